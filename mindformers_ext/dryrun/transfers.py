"""The collectives that a strategy implies, from arithmetic alone: what a rank moves per micro-batch and per step.

The layout is that of research/deepseek3/sharding.py and layers/moe_dispatch.py. What the compiler really
inserts is read from its graph (`mindir.collectives`); the tests compare the two where they must agree.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mindformers_ext.config.run import DTYPE_BYTES
from mindformers_ext.dryrun.device_profile import DeviceProfile
from mindformers_ext.dryrun.parameters import Weight, gathered_bytes, optimizer_ways, parameter_bytes
from mindformers_ext.dryrun.plan import Plan

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
        """Time of all calls when nothing hides them.

        A group on several nodes works in two levels: every member sends its share over its own network port, while the
        members of a node spread what they have over the node's links; both run at once.
        """
        call = profile.latency_us * 1e-6
        if self.kind in ("Send", "Receive"):
            rate = profile.across_bytes_per_s if self.across_nodes(profile) else profile.node_bytes_per_s(2)
            return self.calls * (self.bytes / rate + call)
        size = self.group_size
        stride = max((self.span - 1) // max(size - 1, 1), 1)
        inside = min(size, max(profile.devices_per_node // stride, 1))
        if self.kind in EXCHANGES:  # node after node
            near, far, rounds = (inside - 1) / size, (size - inside) / size, size / inside
        else:
            near, far, rounds = (inside - 1) / inside, (size - inside) / size / inside, 1 + (size > inside)
        times = 2 if self.kind == "AllReduce" else 1
        slowest = max(near / profile.node_bytes_per_s(inside), far / profile.across_bytes_per_s)
        return self.calls * (times * self.bytes * slowest + call * rounds)


def wire_factor(kind: str, group_size: int) -> float:
    """Bytes a rank sends per byte of the collective's whole tensor."""
    if kind in ("Send", "Receive"):
        return 1.0
    share = (group_size - 1) / group_size
    return 2 * share if kind == "AllReduce" else share


def layer_forward(plan: Plan, layer: int) -> list[Transfer]:
    """Collectives of one layer's forward pass for one micro-batch, in order within each purpose."""
    exchanged = plan.model.is_moe_layer(layer) and plan.ep > 1
    return [*_tensor_parallel(plan, layer), *_context_parallel(plan), *(_expert_parallel(plan) if exchanged else [])]


def layer_backward(plan: Plan, layer: int, recomputed: bool) -> list[Transfer]:
    """Collectives of one layer's backward pass for one micro-batch, with those of its forward pass when it runs again.

    The backward pass mirrors the forward one; recomputation leaves out what only makes the layer's output: what
    gathers or sums the FFN's parts. An all-to-all is repeated: the gradient of the router needs the experts' rows.
    """
    forward = layer_forward(plan, layer)
    found = [replace(t, kind=MIRRORED.get(t.kind, t.kind)) for t in forward]
    if recomputed:
        last = {t.purpose: t for t in forward if t.kind not in EXCHANGES}
        if not _splits_ffn_width(plan, layer):
            last.pop("tensor parallel", None)
        found += [replace(t, calls=t.calls - (t is last.get(t.purpose))) for t in forward]
    return found


def _splits_ffn_width(plan: Plan, layer: int) -> bool:
    """True for a layer with a dense FFN or shared experts whose width lies on mp."""
    moe = plan.model.moe_config
    return not plan.model.is_moe_layer(layer) or (moe.shared_expert_num > 0 and moe.shared_expert_split == "width")


EXCHANGES = ("AlltoAll", "AlltoAllV")


def embedding_step(plan: Plan) -> list[Transfer]:
    """Sums over the parts of a vocabulary split on mp, and of their gradient: for the model and MTP."""
    model = plan.model
    if plan.mp == 1 or plan.vocab_emb_dp:
        return []
    size = plan.batch_size * model.seq_length / plan.cp * model.hidden_size * DTYPE_BYTES[model.compute_dtype]
    kinds = ("ReduceScatter", "AllGather") if plan.sequence_parallel else ("AllReduce", "AllReduce")
    return [Transfer("tensor parallel", kind, plan.mp, plan.mp, size, 1 + model.mtp_depth) for kind in kinds]


def head_step(plan: Plan) -> list[Transfer]:
    """Hidden states for the output heads, whose rows lie on mp, and their gradient: for the model and MTP."""
    model = plan.model
    if plan.mp == 1:
        return []
    size = plan.batch_size * model.seq_length / plan.cp * model.hidden_size * DTYPE_BYTES[model.compute_dtype]
    kinds = ("AllGather", "ReduceScatter") if plan.sequence_parallel else ("AllReduce",)
    return [Transfer("tensor parallel", kind, plan.mp, plan.mp, size, 1 + model.mtp_depth) for kind in kinds]


def _tensor_parallel(plan: Plan, layer: int) -> Iterator[Transfer]:
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


def _context_parallel(plan: Plan) -> Iterator[Transfer]:
    """Keys and values of the whole sequence for each device's queries."""
    if plan.cp > 1:
        model = plan.model
        widths = model.num_heads / plan.mp * (model.qk_head_dim + model.v_head_dim)
        size = plan.batch_size * model.seq_length * widths * DTYPE_BYTES[model.compute_dtype]
        yield Transfer("context parallel", "AllGather", plan.cp, (plan.cp - 1) * plan.mp + 1, size, 1)


