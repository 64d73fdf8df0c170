"""Which samples a step reads, and of which documents they are made: from the index alone, without MindSpore.

A sample has two numbers: its place in the order of the data, and its place among those that are read, where
`data_loader.leave_out` takes ranges out of the order. Checkpoints and people speak of the first, batches of the second.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mindformers_ext.bin_dataset.blended_dataset import BlendedDataset, Dataset


class LeftOut:
    """Ranges of samples that are not read, as `leave_out` of a data loader gives them: [first, one after the last]."""

    def __init__(self, ranges: Sequence[Sequence[int]], size: int):
        merged: list[list[int]] = []
        for first, end in sorted((max(first, 0), min(end, size)) for first, end in ranges):
            if first >= end:
                continue
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([first, end])
        self.size = size
        self.first, self.end = np.array(merged, np.int64).reshape(-1, 2).T
        self.until = np.concatenate(([0], np.cumsum(self.end - self.first)))  # left out before each range, and in all

    @property
    def kept(self) -> int:
        """Samples that are read."""
        return self.size - int(self.until[-1])

    def places(self, read: np.ndarray) -> np.ndarray:
        """Places in the order of samples that are read."""
        if not len(self.first):
            return read
        return read + self.until[np.searchsorted(self.first - self.until[:-1], read, side="right")]

    def place_after(self, read: int) -> int:
        """The place in the order after the first `read` samples that are read."""
        return int(self.places(np.array([read - 1]))[0]) + 1 if read else 0

    def read_before(self, place: int) -> int:
        """How many samples before a place in the order are read."""
        return place - int(np.clip(place - self.first, 0, self.end - self.first).sum())


def ranges_of(places: np.ndarray) -> list[list[int]]:
    """Ascending places as ranges [first, one after the last]."""
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    return [[int(run[0]), int(run[-1]) + 1] for run in runs if len(run)]


@dataclass(frozen=True)
class Place:
    """Where a training stands: after `step` steps, in a pass over the data, before a place in its order."""

    step: int = 0
    epoch: int = 0
    sample: int = 0


def samples_of_step(
    left_out: LeftOut, per_step: int, step: int, skipped: int = 0, after: Place | None = None, whole: bool = True
) -> np.ndarray:
    """Places in the order of the samples that a step reads.

    Args:
        per_step: samples of a step.
        skipped: batches that were left out at the start (`data_skip_steps`).
        after: where the training began that takes the step.
        whole: a pass ends with its last whole batch (`drop_remainder`).

    Raises:
        ValueError: this training does not take the step.
    """
    after = after or Place()
    read = left_out.read_before(after.sample)
    first = read % per_step  # before the first batch of a pass: the batch size has changed
    per_pass = (left_out.kept - first + (0 if whole else per_step - 1)) // per_step
    if step <= after.step or per_pass == 0:
        raise ValueError(f"step {step} is not taken: the training begins after step {after.step}, {per_pass} a pass")
    batch = (after.epoch * per_pass + read // per_step + skipped + step - after.step - 1) % per_pass
    begin = first + batch * per_step
    return left_out.places(np.arange(begin, min(begin + per_step, left_out.kept)))


@dataclass(frozen=True)
class Passage:
    """A part of a sample: `tokens` tokens from `offset` on of a document of a file."""

    file: str  # prefix of the .bin/.idx pair
    document: int
    offset: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.file}.bin, document {self.document}, tokens {self.offset} to {self.offset + self.tokens}"


def passages(dataset: Dataset, sample: int) -> Iterator[Passage]:
    """What a sample of the order is made of, with the token after its last, which is learnt."""
    if isinstance(dataset, BlendedDataset):
        owner, sample = dataset.dataset_index[sample], int(dataset.dataset_sample_index[sample])
        dataset = dataset.datasets[owner]
    indexed = dataset.indexed
    ((first, offset, last, end),) = dataset._places(np.array([sample])).tolist()
    for place in range(first, last + 1):
        sequence = int(dataset.document_index[place])
        stop = end + dataset.config.extra if place == last else int(indexed.sequence_lengths[sequence])
        stop = min(stop, int(indexed.sequence_lengths[sequence]))
        if stop > offset:
            document = int(np.searchsorted(indexed.document_indices, sequence, side="right")) - 1
            before = indexed.sequence_lengths[indexed.document_indices[document] : sequence].sum(dtype=np.int64)
            yield Passage(str(indexed.prefix), document, int(before) + offset, stop - offset)
        offset = 0
