"""As one simulated Ascend rank (environment of stand_in_cann): compile a toy and say what its network holds.

    python compiled_rank_state.py DEGREES OUT

Writes OUT/compiled.json and OUT/held.json: the slots that `network.slots_of` finds, and whether loading by them gave
every parameter its own part of the whole value.
"""

import json
import sys
from pathlib import Path

import numpy as np
from cpu_parallel.toy_transformer import build

from mindformers_ext.rank_compiler.compile_rank import compile_cell, start_as_rank
from mindformers_ext.sharded_checkpoint.network import load_into, pieces_of, slots_of, state_of
from mindformers_ext.sharded_checkpoint.shards import Slot


class Counting:
    """Every parameter counts its elements, so that each part is told from the others."""

    path = Path("memory")

    def __init__(self, slots: dict[str, Slot]):
        self.slots = slots

    def names(self):
        return list(self.slots)

    def read(self, name: str) -> np.ndarray:
        shape = self.slots[name].full_shape
        return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def main() -> None:
    degrees, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    start_as_rank()
    cell, inputs = build(**degrees)
    compile_cell(cell, inputs, out, values=True)
    slots = slots_of(cell, state_of(cell))
    source = Counting(slots)
    load_into(cell, state_of(cell), source)
    loaded = all(
        np.array_equal(piece.array, source.read(name)[tuple(slice(a, b) for a, b in piece.slot.ranges)])
        for name, piece in pieces_of(cell).items()
    )
    held = {name: [slot.full_shape, slot.ranges, slot.copy] for name, slot in slots.items()}
    (out / "held.json").write_text(json.dumps({"slots": held, "loaded": loaded}))


if __name__ == "__main__":
    main()
