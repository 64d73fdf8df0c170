"""A step that is left out is left out as a whole: the weights are those of a run that never had its samples."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import poisoned
from helpers.command_line import run_mindformer
from mindspore import Tensor

from mindformers_ext.config.sections import MonitorConfig
from mindformers_ext.errors import TrainingStopped
from mindformers_ext.sharded_checkpoint.audit import differences
from mindformers_ext.sharded_checkpoint.reader import open_source
from mindformers_ext.training.bad_steps import BadSteps
from mindformers_ext.training.wrapper import norm_limit

# Batches of 4: the samples of steps 2 and 5, which hold the two tokens.
WITHOUT = "[[4, 8], [16, 20]]"


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_same_state(first: Path, second: Path) -> None:
    """Every weight, moment, bias and counter of the last checkpoints."""
    assert not list(differences(open_source(first / "checkpoint"), open_source(second / "checkpoint")))


def test_nan_and_spike_are_left_out(tmp_path: Path) -> None:
    documents = poisoned.write_data(tmp_path / "toy_text_document")
    poisoned.write_toy_weights(tmp_path / "weights.safetensors")
    options = ["--load_checkpoint", "weights.safetensors", "--use_skip_data_by_global_norm", "True"]
    options += ["--monitor_config.global_norm_spike_factor", "20", "--monitor_config.global_norm_spike_window", "2"]
    runs = {"with": [], "without": ["--train_dataset.data_loader.leave_out", WITHOUT]}
    for name, more in runs.items():
        result = run_mindformer(tmp_path, "--output_dir", name, *options, *more)
        assert result.returncode == 0, result.stderr[-3000:]
    check_same_state(tmp_path / "with", tmp_path / "without")
    records = {name: read_metrics(tmp_path / name) for name in runs}
    assert [len(records[name]) for name in runs] == [8, 6]
    told = {record["step"]: record["left_out"] for record in records["with"] if "left_out" in record}
    assert list(told) == [2, 5] and not any("left_out" in record for record in records["without"])
    assert told[2]["why"] == "its gradient norm is nan" and "and not below" in told[5]["why"]
    for step, token in ((2, poisoned.NAN_TOKEN), (5, poisoned.SPIKE_TOKEN)):
        assert told[step]["samples"] == [[4 * step - 4, 4 * step]]
        assert any(documents[token] in text for text in told[step]["documents"])
    counted = [record for record in records["with"] if "left_out" not in record]
    for record, other in zip(counted, records["without"], strict=True):
        assert {**record, "step": 0} | SPEED == {**other, "step": 0} | SPEED


def test_check_for_nan_ends_at_the_first_with_a_sentence(tmp_path: Path) -> None:
    poisoned.write_data(tmp_path / "toy_text_document")
    poisoned.write_toy_weights(tmp_path / "weights.safetensors")
    options = ["--load_checkpoint", "weights.safetensors", "--check_for_nan_in_loss_and_grad", "True"]
    options += [
        "--callbacks",
        '[{"type": "TopkBiasBalanceCallback"}]',
    ]  # TrainingMetrics ends at a loss that is NaN too
    result = run_mindformer(tmp_path, "--output_dir", "checked", *options)
    assert result.returncode == TrainingStopped.exit_code and "Traceback" not in result.stderr
    assert "error: the loss of step 2 is nan and check_for_nan_in_loss_and_grad is True: " in result.stderr


SPEED = dict.fromkeys(("tokens_per_s", "tflops_per_device", "mfu"), 0)


def step(norm: float, number: int = 1, overflow: bool = False) -> SimpleNamespace:
    """A run's context after a step of this gradient norm."""
    outputs = (None, Tensor([overflow]), None, None, Tensor(np.array([norm], np.float32)))
    network = SimpleNamespace(use_skip_data_by_global_norm=True, global_norm_spike_threshold=norm_limit(math.inf))
    params = Params(net_outputs=outputs, train_network=network, cur_step_num=number, health={}, train_dataset=None)
    return SimpleNamespace(original_args=lambda: params)


class Params(dict):
    """MindSpore's _InternalCallbackParam."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def test_the_limit_follows_the_median_and_goes_on_after_a_restart() -> None:
    config = MonitorConfig(global_norm_spike_threshold=9.0, global_norm_spike_factor=2.0, global_norm_spike_window=3)
    guard, context = BadSteps(config), step(1.0)
    guard.on_train_begin(context)
    network = context.original_args().train_network
    for norm, limit in ((1.0, 9.0), (3.0, 9.0), (2.0, 4.0), (3.5, 6.0), (8.0, 6.0), (5.9, 7.0), (6.9, 9.0)):
        context.original_args().net_outputs = step(norm).original_args().net_outputs
        guard.on_train_step_end(context)
        assert guard.limit == limit and network.global_norm_spike_threshold.asnumpy() == np.float32(limit)
        assert bool(context.original_args().left_out) == (norm == 8.0)
    resumed, context = BadSteps(config), step(1.0)
    context.original_args().restored = SimpleNamespace(health={"gradient_norms": list(guard.norms)})
    resumed.on_train_begin(context)
    assert resumed.limit == guard.limit and list(resumed.norms) == list(guard.norms)
    assert context.original_args().health["gradient_norms"] is resumed.norms  # what the next checkpoint keeps


def test_too_many_in_a_row_stop_the_run() -> None:
    guard, context = BadSteps(MonitorConfig(global_norm_spike_count_threshold=3)), step(1.0)
    guard.on_train_begin(context)
    for norm in (math.nan, math.inf, 1.0, math.nan, math.nan, math.inf):
        guard.on_train_step_begin(context)
        context.original_args().net_outputs = step(norm).original_args().net_outputs
        guard.on_train_step_end(context)
    with pytest.raises(TrainingStopped, match="3 steps in a row were left out, the last because its .* norm is inf"):
        guard.on_train_step_begin(context)