def _expert_parallel(plan: Plan) -> Iterator[Transfer]:
    model, moe = plan.model, plan.model.moe_config
    element = DTYPE_BYTES[model.compute_dtype]
    tokens = plan.batch_size * model.seq_length / (plan.cp * plan.mp)

    def transfer(kind: str, size: float, calls: int = 1, group: int = plan.ep, span: int = plan.ep) -> Transfer:
        return Transfer("expert parallel", kind, group, span, size, calls)

    row, chosen = model.hidden_size * element, moe.num_experts_chosen
    choices = (tokens + 1) * chosen  # of one token more: layers/moe_dispatch.py
    nodes = max(plan.ep // plan.node, 1)
    between = {"group": nodes, "span": plan.ep - plan.node + 1}
    if plan.dispatcher == "allgather":
        gathered = tokens * plan.ep
        yield transfer("AllGather", gathered * row)
        yield transfer("AllGather", gathered * chosen * FLOAT_BYTES)
        yield transfer("AllGather", gathered * chosen * ID_BYTES)
        yield transfer("ReduceScatter", gathered * row)
    elif plan.dispatcher == "capacity":
        yield transfer("AlltoAll", capacity_rows(plan) * row, 2)
    elif plan.software.distinct_rows:
        if nodes > 1:  # once for each node; DeepEP spreads rows inside it while others arrive
            yield transfer("AlltoAll", tokens * distinct_parts(moe, nodes) * row, 2, **between)
        else:
            yield transfer("AlltoAll", tokens * distinct_parts(moe, plan.ep) * row, 2)
    elif plan.dispatcher == "alltoall" or nodes == 1:
        yield transfer("AlltoAll", moe.expert_num * FLOAT_BYTES)
        yield transfer("AlltoAllV", choices * ID_BYTES)
        yield transfer("AlltoAllV", choices * row, 2)
    else:  # a token crosses the network once for each node, then goes to its ranks there
        inside = {"group": plan.node, "span": plan.node}
        crossing = (tokens + 1) * distinct_parts(moe, nodes)
        yield transfer("AlltoAll", nodes * FLOAT_BYTES, **between)
        yield transfer("AlltoAllV", crossing * chosen * FLOAT_BYTES, 2, **between)  # gates and ids
        yield transfer("AlltoAllV", crossing * row, 2, **between)
        yield transfer("AlltoAll", moe.expert_num // nodes * FLOAT_BYTES, **inside)
        yield transfer("AlltoAllV", choices * ID_BYTES, **inside)
        yield transfer("AlltoAllV", choices * row, 2, **inside)


def distinct_parts(moe, parts: int) -> float:
    """How many of `parts` equal parts of the experts a token's choices lie in, on average over balanced tokens.

    A token chooses its experts in topk_group of n_group groups only, which a part contains or lies in.
    """
    group, chosen = moe.expert_num // moe.n_group, moe.num_experts_chosen
    part, eligible = moe.expert_num // parts, group * moe.topk_group
    groups = max(part // group, 1)  # that a part touches
    found = 0.0
    for hit in range(1, min(groups, moe.topk_group) + 1):
        ways = math.comb(groups, hit) * math.comb(moe.n_group - groups, moe.topk_group - hit)
        inside = hit * min(part, group)
        missed = math.comb(eligible - inside, chosen) / math.comb(eligible, chosen)
        found += ways / math.comb(moe.n_group, moe.topk_group) * (1 - missed)
    return parts * found


def capacity_rows(plan: Plan) -> float:
    """Rows that a rank's tokens may fill over all experts, padding included (capacity dispatch)."""
    moe = plan.model.moe_config
    tokens = plan.batch_size * plan.model.seq_length / (plan.cp * plan.mp)
    group = min(moe.expert_group_size or plan.model.seq_length, tokens)
    capacity = min(math.ceil(moe.num_experts_chosen * group * moe.capacity_factor / moe.expert_num), group)
    return tokens / group * capacity * moe.expert_num


def mtp_embedding(plan: Plan) -> Transfer:
    """What the first stage, which holds the embedding, sends to the last for multi-token prediction."""
    return replace(stage_boundary(plan), span=plan.device_num, calls=plan.model.mtp_depth)


def stage_boundary(plan: Plan) -> Transfer:
    """What a stage sends to the next for one micro-batch."""
    model = plan.model
    share = plan.cp * (plan.mp if plan.sequence_parallel else 1)
    size = plan.batch_size * model.seq_length / share * model.hidden_size * DTYPE_BYTES[model.compute_dtype]
    return Transfer("pipeline parallel", "Send", 2, plan.devices_per_stage + 1, size, 1)


def gradient_exchange(plan: Plan, weights: list[Weight]) -> list[Transfer]:
    """Once a step: gradients over the copies of every weight, and sharded weights gathered again.

    Sharded accumulation buffers take each micro-batch's gradients, so these are scattered as often.
    """
    stage = plan.devices_per_stage
    scattered = plan.micro_batches if plan.shard_gradients else 1
    gathers = plan.software.gathers
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
            found.append(
                Transfer("data parallel", "AllGather", ways, span, values * gathered_bytes(weight, plan), gathers)
            )
            found.append(Transfer("data parallel", "ReduceScatter", ways, span, size, scattered))
        if copies // ways > 1:
            found.append(Transfer("data parallel", "AllReduce", copies // ways, stage, size / ways, 1))
    return found


def _stride(plan: Plan, weight: Weight) -> int:
    """Distance between ranks that hold the same slice."""
    return {1: 1, plan.mp: plan.mp, plan.ep: plan.ep}[weight.ways]
