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
    """Has a method ``add(tokens, lengths, per_document) -> Shaped`` that takes encoded documents batch by batch.

    ``dropped_tokens`` and ``truncated_documents`` count what did not get through.
    """

    has_mask: ClassVar[bool] = False
    dropped_tokens: int = field(default=0, init=False)
    truncated_documents: int = field(default=0, init=False)

    def finish(self) -> Shaped:
        return _NOTHING


class AsIs(Shape):
    """Every document stays one document; an empty one keeps its mark, as in Megatron."""

    def add(self, tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray) -> Shaped:
        return Shaped(tokens, lengths, per_document)


@dataclass
class Stitch(Shape):
    """All documents end to end, cut into documents of ``length`` tokens; the rest at the very end is dropped."""

    length: int
    _rest: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))

    def add(self, tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray) -> Shaped:
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

    def add(self, tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray) -> Shaped:
        # Sentences of one document are joined: the sum of their lengths, document by document.
        owner = np.repeat(np.arange(len(per_document)), per_document)
        sizes = np.bincount(owner, weights=lengths, minlength=len(per_document)).astype(np.int64)
        sizes = sizes[sizes > 0]
        self.dropped_tokens += int(np.maximum(sizes - self.length, 0).sum())
        self.truncated_documents += int((sizes > self.length).sum())
        table = np.full((len(sizes), self.length), self.pad, np.uint32)
        column = np.arange(self.length)
        starts = np.cumsum(sizes) - sizes
        inside = column < sizes[:, None]
        table[inside] = tokens[(starts[:, None] + column)[inside]]
        return Shaped(table.ravel(), np.full(len(sizes), self.length), np.ones(len(sizes), np.int64))


@dataclass
class Pack(Shape):
    """Conversations packed whole into documents of ``length`` tokens, with a mask on the assistant's tokens.

    Sequences of a document are by turns prompt and answer. Each conversation goes to the fullest of the open samples
    that has room; one longer than ``length`` is cut there. Samples are as long as the training sequence, so that
    GPTDataset's samples begin where they begin.
    """

    has_mask: ClassVar[bool] = True
    OPEN_SAMPLES: ClassVar[int] = 64
    length: int
    pad: int
    _open: list[list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=list)
    _room: list[int] = field(default_factory=list)
    _closed: list[list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=list)

    def add(self, tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray) -> Shaped:
        is_answer = np.arange(len(lengths)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
        mask = np.repeat((is_answer % 2).astype(np.uint8), lengths)
        ends = np.concatenate(([0], np.cumsum(lengths)))[np.concatenate(([0], np.cumsum(per_document)))]
        for start, end in zip(ends, ends[1:], strict=False):
            if end - start > self.length:
                self.truncated_documents += 1
                self.dropped_tokens += int(end - start - self.length)
                end = start + self.length
            if mask[start:end].any():
                self._place(tokens[start:end], mask[start:end])
            else:
                self.dropped_tokens += int(end - start)
        return self._take()

    def _place(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        fitting = [i for i, room in enumerate(self._room) if room >= len(tokens)]
        best = min(fitting, key=self._room.__getitem__, default=None)
        if best is None:
            if len(self._open) == self.OPEN_SAMPLES:
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
        self._closed = []
        count = len(tokens)
        return Shaped(tokens.ravel(), np.full(count, self.length), np.ones(count, np.int64), mask.ravel())

    def finish(self) -> Shaped:
        while self._open:
            self._close(0)
        return self._take()
