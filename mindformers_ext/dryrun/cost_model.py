"""Estimated memory, step time and MFU of a plan: arithmetic over a device profile, a few milliseconds per plan.

The estimate ranks strategies and says what bounds them. What it was held against, and its errors: docs/plans.md.

- operators.py: every operator of a layer is a product or moves bytes; both have a roofline.
- transfers.py: collectives, over a node's links and the network.
- pipeline.py: the passes of all stages in the order of the schedule.
- Collectives stand in the way of computation but for the purposes in `Software.overlaps`. A stage's gradients are
  exchanged when its last backward pass ends: while other stages still compute, that costs nothing.
- Routing is balanced: every expert rank gets the same number of tokens.

What V3 sends agrees with its compiled graph to 1 %, memory with MindSpore's plan (`--level memory`) to 10 %. Its errors
in %, by stage (see the tests):

- without fragments, the 671B YAML +4.0 (0), +2.1 (1), +0.2 (15); with capacity dispatch -1.6 (0), -0.5 (1), -1.3 (15);
  V2-Lite -6.3 (0);
- with fragments, the 671B YAML +0.5 (0), -0.9 to +1.1 (1 to 13), -3.8 (14), -1.1 (15); with capacity dispatch -5.1 (0),
  -1.2 (1), -4.5 (8), -1.9 (15).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from math import hypot
from typing import Any

from mindformers_ext.config import flops
from mindformers_ext.config.run import DTYPE_BYTES, Run
from mindformers_ext.dryrun.device_profile import DeviceProfile
from mindformers_ext.dryrun.operators import (
    HOST,
    Part,
    buffer_rows,
    head_parts,
    layer_parts,
    part_seconds,
    projection_parts,
)
from mindformers_ext.dryrun.parameters import (
    Weight,
    first_weights,
    gathered_bytes,
    is_cast,
    is_matrix,
    last_weights,
    layer_weights,
    optimizer_ways,
    parameter_bytes,
    prediction_weights,
)
from mindformers_ext.dryrun.pipeline import Timeline, in_flight, simulate
from mindformers_ext.dryrun.plan import DATA, EXPERT, Plan
from mindformers_ext.dryrun.transfers import (
    Transfer,
    embedding_step,
    gradient_exchange,
    head_step,
    layer_backward,
    layer_forward,
    mtp_embedding,
    stage_boundary,
)

FLOAT_BYTES = 4
ADAM_STATES = 2  # first and second moment, float32
NS_STEPS = 5  # Newton-Schulz iterations of Muon
RECOMPUTATION, BUBBLE, OPTIMIZER = "recomputation", "pipeline bubble", "optimizer"


@dataclass
class StageCost:
    """What one rank of a pipeline stage holds and does; bytes and FLOPs are of one rank, parameters of the stage."""

    stage: int
    layers: list[int]  # num_layers and above: multi-token prediction
    parameters: int  # values of the stage, all ranks together, counted once
    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    gathered_bytes: float  # weights as they are used during the step: whole, and in the compute dtype
    activation_bytes: float  # kept for the backward pass, all micro-batches in flight
    working_bytes: float  # most that lies beside them: of a layer's backward pass, or the update's clipped gradients
    flops_per_step: float  # forward and backward of the model's formula
    seconds: dict[str, float]  # of one micro-batch, forward and backward, by cause
    exchange_seconds: float  # gradients and split weights, once a step
    optimizer_seconds: float
    transfers: list[Transfer]  # of one step

    @property
    def memory_bytes(self) -> float:
        """Estimated peak of one rank."""
        held = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.gathered_bytes
        return held + self.activation_bytes + self.working_bytes

    @property
    def micro_batch_seconds(self) -> float:
        """One micro-batch through this stage, forward and backward."""
        return sum(self.seconds.values())


@dataclass
class PlanCost:
    """The estimate of a whole plan."""

    stages: list[StageCost]
    parameters: int  # of the whole model, shared weights once
    step_seconds: float
    bubble: float  # share of the pipeline's time that an average rank waits
    tokens_per_s: float
    mfu: float
    bound: str  # what takes most of a step on the slowest stage
    seconds_by_cause: dict[str, float]  # of one step on the slowest stage
    memory_bytes: float  # of the fullest rank
    fits: bool
    tokens_per_expert_rank: float  # token choices that one rank's experts serve in a step, in each MoE layer

    def to_json(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        data = asdict(self)
        for record, stage in zip(data["stages"], self.stages, strict=True):
            record["memory_bytes"] = stage.memory_bytes
            record["micro_batch_seconds"] = stage.micro_batch_seconds
            for transfer, source in zip(record["transfers"], stage.transfers, strict=True):
                transfer["sent_bytes"] = source.sent_bytes
        return data


def estimate(plan: Run | Plan, profile: DeviceProfile, costs: "Costs | None" = None) -> PlanCost:
    """Cost of a legal plan on a device; `costs` of it when they are known."""
    plan = plan if isinstance(plan, Plan) else Plan.of(plan)
    costs = costs or Costs(plan, profile)
    passes = costs.all_passes
    stages = [_stage_cost(costs, stage, [row[stage] for row in passes]) for stage in range(plan.pp)]
    timeline = step_timeline(costs)
    causes = _causes(costs, stages, timeline)
    step = sum(causes.values())
    memory = max(s.memory_bytes for s in stages)
    moe = plan.model.moe_config
    choices = plan.tokens_per_step * moe.num_experts_chosen
    per_token = flops.flops_per_token(plan.model, plan.model.seq_length)
    return PlanCost(
        stages=stages,
        parameters=sum(s.parameters for s in stages),
        step_seconds=step,
        bubble=timeline.bubble,
        tokens_per_s=plan.tokens_per_step / step,
        mfu=per_token * plan.tokens_per_step / step / plan.device_num / (profile.peak_tflops * 1e12),
        bound=max(causes, key=causes.get),
        seconds_by_cause=causes,
        memory_bytes=memory,
        fits=memory <= profile.memory_limit_bytes,
        tokens_per_expert_rank=choices / plan.devices_per_stage if moe.expert_num > 1 else 0,
    )


def step_timeline(costs: "Costs") -> Timeline:
    """The pipeline of a step."""
    plan = costs.plan
    forward, backward = costs.pass_seconds
    return simulate(plan.schedule, forward, backward, plan.micro_batches, stage_boundary(plan).seconds(costs.profile))


def _causes(costs: "Costs", stages: list[StageCost], timeline: Timeline) -> dict[str, float]:
    """Seconds of one step by cause: micro-batches on the slowest stage, waiting, and what follows the pipeline.

    The step ends with the stage whose gradient exchange and update end last.
    """
    plan = costs.plan
    overlapped = DATA in plan.software.overlaps
    forward, backward = costs.pass_seconds
    late, ends = 0.0, []
    for stage, cost in enumerate(stages):
        gathers, gradients = costs.exchange_seconds(stage)
        first, last = (sum(row[stage] for row in rows) for rows in (forward, backward))
        if overlapped:
            passes = plan.micro_batches if plan.software.gathers > 1 else 1  # gathered for every pass, beside all
            gathers = costs.left(gathers, first * passes, len(cost.layers) * plan.software.gathers)
            gradients = costs.left(gradients, last * passes, len(cost.layers))
        late = max(late, gathers - sum(forward[0][:stage]))
        ends.append((timeline.ends[stage] + gradients + cost.optimizer_seconds, gradients, cost.optimizer_seconds))
    end, gradients, optimizer = max(ends)
    slowest = max(stages, key=lambda s: s.micro_batch_seconds)
    causes = {cause: seconds * plan.micro_batches for cause, seconds in slowest.seconds.items()}
    waiting = end - gradients - optimizer - sum(causes.values())
    causes |= {BUBBLE: waiting, DATA: gradients + late, OPTIMIZER: optimizer}
    return {cause: seconds for cause, seconds in causes.items() if seconds}


class Costs:
    """What the layers of a plan take on a device: layers of one kind are counted once."""

    def __init__(self, plan: Plan, profile: DeviceProfile):
        self.plan, self.profile = plan, profile
        self.recomputed = plan.recomputed
        self.groups: dict[int, list[tuple[int, list[Weight]]]] = {}
        self.kinds: dict[tuple, Any] = {}

    def like(self, plan: Plan) -> "Costs":
        """The same for a plan whose layers are the same but lie elsewhere, or are computed again or not."""
        costs = Costs(plan, self.profile)
        costs.kinds = self.kinds
        return costs

    def _once(self, key: tuple, make):
        if key not in self.kinds:
            self.kinds[key] = make()
        return self.kinds[key]

    def kind(self, layer: int) -> tuple[bool, bool]:
        """(has experts, is computed again)."""
        return layer >= self.dense_layers, layer in self.recomputed

    @cached_property
    def dense_layers(self) -> int:
        """Layers without experts, which come first."""
        model = self.plan.model
        return model.moe_config.first_k_dense_replace if model.moe_config.expert_num > 1 else model.layers_in_all

    def counted(self, layers: Iterable[int]) -> dict[tuple[bool, bool], tuple[int, int]]:
        """How many layers of each kind, and one of them."""
        found: dict[tuple[bool, bool], tuple[int, int]] = {}
        for layer in layers:
            kind = self.kind(layer)
            found[kind] = (found.get(kind, (0, layer))[0] + 1, layer)
        return found

    def passes(self, chunk: int, stage: int) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds by cause of a chunk's forward and backward pass."""
        found = (defaultdict(float), defaultdict(float))

        def add(pair, times: float = 1) -> None:
            for total, seconds in zip(found, pair, strict=True):
                for cause, value in seconds.items():
                    total[cause] += value * times

        for count, layer in self.counted(self.plan.layers[chunk][stage]).values():
            add(self.layer(layer), count)
        depth = self.plan.model.mtp_depth
        if (chunk, stage) == (0, 0):
            sums = self._collectives(embedding_step(self.plan))
            add(({c: t / 2 for c, t in sums.items()},) * 2)
        if (chunk, stage) == self.plan.last:
            add(self._computed(head_parts(self.plan)), 1 + depth)
            add(self._computed(projection_parts(self.plan)), depth)
            sums = self._collectives(head_step(self.plan))
            add(({c: t / 2 for c, t in sums.items()},) * 2)
        return found

    @cached_property
    def all_passes(self) -> list[list[tuple[dict[str, float], dict[str, float]]]]:
        """`passes` of [chunk][stage]."""
        return [[self.passes(chunk, stage) for stage in range(self.plan.pp)] for chunk in range(self.plan.chunks)]

    @cached_property
    def pass_seconds(self) -> tuple[list[list[float]], list[list[float]]]:
        """Seconds of the forward and of the backward passes of [chunk][stage]."""
        return tuple([[sum(pair[i].values()) for pair in row] for row in self.all_passes] for i in (0, 1))

    def layer(self, layer: int) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds by cause of a decoder layer's forward and backward pass."""
        return self._once(("layer", *self.kind(layer)), lambda: self._layer(layer))

    def sent(self, layer: int) -> list[Transfer]:
        """Collectives of a decoder layer for one micro-batch."""
        self.layer(layer)
        return self.kinds[("sent", *self.kind(layer))]

    def _layer(self, layer: int) -> tuple[dict[str, float], dict[str, float]]:
        plan, (is_moe, recomputed) = self.plan, self.kind(layer)
        parts = layer_parts(plan, is_moe)
        forward, backward = self._computed(parts)
        again = parts if recomputed else [part for part in parts if part.name in plan.parts]
        backward[RECOMPUTATION] = 0.0
        for cause, value in self._computed(again)[0].items():
            backward[HOST if cause == HOST else RECOMPUTATION] += value
        sent = layer_forward(plan, layer), layer_backward(plan, layer, recomputed)
        self._once(("sent", is_moe, recomputed), lambda: sent[0] + sent[1])
        return tuple(
            self._beside(seconds, self._collectives(transfers))
            for seconds, transfers in zip((forward, backward), sent, strict=True)
        )

    def _computed(self, parts: list[Part]) -> tuple[dict[str, float], dict[str, float]]:
        totals = (defaultdict(float), defaultdict(float))
        for part in parts:
            seconds = part_seconds(self.plan, self.profile, part)
            for total, each in zip(totals, (seconds.forward, seconds.backward), strict=True):
                for cause, value in each.items():
                    total[cause] += value
        return totals

    def _collectives(self, transfers: list[Transfer]) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for t in transfers:
            rate = self.plan.software.exchange_efficiency if t.purpose == EXPERT else 1.0
            found[t.purpose] += t.seconds(self.profile) / rate
        return found

    def _beside(self, computed: dict[str, float], sent: dict[str, float]) -> dict[str, float]:
        """Computation and collectives of a pass together: what overlaps is hidden, and the host may be slower."""
        host = computed.pop(HOST)
        work = sum(computed.values())
        found = dict(computed)
        for purpose, seconds in sent.items():
            if purpose in self.plan.software.overlaps:
                seconds = max(seconds - work, self.profile.overlap_cost * seconds)
            found[purpose] = seconds
        device = sum(found.values())
        found[HOST] = hypot(device, host) - device  # some operators wait for the host, others keep it waiting
        return found

    def left(self, sent: float, beside: float, pieces: int) -> float:
        """What is not hidden of collectives that run beside `beside` seconds of computation, in as many pieces."""
        return max(sent - beside, sent / max(pieces, 1), self.profile.overlap_cost * sent)

    def weights(self, stage: int) -> list[tuple[int, list[Weight]]]:
        """Weights of a stage, those of equal layers once, with how often they are there."""
        if stage in self.groups:
            return self.groups[stage]
        plan = self.plan
        groups = self.groups[stage] = []
        for is_moe in (False, True):
            held = [layer for layer in plan.layers_of(stage) if (layer >= self.dense_layers) == is_moe]
            if held:
                make = lambda layer=held[0]: list(layer_weights(plan, "", layer, stage))  # noqa: E731
                groups.append((len(held), self._once(("weights", is_moe), make)))
        if stage == 0:
            groups.append((1, self._once(("first",), lambda: list(first_weights(plan)))))
        if stage == plan.pp - 1:
            groups.append((1, self._once(("last",), lambda: list(last_weights(plan)))))
            if depth := plan.model.mtp_depth:
                groups.append((depth, self._once(("mtp",), lambda: list(prediction_weights(plan, 0)))))
        return groups

    def held(self, weights: list[Weight]) -> dict[str, float]:
        """Bytes that one rank keeps of these weights during the whole step."""
        return self._once(("held", id(weights)), lambda: _held_bytes(self.plan, weights))

    def updated(self, weights: list[Weight]) -> float:
        """Values of these weights that one rank updates: of their gradients as they are clipped, too."""
        make = lambda: sum(w.size / w.ways / optimizer_ways(w, self.plan) for w in weights if w.trainable)  # noqa: E731
        return self._once(("updated", id(weights)), make)

    def turned(self, stage: int) -> Iterator[tuple[int, float, int, int]]:
        """(how often it is there, matrices, rows, columns) of what one rank turns in Muon's update: of stacked experts
        those that it holds, of others the whole, which it gathers."""
        for count, weights in self.weights(stage) if self.plan.muon else ():
            for w in filter(is_matrix, weights):
                *stack, rows, columns = w.shape
                parts = 2 if w.name.endswith("gate_up_proj") else 1
                matrices = parts * stack[0] / w.ways / optimizer_ways(w, self.plan) if stack else 1
                yield count, matrices, rows, columns // parts

    def turned_bytes(self, stage: int) -> float:
        """Most that lies beside the states while a matrix, or a rank's stack, is turned: twice in float32, and as often
        in the compute dtype as a product of an iteration has operands and a result."""
        unit = 2 * FLOAT_BYTES + 3 * DTYPE_BYTES[self.plan.model.compute_dtype]
        return max((n * rows * columns * unit for _, n, rows, columns in self.turned(stage)), default=0.0)

    def turning_seconds(self, stage: int) -> float:
        """The products of Newton-Schulz iterations."""
        flop = 0.0
        for count, matrices, *sides in self.turned(stage):
            small, large = min(sides), max(sides)
            flop += count * matrices * NS_STEPS * 2 * small**2 * (2 * large + small)
        return flop / self.profile.product_flops()

    def exchanges(self, weights: list[Weight]) -> list[Transfer]:
        """Collectives of these weights and their gradients in a step."""
        return self._once(("exchange", id(weights)), lambda: gradient_exchange(self.plan, weights))

    def exchange_seconds(self, stage: int) -> tuple[float, float]:
        """(split weights gathered, gradients exchanged): of a stage in a step when nothing hides them."""
        gathers = gradients = 0.0
        for count, weights in self.weights(stage):
            for is_gather in (True, False):
                seconds = self._once(
                    ("exchange seconds", id(weights), is_gather),
                    lambda weights=weights, is_gather=is_gather: sum(
                        t.seconds(self.profile) for t in self.exchanges(weights) if (t.kind == "AllGather") == is_gather
                    ),
                )
                gathers, gradients = (
                    gathers + seconds * count * is_gather,
                    gradients + seconds * count * (not is_gather),
                )
        return gathers, gradients

    def largest_gradient(self, is_moe: bool) -> float:
        """Bytes of the largest gradient of a layer with or without experts, as its backward pass makes it."""
        weights = self.kinds[("weights", is_moe)]
        return self._once(
            ("gradient", is_moe), lambda: max((self._gradient(w) for w in weights if w.trainable), default=0.0)
        )

    def _gradient(self, weight: Weight) -> float:
        return weight.size / weight.ways * gathered_bytes(weight, self.plan)

    @cached_property
    def embedding_gradient(self) -> float:
        """Bytes of the embedding's gradient."""
        return sum(self._gradient(w) for w in self.kinds[("first",)] if w.trainable)

    def layer_bytes(self, layer: int) -> tuple[float, float]:
        """(kept for the backward pass of a layer, what lies beside it then: computed again, and a gradient)."""
        kind = self.kind(layer)
        return self._once(("bytes", *kind), lambda: self._layer_bytes(*kind))

    def _layer_bytes(self, is_moe: bool, recomputed: bool) -> tuple[float, float]:
        plan = self.plan
        parts = layer_activations(plan, is_moe)
        again = sum(size for name, size in parts.items() if recomputed or name in plan.parts)
        rows = plan.row_tokens * plan.model.hidden_size * DTYPE_BYTES[plan.model.compute_dtype]
        kept = rows if recomputed else sum(parts.values()) - again
        return kept, again + self.largest_gradient(is_moe)


