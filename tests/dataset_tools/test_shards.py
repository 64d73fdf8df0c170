"""Shards of many workers: killed at any time, joined or left apart, the corpus is that of one machine."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.tools import TOOLS, bytes_of, run_tool

from mindformers_ext.bin_dataset.blended_dataset import build_datasets
from mindformers_ext.bin_dataset.gpt_dataset import GPTDatasetConfig
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset, bin_path, idx_path

SHARDS = 4


@pytest.fixture
def corpus(texts, tokenizer_file, tmp_path):
    """Arguments of a tool that are the same for all workers; the inputs are three files of different sizes."""
    for number, name in enumerate(("a", "b", "c")):
        rows = texts * (number * 8 + 1)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text * 20}) + "\n" for text in rows))
    return ["--input", str(tmp_path / "*.jsonl"), "--vocab-file", tokenizer_file, "--append-eod", "--workers", "1"]


def killed_workers(corpus, prefix, kills, seed):
    """Run all shards, two at a time, and kill so many of the workers at any moment; start what was killed again.

    Where all are done before, they begin anew.
    """
    rng = np.random.default_rng(seed)
    command = [sys.executable, str(TOOLS / "jsonl_to_bin.py"), *corpus, "--output-prefix", str(prefix)]
    left = list(range(SHARDS))
    while left:
        running = {}
        for shard in left[:2]:
            arguments = [*command, "--shard", f"{shard}/{SHARDS}", "--partitions", "3"]
            running[shard] = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kills > 0:
            time.sleep(rng.uniform(0.2, 2.5))
            os.kill(running[min(running)].pid, signal.SIGKILL)
        for shard, process in running.items():
            status = process.wait()
            kills -= status == -signal.SIGKILL
            if status == 0:
                left.remove(shard)
        left = left[1:] + left[:1]
        if not left and kills > 0:
            for path in prefix.parent.glob(f"{prefix.name}.*"):
                path.unlink()
            left = list(range(SHARDS))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_workers_leave_the_corpus_of_one_machine(kills, corpus, tmp_path):
    run_tool("jsonl_to_bin", *corpus, "--output-prefix", tmp_path / "one")
    killed_workers(corpus, tmp_path / "many", kills, seed=kills)
    pattern = tmp_path / "many.shard-*_text_document"
    run_tool("merge_bin", "--input", pattern, "--output-prefix", tmp_path / "many_text_document")
    assert bytes_of(tmp_path / "many_text_document") == bytes_of(tmp_path / "one_text_document")
    manifest = json.loads((tmp_path / "many_text_document.json").read_text())
    one = json.loads((tmp_path / "one_text_document.json").read_text())
    assert manifest["counts"] == {name: one["counts"][name] for name in ("documents", "sequences", "tokens")}
    data, at = bin_path(tmp_path / "many_text_document").read_bytes(), 0
    files = manifest["files"]["many_text_document"]
    for piece in files["bin"]:
        assert hashlib.sha256(data[at : at + piece["bytes"]]).hexdigest() == piece["sha256"]
        at += piece["bytes"]
    assert at == len(data) and len(files["bin"]) == SHARDS
    index = idx_path(tmp_path / "many_text_document").read_bytes()
    assert files["idx"] == [{"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}]
    sources = {source["path"]: source["bytes"] for part in manifest["parts"] for source in part["sources"]}
    assert sources == {str(path): path.stat().st_size for path in tmp_path.glob("*.jsonl")}
    assert sum(part["counts"]["documents"] for part in manifest["parts"]) == manifest["counts"]["documents"]


def test_a_blend_reads_the_parts_where_they_are(corpus, tmp_path):
    for shard in range(2):
        run_tool("jsonl_to_bin", *corpus, "--output-prefix", tmp_path / "m", "--shard", f"{shard}/2")
    pattern = tmp_path / "m.shard-*_text_document"
    run_tool("merge_bin", "--input", pattern, "--output-prefix", tmp_path / "m", "--blend")
    assert not bin_path(tmp_path / "m").exists()
    config = GPTDatasetConfig(32, path_to_cache=str(tmp_path / "cache"))
    prefixes = [str(tmp_path / f"m.shard-0000{i}-of-00002_text_document") for i in range(2)]
    from_file, from_list = (
        build_datasets(config, [100, 0, 0], path)[0] for path in (str(tmp_path / "m.json"), prefixes)
    )
    assert from_file.description == from_list.description
    counts = json.loads((tmp_path / "m.json").read_text())["counts"]
    assert counts["tokens"] == sum(len(IndexedDataset(prefix).tokens) for prefix in prefixes)


def test_what_does_not_belong_together_is_refused(corpus, tmp_path):
    run_tool("jsonl_to_bin", *corpus, "--output-prefix", tmp_path / "m", "--shard", "0/2")
    pattern = tmp_path / "m.shard-*_text_document"
    done = run_tool("merge_bin", "--input", pattern, "--output-prefix", tmp_path / "whole", check=False)
    assert done.returncode == 1 and "has 1 parts of [2] shards" in done.stderr
    run_tool("jsonl_to_bin", *corpus, "--output-prefix", tmp_path / "m", "--shard", "1/2")
    path = bin_path(tmp_path / "m.shard-00001-of-00002_text_document")
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    done = run_tool("merge_bin", "--input", pattern, "--output-prefix", tmp_path / "whole", check=False)
    assert done.returncode == 1 and "in its manifest; make it again" in done.stderr
    assert not list(tmp_path.glob("whole*"))
    done = run_tool("jsonl_to_bin", *corpus, "--output-prefix", tmp_path / "m", "--shard", "2/2", check=False)
    assert done.returncode == 2 and "must be I/N with I from 0 to N - 1" in done.stderr
