"""What the cost model needs to know of a run: a small value that the search makes by the thousand.

A `Run` is read from a YAML; a `Plan` is its arithmetic, and may describe another system's run too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Literal

from mindformers_ext.config.model import ModelConfig
from mindformers_ext.config.run import Degrees, Run
from mindformers_ext.dryrun.pipeline import SCHEDULES
from mindformers_ext.files.json_files import read_object
from mindformers_ext.rank_compiler.graph_kernels import JOINED, JOINED_ELEMENTS

# Parts of a layer that may be computed again without the rest: select_recompute.
PARTS = ("norm", "mla_up", "attention", "swiglu", "experts")
DISPATCHERS = ("alltoall_deredundency", "alltoall", "allgather", "capacity")
TENSOR, EXPERT, DATA = "tensor parallel", "expert parallel", "data parallel"


@dataclass(frozen=True)
class Software:
    """How a system runs the model's operators; the defaults are this project's on MindSpore 2.9.

    Args:
        traffic: by part, bytes of the operators that are no products, times what fused operators move; 1 by default.
        kernels: operators launched in a MoE layer's forward pass.
        host_us: the host's time to launch one; 0 where a captured graph is replayed.
        graphed: share of the operators that a captured graph launches.
        joined_values: products of up to so many values add their gradient to its buffer themselves, grouped ones
            always; 0: none.
        accumulation_bytes: moved to add a value of the other gradients to its buffer.
        casts_weights: float32 weights are cast for every micro-batch (no copy in the compute dtype is kept).
        splits_any_axis: optimizer shards are not of the first axis only, as MindSpore's are.
        update_bytes: moved once a step for each value of the optimizer, and for each of the gradient buffers.
        gathers: times a step that split weights are gathered; FSDP gathers in every pass.
        overlaps: purposes of collectives that run beside computation of other micro-batches or layers.
        distinct_rows: a token is sent once to a rank (DeepEP), not once for each of its experts there.
        exchange_efficiency: bandwidth that the experts' exchange reaches, times what other collectives do.
        low_precision: products of linear layers run at the device's fp8 peak.
        quantization: bytes that move for each value of an operand to make it fp8.
        low_precision_attention: attention runs at the fp8 peak.
    """

    traffic: Mapping[str, float] = field(default_factory=dict)
    kernels: int = 150
    host_us: float = 0.0
    graphed: float = 0.0
    joined_values: float = inf
    accumulation_bytes: float = 10.0
    casts_weights: bool = True
    splits_any_axis: bool = False
    update_bytes: tuple[float, float] = (36.0, 12.0)
    gathers: int = 1
    overlaps: frozenset[str] = frozenset()
    distinct_rows: bool = False
    exchange_efficiency: float = 1.0
    low_precision: bool = False
    quantization: float = 4.0
    low_precision_attention: bool = False


@dataclass(frozen=True)
class Plan(Degrees):
    """A model, how it is split, and what is kept or computed again.

    Args:
        layers: decoder layers of [chunk][stage] by number; num_layers and above are MTP's.
        recomputed: layers whose forward pass runs again as a whole.
        parts: what the other layers run again.
    """

    model: ModelConfig
    device_num: int
    dp: int = 1
    cp: int = 1
    mp: int = 1
    pp: int = 1
    ep: int = 1
    batch_size: int = 1
    micro_batches: int = 1
    layers: tuple[tuple[tuple[int, ...], ...], ...] = ()
    recomputed: frozenset[int] = frozenset()
    parts: frozenset[str] = frozenset()
    schedule: str = "1f1b"
    dispatcher: Literal["allgather", "alltoall", "alltoall_deredundency", "capacity"] = "allgather"
    sequence_parallel: bool = False
    vocab_emb_dp: bool = False
    muon: bool = False  # matrices have its momentum in place of AdamW's two moments
    shard_optimizer: bool = False
    optimizer_shard_size: int = -1
    shard_gradients: bool = False
    optimizer_threshold_bytes: int = 64 * 1024
    node: int = 8  # devices that a token reaches without the network
    software: Software = field(default_factory=Software)

    @classmethod
    def of(cls, run: Run) -> "Plan":
        """The plan of a YAML; a scheduler that is not simulated, or folds the way, is taken as interleaved 1F1B."""
        held, moe = run.pipeline.layers_of, run.model.moe_config
        way = [tuple(held(*place)) for place in run.pipeline.way]
        layers = tuple(tuple(way[c * run.pp : (c + 1) * run.pp]) for c in range(run.chunks))
        return cls(
            **{name: getattr(run, name) for name in TAKEN},
            layers=layers,
            recomputed=frozenset(run.pipeline.covered(run.recompute)),
            schedule=run.scheduler if run.scheduler in SCHEDULES else "1f1b",
            dispatcher=moe.moe_token_dispatcher_type if moe.use_gmm else "capacity",
            node=moe.npu_nums_per_device,
            software=replace(MINDSPORE, overlaps=overlaps_of(run), joined_values=joined_values(run)),
            muon=getattr(run.sections.optimizer, "type", None) == "Muon",
        )

    @property
    def chunks(self) -> int:
        """Runs of layers in each stage."""
        return len(self.layers)

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch whose heads and widths lie on mp."""
        return self.batch_size * self.model.seq_length / self.cp

    @property
    def own_tokens(self) -> float:
        """Tokens of a micro-batch that a rank routes."""
        return self.tokens / self.mp

    @property
    def row_tokens(self) -> float:
        """Tokens of a micro-batch between blocks."""
        return self.tokens / (self.mp if self.sequence_parallel else 1)

    def layers_of(self, stage: int) -> list[int]:
        """Decoder layers of `stage`; num_layers and above are MTP's."""
        return [layer for chunk in self.layers for layer in chunk[stage]]

    @cached_property
    def last(self) -> tuple[int, int]:
        """Chunk and stage of the last layer: of the head and MTP."""
        return self.chunks - 1, self.pp - 1


