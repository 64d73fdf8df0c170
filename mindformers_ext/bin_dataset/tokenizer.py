"""Text to token ids for the data tools: `fastokens` where it can load the file, `tokenizers` as reference and fallback.

Why fastokens (measured on 62 MB of docs and code and 320 MB of random words, DeepSeek's tokenizer.json, 2 cores):
identical ids, tens of times faster than `tokenizers`, memory that stays below 500 MB (10 GB of text too), Apache-2.0, a
company behind it, wheels for x86_64 and aarch64. gigatoken 0.10.0 loads in 0.8 s rather than 1.6 s and encodes as fast,
but its caches have no bound (2 GB on the random words; a bound is merged there, not released) and its batches need
awkward, imported in 0.4 s. snaptokens announces its own archival and needs glibc 2.34, kitoken is 10 times slower,
tokie and splintr-rs give other ids on some hard texts. All the same no fast library is trusted: a sample of the
documents of every run is encoded by `tokenizers`, in another process, and one difference stops the run.

Loading is the slowest step of a short run, so it happens in the background, and this module imports nothing slow: a
tool imports numpy and the rest meanwhile.
"""

from __future__ import annotations

import atexit
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mindformers_ext.bin_dataset.tokenizer_files import (
    SENTENCEPIECE,
    TIKTOKEN,
    TokenizerError,
    TokenizerFile,
    config_of,
    find_tokenizer,
    identity,
    tiktoken_as_json,
    tiktoken_ranks,
    tiktoken_special,
)
from mindformers_ext.child_process import end_with_parent

if TYPE_CHECKING:
    import fastokens
    import numpy as np
    import tokenizers

# Chosen without looking at the text: the first documents of every batch, and then one in this many.
CHECKED_FIRST = 4
CHECKED_EVERY = 500
CHECKED_LONGEST = 100_000  # characters of a document that are compared: the reference takes 150 bytes for each
# Tokens that end a document, begin one or fill short samples: their key in tokenizer_config.json, and well-known names.
SPECIAL = {
    "eod": "eos_token <｜end▁of▁sentence｜> <|endoftext|> <|end_of_text|> </s> <eos> <eod> [EOD]",
    "bos": "bos_token <｜begin▁of▁sentence｜> <|begin_of_text|> <s> <bos> [BOS]",
    "pad": "pad_token <｜▁pad▁｜> <pad> [PAD] <|pad|>",
}


class Encoded(NamedTuple):
    """Ids of many texts."""

    ids: np.ndarray  # (tokens,) uint32, text after text
    lengths: np.ndarray  # (texts,) int64


class Backend(NamedTuple):
    """A loaded tokenizer library."""

    name: str
    vocab_size: int
    encode: Callable[[list[str]], Encoded]
    switched_off: tuple[str, ...] = ()  # settings of the file that would change a text's ids


