"""The collectives that a strategy implies, from arithmetic alone: what a rank moves per micro-batch and per step.

The layout is that of research/deepseek3/sharding.py and layers/moe_dispatch.py. What the compiler really
inserts is read from its graph (`mindir.collectives`); the tests compare the two where they must agree.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mindformers_ext.config.run import DTYPE_BYTES, Run
from mindformers_ext.dryrun.device_profile import DeviceProfile
from mindformers_ext.dryrun.parameters import Weight, gathered_bytes, optimizer_ways, parameter_bytes

ID_BYTES = 4
MIRRORED = {"AllGather": "ReduceScatter", "ReduceScatter": "AllGather"}  # a collective's own gradient
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Transfer:
    """`calls` collectives of one kind; `bytes` is the whole tensor of one call, as in `mindir.Collective`."""

    purpose: str  # tensor, expert, data or pipeline parallelism
    kind: str
    group_size: int
    span: int  # distance in ranks from the group's first to its last member, plus one
    bytes: float
    calls: float

    def across_nodes(self, profile: DeviceProfile) -> bool:
        """True when the group leaves a node."""
        return self.span > profile.devices_per_node

    @property
    def wire_bytes(self) -> float:
        """Bytes that one rank sends for all calls, or receives, with ring or pairwise algorithms."""
        return self.calls * self.bytes * wire_factor(self.kind, self.group_size)

    @property
    def sent_bytes(self) -> float:
        """Bytes that one rank sends for all calls."""
        return 0.0 if self.kind == "Receive" else self.wire_bytes

    def seconds(self, profile: DeviceProfile) -> float:
        """Time of all calls when nothing hides them."""
        rate = profile.link_bytes_per_s(self.across_nodes(profile), self.group_size)
        return self.wire_bytes / rate + self.calls * profile.latency_us * 1e-6


def wire_factor(kind: str, group_size: int) -> float:
    """Bytes a rank sends per byte of the collective's whole tensor."""
    if kind in ("Send", "Receive"):
        return 1.0
    share = (group_size - 1) / group_size
    return 2 * share if kind == "AllReduce" else share


def layer_forward(plan: Run, layer: int) -> list[Transfer]:
    """Collectives of one layer's forward pass for one micro-batch, in order within each purpose."""
    return [*_tensor_parallel(plan, layer), *_expert_parallel(plan, layer)]


def layer_step(plan: Run, layer: int, recomputed: bool) -> list[Transfer]:
    """Collectives of one layer for one micro-batch: forward, backward, and forward again when it is recomputed.

    The backward pass mirrors the forward one; recomputation leaves out what only makes the layer's output: what
    gathers or sums the FFN's parts. An all-to-all is repeated: the gradient of the router needs the experts' rows.
    """
    forward = layer_forward(plan, layer)
    found = forward + [replace(t, kind=MIRRORED.get(t.kind, t.kind)) for t in forward]
    if recomputed:
        last = {t.purpose: t for t in forward if t.kind not in ("AlltoAll", "AlltoAllV")}
        if not _splits_ffn_width(plan, layer):
            last.pop("tensor parallel", None)
        found += [replace(t, calls=t.calls - (t is last.get(t.purpose))) for t in forward]
    return found


def _splits_ffn_width(plan: Run, layer: int) -> bool:
    """True for a layer with a dense FFN or shared experts whose width lies on mp."""
    moe = plan.model.moe_config
    return not plan.model.is_moe_layer(layer) or (moe.shared_expert_num > 0 and moe.shared_expert_split == "width")


def embedding_step(plan: Run) -> list[Transfer]:
    """Sums over the parts of a vocabulary split on mp, and of their gradient: for the model and MTP."""
    model = plan.model
    if plan.mp == 1 or plan.vocab_emb_dp:
        return []
    size = plan.batch_size * model.seq_length / plan.cp * model.hidden_size * DTYPE_BYTES[model.compute_dtype]
    kinds = ("ReduceScatter", "AllGather") if plan.sequence_parallel else ("AllReduce", "AllReduce")
    return [Transfer("tensor parallel", kind, plan.mp, plan.mp, size, 1 + model.mtp_depth) for kind in kinds]


def head_step(plan: Run) -> list[Transfer]:
    """Hidden states for the output heads, whose rows lie on mp, and their gradient: for the model and MTP."""
    model = plan.model
    if plan.mp == 1:
        return []
    size = plan.batch_size * model.seq_length / plan.cp * model.hidden_size * DTYPE_BYTES[model.compute_dtype]
    kinds = ("AllGather", "ReduceScatter") if plan.sequence_parallel else ("AllReduce",)
    return [Transfer("tensor parallel", kind, plan.mp, plan.mp, size, 1 + model.mtp_depth) for kind in kinds]