def joined_values(run: Run) -> float:
    """As `Software.joined_values`: what the backend's passes join where the flags enable them (docs/graph.md)."""
    flags = run.sections.context.graph_kernel_flags or ""
    return JOINED_ELEMENTS if JOINED["GroupedMatmul"] in flags else 0


def overlaps_of(run: Run) -> frozenset[str]:
    """Purposes of collectives that the switches of parallel_speed_up.json run beside computation."""
    ascend = run.sections.context.ascend_config
    path = ascend.parallel_speed_up_json_path if ascend else None
    switches = read_object(Path(path)) if path and Path(path).is_file() else {}
    return frozenset(purpose for switch, purpose in SWITCHES.items() if switches.get(switch))


SWITCHES = {  # both names that MindSpore 2.9 has for each
    "pp_1f1b_overlap": EXPERT,
    "compute_communicate_fusion_level": TENSOR,
    "computation_communication_fusion_level": TENSOR,
    "enable_grad_comm_opt": DATA,
    "grad_computation_allreduce_overlap": DATA,
    "enable_opt_shard_comm_opt": DATA,
    "computation_allgather_overlap": DATA,
}


def placed(model: ModelConfig, counts: list[list[int]]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Decoder layers of [chunk][stage] in the model's order, as many as `counts` says, MTP's behind the last."""
    layers, first = [], 0
    for row in counts:
        layers.append([])
        for count in row:
            layers[-1].append(tuple(range(first, first + count)))
            first += count
    layers[-1][-1] += tuple(range(model.num_layers, model.layers_in_all))
    return tuple(map(tuple, layers))


TAKEN = (  # what a Run says by the same name
    *("model", "device_num", "dp", "cp", "mp", "pp", "ep", "batch_size", "micro_batches", "sequence_parallel"),
    *("vocab_emb_dp", "shard_optimizer", "optimizer_shard_size", "shard_gradients", "optimizer_threshold_bytes"),
)
# Counted in a compiled rank with rank_compiler/roofline.py: two micro-batches of hidden 7168, 128 heads, 256 experts,
# four layers and MTP on dp4 mp4 pp2 ep8 (benchmarks/graph). Attention turns and joins; the loss is not fused.
MINDSPORE = Software(
    traffic={
        "norm": 1.7,
        "residual": 1.0,
        "mla_up": 2.8,
        "router": 3.2,
        "dispatch": 0.5,
        "swiglu": 1.7,
        "head": 2.3,
        "mtp": 1.0,
    },
    kernels=200,
    joined_values=0,
    update_bytes=(141.0, 66.0),
)
