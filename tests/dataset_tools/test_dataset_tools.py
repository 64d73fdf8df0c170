"""The command lines of dataset_tools/: same bytes as Megatron's preprocessing, resuming, and clear refusals."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.tools import TOOLS, bytes_of, run_tool

from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset, IndexedDatasetWriter, bin_path


def megatron_preprocess(rows, keys, folder, prefix, append_eod):
    """The steps of Megatron-LM's tools/preprocess_data.py with megatron-core's own tokenizer and builder."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(str(folder), metadata_path={"library": "huggingface"})
    for key in keys:
        builder = IndexedDatasetBuilder(f"{prefix}_{key}_document.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
        for row in rows:
            sentences = row[key] if isinstance(row[key], list) else [row[key]]
            encoded = [ids for ids in map(tokenizer.tokenize, sentences) if len(ids)]
            if encoded and append_eod:
                encoded[-1] = [*encoded[-1], tokenizer.eod]
            builder.add_document([token for ids in encoded for token in ids], [len(ids) for ids in encoded])
        builder.finalize(f"{prefix}_{key}_document.idx")


@pytest.mark.parametrize("append_eod", [False, True])
def test_bytes_equal_megatron_preprocessing(append_eod, tokenizer_file, texts, tmp_path):
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "hf"
    PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<｜end▁of▁sentence｜>").save_pretrained(folder)
    rows = [{"text": text, "title": text[:9]} for text in texts]
    rows[3]["text"] = rows[-1]["text"] = ""
    rows[5]["text"] = ["a list", "", "of sentences"]
    rows[6]["text"] = []
    rows[7]["text"] = "emoji 👍🏽 日本語 \t\n <｜User｜>"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    megatron_preprocess(rows, ["text", "title"], folder, tmp_path / "theirs", append_eod)
    flags = ["--append-eod"] if append_eod else []
    for name, partitions in (("ours", 1), ("parts", 5)):
        run_tool(
            "jsonl_to_bin", "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / name,
            "--vocab-file", folder, "--json-keys", "text", "title", "--workers", 2, "--partitions", partitions, *flags,
            "--keep-sequential-samples",
        )  # fmt: skip
        for key in ("text", "title"):
            assert bytes_of(tmp_path / f"{name}_{key}_document") == bytes_of(tmp_path / f"theirs_{key}_document")
    assert not list(tmp_path.glob("*.part*"))


def test_summary_counts_everything(tokenizer_file, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the model"}\noops\n{"text": ""}\n\n{"text": "data"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "the data"}\n'))
    done = run_tool(
        "jsonl_to_bin", "--input", tmp_path / "*.jsonl*", "--output-prefix", tmp_path / "o", "--vocab-file",
        tokenizer_file, "--skip-bad-lines",
    )  # fmt: skip
    summary = json.loads((tmp_path / "o_text_document.json").read_text())
    counts = summary["counts"]
    assert (counts["documents"], counts["empty_documents"], counts["bad_lines"], counts["sequences"]) == (4, 1, 1, 3)
    assert counts["tokens"] == len(IndexedDataset(tmp_path / "o_text_document").tokens)
    assert summary["tokenizer_sha256"] and summary["tool_version"] and summary["arguments"]["skip_bad_lines"]
    assert "4 documents" in done.stdout and "1 unreadable lines" in done.stdout and "a.jsonl:2" in done.stdout


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ('{"text": "a"}\n{"text": \n', [], "in.jsonl:2: broken JSON"),
        ('{"text": "the model"}\n', ["--vocab-size", "5"], "outside --vocab-size 5"),
        ('{"text": "a"}\n', ["--workers", "0"], "--workers"),
        ('{"text": "a"}\n', ["--append-eod", "--eod-token", "<x>"], "no eod token"),
        ('{"text": "the model"}\n', ["--dtype", "uint8"], "do not fit dtype uint8"),
    ],
)
def test_bad_input_is_one_sentence(content, flags, message, tokenizer_file, tmp_path):
    (tmp_path / "in.jsonl").write_text(content)
    done = run_tool(
        "jsonl_to_bin", "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "o", "--vocab-file",
        tokenizer_file, *flags, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0] and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_finished_output_is_kept_until_something_changes(tokenizer_file, jsonl, tmp_path):
    command = ["jsonl_to_bin", "--input", jsonl, "--output-prefix", tmp_path / "o", "--vocab-file", tokenizer_file]
    run_tool(*command)
    first = bin_path(tmp_path / "o_text_document").stat().st_mtime_ns
    assert "finished by an earlier run" in run_tool(*command).stderr
    assert bin_path(tmp_path / "o_text_document").stat().st_mtime_ns == first
    run_tool(*command, "--append-eod")
    assert bin_path(tmp_path / "o_text_document").stat().st_mtime_ns != first


