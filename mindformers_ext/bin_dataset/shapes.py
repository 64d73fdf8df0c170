"""How encoded documents become the sequences that are written: as they are, stitched to one length, or padded."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np


@dataclass
class Shaped:
    """Sequences to write: flat tokens, length of each sequence, number of sequences of each document.

    ``mask``, where the shape has one, is 1 on the tokens to be learnt.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    per_document: np.ndarray
    mask: np.ndarray | None = None


_NOTHING = Shaped(np.empty(0, np.uint32), np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass
class Shape:
    """Has a method ``add(tokens, lengths, per_document, mask) -> Shaped`` that takes encoded documents batch by batch.

    ``mask`` is None, or 1 on the tokens to be learnt. The counts say what did not get through, and what came to it.
    """

    has_mask: ClassVar[bool] = False
    dropped_tokens: int = field(default=0, init=False)
    truncated_documents: int = field(default=0, init=False)
    dropped_documents: int = field(default=0, init=False)
    padding_tokens: int = field(default=0, init=False)
    learnt_tokens: int = field(default=0, init=False)

    def finish(self) -> Shaped:
        return _NOTHING


class AsIs(Shape):
    """Every document stays one document; an empty one keeps its mark, as in Megatron."""

    def add(
        self, tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray, mask: np.ndarray | None = None
    ) -> Shaped:
        return Shaped(tokens, lengths, per_document)


@dataclass
class Stitch(Shape):
    """All documents end to end, cut into documents of ``length`` tokens; the rest at the very end is dropped."""

    length: int
    _rest: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32), init=False)

    def add(
        self, tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray, mask: np.ndarray | None = None
    ) -> Shaped:
        joined = np.concatenate((self._rest, tokens))
        count = len(joined) // self.length
        self._rest = joined[count * self.length :].copy()
        return Shaped(joined[: count * self.length], np.full(count, self.length), np.ones(count, np.int64))

    def finish(self) -> Shaped:
        self.dropped_tokens += len(self._rest)
        self._rest = self._rest[:0]
        return _NOTHING


@dataclass
class Pad(Shape):
    """Every document that has tokens becomes one of ``length`` tokens: cut there, or filled with ``pad``."""

    length: int
    pad: int

    def add(
        self, tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray, mask: np.ndarray | None = None
    ) -> Shaped:
        # Sentences of one document are joined: the sum of their lengths, document by document.
        owner = np.repeat(np.arange(len(per_document)), per_document)
        sizes = np.bincount(owner, weights=lengths, minlength=len(per_document)).astype(np.int64)
        sizes = sizes[sizes > 0]
        self.dropped_tokens += int(np.maximum(sizes - self.length, 0).sum())
        self.truncated_documents += int((sizes > self.length).sum())
        self.padding_tokens += int(np.maximum(self.length - sizes, 0).sum())
        table = np.full((len(sizes), self.length), self.pad, np.uint32)
        column = np.arange(self.length)
        starts = np.cumsum(sizes) - sizes
        inside = column < sizes[:, None]
        table[inside] = tokens[(starts[:, None] + column)[inside]]
        return Shaped(table.ravel(), np.full(len(sizes), self.length), np.ones(len(sizes), np.int64))


TRUNCATION = {
    "cut": "a conversation longer than a sample ends where the sample does (default)",
    "turns": "its last turns are left out until it fits",
    "drop": "it is left out",
}
# How many samples are open at once while conversations are packed.
PACKING = {"best": 64, "in-order": 1, "none": 0}


@dataclass
class Pack(Shape):
    """Conversations packed whole into documents of ``length`` tokens, with a mask on the assistant's tokens.

    Each conversation, a sequence, goes to the fullest of the open samples that has room. One that is longer than
    ``length`` meets ``truncation``; one of which nothing is learnt then is dropped. Samples are as long as the training
    sequence, so that GPTDataset's samples begin where they begin.
    """

    has_mask: ClassVar[bool] = True
    length: int
    pad: int
    truncation: str = "cut"  # of TRUNCATION
    packing: str = "best"  # of PACKING
    _open: list[list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=list, init=False)
    _room: list[int] = field(default_factory=list, init=False)
    _closed: list[list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=list, init=False)

    def add(
        self, tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray, mask: np.ndarray | None = None
    ) -> Shaped:
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends, strict=True):
            kept = self._kept(mask[start:end])
            self.truncated_documents += int(end - start > self.length and self.truncation != "drop")
            self.dropped_documents += kept == 0
            self.dropped_tokens += int(end - start - kept)
            if kept:
                self._place(tokens[start : start + kept], mask[start : start + kept])
        return self._take()

    def _kept(self, mask: np.ndarray) -> int:
        """How many tokens of a conversation a sample takes: 0 if none of them would be learnt."""
        kept = min(len(mask), self.length)
        if kept < len(mask):
            if self.truncation == "drop":
                return 0
            if self.truncation == "turns":
                ends = np.flatnonzero(mask[:kept] > mask[1 : kept + 1]) + 1
                kept = int(ends[-1]) if len(ends) else 0
        return kept if mask[:kept].any() else 0

    def _place(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        fitting = [i for i, room in enumerate(self._room) if room >= len(tokens) and self.packing != "none"]
        best = min(fitting, key=self._room.__getitem__, default=None)
        if best is None:
            if len(self._open) == max(1, PACKING[self.packing]):
                self._close(self._room.index(min(self._room)))
            self._open.append([])
            self._room.append(self.length)
            best = len(self._open) - 1
        self._open[best].append((tokens, mask))
        self._room[best] -= len(tokens)
        if self._room[best] == 0:
            self._close(best)

    def _close(self, number: int) -> None:
        self._closed.append(self._open.pop(number))
        self._room.pop(number)

    def _take(self) -> Shaped:
        tokens = np.full((len(self._closed), self.length), self.pad, np.uint32)
        mask = np.zeros((len(self._closed), self.length), np.uint8)
        for row, parts in enumerate(self._closed):
            joined = np.concatenate([part for part, _ in parts])
            tokens[row, : len(joined)] = joined
            mask[row, : len(joined)] = np.concatenate([part for _, part in parts])
            self.padding_tokens += self.length - len(joined)
        self._closed = []
        count = len(tokens)
        self.learnt_tokens += int(mask.sum())
        return Shaped(tokens.ravel(), np.full(count, self.length), np.ones(count, np.int64), mask.ravel())

    def finish(self) -> Shaped:
        while self._open:
            self._close(0)
        return self._take()
