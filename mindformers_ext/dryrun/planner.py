"""Search a plan for a number of devices: every layout that the rules allow, the fastest that fits in memory.

A family is a choice of degrees, micro-batch size, dispatcher and optimizer shards. Its time is at least that of all
layers without recomputation, spread evenly over the stages; families are tried in that order until none can be faster
than what is found. Within a family every number of chunks is tried: layers are dealt by time, and each stage computes
again as few layers as its memory allows.
"""

import multiprocessing
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from math import gcd, inf
from typing import Any

from mindformers_ext.config.run import Run
from mindformers_ext.config.strategy_rules import check_plan
from mindformers_ext.dryrun.cost_model import Costs, PlanCost, estimate, stage_memory, step_timeline
from mindformers_ext.dryrun.device_profile import DeviceProfile
from mindformers_ext.dryrun.plan import DATA, DISPATCHERS, Plan, placed


@dataclass(frozen=True)
class Space:
    """What the search may choose from; each list in the order of preference among equals."""

    mp: tuple[int, ...] = (1, 2, 4, 8)
    cp: tuple[int, ...] = (1, 2)
    pp: tuple[int, ...] = ()  # none: all divisors of the devices
    chunks: tuple[int, ...] = (1, 2, 3, 4)
    batch_size: tuple[int, ...] = (1, 2, 4)
    dispatchers: tuple[str, ...] = ("alltoall_deredundency", "alltoall", "allgather")
    parts: tuple[frozenset[str], ...] = (frozenset(),)
    shard_gradients: tuple[bool, ...] = (False, True)
    optimizer_shard_size: tuple[int, ...] = (-1,)
    overlaps: frozenset[str] = frozenset()  # purposes taken as overlapped, beside what the YAML switches on


@dataclass
class Candidate:
    """A plan and its estimate."""

    plan: Plan
    cost: PlanCost

    @property
    def layout(self) -> tuple:
        """What makes a candidate another one in a list of the best."""
        p = self.plan
        return p.dp, p.cp, p.mp, p.pp, p.ep, p.batch_size, p.chunks


@dataclass
class Found:
    """What a search has seen."""

    best: list[Candidate]  # the fastest first, one of each layout
    points: list[tuple[float, float]]  # (bytes, seconds) of all that was estimated, those that do not fit too
    families: int  # that the rules allow
    small: int  # of them, those whose least memory is within the limit
    tried: int  # of these, those whose least time did not rule them out
    illegal: int  # layouts


def search(
    base: Run, profile: DeviceProfile, device_num: int, global_batch: int, limit: float, space: Space, top: int
) -> Found:
    """The fastest plans of `device_num` devices whose ranks need at most `limit` bytes."""
    legal, illegal = families(base, device_num, global_batch, space)
    bounds = [(*least(plan, profile), i) for i, plan in enumerate(legal)]
    best: dict[tuple, Candidate] = {}
    points: list[tuple[float, float]] = []
    tried, worst = 0, inf
    order = sorted(bound for bound in bounds if bound[1] <= limit)
    with _pool(legal, profile, limit, space.chunks) as pool:
        for batch in _batches(order):
            batch = [i for seconds, _, i in batch if seconds <= worst]
            if not batch:
                break
            tried += len(batch)
            for candidate in chain.from_iterable(pool.map(_candidates, [(i, worst) for i in batch], chunksize=2)):
                points.append((candidate.cost.memory_bytes, candidate.cost.step_seconds))
                known = best.get(candidate.layout)
                if known is None or candidate.cost.step_seconds < known.cost.step_seconds:
                    best[candidate.layout] = candidate
            fastest = sorted(c.cost.step_seconds for c in best.values())
            worst = fastest[top - 1] if len(fastest) >= top else inf
        ranked = sorted(best.values(), key=lambda c: c.cost.step_seconds)[: 2 * top]
        ranked = pool.map(_improved, ranked, chunksize=1)
    ranked.sort(key=lambda c: c.cost.step_seconds)
    return Found(ranked[:top], points, len(legal), len(order), tried, illegal)


def _batches(order: list) -> Iterator[list]:
    """The first ones small: what they find rules out others."""
    size, start = 16, 0
    while start < len(order):
        yield order[start : start + size]
        start, size = start + size, 64


_searched: tuple = ()  # what the processes of a pool search, as they were forked


def _pool(*searched):
    global _searched
    _searched = searched
    return multiprocessing.get_context("fork").Pool(os.cpu_count())