class TextTokenizer:
    """Encode batches of texts without adding special tokens; special tokens written in a text become their ids.

    ``path`` is a tokenizer.json, a HuggingFace folder, a sentencepiece .model or a tiktoken file. It is loaded in the
    background; the first use waits for it, and raises TokenizerError for a file that cannot be loaded. ``checked``
    counts the documents compared with the reference so far. Texts are encoded whole: truncation and padding that a
    tokenizer.json was saved with are switched off.
    """

    def __init__(self, path: str | Path, fast: bool = True) -> None:
        self.file = find_tokenizer(path)
        self.path = self.file.path
        self.checked = 0
        self._pending: list[tuple[Future[list[list[int]]], list[list[int]], list[str]]] = []
        self._reference: ProcessPoolExecutor | None = None
        self._fast: Future[fastokens.Tokenizer] | None = None
        if fast and self.file.kind != SENTENCEPIECE and find_spec("fastokens"):
            # The reference's process is forked before there is a second thread.
            self._reference = ProcessPoolExecutor(1, multiprocessing.get_context("fork"), end_with_parent)
            self._reference.submit(_reference_encode, self.file, [])
            self._fast = ThreadPoolExecutor(1).submit(_load_fast, self.file)
            # Kept until the end: Python 3.11 fails to wait for a pool that was collected before (an early error).
            atexit.register(self.close)

    @cached_property
    def _backend(self) -> Backend:
        if self.file.kind == SENTENCEPIECE:
            return _sentencepiece_backend(self.path)
        if self._fast is not None:
            try:
                return _fast_backend(self._fast.result())
            except Exception:  # A file of another kind, of which it raises whatever it likes.
                self.close()
        return _reference_backend(self.file)

    @property
    def backend(self) -> str:
        """Name of the library in use."""
        return self._backend.name

    @property
    def switched_off(self) -> tuple[str, ...]:
        """Settings of the file that were switched off, in words."""
        return self._backend.switched_off

    @property
    def vocab_size(self) -> int:
        """How many ids there are, special tokens included."""
        return self._backend.vocab_size

    def encode(self, texts: list[str]) -> Encoded:
        """Ids of all texts one after another, and the number of ids of each text."""
        encoded = self._backend.encode(texts)
        if len(encoded.ids) and encoded.ids.max() >= self.vocab_size:
            raise TokenizerError(
                f"{self.path}: {self.backend} gave id {encoded.ids.max()}, the vocabulary is {self.vocab_size}"
            )
        if self._reference is not None:
            self._submit_check(texts, *encoded)
        return encoded

    def _submit_check(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        chosen = sorted({*range(min(CHECKED_FIRST, len(texts))), *range(0, len(texts), CHECKED_EVERY)})
        ends = lengths.cumsum()
        ours = [ids[ends[i] - lengths[i] : ends[i]].tolist() for i in chosen if len(texts[i]) <= CHECKED_LONGEST]
        sample = [texts[i] for i in chosen if len(texts[i]) <= CHECKED_LONGEST]
        for text in (texts[i][:CHECKED_LONGEST] for i in chosen if len(texts[i]) > CHECKED_LONGEST):
            ours.append(self._backend.encode([text]).ids.tolist())
            sample.append(text)
        self._pending.append((self._reference.submit(_reference_encode, self.file, sample), ours, sample))
        while self._pending and (self._pending[0][0].done() or len(self._pending) > 4):
            self._compare(*self._pending.pop(0))

    def _compare(self, future: Future[list[list[int]]], ours: list[list[int]], sample: list[str]) -> None:
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
        if self.file.kind == SENTENCEPIECE:
            from sentencepiece import SentencePieceProcessor

            return SentencePieceProcessor(model_file=str(self.path)).decode(list(map(int, ids)))
        return load_reference(self.file)[0].decode(list(map(int, ids)), skip_special_tokens=False)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """How many bytes of a text each id stands for, (ids,) int64, in a byte-level tokenizer."""
        import numpy as np

        if self.file.kind == SENTENCEPIECE:
            raise TokenizerError(f"{self.path} is a sentencepiece model; conversations need a byte-level tokenizer")
        vocab = load_reference(self.file)[0].get_vocab()
        lengths = np.zeros(max(vocab.values()) + 1, np.int64)
        for token, number in vocab.items():  # A byte is a letter there.
            lengths[number] = len(token)
        for token, number in self.special_ids.items():
            lengths[number] = len(token.encode())
        return lengths

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokenizer file, and of what stands beside it that decides ids."""
        return identity(self.file)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Name to id of the tokenizer's added (special) tokens."""
        if self.file.kind == SENTENCEPIECE:
            from sentencepiece import SentencePieceProcessor

            processor = SentencePieceProcessor(model_file=str(self.path))
            return {
                processor.id_to_piece(i): i
                for i in range(processor.vocab_size())
                if processor.is_control(i) or processor.is_unknown(i)
            }
        if self.file.kind == TIKTOKEN:
            return tiktoken_special(self.path, len(tiktoken_ranks(self.path)))
        import msgspec

        # The one field of the file that is asked for; to parse the rest takes ten times as long.
        kind = msgspec.defstruct("TokenizerFile", [("added_tokens", list[dict[str, object]])])
        added = msgspec.json.decode(self.path.read_bytes(), type=kind).added_tokens
        return {item["content"]: item["id"] for item in added}

    def special_id(self, role: str, name: str | None = None) -> int:
        """Id of the token for a role of SPECIAL: ``name``, tokenizer_config.json's, or a well-known one."""
        key, *known = SPECIAL[role].split()
        configured = config_of(self.path).get(key)
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


def _load_fast(file: TokenizerFile) -> fastokens.Tokenizer:
    from fastokens import Tokenizer

    if file.kind == TIKTOKEN:
        return Tokenizer.from_json_str(tiktoken_as_json(file.path))
    return Tokenizer.from_file(str(file.path))


def _fast_backend(tokenizer: fastokens.Tokenizer) -> Backend:
    import numpy as np

    switched_off = encode_whole(tokenizer)

    def encode(texts: list[str]) -> Encoded:
        ids, offsets = tokenizer.encode_batch_flat(texts)
        return Encoded(np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64)))

    return Backend("fastokens", int(tokenizer.vocab_size), encode, switched_off)


