"""Text to token ids for the data tools: `fastokens` where it can load the file, `tokenizers` as reference and fallback.

Why fastokens (measured on 62 MB of docs and code and 320 MB of random words, DeepSeek's tokenizer.json, 2 cores):
identical ids, 60 to 140 times faster than `tokenizers`, memory that stays below 500 MB, Apache-2.0, a company behind
it. gigatoken grew past 2 GB on the random words, snaptokens announces its own archival and needs glibc 2.34, kitoken
is 10 times slower, tokie and splintr-rs give other ids on some hard texts. All the same no fast library is trusted: a
sample of the documents of every run is encoded by `tokenizers`, in another process, and one difference stops the run.
"""

import ctypes
import hashlib
import json
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

# Chosen without looking at the text: the first documents of every batch, and then one in this many.
CHECKED_FIRST = 8
CHECKED_EVERY = 500
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
EOD_NAMES = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<eod>", "[EOD]")
BOS_NAMES = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
PAD_NAMES = ("<｜▁pad▁｜>", "<pad>", "[PAD]", "<|pad|>")

Encoded = tuple[np.ndarray, np.ndarray]  # Flat ids (tokens,) uint32 and the length of each text (texts,) int64.


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded, lacks a needed token, or disagrees with the reference."""


class TextTokenizer:
    """Encode batches of texts without adding special tokens; special tokens written in a text become their ids.

    ``path`` is a tokenizer.json, a HuggingFace folder or a sentencepiece .model. Attributes: ``backend`` (name of the
    library in use), ``vocab_size``, ``checked`` (documents compared with the reference so far).
    """

    def __init__(self, path: str | Path, fast: bool = True) -> None:
        self.path = _tokenizer_file(Path(path))
        self.checked = 0
        self._pending: list[tuple[Future[list[list[int]]], list[list[int]], list[str]]] = []
        self._reference: ProcessPoolExecutor | None = None
        self._encode: Callable[[list[str]], Encoded]
        if self.path.suffix == ".model":
            self._load_sentencepiece()
        elif not fast or not self._load_fast():
            self._load_reference()

    def _load_fast(self) -> bool:
        try:
            from fastokens import Tokenizer
        except ImportError:
            return False
        # Started before the slow load so that both tokenizers load at the same time, on two cores.
        self._reference = ProcessPoolExecutor(1, multiprocessing.get_context("fork"), _die_with_parent)
        self._reference.submit(_reference_encode, str(self.path), [])
        try:
            tokenizer = Tokenizer.from_file(str(self.path))
        except Exception:
            self.close()
            return False

        def encode(texts: list[str]) -> Encoded:
            ids, offsets = tokenizer.encode_batch_flat(texts)
            return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))

        self._encode, self.backend, self.vocab_size = encode, "fastokens", int(tokenizer.vocab_size)
        return True

    def _load_reference(self) -> None:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:
            raise TokenizerError(f"{self.path} is no tokenizer that `tokenizers` can load: {error}") from error

        def encode(texts: list[str]) -> Encoded:
            return _flatten([item.ids for item in tokenizer.encode_batch_fast(texts, add_special_tokens=False)])

        self._encode, self.backend, self.vocab_size = encode, "tokenizers", tokenizer.get_vocab_size()

    def _load_sentencepiece(self) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            processor = SentencePieceProcessor(model_file=str(self.path))
        except Exception as error:
            raise TokenizerError(f"{self.path} is no sentencepiece model: {error}") from error
        self._encode = lambda texts: _flatten(processor.encode(texts))
        self.backend, self.vocab_size = "sentencepiece", processor.vocab_size()

    def encode(self, texts: list[str]) -> Encoded:
        """Ids of all texts one after another, and the number of ids of each text."""
        ids, lengths = self._encode(texts)
        if len(ids) and ids.max() >= self.vocab_size:
            raise TokenizerError(
                f"{self.path}: {self.backend} gave id {ids.max()}, the vocabulary is {self.vocab_size}"
            )
        if self._reference is not None:
            self._submit_check(texts, ids, lengths)
        return ids, lengths

    def _submit_check(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        chosen = sorted({*range(min(CHECKED_FIRST, len(texts))), *range(0, len(texts), CHECKED_EVERY)})
        ends = np.cumsum(lengths)
        ours = [ids[ends[i] - lengths[i] : ends[i]].tolist() for i in chosen]
        sample = [texts[i] for i in chosen]
        self._pending.append((self._reference.submit(_reference_encode, str(self.path), sample), ours, sample))
        while self._pending and (self._pending[0][0].done() or len(self._pending) > 4):
            self._compare(*self._pending.pop(0))

    def _compare(self, future: "Future[list[list[int]]]", ours: list[list[int]], sample: list[str]) -> None:
        for text, fast, reference in zip(sample, ours, future.result(), strict=True):
            if fast != reference:
                at = next((i for i, pair in enumerate(zip(fast, reference, strict=False)) if pair[0] != pair[1]), None)
                at = min(len(fast), len(reference)) if at is None else at
                raise TokenizerError(
                    f"{self.backend} and tokenizers disagree at token {at} of the text starting {text[:60]!r}: "
                    f"{fast[at : at + 4]} against {reference[at : at + 4]}; run again with --no-fast-tokenizer"
                )
        self.checked += len(sample)

    def finish_checks(self) -> None:
        """Wait for the comparisons under way. Raises TokenizerError for a difference."""
        while self._pending:
            self._compare(*self._pending.pop(0))

    def close(self) -> None:
        """End the reference's process."""
        if self._reference is not None:
            self._reference.shutdown(cancel_futures=True)
            self._reference = None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        if self.path.suffix == ".model":
            from sentencepiece import SentencePieceProcessor

            return SentencePieceProcessor(model_file=str(self.path)).decode(list(map(int, ids)))
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.path)).decode(list(map(int, ids)), skip_special_tokens=False)

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokenizer file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Name to id of the tokenizer's added (special) tokens."""
        if self.path.suffix == ".model":
            from sentencepiece import SentencePieceProcessor

            processor = SentencePieceProcessor(model_file=str(self.path))
            return {
                processor.id_to_piece(i): i
                for i in range(processor.vocab_size())
                if processor.is_control(i) or processor.is_unknown(i)
            }
        return {item["content"]: item["id"] for item in json.loads(self.path.read_text())["added_tokens"]}

    def eod_id(self, name: str | None = None) -> int:
        """Id of the token that ends a document: ``name``, the config's eos_token, or a well-known one."""
        return self._special("eod", "eos_token", name, EOD_NAMES)

    def bos_id(self, name: str | None = None) -> int:
        """Id of the token that begins a document."""
        return self._special("bos", "bos_token", name, BOS_NAMES)

    def pad_id(self, name: str | None = None) -> int:
        """Id of the token that fills short samples."""
        return self._special("pad", "pad_token", name, PAD_NAMES)

    def _special(self, role: str, key: str, name: str | None, known: Sequence[str]) -> int:
        configured = self._config().get(key)
        if isinstance(configured, dict):
            configured = configured.get("content")
        candidates = [name] if name else [configured, *known]
        for candidate in candidates:
            if candidate in self.special_ids:
                return self.special_ids[candidate]
        raise TokenizerError(
            f"{self.path} has no {role} token among {[c for c in candidates if c]}; name one with --{role}-token, "
            f"the special tokens are {list(self.special_ids)[:12]}"
        )

    def _config(self) -> dict[str, object]:
        path = self.path.with_name("tokenizer_config.json")
        return json.loads(path.read_text()) if path.is_file() else {}


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise TokenizerError(f"folder {path} has neither tokenizer.json nor tokenizer.model")
    if not path.is_file():
        raise TokenizerError(f"tokenizer {path} does not exist; give a tokenizer.json, a folder or a .model file")
    if path.suffix not in (".json", ".model"):
        raise TokenizerError(f"tokenizer {path} is neither a .json nor a sentencepiece .model file")
    return path


def _flatten(ids: list[list[int]]) -> Encoded:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.fromiter((token for text in ids for token in text), np.uint32, int(lengths.sum()))
    return flat, lengths


def _die_with_parent() -> None:
    """Have the kernel end the reference's process when ours is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


_LOADED: dict[str, object] = {}  # The reference process keeps its tokenizer between calls.


def _reference_encode(path: str, texts: list[str]) -> list[list[int]]:
    from tokenizers import Tokenizer

    if path not in _LOADED:
        _LOADED[path] = Tokenizer.from_file(path)
    return [_LOADED[path].encode(text, add_special_tokens=False).ids for text in texts]
