"""Which kind of tokenizer a file is, and tiktoken's ranks as a tokenizer.json, which all libraries here read.

A tokenizer.json and a sentencepiece .model are used as they are. A tiktoken file (`tiktoken.model` of Moonlight and
Kimi, `cl100k_base.tiktoken`) has one line a token, its bytes in base64 and its rank, and says neither how a text is cut
nor which special tokens there are: that stands in the tokenization_*.py and the tokenizer_config.json beside it.
"""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

JSON, SENTENCEPIECE, TIKTOKEN = "tokenizer.json", "sentencepiece", "tiktoken"
FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")  # of a folder, the first that is there
RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
RESERVED = 256  # ids after the ranks that tokenization_moonshot.py gives names: what the models' vocabulary has left

# How texts are cut before merging, by the file's stem or the tokenizer_class of tokenizer_config.json.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _words(but: str) -> str:
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{but}]*[{_LOWER}{but}]+{_CONTRACTIONS}?|"
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{but}]+[{_LOWER}{but}]*{_CONTRACTIONS}?"
    )


_NUMBERS, _SPACES = r"\p{N}{1,3}", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
PATTERNS = {
    "TikTokenTokenizer": "|".join([r"[\p{Han}]+", _words(r"&&[^\p{Han}]"), _NUMBERS, _SIGNS, _SPACES]),
    "o200k_base": "|".join([_words(""), _NUMBERS, _SIGNS.replace(r"\n", r"\n/"), _SPACES]),
    "cl100k_base": "|".join([_CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?\p{L}+", _NUMBERS, _SIGNS, _SPACES]),
}


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded, lacks a needed token, or disagrees with the reference."""


class TokenizerFile(NamedTuple):
    """A tokenizer on disk, and how it is written."""

    path: Path
    kind: str  # JSON, SENTENCEPIECE or TIKTOKEN


def find_tokenizer(path: str | Path) -> TokenizerFile:
    """The tokenizer that a file is, or that a HuggingFace folder has."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()] or sorted(path.glob("*.tiktoken"))
        if not found:
            raise TokenizerError(f"folder {path} has neither {' nor '.join(FILES)} nor a .tiktoken file")
        path = found[0]
    if not path.is_file():
        raise TokenizerError(
            f"tokenizer {path} does not exist; give a tokenizer.json, a folder, a .model or a .tiktoken file"
        )
    if path.suffix == ".json":
        return TokenizerFile(path, JSON)
    if path.suffix not in (".model", ".tiktoken"):
        raise TokenizerError(f"tokenizer {path} is neither a .json nor a .model nor a .tiktoken file")
    with open(path, "rb") as file:
        return TokenizerFile(path, TIKTOKEN if RANK_LINE.match(file.read(4096)) else SENTENCEPIECE)


def config_of(path: Path) -> dict[str, object]:
    """The tokenizer_config.json beside a tokenizer; empty if there is none."""
    config = path.with_name("tokenizer_config.json")
    return json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}


def tiktoken_ranks(path: Path) -> dict[bytes, int]:
    """Bytes of a token to its rank, which is its id."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise TokenizerError(f"{path}:{number}: {line[:60]!r} is no token in base64 and its rank") from None
    return ranks


def tiktoken_special(path: Path, first: int) -> dict[str, int]:
    """Special tokens of a tiktoken file whose ranks end before ``first``."""
    config = config_of(path)
    special = {meta["content"]: int(token) for token, meta in config.get("added_tokens_decoder", {}).items()}
    if config.get("tokenizer_class") == "TikTokenTokenizer":
        named = set(special.values())
        special |= {f"<|reserved_token_{i}|>": i for i in range(first, first + RESERVED) if i not in named}
    return special


def tiktoken_pattern(path: Path) -> str:
    """How texts are cut: what the Python file beside the ranks says (it is read, not run), or a well-known one."""
    for source in sorted(path.parent.glob("tokenization_*.py")):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            names = [ast.unparse(target).lower() for target in getattr(node, "targets", ())]
            if any(name.removeprefix("self.") in ("pat_str", "pattern") for name in names):
                return _text_of(node.value, source)
    for name in (path.stem, config_of(path).get("tokenizer_class")):
        if name in PATTERNS:
            return PATTERNS[name]
    raise TokenizerError(
        f"{path} does not say how texts are cut; put the tokenization_*.py of its model beside it, or name it "
        f"{' or '.join(f'{name}.tiktoken' for name in PATTERNS if '_' in name)}"
    )


def _text_of(node: ast.expr, source: Path) -> str:
    """A text constant, or ``"|".join([constants])``."""
    try:
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".join"):
            return ast.literal_eval(node.func.value).join(ast.literal_eval(node.args[0]))
        return ast.literal_eval(node)
    except (ValueError, AttributeError, IndexError):
        raise TokenizerError(f"{source}:{node.lineno}: the pattern is no text that can be read") from None


def tiktoken_as_json(path: Path) -> str:
    """A tokenizer.json that gives the ids of the package `tiktoken`."""
    ranks = tiktoken_ranks(path)
    letters = _byte_letters()
    spelled = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    pairs = (merged_pair(token, ranks) for token in sorted(ranks, key=ranks.__getitem__))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = tiktoken_special(path, len(ranks))
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": tiktoken_pattern(path)}, "behavior": "Isolated", "invert": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags} for name, i in sorted(special.items(), key=lambda x: x[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, by_bytes]},
        "post_processor": None,
        "decoder": by_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # tiktoken takes a piece that is a token as that token, however it would merge
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": [(spelled[pair[0]], spelled[pair[1]]) for pair in pairs if pair],
        },
    }
    return json.dumps(content, ensure_ascii=False)


def merged_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The one pair of tokens that becomes ``token`` when tiktoken merges; None where merging never reaches it.

    tiktoken merges any neighbours whose bytes are a token, lowest rank first; `tokenizers` merges listed pairs. Inside
    the bytes that will become a token, a text is merged as those bytes would be alone, so there is one last pair.
    """
    pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    if len(pairs) < 2:  # The only one there could be needs no proof: a pair that never meets does no harm.
        return pairs[0] if pairs else None
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = map(bytes.__add__, parts, parts[1:])
        rank, at = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(joined))
        if rank == math.inf:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte, GPT-2's table."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def identity(file: TokenizerFile) -> str:
    """Hash of all that decides the ids."""
    digest = hashlib.sha256(file.path.read_bytes())
    if file.kind == TIKTOKEN:
        digest.update(json.dumps([tiktoken_special(file.path, 0), tiktoken_pattern(file.path)]).encode())
    return digest.hexdigest()
