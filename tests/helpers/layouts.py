"""A small model spread over ranks in many ways, written down as the rank compiler does, and its values in numpy."""

from dataclasses import dataclass, field
from math import prod

import numpy as np

from mindformers_ext.sharded_checkpoint.layout import Meta, Piece, compiled_slots
from mindformers_ext.sharded_checkpoint.shards import Slot
from mindformers_ext.sharded_checkpoint.writer import Saver

VOCAB, HIDDEN, EXPERTS, LAYERS = 16, 8, 4, 4
STATES = ("adam_m.", "adam_v.")
# tensor axis that each device axis splits: "mp" model parallel, "ep" experts
SPLITS = {"q_proj.weight": ("mp", None), "o_proj.weight": (None, "mp"), "experts.down_proj": ("ep", None, None)}


@dataclass(frozen=True)
class Degrees:
    """A layout; `first_layers` gives the first layer of every pipeline stage, `shard` optimizer parallelism."""

    dp: int = 1
    mp: int = 1
    ep: int = 1
    first_layers: tuple[int, ...] = (0,)
    shard: int = 1
    name: str = field(default="", compare=False)

    @property
    def devices(self) -> int:
        """Ranks of one stage."""
        return self.dp * self.mp

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.devices * len(self.first_layers)


LAYOUTS = [
    Degrees(name="single"),
    Degrees(dp=2, name="dp2"),
    Degrees(mp=4, name="mp4"),
    Degrees(dp=2, mp=2, name="dp2-mp2"),
    Degrees(dp=4, ep=4, shard=4, name="dp4-ep4-optimizer4"),
    Degrees(dp=2, mp=2, ep=2, shard=2, name="dp2-mp2-ep2-optimizer2"),
    Degrees(dp=4, shard=2, name="dp4-optimizer2"),
    Degrees(mp=2, first_layers=(0, 2), name="mp2-pp2"),
    Degrees(dp=2, ep=2, first_layers=(0, 1), shard=2, name="dp2-ep2-pp2-offset-optimizer"),
    Degrees(first_layers=(0, 1, 2, 3), name="pp4"),
]


def shapes() -> dict[str, tuple[int, ...]]:
    """Every weight and its shape."""
    found = {"embed_tokens.weight": (VOCAB, HIDDEN), "norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        found |= {
            f"layers.{i}.q_proj.weight": (2 * HIDDEN, HIDDEN),
            f"layers.{i}.o_proj.weight": (HIDDEN, 2 * HIDDEN),
            f"layers.{i}.experts.down_proj": (EXPERTS, HIDDEN, 6),
        }
    return found


def values() -> dict[str, np.ndarray]:
    """Every parameter's value: weights, optimizer states, the step counter."""
    rng = np.random.default_rng(5)
    names = [prefix + name for prefix in ("", *STATES) for name in shapes()]
    found = {
        name: rng.standard_normal(shapes()[name.removeprefix("adam_m.").removeprefix("adam_v.")]) for name in names
    }
    return {name: value.astype(np.float32) for name, value in found.items()} | {"global_step": np.array([7], np.int32)}


def stage_of(name: str, degrees: Degrees) -> int:
    """The pipeline stage that holds a weight; the embedding is on the first, the norm on the last."""
    if "layers." not in name:
        return 0 if name.startswith("embed") else len(degrees.first_layers) - 1
    layer = int(name.split(".")[1])
    return max(s for s, first in enumerate(degrees.first_layers) if first <= layer)


def compiled(degrees: Degrees, rank: int) -> dict:
    """`compiled.json` of a rank."""
    layouts, parameters = {}, {"global_step": {"shape": [1]}, "layers.0.gate.expert_load": {"shape": [EXPERTS]}}
    for name, shape in shapes().items():
        if stage_of(name, degrees) != rank // degrees.devices:
            continue
        kind = next((split for end, split in SPLITS.items() if name.endswith(end)), (None,) * len(shape))
        matrix, axes = [degrees.dp, degrees.mp], {"mp": 0}
        if "ep" in kind:
            matrix, axes = [degrees.devices // degrees.ep, degrees.ep], {"ep": 0}
        sizes = {None: 1, "mp": degrees.mp, "ep": degrees.ep}
        stored = [size // sizes[axis] for size, axis in zip(shape, kind, strict=True)]
        copies = prod(matrix) // prod(sizes[axis] for axis in kind)
        if degrees.shard <= copies and stored[0] % degrees.shard == 0:
            stored[0] //= degrees.shard
        layouts[name] = {
            "device_matrix": matrix,
            "tensor_map": [-1 if axis is None else axes[axis] for axis in kind],
            "full_shape": list(shape),
        }
        parameters |= {prefix + name: {"shape": stored} for prefix in ("", *STATES)}
    return {"rank": rank, "device_num": degrees.ranks, "layouts": layouts, "parameters": parameters}


def slots(degrees: Degrees) -> list[dict[str, Slot]]:
    """What every rank holds."""
    return [compiled_slots(compiled(degrees, rank)) for rank in range(degrees.ranks)]


def cut(value: np.ndarray, slot: Slot) -> np.ndarray:
    """The part of a whole value that a slot stands for."""
    return value[tuple(slice(begin, end) for begin, end in slot.ranges)]


def save(root, degrees: Degrees, step: int = 7, parameters: dict | None = None, **meta) -> None:
    """Save as the ranks of a layout do; the last ranks first, as the first one waits."""
    parameters = values() if parameters is None else parameters
    for rank, own in reversed(list(enumerate(slots(degrees)))):
        pieces = {name: Piece(np.ascontiguousarray(cut(parameters[name], slot)), slot) for name, slot in own.items()}
        Saver(root, rank, degrees.ranks).save(Meta(step, degrees.ranks, **meta), pieces, {"rank": rank})
