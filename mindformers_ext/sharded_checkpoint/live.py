"""The weights of a network that is training, read whole and one at a time from the ranks that hold them.

For a rollout engine that gets new weights between two steps, without a checkpoint on disk. Every rank must ask for the
same parts in the same order, as the parts travel by collectives; each gets them all.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops

from mindformers_ext.collectives import collectives
from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.layout import Piece, intersect
from mindformers_ext.sharded_checkpoint.network import is_lowered, is_split, pieces_of

Sum = Callable[[np.ndarray], np.ndarray]  # over all ranks


class LiveParameter:
    """A parameter of the whole model wherever its parts lie: `parameter[2:4]` is that part in float32, new memory."""

    def __init__(self, piece: Piece | None, shape: tuple[int, ...], add: Sum | None):
        self.piece, self.shape, self.add = piece, shape, add

    def __getitem__(self, index: Any) -> np.ndarray:
        if self.add is None:
            return np.array(self.piece.array[index], np.float32)
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (len(self.shape) - len(index))
        wanted = tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
        # Each element comes from one rank, and zero from the others, so the sum is exact. It is float32 because a rank
        # does not know the type of a weight that another pipeline stage holds.
        result = np.zeros([stop - start for start, stop in wanted], np.float32)
        if self.piece is not None and self.piece.slot.copy == 0:
            held = self.piece.slot.ranges
            common = intersect(wanted, held)
            if common is not None:
                here, there = (
                    tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))
                    for box in (wanted, held)
                )
                result[here] = self.piece.array[there]
        return self.add(result)


class LiveWeights:
    """A network's weights by name.

    Args:
        network: a model, or its training step; one that is split over devices has been compiled.
        shapes: of the whole model's weights, also of those that other pipeline stages hold.
    """

    def __init__(self, network: nn.Cell, shapes: Mapping[str, tuple[int, ...]]):
        self.pieces, self.shapes = pieces_of(network), shapes
        self.add: Sum | None = None
        if is_lowered(network):
            ranks = range(network.job.world_size)
            self.add = lambda array: collectives.all_reduce(array, ranks)
        elif is_split():
            reduce = ops.AllReduce()
            self.add = lambda array: reduce(Tensor(array)).asnumpy()

    def names(self) -> Iterable[str]:
        """Of the whole model's weights."""
        return self.shapes

    def read(self, name: str) -> LiveParameter:
        """One weight; nothing is gathered before it is indexed. Raises ConfigError when the network has no such."""
        if self.add is None and name not in self.pieces:
            raise ConfigError(
                f"{name}: the network has no such weight; make the cells around it with auto_prefix=False"
            )
        return LiveParameter(self.pieces.get(name), self.shapes[name], self.add)