def _candidates(job: tuple[int, float]) -> list[Candidate]:
    (legal, profile, limit, chunks), (i, worst) = _searched, job
    return list(candidates(legal[i], profile, limit, chunks, worst))


def _improved(candidate: Candidate) -> Candidate:
    _, profile, limit, _ = _searched
    return improved(candidate, profile, limit)


def families(base: Run, device_num: int, global_batch: int, space: Space) -> tuple[list[Plan], int]:
    """(plans without chunks and recomputation that the rules allow, how many layouts they forbid)."""
    model = base.model
    experts = model.moe_config.expert_num
    found, illegal = [], 0
    layouts = product(space.mp, space.cp, space.pp or _divisors(device_num))
    for mp, cp, pp in layouts:
        if device_num % (mp * cp * pp) or pp > model.num_layers:
            continue
        dp = device_num // (mp * cp * pp)
        sizes = [b for b in space.batch_size if global_batch % (dp * b) == 0 and global_batch // (dp * b) >= pp]
        if not sizes:
            continue
        stage = device_num // pp
        for ep in _divisors(gcd(stage, experts)):
            run = _with_degrees(base, device_num, dp, cp, mp, pp, ep, global_batch // dp)
            if check_plan(run):
                illegal += 1
                continue
            start = Plan.of(run)
            rest = product(
                sizes,
                _useful(space.dispatchers, ep, start.node),
                space.parts,
                space.shard_gradients,
                space.optimizer_shard_size,
            )
            for size, dispatcher, parts, shard_gradients, shards in rest:
                found.append(
                    replace(
                        start,
                        batch_size=size,
                        micro_batches=global_batch // (dp * size),
                        dispatcher=dispatcher,
                        parts=parts,
                        shard_optimizer=True,
                        shard_gradients=shard_gradients,
                        optimizer_shard_size=shards,
                        recomputed=frozenset(),
                        software=replace(start.software, overlaps=start.software.overlaps | space.overlaps),
                    )
                )
    return found, illegal


def _useful(dispatchers: Iterable[str], ep: int, node: int) -> list[str]:
    """Of dispatchers that are the same thing on these ranks, the first."""
    if ep == 1:
        return list(dispatchers)[-1:]
    return [d for d in dispatchers if d != "alltoall_deredundency" or ep > node]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _with_degrees(base: Run, device_num: int, dp: int, cp: int, mp: int, pp: int, ep: int, micro_batches: int) -> Run:
    return base.changed(degrees(base, dp, cp, mp, pp, ep, 1, micro_batches), device_num)


def degrees(
    base: Run, dp: int, cp: int, mp: int, pp: int, ep: int, batch_size: int, micro_batches: int
) -> list[tuple[str, Any]]:
    """Overrides that give a YAML other degrees, and even stages of one chunk without recomputation."""
    found = {
        "parallel_config.data_parallel": dp,
        "parallel_config.context_parallel": cp,
        "parallel_config.model_parallel": mp,
        "parallel_config.pipeline_stage": pp,
        "parallel_config.expert_parallel": ep,
        "parallel_config.micro_batch_num": micro_batches if pp > 1 else 1,
        "parallel_config.use_seq_parallel": mp > 1,
        "runner_config.gradient_accumulation_steps": 1 if pp > 1 else micro_batches,
        "runner_config.batch_size": batch_size,
        "parallel.enable_parallel_optimizer": True,
        "parallel.parallel_optimizer_config.optimizer_weight_shard_size": -1,
        "parallel.pipeline_config.pipeline_interleave": False,
        "model.model_config.pp_interleave_num": 1,
        "model.model_config.offset": 0,
        "recompute_config.recompute": False,
        "recompute_config.select_recompute": False,
    }
    if base.value("model.model_config.batch_size") is not None:
        found["model.model_config.batch_size"] = batch_size
    strategy = base.sections.parallel.dataset_strategy
    if isinstance(strategy, list):
        found["parallel.dataset_strategy"] = [[dp, *row[1:]] for row in strategy]
    return list(found.items())


def overrides(base: Run, plan: Plan) -> list[tuple[str, Any]]:
    """What makes the base YAML a plan's."""
    found = dict(degrees(base, plan.dp, plan.cp, plan.mp, plan.pp, plan.ep, plan.batch_size, plan.micro_batches))
    even = plan.model.num_layers // (plan.pp * plan.chunks)
    decoder = [[[i for i in layers if i < plan.model.num_layers] for layers in row] for row in plan.layers]
    recomputed = [[sum(i in plan.recomputed for i in layers) for layers in row] for row in plan.layers]
    if plan.pp > 1:
        found["model.model_config.offset"] = _one([[len(layers) - even for layers in row] for row in decoder])
    if plan.recomputed:
        found["recompute_config.recompute"] = _one(recomputed)
    if plan.chunks > 1:
        found["model.model_config.pp_interleave_num"] = plan.chunks
        found["parallel.pipeline_config.pipeline_interleave"] = True
    found["parallel.parallel_optimizer_config.gradient_accumulation_shard"] = plan.shard_gradients
    found["parallel.parallel_optimizer_config.optimizer_weight_shard_size"] = plan.optimizer_shard_size
    found[DISPATCHER_KEY] = plan.dispatcher
    return list(found.items())


def _one(rows: list[list[int]]) -> list:
    return rows[0] if len(rows) == 1 else rows


DISPATCHER_KEY = "moe_config.moe_token_dispatcher_type"


def dispatchers_of(base: Run) -> tuple[str, ...]:
    """What a YAML can name, the fastest across nodes first."""
    moe = base.model.moe_config
    return DISPATCHERS[:3] if moe.use_gmm and moe.use_fused_ops_permute else ("allgather",)


def least(plan: Plan, profile: DeviceProfile) -> tuple[float, float]:
    """(seconds, bytes) that a step takes at least: all work spread evenly over the stages, nothing computed again.

    Bytes are what an average stage needs when all of its layers are computed again.
    """
    one_part = replace(plan, layers=((tuple(range(plan.model.layers_in_all)),),), pp=1)
    costs = Costs(one_part, profile)
    exchange = costs.exchange_seconds(0)[1] * (profile.overlap_cost if DATA in plan.software.overlaps else 1.0)
    seconds = (_sum(costs.passes(0, 0)) * plan.micro_batches + exchange) / plan.pp
    held = sum(count * sum(costs.held(weights).values()) for count, weights in costs.weights(0))
    again = costs.like(replace(one_part, recomputed=frozenset(one_part.layers[0][0])))
    rows, working = again.layer_bytes(plan.model.num_layers - 1)
    in_flight = rows * plan.model.num_layers / plan.pp * (plan.pp + 1) / 2
    return seconds, held / plan.pp + in_flight + working


def candidates(
    plan: Plan, profile: DeviceProfile, limit: float, chunks: Iterable[int], worst: float = inf
) -> Iterator[Candidate]:
    """A family's plans of less than `worst` seconds: for each number of chunks, as little recomputation as fits."""
    costs = Costs(plan, profile)
    model = plan.model
    every = frozenset(range(model.layers_in_all))
    for number in chunks:
        if number > 1 and (plan.pp == 1 or plan.micro_batches % plan.pp or number * plan.pp > model.num_layers):
            continue
        found: dict[tuple, Plan] = {}
        for guess in (frozenset(), every):  # layers are dealt as if none, or all, were computed again
            dealt = replace(balanced(costs.like(replace(plan, recomputed=guess)), number), recomputed=frozenset())
            fitted = _recomputing(costs.like(dealt), limit) or _lightened(costs.like(dealt), limit)
            if fitted is not None:
                found.setdefault((fitted.layers, fitted.recomputed), fitted)
                if not fitted.recomputed:
                    break
        for each in found.values():
            stages = [map(sum, zip(*rows, strict=True)) for rows in costs.like(each).pass_seconds]
            if max(map(sum, zip(*stages, strict=True))) * plan.micro_batches > worst:
                continue
            yield Candidate(each, estimate(each, profile, costs.like(each)))


def _recomputing(costs: Costs, limit: float) -> Plan | None:
    """The plan in which each stage computes again the fewest of its first layers that it must to fit, or None."""
    plan, costs = costs.plan, costs.like(costs.plan)
    chosen: frozenset[int] = frozenset()
    for stage in range(plan.pp):
        order = dealt_in_turn(plan, stage)

        def fits(count: int, stage: int = stage, order: list[int] = order) -> bool:
            costs.recomputed = frozenset(order[:count])
            return stage_memory(costs, stage) <= limit

        if not fits(len(order)):
            return None
        chosen |= frozenset(order[: bisect_left(range(len(order)), True, key=fits)])
    return replace(plan, recomputed=chosen)


def _lightened(costs: Costs, limit: float) -> Plan | None:
    """The plan with layers moved from stages that do not fit to those with most room, when that helps; else None."""
    plan = costs.plan
    every = frozenset(range(plan.model.layers_in_all))
    for _ in range(plan.model.num_layers):
        costs = costs.like(replace(plan, recomputed=every))
        memory = [stage_memory(costs, stage) for stage in range(plan.pp)]
        fullest, emptiest = memory.index(max(memory)), memory.index(min(memory))
        if memory[fullest] <= limit:
            return _recomputing(costs.like(replace(plan, recomputed=frozenset())), limit)
        if memory[fullest] == memory[emptiest] or (moved := _moved(plan, fullest, emptiest)) is None:
            return None
        plan = moved
    return None


def _moved(plan: Plan, giver: int, taker: int) -> Plan | None:
    """A layer fewer on one stage and one more on another; None where the first has no layer to give."""
    model = plan.model
    counts = [[sum(i < model.num_layers for i in layers) for layers in row] for row in plan.layers]
    gives = max(range(plan.chunks), key=lambda c: counts[c][giver])
    takes = min(range(plan.chunks), key=lambda c: counts[c][taker])
    if counts[gives][giver] < 2:
        return None
    counts[gives][giver] -= 1
    counts[takes][taker] += 1
    return replace(plan, layers=placed(model, counts))


def improved(candidate: Candidate, profile: DeviceProfile, limit: float) -> Candidate:
    """The candidate with single layers moved away from its slowest stage for as long as that makes it faster."""
    costs = Costs(candidate.plan, profile)
    while True:
        stages = candidate.cost.stages
        giver = max(range(len(stages)), key=lambda s: stages[s].micro_batch_seconds)
        others = []
        for taker in range(len(stages)):
            moved = _moved(candidate.plan, giver, taker) if taker != giver else None
            fitted = moved and _recomputing(costs.like(replace(moved, recomputed=frozenset())), limit)
            if fitted:
                others.append(Candidate(fitted, estimate(fitted, profile, costs.like(fitted))))
        best = min(others, key=lambda c: c.cost.step_seconds, default=candidate)
        if best.cost.step_seconds >= candidate.cost.step_seconds:
            return candidate
        candidate = best


def dealt_in_turn(plan: Plan, stage: int) -> list[int]:
    """The first layer of each chunk of a stage, then the second of each, and so on: as a number is dealt to chunks."""
    runs = [chunk[stage] for chunk in plan.layers]
    return [run[i] for i in range(max(map(len, runs))) for run in runs if i < len(run)]


def balanced(costs: Costs, chunks: int, least: int = 1) -> Plan:
    """The plan with its decoder layers dealt to chunks and stages so that the pipeline is as fast as can be.

    Layers differ only in having experts or not; the first part also has the embedding, the last the heads and MTP. The
    slowest stage sets the pace, and interleaved also the slowest chunk: both ways of dealing are tried.
    """
    tried = [_dealt(costs, chunks, least, by_chunk) for by_chunk in ((False, True) if chunks > 1 else (False,))]
    return min(tried, key=lambda plan: step_timeline(costs.like(plan)).seconds)


def _dealt(costs: Costs, chunks: int, least: int, by_chunk: bool) -> Plan:
    """Layers one after the other to the chunk or the stage that they make slow the least."""
    plan, model = costs.plan, costs.plan.model
    counts = [[least] * plan.pp for _ in range(chunks)]
    counts[0][0] = max(counts[0][0], 1)
    costs = costs.like(replace(plan, layers=placed(model, counts)))
    seconds = [[_sum(costs.passes(c, s)) for s in range(plan.pp)] for c in range(chunks)]
    stages = [sum(column) for column in zip(*seconds, strict=True)]
    dense = sum(not model.is_moe_layer(i) for i in range(model.num_layers))
    times = {True: _sum(costs.layer(model.num_layers - 1)), False: _sum(costs.layer(0))}
    for _ in range(model.num_layers - sum(map(sum, counts))):
        best = None
        for chunk, row in enumerate(seconds):
            for stage, of_chunk in enumerate(row):
                more = times[chunk + stage > 0 or counts[0][0] >= dense]
                pair = (of_chunk + more, stages[stage] + more)
                key = (*(pair if by_chunk else pair[::-1]), -stage)
                if best is None or key < best[0]:
                    best = (key, chunk, stage, more)
        _, chunk, stage, more = best
        seconds[chunk][stage] += more
        stages[stage] += more
        counts[chunk][stage] += 1
    return replace(plan, layers=placed(model, counts))


def _sum(passes: tuple[dict[str, float], dict[str, float]]) -> float:
    return sum(sum(each.values()) for each in passes)
