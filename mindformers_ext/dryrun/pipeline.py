"""A step's pipeline, pass by pass: when each stage runs every micro-batch, and what it keeps meanwhile.

A stage runs its passes in the order that its schedule says, each as soon as the pass before it on the stage and the
one that it needs from a neighbour have ended. A stage holds `chunks` runs of layers: chunk c of stage s is part
c * stages + s of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

FORWARD, BACKWARD = 0, 1
SCHEDULES = ("gpipe", "1f1b")  # with several chunks 1f1b is interleaved

Pass = tuple[int, int, int]  # FORWARD or BACKWARD, chunk, micro-batch


@dataclass(frozen=True)
class Timeline:
    """What a simulated step took; seconds of its stages."""

    ends: list[float]  # when each stage has run its last pass
    busy: list[float]  # time that each stage spends in passes

    @property
    def seconds(self) -> float:
        """From the first pass to the end of the last."""
        return max(self.ends)

    @property
    def bubble(self) -> float:
        """Share of the time that an average stage waits."""
        return 1 - sum(self.busy) / len(self.busy) / self.seconds


def passes(schedule: str, stages: int, chunks: int, micro_batches: int, stage: int) -> list[Pass]:
    """The order in which a stage runs its passes.

    1f1b of several chunks is that of Narayanan et al. (arXiv 2104.04473): groups of as many micro-batches as stages go
    through one chunk after the other.
    """
    groups = [range(i, min(i + stages, micro_batches)) for i in range(0, micro_batches, stages)]
    forward = [(FORWARD, c, m) for group in groups for c in range(chunks) for m in group]
    backward = [(BACKWARD, c, m) for group in groups for c in reversed(range(chunks)) for m in group]
    if schedule == "gpipe":
        return forward + backward
    ahead = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    ahead = min(ahead, len(forward))
    order = forward[:ahead]
    for one_forward, one_backward in zip(forward[ahead:], backward, strict=False):
        order += (one_forward, one_backward)
    return order + backward[len(forward) - ahead :]


@lru_cache(maxsize=512)
def in_flight(schedule: str, stages: int, chunks: int, micro_batches: int, stage: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches of each chunk that a stage keeps at once: every combination that no other one contains."""
    held, found = [0] * chunks, set()
    for kind, chunk, _ in passes(schedule, stages, chunks, micro_batches, stage):
        if kind == BACKWARD:
            found.add(tuple(held))
        held[chunk] += 1 if kind == FORWARD else -1
    return tuple(a for a in found if not any(a != b and all(x <= y for x, y in zip(a, b, strict=True)) for b in found))


@dataclass(frozen=True)
class _Program:
    """The passes of all stages in an order in which each comes after those that it waits for; number 0 is the start.

    Args:
        steps: of each pass, its place (kind * chunks + chunk) * stages + stage, the number of the pass before it on its
            stage, of the pass whose result it takes, and whether that comes from another stage.
        last: the number of each stage's last pass.
    """

    steps: list[tuple[int, int, int, bool]]
    last: list[int]


@lru_cache(maxsize=256)
def _program(schedule: str, stages: int, chunks: int, micro_batches: int) -> _Program:
    orders = [passes(schedule, stages, chunks, micro_batches, s) for s in range(stages)]
    program = _Program([], [0] * stages)
    done: dict[tuple[int, int, int], int] = {}  # (kind, part of the model, micro-batch): number
    parts, at, waiting = stages * chunks, [0] * stages, list(range(stages))
    while waiting:
        stage = waiting.pop()
        order = orders[stage]
        while at[stage] < len(order):
            kind, chunk, micro = order[at[stage]]
            part = chunk * stages + stage
            needed = _needed(kind, part, parts, micro)
            if needed is not None and needed not in done:
                break
            sent = needed is not None and needed[1] % stages != stage
            place = (kind * chunks + chunk) * stages + stage
            program.steps.append((place, program.last[stage], done[needed] if needed else 0, sent))
            program.last[stage] = done[kind, part, micro] = len(program.steps)
            at[stage] += 1
            follower = (part + 1 if kind == FORWARD else part - 1) % stages
            if follower != stage and follower not in waiting:
                waiting.append(follower)
    if at != [len(order) for order in orders]:
        raise ValueError(f"the passes of {schedule} with {stages} stages and {chunks} chunks wait for each other")
    return program


def _needed(kind: int, part: int, parts: int, micro: int) -> tuple[int, int, int] | None:
    if kind == FORWARD:
        return (FORWARD, part - 1, micro) if part else None
    return (BACKWARD, part + 1, micro) if part < parts - 1 else (FORWARD, part, micro)


def simulate(
    schedule: str,
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    micro_batches: int,
    send: float = 0.0,
) -> Timeline:
    """Run a step whose passes take `forward[chunk][stage]` and `backward[chunk][stage]` seconds.

    Args:
        schedule: one of SCHEDULES.
        forward: seconds of a micro-batch.
        backward: the same, recomputation included.
        micro_batches: of the step.
        send: seconds from the end of a pass to when a neighbour may use its result.

    Once all stages are at work a step repeats itself: a long one is simulated for a few rounds, of as many
    micro-batches as stages, and the rest is added at the pace of the last round, or of the slowest stage.
    (Interleaving works in whole rounds.)
    """
    chunks, stages = len(forward), len(forward[0])
    work = [sum(f[s] + b[s] for f, b in zip(forward, backward, strict=True)) for s in range(stages)]
    short = micro_batches
    if schedule != "gpipe" and (micro_batches > ROUNDS * stages or chunks > 1):
        short = min(micro_batches // stages, ROUNDS) * stages or stages
    seconds = [t for table in (forward, backward) for row in table for t in row]
    ends = _run(_program(schedule, stages, chunks, short), seconds, send)
    if short < micro_batches:
        less = _run(_program(schedule, stages, chunks, short - stages), seconds, send)
        more = (micro_batches - short) * max(max(ends) / stages - max(less) / stages, *work)
        ends = [end + more for end in ends]
    return Timeline(ends, [micro_batches * t for t in work])


ROUNDS = 4


def _run(program: _Program, seconds: list[float], send: float) -> list[float]:
    ends = [0.0]
    for place, before, needs, sent in program.steps:
        start, ready = ends[before], ends[needs] + send if sent else ends[needs]
        ends.append((start if start > ready else ready) + seconds[place])
    return [ends[i] for i in program.last]
