"""What changes in the course of a training, by the tokens trained before a step: the `recipe` section, and its steps.

A compiled graph has one batch. The batch therefore grows between runs: each phase is a run of its own that goes on from
the last one's checkpoint, which scripts/keep_running.sh does by itself. Only the number of micro-batches grows, so
that every rank goes on holding what it held.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from mindformers_ext.config.typed import NotNegativeNumber

if TYPE_CHECKING:
    from mindformers_ext.config.run import Run

Points = Annotated[
    list[Annotated[list[NotNegativeNumber], Meta(min_length=2, max_length=2)]],
    Meta(min_length=1, description="a list of pairs, each [tokens, the value from then on]"),
]


@dataclass(kw_only=True)
class Recipe:
    """The `recipe` section. Before its first pair a value is what the YAML says elsewhere."""

    micro_batches: Points | None = None  # of a step; begins at 0 tokens
    mtp_loss_factor: Points | None = None
    topk_bias_update_rate: Points | None = None
    ema_decay: Annotated[float, Meta(gt=0, lt=1)] | None = None  # of an average of the weights, kept on the host


@dataclass(frozen=True)
class Phase:
    """Steps of one batch: it begins after `step` steps and `tokens` tokens."""

    step: int
    tokens: int
    micro_batches: int


def micro_batch_key(run: "Run") -> str:
    """The key that says how many micro-batches a step has."""
    return "parallel_config.micro_batch_num" if run.pp > 1 else "runner_config.gradient_accumulation_steps"


def phases(run: "Run") -> list[Phase]:
    """All phases of a training, in order; one when its batch stays."""
    recipe = run.sections.recipe
    points = recipe.micro_batches if recipe and recipe.micro_batches else [[0, run.micro_batches]]
    found = [Phase(0, 0, int(points[0][1]))]
    for tokens, micro_batches in points[1:]:
        last = found[-1]
        per_step = tokens_per_step(run, last)
        steps = max(math.ceil((tokens - last.tokens) / per_step), 0)
        found.append(Phase(last.step + steps, last.tokens + steps * per_step, int(micro_batches)))
    return [p for p, after in zip(found, [*found[1:], None], strict=True) if after is None or after.step > p.step]


def samples_per_step(run: "Run", phase: Phase) -> int:
    """Samples of an optimizer step of this phase."""
    return run.batch_size * run.dp * phase.micro_batches


def tokens_per_step(run: "Run", phase: Phase) -> int:
    """Tokens of an optimizer step of this phase."""
    return samples_per_step(run, phase) * run.model.seq_length


def phase_after(found: Sequence[Phase], step: int) -> tuple[Phase, int | None]:
    """The phase of the step after `step`, and after which step it ends (None: never)."""
    index = max(i for i, phase in enumerate(found) if phase.step <= step)
    return found[index], found[index + 1].step if index + 1 < len(found) else None


def value_at(points: Sequence[Sequence[float]] | None, tokens: int, otherwise: float) -> float:
    """What a value is once so many tokens were trained."""
    return next((value for begin, value in reversed(points or ()) if tokens >= begin), otherwise)