def test_a_second_job_leaves_the_partitions_of_a_running_one(tokenizer_file, jsonl, tmp_path):
    command = ["jsonl_to_bin", "--input", jsonl, "--output-prefix", tmp_path / "o", "--vocab-file", tokenizer_file]
    with IndexedDatasetWriter(tmp_path / "o_text_document") as running:
        part = tmp_path / "o.part00000_text_document.bin.partial"
        part.write_bytes(b"of the running job")
        done = run_tool(*command, "--partitions", 3, "--append-eod", check=False)
        assert done.returncode == 1 and "another process is writing" in done.stderr
        assert part.read_bytes() == b"of the running job"
        running.add_document([1])


def test_a_run_that_writes_nothing_says_so(tokenizer_file, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": ""}\n')
    done = run_tool(
        "jsonl_to_bin",
        "--input",
        tmp_path / "in.jsonl",
        "--output-prefix",
        tmp_path / "o",
        "--vocab-file",
        tokenizer_file,
    )
    assert "no sequence was written" in done.stdout


def test_killed_at_20_points_and_resumed_to_identical_bytes(tokenizer_file, texts, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text * 40}) + "\n" for text in texts * 30))
    command = [
        sys.executable, str(TOOLS / "jsonl_to_bin.py"), "--input", str(source), "--vocab-file", tokenizer_file,
        "--partitions", "12", "--append-eod", "--output-prefix",
    ]  # fmt: skip
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    duration = time.monotonic() - started
    expected = bytes_of(tmp_path / "whole_text_document")
    rng = np.random.default_rng(11)
    prefix, killed = str(tmp_path / "o"), 0
    while killed < 20:
        process = subprocess.Popen(
            [*command, prefix], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(rng.uniform(0.2, 1.0) * duration)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        for pair in tmp_path.glob("o*.idx"):  # What has its final name is whole.
            IndexedDataset(str(pair).removesuffix(".idx")).check(600)
        if Path(f"{prefix}_text_document.json").exists():
            assert bytes_of(f"{prefix}_text_document") == expected
            for path in tmp_path.glob("o*"):
                path.unlink()
    subprocess.run([*command, prefix], check=True, capture_output=True)
    assert bytes_of(f"{prefix}_text_document") == expected
    assert sorted(path.name for path in tmp_path.glob("o*")) == [f"o_text_document.{x}" for x in ("bin", "idx", "json")]


WIKI = " \n = Title = \n \n The model of data . \n More of the data . \n \n = = Part = = \n \n The token . \n" * 9


@pytest.mark.parametrize("shape", ["stitch", "pad", "none"])
def test_wikitext(shape, tokenizer_file, tmp_path):
    (tmp_path / "wiki.train.tokens").write_text(WIKI)
    run_tool(
        "wikitext_to_bin", "--input", tmp_path / "wiki.train.tokens", "--output-prefix", tmp_path / "w", "--vocab-file",
        tokenizer_file, "--seq-length", 8, "--worker", 2, "--append-eod", "--pad-or-stitch", shape,
        "--pad-token", "<｜▁pad▁｜>",
    )  # fmt: skip
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(tokenizer_file)
    documents = [
        reference.encode(text).ids + [1] for text in ("The model of data.\nMore of the data.", "The token.")
    ] * 9
    if shape == "stitch":
        stream = [token for document in documents for token in document]
        documents = [stream[i : i + 9] for i in range(0, len(stream) - 8, 9)]
    elif shape == "pad":
        documents = [(document + [2] * 9)[:9] for document in documents]
    assert [document.tolist() for document in IndexedDataset(tmp_path / "w_text_document")] == documents
    counts = json.loads((tmp_path / "w_text_document.json").read_text())["counts"]
    assert counts["documents"] == 18
    assert (counts["truncated_documents"] > 0) == (shape == "pad")


def test_text_to_fixed(tokenizer_file, tmp_path):
    from tokenizers import Tokenizer

    (tmp_path / "books.txt").write_text("the model\n\nof data\nand token\n")
    run_tool(
        "text_to_fixed", "--input", tmp_path / "books.txt", "--output-prefix", tmp_path / "b", "--vocab-file",
        tokenizer_file, "--sequence-length", 4,
    )  # fmt: skip
    reference = Tokenizer.from_file(tokenizer_file)
    stream = [t for text in ("the model", "of data", "and token") for t in [0, *reference.encode(text).ids, 1]]
    got = [sample.tolist() for sample in IndexedDataset(tmp_path / "b_text_document")]
    assert got == [stream[i : i + 4] for i in range(0, len(stream) - 3, 4)]


# The chat template of DeepSeek-V3's published tokenizer_config.json, without its tool calls.
TEMPLATE = (
    "{{bos_token}}{% for m in messages %}{% if m['role'] == 'system' %}{{m['content']}}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{'<｜User｜>' + m['content']}}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{'<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>'}}"
    "{% endgeneration %}{% endif %}{% endfor %}"
)
CONVERSATIONS = [
    [
        ("system", "Be kind."),
        ("user", "the model?"),
        ("assistant", "of data"),
        ("user", "and?"),
        ("assistant", "token"),
    ],
    [("user", "layer"), ("assistant", "expert")],
    [("user", "the " * 80), ("assistant", "too long")],
    [("user", "a"), ("assistant", "b"), ("user", "no answer")],
]


def test_instruct_formats_template_and_mask(tokenizer_file, tmp_path):
    from transformers import PreTrainedTokenizerFast

    names = {"user": "human", "assistant": "gpt", "system": "system"}
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in CONVERSATIONS[0]]},
        {"instruction": "layer", "input": "", "output": "expert"},
        {"messages": [{"role": role, "content": text} for role, text in CONVERSATIONS[2]]},
        {"conversations": [{"from": names[role], "value": text} for role, text in CONVERSATIONS[3]]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "in.json").write_text(json.dumps(rows))
    length = 64
    for name in ("in.jsonl", "in.json"):
        run_tool(
            "instruct_to_bin", "--input", tmp_path / name, "--output-prefix", tmp_path / name, "--vocab-file",
            tokenizer_file, "--seq-length", length, "--pad-token", "<｜▁pad▁｜>",
        )  # fmt: skip
    prefix = tmp_path / "in.json_text_document"
    assert bytes_of(prefix) == bytes_of(tmp_path / "in.jsonl_text_document")

    hf = PreTrainedTokenizerFast(
        tokenizer_file=tokenizer_file, bos_token="<｜begin▁of▁sentence｜>", chat_template=TEMPLATE
    )
    tokens = np.concatenate(list(IndexedDataset(prefix)))
    mask = np.concatenate(list(IndexedDataset(f"{prefix}_loss_mask")))
    assert len(tokens) % length == 0 and not mask[tokens == 2].any()
    kept = [CONVERSATIONS[0], CONVERSATIONS[1], CONVERSATIONS[3][:2]]  # The long one has no answer before the cut.
    found = 0
    for conversation in kept:
        messages = [{"role": role, "content": text} for role, text in conversation]
        encoded = hf.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, learnt = encoded["input_ids"], np.array(encoded["assistant_masks"])
        learnt[np.array(ids) == 4] = 0  # <｜Assistant｜> is the prompt's last token.
        starts = [i for i in range(len(tokens)) if tokens[i : i + len(ids)].tolist() == ids]
        assert len(starts) == 1
        np.testing.assert_array_equal(mask[starts[0] : starts[0] + len(ids)], learnt)
        found += len(ids)
    assert found == np.count_nonzero(tokens != 2)
    counts = json.loads(Path(f"{prefix}.json").read_text())["counts"]
    assert (counts["documents"], counts["truncated_documents"]) == (4, 1)