def encode_whole(tokenizer: fastokens.Tokenizer | tokenizers.Tokenizer) -> tuple[str, ...]:
    """Switch off the truncation and padding that a tokenizer.json was saved with; returns them in words."""
    saved = (("truncation", tokenizer.truncation), ("padding", tokenizer.padding))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tuple(f"{name} {setting}" for name, setting in saved if setting)


def load_reference(file: TokenizerFile) -> tuple[tokenizers.Tokenizer, tuple[str, ...]]:
    """A tokenizer.json or tiktoken file in `tokenizers`, encoding whole texts, and what was switched off for that.

    Raises TokenizerError for another file, and for one that would split the same text differently each time.
    """
    from tokenizers import Tokenizer

    path = file.path
    try:
        as_json = file.kind == TIKTOKEN and tiktoken_as_json(path)
        tokenizer = Tokenizer.from_str(as_json) if as_json else Tokenizer.from_file(str(path))
    except TokenizerError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} is no tokenizer that `tokenizers` can load: {error}") from error
    dropout = getattr(tokenizer.model, "dropout", None)
    if dropout:
        raise TokenizerError(
            f"{path}: model.dropout is {dropout:.3g}, which gives the same text other tokens each time; set it to null"
        )
    return tokenizer, encode_whole(tokenizer)


def _reference_backend(file: TokenizerFile) -> Backend:
    tokenizer, switched_off = load_reference(file)

    def encode(texts: list[str]) -> Encoded:
        return _flatten([item.ids for item in tokenizer.encode_batch_fast(texts, add_special_tokens=False)])

    return Backend("tokenizers", tokenizer.get_vocab_size(), encode, switched_off)


def _sentencepiece_backend(path: Path) -> Backend:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise TokenizerError(f"{path} is no sentencepiece model: {error}") from error
    return Backend("sentencepiece", processor.vocab_size(), lambda texts: _flatten(processor.encode(texts)))


def _flatten(ids: list[list[int]]) -> Encoded:
    import numpy as np

    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return Encoded(np.fromiter((token for text in ids for token in text), np.uint32, int(lengths.sum())), lengths)


_LOADED: dict[TokenizerFile, tokenizers.Tokenizer] = {}  # The reference process keeps its tokenizer between calls.


def _reference_encode(file: TokenizerFile, texts: list[str]) -> list[list[int]]:
    if file not in _LOADED:
        _LOADED[file] = load_reference(file)[0]
    return [_LOADED[file].encode(text, add_special_tokens=False).ids for text in texts]
