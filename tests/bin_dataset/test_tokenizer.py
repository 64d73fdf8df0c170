"""The fast tokenizer against `tokenizers` on hard text, the check of every run, and the fallbacks."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.hard_texts import TEXTS
from hypothesis import given, settings

from mindformers_ext.bin_dataset.tokenizer import CHECKED_FIRST, TextTokenizer, TokenizerError


@pytest.fixture(scope="module")
def fast(deepseek_tokenizer_file):
    tokenizer = TextTokenizer(deepseek_tokenizer_file)
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="module")
def reference(deepseek_tokenizer_file):
    return TextTokenizer(deepseek_tokenizer_file, fast=False)


@settings(max_examples=300, deadline=None)
@given(batch=TEXTS)
def test_fast_ids_equal_reference(batch, fast, reference):
    assert (fast.backend, reference.backend) == ("fastokens", "tokenizers")
    for got, expected in zip(fast.encode(batch), reference.encode(batch), strict=True):
        np.testing.assert_array_equal(got, expected)
    fast.finish_checks()


def test_special_ids(reference):
    assert [reference.special_id(role) for role in ("bos", "eod", "pad")] == [0, 1, 1]
    assert reference.special_id("pad", "<｜▁pad▁｜>") == 2
    assert reference.vocab_size == 129280
    with pytest.raises(TokenizerError, match="has no eod token among \\['<nope>'\\]; name one with --eod-token"):
        reference.special_id("eod", "<nope>")


def test_a_difference_stops_the_run(tokenizer_file):
    tokenizer = TextTokenizer(tokenizer_file)
    ids, lengths = tokenizer.encode(["the model", "data"])
    wrong = ids.copy()
    wrong[-1] += 1
    with pytest.raises(TokenizerError, match="disagree at token .* of the text starting 'data'"):
        tokenizer._submit_check(["the model", "data"], wrong, lengths)
        tokenizer.finish_checks()
    tokenizer.close()


def test_every_batch_is_sampled(tokenizer_file):
    tokenizer = TextTokenizer(tokenizer_file)
    for _ in range(3):
        tokenizer.encode(["the model and data"] * 1001)
    tokenizer.finish_checks()
    assert tokenizer.checked == 3 * (CHECKED_FIRST + 2)
    tokenizer.close()


def test_file_that_only_the_reference_loads(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer(tmp_path)
    assert loaded.backend == "tokenizers"
    ids, lengths = loaded.encode(["a b c", "", "b"])
    assert (ids.tolist(), lengths.tolist()) == ([0, 1, 2, 1], [3, 0, 1])


def test_sentencepiece_model(tmp_path, texts):
    import sentencepiece

    (tmp_path / "in.txt").write_text("\n".join(texts * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "in.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=34, minloglevel=2
    )
    loaded = TextTokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids, lengths = loaded.encode(texts)
    assert loaded.backend == "sentencepiece"
    assert ids.tolist() == [token for text in texts for token in processor.encode(text)]
    assert lengths.sum() == len(ids)
    assert loaded.special_id("eod") == processor.eos_id()
    assert loaded.decode(ids[: lengths[0]]) == texts[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.json", None, "does not exist"),
        ("tokenizer.json", "{}", "no tokenizer that `tokenizers` can load"),
        ("vocab.txt", "a", "neither a .json nor"),
        ("tokenizer.model", "x", "no sentencepiece model"),
    ],
)
def test_bad_tokenizer_file(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        TextTokenizer(tmp_path / name).encode(["a"])


def changed_file(tokenizer_file, folder, change):
    """A copy of a tokenizer.json after ``change(content)``."""
    content = json.loads(Path(tokenizer_file).read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


SAVED_WITH = {
    "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 16},
        "direction": "Left",
        "pad_to_multiple_of": 8,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<｜end▁of▁sentence｜>",
    },
}


@pytest.mark.parametrize("name", SAVED_WITH)
@pytest.mark.parametrize("fast", [True, False])
def test_texts_are_encoded_whole_whatever_the_file_was_saved_with(name, fast, tokenizer_file, texts, tmp_path):
    plain = TextTokenizer(tokenizer_file, fast=False)
    changed = TextTokenizer(
        changed_file(tokenizer_file, tmp_path, lambda content: content.update({name: SAVED_WITH[name]})), fast
    )
    assert plain.switched_off == () and [text.split()[0] for text in changed.switched_off] == [name]
    for got, expected in zip(changed.encode(texts), plain.encode(texts), strict=True):
        np.testing.assert_array_equal(got, expected)
    changed.finish_checks()
    changed.close()


@pytest.mark.parametrize("fast", [True, False])
def test_dropout_is_refused(fast, tokenizer_file, tmp_path):
    tokenizer = TextTokenizer(
        changed_file(tokenizer_file, tmp_path, lambda content: content["model"].update(dropout=0.3)), fast
    )
    with pytest.raises(TokenizerError, match="model.dropout is 0.3"):
        tokenizer.encode(["the model"])
        tokenizer.finish_checks()
    tokenizer.close()


def test_of_a_huge_text_the_beginning_is_compared(tokenizer_file, monkeypatch):
    from mindformers_ext.bin_dataset import tokenizer as module

    monkeypatch.setattr(module, "CHECKED_LONGEST", 40)
    tokenizer = TextTokenizer(tokenizer_file)
    sampled = []
    submit = tokenizer._reference.submit
    monkeypatch.setattr(tokenizer._reference, "submit", lambda *args: sampled.extend(args[2]) or submit(*args))
    tokenizer.encode(["the model and data " * 100, "data"])
    tokenizer.finish_checks()
    assert sorted(map(len, sampled)) == [4, 40] and tokenizer.checked == 2
    tokenizer.close()