def _stage_cost(costs: Costs, stage: int, passes: list[tuple[dict[str, float], dict[str, float]]]) -> StageCost:
    plan, profile = costs.plan, costs.profile
    layers = plan.layers_of(stage)
    groups = costs.weights(stage)
    held = dict.fromkeys(("weight_bytes", "gradient_bytes", "optimizer_bytes", "gathered_bytes"), 0.0)
    for count, weights in groups:
        for name, value in costs.held(weights).items():
            held[name] += count * value
    kept, working = _activations(costs, stage)
    updated = sum(count * costs.updated(weights) for count, weights in groups)
    updating = FLOAT_BYTES * updated + costs.turned_bytes(stage)  # when all activations are gone
    seconds: dict[str, float] = defaultdict(float)
    for pair in passes:
        for each in pair:
            for cause, value in each.items():
                seconds[cause] += value
    states, buffers = plan.software.update_bytes
    moved = states * updated
    moved += buffers * held["gradient_bytes"] / DTYPE_BYTES[plan.model.param_init_type]
    return StageCost(
        stage=stage,
        layers=layers,
        parameters=sum(count * sum(w.size for w in weights) for count, weights in groups),
        **held,
        activation_bytes=kept,
        working_bytes=max(working, updating - kept),
        flops_per_step=6 * _macs_per_token(costs, stage) * plan.tokens_per_step / plan.devices_per_stage,
        seconds={cause: value for cause, value in seconds.items() if value},
        exchange_seconds=sum(costs.exchange_seconds(stage)),
        optimizer_seconds=moved / profile.memory_bytes_per_s + costs.turning_seconds(stage),
        transfers=_step_transfers(costs, stage),
    )


