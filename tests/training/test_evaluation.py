"""Evaluation and monitors inside a training: equal to run_mode eval and to what the step itself reports."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import ROOT, TOY, run_command, run_mindformer
from training.test_resume import SMALL, TINY, four_ranks

from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter
from mindformers_ext.sharded_checkpoint.reader import open_source

BLEND = "['2','toy_text_document','1','other_text_document']"
MONITORS = {name: 2 for name in ("gradient_norms", "weight_norms", "update_norms", "moment_norms", "experts", "times")}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(trained: Path, toy_folder: Path) -> Path:
    """The toy's 16 steps once more, evaluated on two sources after every third, with all monitors on every second."""
    rng = np.random.default_rng(5)
    with IndexedDatasetWriter(toy_folder / "other_text_document", np.uint16) as writer:
        for _ in range(40):
            writer.add_document(rng.integers(0, 8, 50))
    options = ["--output_dir", "watched", "--runner_config.epochs", "2", "--do_eval", "True"]
    options += ["--eval_step_interval", "3", "--eval_dataset.data_loader.config.data_path", BLEND]
    options += ["--callbacks.0.keep_checkpoint_max", "1", "--callbacks.1.monitors", json.dumps(MONITORS)]
    result = run_mindformer(toy_folder, *options, config=TOY / "eval_toy.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    return toy_folder / "watched"


def test_the_training_is_the_same(watched: Path, trained: Path) -> None:
    for record, other in zip(lines(watched / "metrics.jsonl"), lines(trained / "metrics.jsonl"), strict=True):
        for key in ("loss", "grad_norm", "expert_load"):
            assert record[key] == other[key]


def test_it_equals_run_mode_eval_and_the_best_stays(watched: Path, toy_folder: Path) -> None:
    found = lines(watched / "eval.jsonl")
    assert [record["step"] for record in found] == [3, 6, 9, 12, 15]
    for record in found:
        parts = record["sources"]
        assert parts.keys() == {"toy_text_document", "other_text_document"}
        assert record["tokens"] == sum(part["tokens"] for part in parts.values())
        whole = sum(part["loss"] * part["tokens"] for part in parts.values()) / record["tokens"]
        assert record["loss"] == pytest.approx(whole, rel=1e-9)
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    best = min(found, key=lambda record: record["loss"])
    name = f"step_{best['step']:06d}"
    assert (watched / "checkpoint/best").read_text() == name
    assert {path.name for path in (watched / "checkpoint").glob("step_*")} == {name, "step_000016"}
    result = run_mindformer(
        toy_folder, "--run_mode", "eval", "--load_checkpoint", f"watched/checkpoint/{name}", "--output_dir", "again",
        "--eval_dataset.data_loader.config.data_path", BLEND, config=TOY / "eval_toy.yaml",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    said = dict(re.findall(r"(validation|of \w+):? loss ([\d.]+), perplexity", result.stdout))
    assert said == {
        "validation": f"{best['loss']:.4f}",
        **{f"of {source}": f"{part['loss']:.4f}" for source, part in best["sources"].items()},
    }


def test_monitors(watched: Path) -> None:
    """Norms of gradients, weights and moments, against the step's own norm and the checkpoint."""
    records = lines(watched / "metrics.jsonl")
    assert [record["step"] for record in records if "weight_norms" in record] == list(range(2, 17, 2))
    names = {"embedding", "scale", "head.weight", "head.bias"}
    for record in records[1::2]:
        assert record["gradient_norms"]["all"] == pytest.approx(record["grad_norm"], rel=1e-4)
        for kind in ("gradient_norms", "weight_norms", "update_norms", "first_moment_norms", "second_moment_norms"):
            norms = record[kind]
            assert norms["parameters"].keys() == names
            assert norms["all"] == pytest.approx(sum(n**2 for n in norms["parameters"].values()) ** 0.5, rel=1e-6)
        assert 0 < record["experts"]["toy"]["entropy"] <= 1 and record["experts"]["toy"]["dead"] == 0
        assert record["seconds"]["step"] > 0 and record["seconds"]["between_steps"] > 0
    last, saved = records[-1], open_source(watched / "checkpoint", "step_000016")
    for name in names:
        for kind, key in (("weight_norms", name), ("first_moment_norms", f"adam_m.{name}")):
            assert last[kind]["parameters"][name] == pytest.approx(float(np.linalg.norm(saved.read(key)[:])), rel=1e-6)


@pytest.mark.slow
def test_ranks_evaluate_as_one_process_does(toy_folder: Path) -> None:
    """DeepSeek-V3 in small over four ranks; the norms of their monitors are those of whole gradients."""
    data = "--eval_dataset.data_loader.config.data_path ['1','toy_text_document']"
    monitors = json.dumps(MONITORS, separators=(",", ":"))
    options = ["--do_eval True --eval_step_interval 40", data, f"--callbacks.0.monitors '{monitors}'"]
    result = run_command(four_ranks("--output_dir", "evaluated", *options), toy_folder, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    found = lines(toy_folder / "evaluated/eval.jsonl")
    assert [record["step"] for record in found] == [40, 80]
    for record in lines(toy_folder / "evaluated/metrics.jsonl")[1::2]:
        assert record["gradient_norms"]["all"] == pytest.approx(record["grad_norm"], rel=1e-4)
    one = [f"--{key} {value}" for key, value in SMALL.items()] + [data, "--run_mode eval --use_parallel False"]
    one += ["--parallel.parallel_mode 0 --output_dir alone --load_checkpoint evaluated/checkpoint/step_000080"]
    command = [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(TINY), *" ".join(one).split()]
    result = run_command(command, toy_folder)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"validation loss {found[1]['loss']:.4f}, perplexity {found[1]['perplexity']:.2f}" in result.stdout