def test_instruct_row_without_an_answer_is_named(tokenizer_file, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    done = run_tool(
        "instruct_to_bin", "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "o", "--vocab-file",
        tokenizer_file, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "in.jsonl:1: no message of an assistant" in done.stderr


def test_inspect_reports_and_refuses(tokenizer_file, jsonl, texts, tmp_path):
    run_tool("jsonl_to_bin", "--input", jsonl, "--output-prefix", tmp_path / "o", "--vocab-file", tokenizer_file)
    prefix = tmp_path / "o_text_document"
    done = run_tool("inspect_bin", prefix, "--vocab-file", tokenizer_file, "--sample-tokens", 500)
    assert "documents  50" in done.stdout and "sequences  50" in done.stdout and repr(texts[0]) in done.stdout
    assert (tmp_path / "o_text_document.lengths.png").read_bytes().startswith(b"\x89PNG")
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-2])
    done = run_tool("inspect_bin", prefix, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "truncated" in done.stderr


def test_merge_bin(corpus, tmp_path):
    parts = [corpus("a", [3, 0, 4]), corpus("b", [5], seed=1)]
    done = run_tool("merge_bin", "--input", *parts, "--output-prefix", tmp_path / "all")
    assert "4 documents" in done.stdout
    merged = IndexedDataset(tmp_path / "all")
    expected = [sequence.tolist() for part in parts for sequence in IndexedDataset(part)]
    assert [sequence.tolist() for sequence in merged] == expected
    beside = json.loads((tmp_path / "all.json").read_text())
    assert beside["counts"]["sequences"] == len(merged) and len(beside["parts"]) == len(parts)
    done = run_tool("merge_bin", "--input", *parts, "--output-prefix", parts[0], check=False)
    assert done.returncode == 1 and "also an input" in done.stderr


def test_dtypes_offered_are_those_of_the_format():
    from mindformers_ext.bin_dataset import cli, indexed_dataset

    assert set(cli.DTYPE_NAMES) == {str(dtype) for dtype in indexed_dataset.CODES if dtype.kind in "iu"}