def stage_memory(costs: Costs, stage: int) -> float:
    """`StageCost.memory_bytes` alone."""
    held = [count * sum(costs.held(weights).values()) for count, weights in costs.weights(stage)]
    updated = sum(count * costs.updated(weights) for count, weights in costs.weights(stage))
    kept, working = _activations(costs, stage)
    return sum(held) + kept + max(working, FLOAT_BYTES * updated + costs.turned_bytes(stage) - kept)


def _held_bytes(plan: Plan, weights: list[Weight]) -> dict[str, float]:
    held = dict.fromkeys(("weight_bytes", "gradient_bytes", "optimizer_bytes", "gathered_bytes"), 0.0)
    for weight in weights:
        ways, unit = optimizer_ways(weight, plan), parameter_bytes(weight, plan)
        values = weight.size / weight.ways
        held["weight_bytes"] += values / ways * unit
        if ways > 1 or (is_cast(weight) and unit != gathered_bytes(weight, plan)):
            held["gathered_bytes"] += values * gathered_bytes(weight, plan)
        if not weight.trainable:
            continue
        states = 1 if plan.muon and is_matrix(weight) else ADAM_STATES
        held["optimizer_bytes"] += values / ways * states * FLOAT_BYTES
        # A buffer sums the micro-batches' gradients before they are exchanged.
        held["gradient_bytes"] += values / (ways if plan.shard_gradients else 1) * unit
    return held


