"""Phases of a recipe against a training that is counted step by step; which recipes are refused."""

from pathlib import Path
from typing import Any

import pytest

from mindformers_ext.config.recipe import phase_after, phases, tokens_per_step, value_at
from mindformers_ext.config.run import Run, read_run
from mindformers_ext.config.strategy_rules import check_run

YAML = Path(__file__).resolve().parents[2] / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml"
WHOLE = YAML.with_name("pretrain_deepseek3_tiny_8p.yaml")


def run_of(recipe: dict[str, Any], path: Path = YAML) -> Run:
    return read_run(path, overrides=[("recipe", recipe)])


RAMPS = [
    [[0, 1], [5000, 2], [20000, 4]],
    [[0, 3], [1, 5], [1025, 7], [1e6, 2]],  # a phase of no step, and a batch that shrinks
    [[0, 2]],
]


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("path", [YAML, WHOLE], ids=["one process", "ranks"])
def test_batches_and_samples_equal_a_count_step_by_step(ramp: list, path: Path) -> None:
    run = run_of({"micro_batches": ramp}, path)
    found, samples = phases(run), 0
    one = run.batch_size * run.dp
    for step in range(2000):
        tokens = samples * run.model.seq_length
        expected = [count for begin, count in ramp if tokens >= begin][-1]
        phase, end = phase_after(found, step)
        assert phase.micro_batches == expected
        assert tokens == phase.tokens + (step - phase.step) * tokens_per_step(run, phase)
        assert end is None or step < end
        samples += one * expected


def test_values_by_tokens() -> None:
    points = [[10, 0.1], [20, 0.0]]
    assert [value_at(points, tokens, 0.3) for tokens in (0, 9, 10, 19, 20, 99)] == [0.3, 0.3, 0.1, 0.1, 0.0, 0.0]
    assert value_at(None, 5, 0.3) == 0.3


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ({"micro_batches": [[1, 2]]}, "recipe.micro_batches"),
        ({"micro_batches": [[0, 1.5]]}, "recipe.micro_batches"),
        ({"micro_batches": [[0, 2], [0, 4]]}, "recipe.micro_batches"),
        ({"mtp_loss_factor": [[9, 0.1], [5, 0.2]]}, "recipe.mtp_loss_factor"),
    ],
)
def test_what_cannot_be_followed_is_refused(recipe: dict[str, Any], key: str) -> None:
    assert [violation.key for violation in check_run(run_of(recipe))] == [key]
