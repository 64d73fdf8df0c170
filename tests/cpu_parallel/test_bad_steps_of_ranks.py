"""DeepSeek-V3 in small, as one process and as ranks: a NaN and a spike are left out, bit for bit, on every rank."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import poisoned
from helpers.command_line import ROOT, run_command
from helpers.small_yaml import small_sizes
from safetensors.numpy import load_file, save_file

from mindformers_ext.sharded_checkpoint.audit import differences
from mindformers_ext.sharded_checkpoint.layout import is_weight
from mindformers_ext.sharded_checkpoint.reader import open_source

YAML = ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny_8p.yaml"
SMALL = small_sizes(16) | {
    "model.model_config.intermediate_size": 64,
    "eval_dataset.data_loader.config.seq_length": 16,
    "train_dataset.data_loader.config.data_path": "['1','toy_text_document']",
    "train_dataset.data_loader.config.split": "'1,0,0'",
    "train_dataset.data_loader.sizes": "[32,0,0]",
    "processor": "null",
    "lr_schedule.warmup_steps": 2,
}
# data, tensor and pipeline parallel; samples of a micro-batch, and micro-batches
LAYOUTS = {"single": (1, 1, 1, 4, 1), "dp2": (2, 1, 1, 2, 1), "dp2-mp2": (2, 2, 1, 2, 1), "pp2": (1, 1, 2, 2, 2)}
GUARD = ["--use_skip_data_by_global_norm True --monitor_config.global_norm_spike_threshold 40"]
WITHOUT = "--train_dataset.data_loader.leave_out [[4,8],[16,20]]"
EMBEDDING = "model.embed_tokens.weight"


def command(layout: str, output: str, *arguments: str) -> list[str]:
    """A run of four samples a step in this layout."""
    dp, mp, pp, batch, micro = LAYOUTS[layout]
    degrees = {
        "parallel_config.data_parallel": dp,
        "parallel_config.model_parallel": mp,
        "parallel_config.pipeline_stage": pp,
        "parallel_config.expert_parallel": dp,
        "parallel_config.micro_batch_num": micro,
        "parallel_config.use_seq_parallel": mp > 1,
        "parallel.dataset_strategy": json.dumps([[dp, 1]] * 4, separators=(",", ":")),
        "runner_config.batch_size": batch,
        "output_dir": output,
    }
    if layout == "single":
        degrees |= {"use_parallel": False, "parallel.parallel_mode": 0, "context.memory_optimize_level": "O1"}
    words = [f"run_mindformer.py --config {YAML}", *(f"--{k} {v}" for k, v in (SMALL | degrees).items()), *arguments]
    ranks = dp * mp * pp
    if ranks == 1:
        return ["bash", "-c", f"python {ROOT}/" + " ".join(words)]
    launcher = ["bash", str(ROOT / "scripts/msrun_launcher.sh"), " ".join(words), str(ranks), str(ranks)]
    return [*launcher, "127.0.0.1", "18349", "0", f"{output}/log", "True", "600"]


def train(folder: Path, layout: str, output: str, *arguments: str) -> Path:
    result = run_command(command(layout, output, *arguments), folder, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder / output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with the two tokens, and weights whose embedding makes a NaN of one and a large gradient of the other."""
    folder = tmp_path_factory.mktemp("poisoned")
    poisoned.write_data(folder / "toy_text_document")
    start = open_source(train(folder, "single", "start", "--train_dataset.data_loader.sizes [4,0,0]") / "checkpoint")
    names = set(start.names())
    weights = {name: start.read(name)[:] for name in names if is_weight(name, names)}
    weights[EMBEDDING][poisoned.NAN_TOKEN] = np.nan
    weights[EMBEDDING][poisoned.SPIKE_TOKEN] = 0.0  # the norm divides by its size
    save_file(weights, folder / "weights.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_spike_are_left_out(folder: Path, layout: str) -> None:
    options = ["--load_checkpoint weights.safetensors", *GUARD]
    poison = train(folder, layout, layout, *options)
    (folder / f"{layout}_without").mkdir()
    if (poison / "compiled_ranks").exists():  # the graphs are the same
        (poison / "compiled_ranks").rename(folder / f"{layout}_without/compiled_ranks")
    clean = train(folder, layout, f"{layout}_without", *options, WITHOUT)
    records = [json.loads(line) for line in (poison / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "left_out" in record] == [2, 5]
    assert not list(differences(open_source(poison / "checkpoint"), open_source(clean / "checkpoint")))
    assert int(open_source(poison / "checkpoint").read("global_step")[0]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "single"])
def test_infinite_gradients_change_nothing(folder: Path, layout: str) -> None:
    """Without any key: the loss is finite, a steep head and a loss scale make its gradients infinite."""
    weights = load_file(folder / "weights.safetensors")
    weights["lm_head.weight"] *= 1000
    save_file(weights, folder / "steep.safetensors")
    more = ["--load_checkpoint steep.safetensors", "--runner_wrapper.scale_sense 3.0e38", WITHOUT]
    output = train(folder, layout, f"{layout}_infinite", *more)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(record["loss"]) and record["grad_norm"] is None for record in records)
    final = open_source(output / "checkpoint")
    names = set(final.names())
    for name, value in weights.items():
        np.testing.assert_array_equal(final.read(name)[:], value, err_msg=name)
    moments = [name for name in names if name.startswith(("adam_m.", "adam_v."))]
    assert moments and not any(np.any(final.read(name)[:]) for name in moments)