def _tensor_parallel(plan: Run, layer: int) -> Iterator[Transfer]:
    if plan.mp == 1:
        return
    model = plan.model
    rows = plan.batch_size * model.seq_length / plan.cp * DTYPE_BYTES[model.compute_dtype]
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    dense = _splits_ffn_width(plan, layer)

    def transfer(kind: str, width: int, calls: int = 1) -> Transfer:
        return Transfer("tensor parallel", kind, plan.mp, plan.mp, rows * width, calls)

    if plan.sequence_parallel:
        if model.q_lora_rank is None:
            yield transfer("AllGather", model.hidden_size)
        yield transfer("AllGather", latents)
        yield transfer("ReduceScatter", model.hidden_size)
        if dense:
            yield transfer("AllGather", model.hidden_size)
            yield transfer("ReduceScatter", model.hidden_size)
    else:
        yield transfer("AllReduce", model.hidden_size, 2 if dense else 1)


def _expert_parallel(plan: Run, layer: int) -> Iterator[Transfer]:
    model, moe = plan.model, plan.model.moe_config
    if not model.is_moe_layer(layer) or plan.ep == 1:
        return
    element = DTYPE_BYTES[model.compute_dtype]
    tokens = plan.batch_size * model.seq_length / (plan.cp * plan.mp)

    def transfer(kind: str, size: float, calls: int = 1) -> Transfer:
        return Transfer("expert parallel", kind, plan.ep, plan.ep, size, calls)

    if moe.use_gmm and moe.moe_token_dispatcher_type == "alltoall":
        choices = (tokens + 1) * moe.num_experts_chosen  # of one token more: layers/moe_dispatch.py
        yield transfer("AlltoAll", moe.expert_num * FLOAT_BYTES)
        yield transfer("AlltoAllV", choices * ID_BYTES)
        yield transfer("AlltoAllV", choices * model.hidden_size * element, 2)
    elif moe.use_gmm:
        gathered = tokens * plan.ep
        yield transfer("AllGather", gathered * model.hidden_size * element)
        yield transfer("AllGather", gathered * moe.num_experts_chosen * FLOAT_BYTES)
        yield transfer("AllGather", gathered * moe.num_experts_chosen * ID_BYTES)
        yield transfer("ReduceScatter", gathered * model.hidden_size * element)
    else:
        yield transfer("AlltoAll", capacity_rows(plan) * model.hidden_size * element, 2)


def capacity_rows(plan: Run) -> float:
    """Rows that a rank's tokens may fill over all experts, padding included (capacity dispatch)."""
    moe = plan.model.moe_config
    tokens = plan.batch_size * plan.model.seq_length / (plan.cp * plan.mp)
    group = min(moe.expert_group_size or plan.model.seq_length, tokens)
    capacity = min(math.ceil(moe.num_experts_chosen * group * moe.capacity_factor / moe.expert_num), group)
    return tokens / group * capacity * moe.expert_num


def mtp_embedding(plan: Run) -> Transfer:
    """What the first stage, which holds the embedding, sends to the last for multi-token prediction."""
    return replace(stage_boundary(plan), span=plan.device_num, calls=plan.model.mtp_depth)


def stage_boundary(plan: Run) -> Transfer:
    """What a stage sends to the next for one micro-batch."""
    model = plan.model
    share = plan.cp * (plan.mp if plan.sequence_parallel else 1)
    size = plan.batch_size * model.seq_length / share * model.hidden_size * DTYPE_BYTES[model.compute_dtype]
    return Transfer("pipeline parallel", "Send", 2, plan.devices_per_stage + 1, size, 1)


def gradient_exchange(plan: Run, weights: list[Weight]) -> list[Transfer]:
    """Once a step: gradients over the copies of every weight, and sharded weights gathered again.

    Sharded accumulation buffers take each micro-batch's gradients, so these are scattered as often.
    """
    stage = plan.devices_per_stage
    scattered = plan.micro_batches if plan.shard_gradients else 1
    found = []
    for weight in weights:
        copies = stage // weight.ways
        if copies == 1 or not weight.trainable:
            continue
        values = weight.size // weight.ways
        size = values * parameter_bytes(weight, plan)
        ways = optimizer_ways(weight, plan)
        if ways > 1:
            # Shards are neighbours among the copies: consecutive ranks when the weight is whole on every rank.
            span = (ways - 1) * _stride(plan, weight) + 1
            found.append(Transfer("data parallel", "AllGather", ways, span, values * gathered_bytes(weight, plan), 1))
            found.append(Transfer("data parallel", "ReduceScatter", ways, span, size, scattered))
        if copies // ways > 1:
            found.append(Transfer("data parallel", "AllReduce", copies // ways, stage, size / ways, 1))
    return found


def _stride(plan: Run, weight: Weight) -> int:
    """Distance between ranks that hold the same slice."""
    return {1: 1, plan.mp: plan.mp, plan.ep: plan.ep}[weight.ways]
