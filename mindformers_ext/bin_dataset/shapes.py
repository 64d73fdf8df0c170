"""How encoded documents become the sequences that are written: as they are, stitched to one length, or padded."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass
class Shaped:
    """Sequences to write: flat tokens, length of each sequence, number of sequences of each document."""

    tokens: np.ndarray
    lengths: np.ndarray
    per_document: np.ndarray


class Shape(Protocol):
    """Takes encoded documents batch by batch. ``dropped`` and ``truncated`` count what did not get through."""

    dropped_tokens: int
    truncated_documents: int

    def add(self, tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray) -> Shaped: ...

    def finish(self) -> Shaped: ...


_NOTHING = Shaped(np.empty(0, np.uint32), np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass
class AsIs:
    """Every document stays one document; an empty one keeps its mark, as in Megatron."""

    dropped_tokens: int = 0
    truncated_documents: int = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray) -> Shaped:
        return Shaped(tokens, lengths, per_document)

    def finish(self) -> Shaped:
        return _NOTHING


@dataclass
class Stitch:
    """All documents end to end, cut into documents of ``length`` tokens; the rest at the very end is dropped."""

    length: int
    dropped_tokens: int = 0
    truncated_documents: int = 0
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
class Pad:
    """Every document that has tokens becomes one of ``length`` tokens: cut there, or filled with ``pad``."""

    length: int
    pad: int
    dropped_tokens: int = 0
    truncated_documents: int = 0

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

    def finish(self) -> Shaped:
        return _NOTHING
