"""A small DeepSeek-V3 by a recipe: values by tokens, the average of the weights, and phases that resume bit for bit."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import poisoned
from helpers.command_line import ROOT, run_command
from helpers.small_yaml import small_sizes
from hf_config import config_to_hf
from safetensors.numpy import load_file

from mindformers_ext.config.run import read_run
from mindformers_ext.sharded_checkpoint.audit import differences
from mindformers_ext.sharded_checkpoint.layout import AVERAGE
from mindformers_ext.sharded_checkpoint.reader import Checkpoint, open_source

YAML = ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml"
DECAY = np.float32(0.75)
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
# Steps of two samples of 16 tokens: after 2 steps the factor falls, after 3 the bias stands still.
RECIPE = {
    "ema_decay": float(DECAY),
    "mtp_loss_factor": [[64, 0.1]],
    "topk_bias_update_rate": [[96, 0.0]],
}
SMALL = small_sizes(16) | {
    "model.model_config.intermediate_size": 64,
    "train_dataset.data_loader.config.data_path": '["1","toy_text_document"]',
    "train_dataset.data_loader.config.split": "1,0,0",
    "runner_config.batch_size": 2,
    "processor": "null",
    "lr_schedule.warmup_steps": 0,
    "eval_dataset.data_loader.config.seq_length": 16,
    "callbacks.2.save_checkpoint_steps": 1,
    "callbacks.2.keep_checkpoint_max": 50,
}


def command(samples: int, recipe: dict, *more: str) -> list[str]:
    settings = SMALL | {"train_dataset.data_loader.sizes": f"[{samples},0,0]", "recipe": json.dumps(recipe)}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(YAML), *words, *more]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> Iterator:
    for path in sorted((folder / "checkpoint").glob("step_*")):
        yield open_source(path)


def check(result) -> None:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]


def test_values_and_average(tmp_path: Path) -> None:
    poisoned.write_data(tmp_path / "toy_text_document")
    check(run_command(command(10, RECIPE, "--output_dir", "out"), tmp_path))
    factors = [0.3, 0.3, 0.1, 0.1, 0.1]
    for record, factor in zip(metrics(tmp_path / "out"), factors, strict=True):
        assert record["loss"] == pytest.approx(
            record["main_loss"] + factor * record["mtp_loss"] + record["balance_loss"]
        )
    saved = list(steps_of(tmp_path / "out"))
    biases = [source.read(BIAS)[:] for source in saved]
    moved = [bool(np.any(after != before)) for before, after in zip(biases, biases[1:], strict=False)]
    assert moved == [True, True, False, False]
    names = [name for name in saved[0].names() if AVERAGE + name in set(saved[0].names())]
    assert "model.embed_tokens.weight" in names and len(names) > 30
    check_converted(tmp_path / "out", {name: averages(saved, name) for name in names} | {BIAS: biases[-1]})


def averages(saved: list[Checkpoint], name: str) -> np.ndarray:
    """The average of a weight, made of what every step saved; as the last step saved it."""
    average = saved[0].read(name)[:]
    for source in saved[1:]:
        average = average + (1 - DECAY) * (source.read(name)[:] - average)
    np.testing.assert_array_equal(saved[-1].read(AVERAGE + name)[:], average)
    return average


def check_converted(output: Path, expected: dict[str, np.ndarray]) -> None:
    """convert_reversed.py --averaged writes these values bit for bit, experts apart and as torch has them."""
    folder = output.parent
    sizes = [item for item in SMALL.items() if item[0].startswith(("model.", "moe_config."))]
    config = config_to_hf(read_run(YAML, overrides=sizes).model, 1, "float32")
    (folder / "assets").mkdir()
    (folder / "assets/config.json").write_text(json.dumps(config))
    script = [sys.executable, str(ROOT / "research/deepseek3/convert_reversed.py"), "--averaged", "--export_dtype"]
    script += ["fp32", "--input", f"{output.name}/checkpoint", "--output", "averaged", "--hf_assets_path", "assets"]
    check(run_command(script, folder))
    found = {}
    for file in (folder / "averaged").glob("*.safetensors"):
        found |= load_file(file)
    same = [name for name in expected if name in found]
    assert len(same) > 20 and BIAS in same
    for name in same:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    experts = "model.layers.1.mlp.experts."
    gates, ups = np.split(expected[f"{experts}gate_up_proj"], 2, -1)
    stacks = {"gate_proj": gates, "up_proj": ups, "down_proj": expected[f"{experts}down_proj"]}
    for projection, stack in stacks.items():
        for expert, matrix in enumerate(stack):
            np.testing.assert_array_equal(found[f"{experts}{expert}.{projection}.weight"], matrix.T)


@pytest.mark.slow
def test_a_run_with_all_of_it_resumes_bitwise(tmp_path: Path) -> None:
    """Three batches, supervised; a second run that is stopped inside every phase ends at the same bits."""
    poisoned.write_data(tmp_path / "toy_text_document")
    recipe = RECIPE | {"micro_batches": [[0, 1], [64, 2], [192, 3]]}
    guard = ["--use_skip_data_by_global_norm", "True", "--monitor_config.global_norm_spike_factor", "50"]
    guard += ["--use_graceful_exit", "True", "--optimizer", json.dumps({"type": "Muon", "qk_clip_threshold": 1e-4})]
    guard += ["--model.model_config.track_max_attention_logit", "True"]
    keep = ["bash", str(ROOT / "scripts/keep_running.sh"), "--"]
    check(run_command([*keep, *command(30, recipe, *guard, "--output_dir", "whole")], tmp_path, timeout=600))
    expected = metrics(tmp_path / "whole")
    for step, first, count in ((2, 2, 2), (4, 8, 4), (7, 24, 6)):
        more = ["--output_dir", "whole", "--step", str(step)]
        found = run_command(
            [sys.executable, str(ROOT / "dataset_tools/which_documents.py"), *command(30, recipe)[2:], *more], tmp_path
        )
        samples = {int(line.partition(":")[0].split()[1]) for line in found.stdout.splitlines()}
        assert samples == set(range(first, first + count)), found.stderr
    assert [record["step"] for record in expected] == list(range(1, 8))  # 2 x 2, 2 x 4, 3 x 6 samples

    parts = tmp_path / "parts"
    short = ["--output_dir", "parts", "--max_train_hours", "0.0000001"]  # every process takes one step
    while not parts.exists() or metrics(parts)[-1]["step"] < 7:
        check(run_command([*keep, *command(30, recipe, *guard, *short)], tmp_path, timeout=600))
    for record, other in zip(metrics(parts), expected, strict=True):
        for key in ("step", "loss", "grad_norm", "lr", "expert_load"):
            assert record[key] == other[key]
    assert not list(differences(open_source(parts / "checkpoint"), open_source(tmp_path / "whole/checkpoint")))