def _macs_per_token(costs: Costs, stage: int) -> float:
    """Multiply-adds of a token in one stage's forward pass, as the model's formula counts them."""
    plan, model = costs.plan, costs.plan.model
    macs = 0.0
    for count, layer in costs.counted(plan.layers_of(stage)).values():
        macs += count * (flops.attention_macs(model, model.seq_length) + flops.ffn_macs(model, layer))
    if stage == plan.last[1]:
        macs += model.vocab_size * model.hidden_size * (1 + model.mtp_depth)
        macs += 2 * model.hidden_size**2 * model.mtp_depth
    return macs


def _step_transfers(costs: Costs, stage: int) -> list[Transfer]:
    """Every collective of one rank of a stage in one step, equal ones summed; stages of equal layers share it."""
    plan = costs.plan
    counted = costs.counted(plan.layers_of(stage))
    counts = tuple((kind, count) for kind, (count, _) in counted.items())
    ends = stage == 0, stage == plan.pp - 1, plan.chunks
    return costs._once(("step", counts, ends), lambda: _summed_transfers(costs, stage, counted))


def _summed_transfers(costs: Costs, stage: int, counted: dict) -> list[Transfer]:
    plan, micro = costs.plan, costs.plan.micro_batches
    totals: dict[tuple, float] = defaultdict(float)

    def add(transfers: Iterable[Transfer], times: float) -> None:
        for t in transfers:
            totals[(t.purpose, t.kind, t.group_size, t.span, t.bytes)] += t.calls * times

    for count, layer in counted.values():
        add(costs.sent(layer), count * micro)
    ends = (embedding_step(plan) if stage == 0 else []) + (head_step(plan) if stage == plan.last[1] else [])
    add(ends, micro)
    parts = [chunk * plan.pp + stage for chunk in range(plan.chunks)]
    edges = sum(part > 0 for part in parts) + sum(part < plan.chunks * plan.pp - 1 for part in parts)
    if plan.pp > 1:
        edge = stage_boundary(plan)
        for kind in ("Send", "Receive"):  # activations one way, their gradients the other
            totals[(edge.purpose, kind, edge.group_size, edge.span, edge.bytes)] += edges * micro
    if plan.pp > 1 and plan.model.mtp_depth and stage in (0, plan.last[1]):
        t = mtp_embedding(plan)
        for kind in ("Send", "Receive"):  # the embedding one way, its gradient the other
            totals[(t.purpose, kind, t.group_size, t.span, t.bytes)] += t.calls * micro
    for count, weights in costs.weights(stage):
        add(costs.exchanges(weights), count)
    return [Transfer(*key, calls) for key, calls in totals.items() if calls]


