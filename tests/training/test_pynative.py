"""The tiny YAML trains without a compiled graph, operator by operator, to the same losses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command_line import ROOT, run_command
from helpers.small_yaml import small_sizes

TINY = ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml"
WAYS = {
    "as it is": {},
    "no operator of ours, capacity dispatch": {
        "moe_config.use_gmm": False,
        "moe_config.use_fused_ops_permute": False,
        "moe_config.use_fused_ops_topkrouter": False,
        "moe_config.capacity_factor": 1.0,
        **{f"model.model_config.use_fused_{name}": False for name in ("rope", "swiglu", "rms_norm", "cross_entropy")},
        "model.model_config.use_flash_attention": False,
    },
    "accumulated": {"runner_config.gradient_accumulation_steps": 2, "runner_config.batch_size": 2},
}


def train(folder: Path, data: str, mode: int, way: dict[str, object]) -> list[dict]:
    """The metrics of a few steps of the small model."""
    values = small_sizes(16) | way | {"mode": mode, "output_dir": str(folder), "processor": "null"}
    values |= {"train_dataset.data_loader.sizes": [12, 0, 0], "eval_dataset": "null", "eval_dataset_task": "null"}
    values |= {"train_dataset.data_loader.config.data_path": ["1", data]}
    values["callbacks"] = "[{type: TrainingMetrics}, {type: TopkBiasBalanceCallback}]"
    options = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    done = run_command(
        [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(TINY), *options], folder.parent
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "way", [name if index == 0 else pytest.param(name, marks=pytest.mark.slow) for index, name in enumerate(WAYS)]
)
def test_losses_are_those_of_the_graph(way: str, corpus: Callable[..., str], tmp_path: Path) -> None:
    data = corpus("text", [40] * 20)
    graph, pynative = (train(tmp_path / str(mode), data, mode, WAYS[way]) for mode in (0, 1))
    assert len(graph) == len(pynative) == 3
    for one, other in zip(graph, pynative, strict=True):
        for key in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
        assert other["expert_load"] == one["expert_load"]
