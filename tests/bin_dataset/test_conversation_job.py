"""Samples of conversations: every policy is counted, every form of file and both ways in give the same tokens."""

import json

import numpy as np
import pytest

from mindformers_ext.bin_dataset.conversation_job import ConversationOptions
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset, loss_mask_prefix
from mindformers_ext.bin_dataset.loader_config import LoaderConfig
from mindformers_ext.bin_dataset.pipeline import Job, run
from mindformers_ext.bin_dataset.tokenizer import TextTokenizer

PAD = "<｜▁pad▁｜>"


def talk(*words):
    roles = ("user", "assistant") * len(words)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, words, strict=False)]}


ROWS = [talk("the model", "data " * n) for n in (1, 3, 2, 5)] + [
    talk("of", "and", "the " * 9, "token"),
    talk("x" * 40, "y"),
]


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def made(chats, tokenizer_file, prefix, **options):
    """Counts, samples and masks of a job."""
    tokenizer = TextTokenizer(tokenizer_file, fast=False)
    fields = ConversationOptions(24, PAD, **options).job_fields(tokenizer)
    job = Job(tool="test", inputs=(chats,), prefix=str(prefix), tokenizer=tokenizer, dtype=np.uint16, **fields)
    counts = run(job)
    name = job.output("text")
    return counts, np.array(list(IndexedDataset(name))), np.array(list(IndexedDataset(loss_mask_prefix(name))))


@pytest.mark.parametrize("truncation", ["cut", "turns", "drop"])
@pytest.mark.parametrize("packing", ["best", "in-order", "none"])
def test_policies_are_counted(truncation, packing, chats, tokenizer_file, tmp_path):
    counts, samples, masks = made(chats, tokenizer_file, tmp_path / "p", truncation=truncation, packing=packing)
    kept, all_tokens, all_learnt, long = [], 0, 0, 0
    for row in ROWS:
        (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
        name = tmp_path / f"one{len(kept)}{all_tokens}"
        tokenizer = TextTokenizer(tokenizer_file, fast=False)
        whole = ConversationOptions(100, PAD).job_fields(tokenizer)
        job = Job("test", (str(tmp_path / "one.jsonl"),), str(name), tokenizer, np.uint16, **whole)
        run(job)
        tokens = IndexedDataset(job.output("text"))[0]
        mask = IndexedDataset(loss_mask_prefix(job.output("text")))[0][tokens != 2]
        tokens = tokens[tokens != 2]
        all_tokens += len(tokens)
        size = len(tokens)
        if size > 24:
            long += 1
            ends = np.flatnonzero(np.diff(mask[:25].astype(int)) == -1) + 1
            size = {"cut": 24, "drop": 0, "turns": ends[-1] if len(ends) else 0}[truncation]
        if mask[:size].any():
            kept.append(tokens[:size].tolist())
            all_learnt += int(mask[:size].sum())
    flat = [sample[sample != 2].tolist() for sample in samples]
    if packing == "none":
        assert flat == kept
    elif packing == "in-order":
        assert sum(flat, []) == sum(kept, [])
    assert sorted(sum(flat, [])) == sorted(sum(kept, []))
    assert counts.documents == len(ROWS)
    assert counts.dropped_documents == len(ROWS) - len(kept)
    assert counts.dropped_tokens == all_tokens - sum(map(len, kept))
    assert counts.padding_tokens == (samples == 2).sum()
    assert counts.learnt_tokens == masks.sum() == all_learnt
    assert long and counts.truncated_documents == {"cut": long, "turns": long, "drop": 0}[truncation]


def test_online_and_offline_give_the_same_samples(chats, tokenizer_file, tmp_path):
    _, samples, masks = made(chats, tokenizer_file, tmp_path / "p", learn="last")
    conversations = {"input": [chats], "tokenizer": tokenizer_file, "pad_token": PAD, "learn": "last"}
    config = {"seq_length": 24, "conversations": conversations, "path_to_cache": str(tmp_path / "cache"), "pad": 2}
    offline = {"seq_length": 24, "data_path": str(tmp_path / "p_text_document"), "pad": 2}
    asked = [LoaderConfig.of("GPTDataset", [None, 0, 0], item, False, "train") for item in (config, offline)]
    online, read = (item.build() for item in asked)
    assert len(online) == len(read) > 1
    for index in range(len(read)):
        for name, column in read[index].items():
            np.testing.assert_array_equal(online[index][name], column)
    (prefix,) = asked[0].data_paths()["data_path"]
    np.testing.assert_array_equal(np.array(list(IndexedDataset(prefix))), samples)
    made_at = [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").glob("*.bin"))]
    asked[0].data_paths()
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").glob("*.bin"))] == made_at


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning": "all"}, "config.conversations.learning is unknown"),
        ({"tokenizer": "nothing.json"}, "does not exist"),
        ({"learn": "some"}, "learn must be one of all, last"),
        ({"input": "nothing.jsonl"}, "nothing.jsonl matches no file"),
    ],
)
def test_a_yaml_that_cannot_work(changes, message, chats, tokenizer_file):
    conversations = {"input": chats, "tokenizer": tokenizer_file, "pad_token": PAD, **changes}
    asked = LoaderConfig.of("GPTDataset", [1, 0, 0], {"seq_length": 24, "conversations": conversations}, False, "train")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        asked.data_paths()


def test_parquet_and_hub_names_give_the_same(chats, tokenizer_file, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    folder = tmp_path / "hub/own"
    folder.mkdir(parents=True)
    rows = datasets.Dataset.from_list(ROWS)
    rows.to_parquet(folder / "train.parquet")
    _, samples, masks = made(chats, tokenizer_file, tmp_path / "p")
    from mindformers_ext.bin_dataset.text_sources import find_inputs

    for number, path in enumerate([str(folder / "train.parquet"), *find_inputs([f"hf://{folder}@train"])]):
        _, got, got_masks = made(path, tokenizer_file, tmp_path / f"q{number}")
        np.testing.assert_array_equal(got, samples)
        np.testing.assert_array_equal(got_masks, masks)