def _activations(costs: Costs, stage: int) -> tuple[float, float]:
    """(bytes kept for the backward pass by the micro-batches in flight, most bytes beside them at any time).

    The backward pass goes from the last layer to the first: each layer's kept values are gone after it. A layer holds
    what it computed again, and the gradient of its largest weight until that is added to the buffer. With dropless
    dispatch rows of the experts are gone by then, and others are copied by a mask before: V3's sum is 1 GiB too high.
    """
    plan, model = costs.plan, costs.plan.model
    unit = DTYPE_BYTES[model.compute_dtype]
    working, chunks = 0.0, []
    for chunk in range(plan.chunks):
        later = 0.0
        for layer in reversed(plan.layers[chunk][stage]):
            kept, beside = costs.layer_bytes(layer)
            working = max(working, beside - later)
            later += kept
        chunks.append(later)
    first = plan.layers[0][0][0] if stage == 0 else None
    if first is not None and costs.kind(first)[1]:
        # the first layer keeps the looked up rows, and splits them again
        chunks[0] += (plan.tokens - plan.row_tokens) * model.hidden_size * unit
    if stage == 0:
        looked_up = plan.tokens * model.hidden_size * FLOAT_BYTES
        working = max(working, looked_up + costs.embedding_gradient - chunks[0])
    if stage == plan.last[1]:
        # Logits and their gradient in float32 and compute dtype, for the main head and MTP's.
        working = max(
            working, plan.tokens * model.vocab_size / plan.mp * (unit + 2 * FLOAT_BYTES) * (1 + model.mtp_depth)
        )
    flights = in_flight(plan.schedule, plan.pp, plan.chunks, min(plan.micro_batches, 4 * plan.pp), stage)
    return max(sum(n * size for n, size in zip(flight, chunks, strict=True)) for flight in flights), working


