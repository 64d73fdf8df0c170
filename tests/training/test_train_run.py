"""Whole runs of the toy model through MindFormers' Trainer: what they write, data parallel, eval, predict."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import ROOT, TOY, run_command, run_mindformer
from safetensors.numpy import load_file

from mindformers_ext.sharded_checkpoint.reader import open_source


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_recorded(trained: Path) -> None:
    records = read_metrics(trained)
    assert [record["step"] for record in records] == list(range(1, 17))
    keys = "step loss main_loss mtp_loss balance_loss grad_norm lr tokens_per_s tflops_per_device mfu expert_load"
    for record in records:
        assert set(record) == set(keys.split())
        assert record["loss"] == pytest.approx(record["main_loss"], rel=1e-6)
        assert (record["mtp_loss"], record["balance_loss"]) == (0.5, 0.25)
        assert record["expert_load"]["toy"]["mean"] == 4 * 16 / 4  # tokens of a step over experts
        # MFU from the parts: the toy's 6 FLOPs per weight, the YAML's peak of 0.1 TFLOP/s, one device
        tflops = record["tokens_per_s"] * 6 * (64 * 16 + 4 * 16 + 64 * 16 + 64) / 1e12
        assert record["tflops_per_device"] == pytest.approx(tflops, rel=1e-9)
        assert record["mfu"] == pytest.approx(tflops / 0.1, rel=1e-9)
    assert records[0]["lr"] == 0 and records[5]["lr"] == pytest.approx(0.01)


def test_plot_summary_and_tensorboard_are_written(trained: Path) -> None:
    assert (trained / "training.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    summary = (trained / "summary.txt").read_text()
    for word in (
        "first (step 1)",
        "last (step 16)",
        "main_loss",
        "mtp_loss",
        "tokens/s",
        "MFU",
        "checkpoint",
        "metrics",
    ):
        assert word in summary
    assert list((trained / "tensorboard").glob("events.*"))


def test_checkpoint_holds_the_updated_bias_and_the_optimizer(trained: Path) -> None:
    """TopkBiasBalanceCallback is listed last in the YAML and still runs before CheckpointMonitor."""
    tokens = load_file(trained / "checkpoint/step_000004/rank_0000.safetensors")
    bias = tokens["router.expert_bias"]
    # Four updates of +-0.001 or 0; a bias saved before its update would be a sum of three.
    assert np.any(np.isclose(np.abs(bias), 0.004)) or np.any(np.round(np.abs(bias) / 0.001) % 2 == 0)
    assert np.allclose(bias / 0.001, np.round(bias / 0.001), atol=1e-3) and np.any(bias != 0)
    assert {"adam_m.embedding", "adam_v.head.weight", "global_step"} <= set(tokens)
    assert not {"router.expert_load", "loss_parts"} & set(tokens)  # counters, not state
    assert int(tokens["global_step"].item()) == 4


def test_accumulated_micro_batches_equal_one_batch(trained: Path, toy_folder: Path) -> None:
    arguments = "--output_dir accumulated --batch_size 2 --gradient_accumulation_steps 2"
    result = run_mindformer(toy_folder, *arguments.split())
    assert result.returncode == 0, result.stderr[-3000:]
    accumulated = read_metrics(toy_folder / "accumulated")
    assert len(accumulated) == 8
    for record, whole in zip(accumulated, read_metrics(trained), strict=False):
        for key in ("loss", "main_loss", "grad_norm"):
            assert record[key] == pytest.approx(whole[key], rel=2e-6)
        assert record["expert_load"] == whole["expert_load"]
        assert (record["mtp_loss"], record["lr"]) == (0.5, whole["lr"])


@pytest.mark.slow
def test_two_data_parallel_processes_equal_one_with_the_double_batch(trained: Path, toy_folder: Path) -> None:
    command = (
        f"run_mindformer.py --config {TOY}/train_toy.yaml --register_path {TOY} --output_dir parallel "
        "--runner_config.batch_size 2"
    )
    launcher = ["bash", str(ROOT / "scripts/msrun_launcher.sh"), command, "2", "2", "127.0.0.1", "18347", "0"]
    result = run_command([*launcher, "parallel/msrun_log", "True", "120"], toy_folder)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    together = read_metrics(toy_folder / "parallel")
    assert len(together) == 8
    for record, alone in zip(together, read_metrics(trained), strict=False):
        for key in ("loss", "main_loss", "grad_norm"):
            assert record[key] == pytest.approx(alone[key], rel=2e-6)
        assert record["expert_load"] == alone["expert_load"]  # summed over ranks: the global batch
    parallel = open_source(toy_folder / "parallel/checkpoint")
    alone = open_source(trained / "checkpoint", "step_000008")
    assert (parallel.meta.ranks, parallel.meta.step) == (2, 8)
    assert parallel.meta.data_hash == alone.meta.data_hash
    np.testing.assert_array_equal(parallel.read("router.expert_bias")[:], alone.read("router.expert_bias")[:])
    np.testing.assert_allclose(parallel.read("embedding")[:], alone.read("embedding")[:], atol=2e-6)


def test_a_loss_that_is_not_finite_stops_with_one_sentence(toy_folder: Path) -> None:
    result = run_mindformer(toy_folder, "--output_dir", "nan", "--lr_schedule.learning_rate", "1.0e+38")
    assert result.returncode == 3, result.stderr[-2000:]
    last = result.stderr.strip().splitlines()[-1]
    assert re.match(r"error: the loss is (nan|inf) at step \d+ \(last finite loss: [\d.e+]+ at step \d+\)", last)
    assert "lr_schedule.learning_rate (now 1e+38)" in last or "lr_schedule.learning_rate (now 9.9" in last


def test_steps_that_are_skipped_for_ever_stop_the_run(toy_folder: Path) -> None:
    """A loss scale of 3e38 overflows every gradient while the loss is finite; the record is strict JSON."""
    options = ["--runner_wrapper.scale_sense", "3.0e+38", "--callbacks.1.max_skipped_steps", "2"]
    result = run_mindformer(toy_folder, "--output_dir", "skipped", *options)
    assert result.returncode == 3, result.stderr[-2000:]
    assert "error: the gradients of 3 steps in a row were not finite, the last of step 3" in result.stderr

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = (toy_folder / "skipped" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [r["step"] for r in records] == [1, 2, 3] and records[-1]["grad_norm"] is None


def test_eval_prints_loss_and_perplexity(trained: Path, toy_folder: Path) -> None:
    result = run_mindformer(
        toy_folder, "--config", str(TOY / "eval_toy.yaml"), "--run_mode", "eval",
        "--load_checkpoint", "straight/checkpoint", "--output_dir", "eval",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found = re.search(r"validation loss ([\d.]+), perplexity ([\d.]+) over (\d+) tokens", result.stdout)
    assert found, result.stdout[-2000:]
    loss, perplexity = float(found[1]), float(found[2])
    assert 3.5 < loss < 4.5 and perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert int(found[3]) == 16 * 16
    reference = numpy_loss(trained, toy_folder)
    assert loss == pytest.approx(reference, abs=2e-4)


def numpy_loss(trained: Path, toy_folder: Path) -> float:
    """The toy model's validation loss, computed from the checkpoint with numpy."""
    from mindformers_ext.bin_dataset.blended_dataset import build_datasets
    from mindformers_ext.bin_dataset.gpt_dataset import GPTDatasetConfig

    weights = load_file(trained / "checkpoint/step_000016/rank_0000.safetensors")
    config = GPTDatasetConfig(random_seed=1234, sequence_length=16, split="1, 1, 0", create_attention_mask=False)
    dataset = build_datasets(
        config, [None, 16, None], ["1", str(toy_folder / "toy_text_document")], [None] * 3, only=1
    )[1]
    total = 0.0
    for index in range(16):
        sample = dataset[index]
        ids, labels = np.asarray(sample["input_ids"]), np.asarray(sample["labels"])
        hidden = weights["embedding"][ids] * weights["scale"][ids % 4]
        logits = hidden @ weights["head.weight"].T + weights["head.bias"]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log_p[np.arange(16), labels].mean()
    return total / 16


def test_predict_continues_the_text(trained: Path, toy_folder: Path) -> None:
    result = run_mindformer(
        toy_folder, "--config", str(TOY / "eval_toy.yaml"), "--run_mode", "predict", "--predict_data", "01234",
        "--load_checkpoint", "straight/checkpoint", "--output_dir", "predict",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    weights = load_file(trained / "checkpoint/step_000016/rank_0000.safetensors")
    expected = [0, 1, 2, 3, 4]
    while len(expected) < 11:
        token = expected[-1]
        logits = weights["head.weight"] @ (weights["embedding"][token] * weights["scale"][token % 4])
        expected.append(int((logits + weights["head.bias"]).argmax()))
    assert "".join(chr(ord("0") + token) for token in expected) in result.stdout.replace(" ", "")
