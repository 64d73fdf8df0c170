"""Where every decoder layer lies in the pipeline: its stage, and its chunk among the layers of that stage.

A stage holds `pp_interleave_num` chunks, each a run of consecutive layers. Layers go through all stages once for every
chunk: stages 0, 1, 0, 1 with two stages and two chunks. The scheduler zero_bubble_v folds the way: 0, 1, 1, 0. Layers
of multi-token prediction, the last norm and the head lie where the last decoder layer does.

All that asks for a layer's place asks here: the model, the rules, the estimate, the dry run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

FOLDED = "zero_bubble_v"  # the scheduler whose second chunk goes from the last stage back to the first


class Place(NamedTuple):
    """A chunk of a stage."""

    stage: int
    chunk: int


@dataclass(frozen=True)
class Pipeline:
    """The layers of a model over `stages` of `chunks`.

    Args:
        layers: decoder layers without MTP's.
        further: MTP's, which follow the last.
        offset: layers more (or fewer) than layers // (stages * chunks) of each stage, or of each stage by chunk; 0: the
            remainder goes to the last ones, as in MindFormers.
    """

    layers: int
    further: int
    stages: int
    chunks: int = 1
    folded: bool = False
    offset: int | Sequence = 0

    @property
    def way(self) -> list[Place]:
        """The chunks in the order in which layers go through them."""
        forward = range(self.stages)
        return [
            Place(stage, chunk)
            for chunk in range(self.chunks)
            for stage in (reversed(forward) if self.folded and chunk % 2 else forward)
        ]

    @cached_property
    def counts(self) -> dict[Place, int]:
        """Decoder layers of every chunk, without MTP's, in the order of `way`."""
        base, rest = divmod(self.layers, self.stages * self.chunks)
        if not isinstance(self.offset, list | tuple):
            first = self.stages * self.chunks - rest
            return {place: base + (i >= first) for i, place in enumerate(self.way)}
        rows = by_chunk(self.offset, self.chunks)
        return {place: base + rows[place.chunk][place.stage] for place in self.way}

    @cached_property
    def places(self) -> list[Place]:
        """The place of every decoder layer, MTP's included."""
        found = [place for place, count in self.counts.items() for _ in range(count)]
        return found + [self.last] * self.further

    @property
    def first(self) -> Place:
        """Where the embedding lies."""
        return self.way[0]

    @property
    def last(self) -> Place:
        """Where the last norm, the head and MTP lie."""
        return self.way[-1]

    @property
    def layers_per_stage(self) -> list[int]:
        """Decoder layers of each stage, without MTP's."""
        return [sum(n for place, n in self.counts.items() if place.stage == s) for s in range(self.stages)]

    @cached_property
    def held(self) -> dict[Place, list[int]]:
        """Decoder layers of every chunk, MTP's included."""
        found: dict[Place, list[int]] = {place: [] for place in self.way}
        for layer, place in enumerate(self.places):
            found[place].append(layer)
        return found

    def layers_of(self, stage: int, chunk: int | None = None) -> list[int]:
        """Decoder layers of a stage, or of one chunk of it; number `layers` and above are MTP's."""
        chunks = range(self.chunks) if chunk is None else [chunk]
        return [i for c in chunks for i in self.held[stage, c]]

    def covered(self, setting: bool | Sequence) -> list[int]:
        """Decoder layers that a recompute setting means: all, or the first so many of every stage or chunk.

        A number for a stage of several chunks is dealt to them in turn, as MindFormers does.
        """
        if not isinstance(setting, list | tuple):
            return list(range(self.layers + self.further)) if setting else []
        rows = setting if isinstance(setting[0], list | tuple) else self._dealt(setting)
        return sorted(i for (stage, chunk), layers in self.held.items() for i in layers[: rows[chunk][stage]])

    def _dealt(self, numbers: Sequence[int]) -> list[list[int]]:
        rows = [[0] * self.stages for _ in range(self.chunks)]
        for stage, left in enumerate(numbers):
            turns = [(turn, c) for c in range(self.chunks) for turn, _ in enumerate(self.held[stage, c])]
            for _, chunk in sorted(turns)[: max(left, 0)]:
                rows[chunk][stage] += 1
        return rows


def by_chunk(numbers: Sequence, chunks: int) -> list[list[int]]:
    """A list of numbers per stage, or a list of those per chunk, as the latter."""
    return list(numbers) if isinstance(numbers[0], list | tuple) else [list(numbers)] * chunks