def layer_activation_bytes(plan: Run | Plan, layer: int) -> float:
    """Bytes that one layer keeps for its backward pass without recomputation, one micro-batch on one rank."""
    plan = plan if isinstance(plan, Plan) else Plan.of(plan)
    return sum(layer_activations(plan, plan.model.is_moe_layer(layer)).values())


def layer_activations(plan: Plan, is_moe: bool) -> dict[str, float]:
    """The same by part."""
    model, moe = plan.model, plan.model.moe_config
    unit = DTYPE_BYTES[model.compute_dtype]
    tokens, local = plan.tokens, plan.row_tokens
    heads = model.num_heads / plan.mp
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    context = tokens * heads * 2 * model.v_head_dim * unit
    if not model.use_flash_attention:
        context += tokens * heads * model.seq_length * (2 * FLOAT_BYTES + unit)
    if model.has_indexer:
        products = model.index_n_heads / plan.mp * (2 * FLOAT_BYTES + unit)
        context += tokens * model.seq_length * (products + 4 * FLOAT_BYTES)
    kept = {
        "norm": 2 * local * model.hidden_size * (FLOAT_BYTES + unit) + local * latents * (FLOAT_BYTES + unit),
        "mla_up": tokens * heads * (2 * 2 * model.qk_head_dim + 2 * model.v_head_dim) * unit,
        "attention": context,
        "residual": 2 * local * model.hidden_size * unit,
    }
    if not is_moe:
        width = model.intermediate_size / plan.mp
        return kept | {"mlp": tokens * 3 * width * unit, "swiglu": tokens * width * unit}
    shared, width = moe.shared_expert_num * moe.moe_intermediate_size / plan.mp, moe.moe_intermediate_size
    rows = buffer_rows(plan)
    return kept | {
        "shared": tokens * 3 * shared * unit,
        "experts": rows * (2 * model.hidden_size + 3 * width) * unit,
        "swiglu": (rows * width + tokens * shared) * unit,
        "router": plan.own_tokens * moe.expert_num * 4 * FLOAT_BYTES,
    }
