"""Search a plan for a number of devices: every layout that the rules allow, the fastest that fits in memory."""

from dataclasses import replace

from mindformers_ext.dryrun.cost_model import Costs, step_timeline
from mindformers_ext.dryrun.device_profile import DeviceProfile
from mindformers_ext.dryrun.plan import Plan, placed


def balanced(plan: Plan, profile: DeviceProfile, chunks: int, least: int = 1) -> Plan:
    """The plan with its decoder layers dealt to chunks and stages so that the pipeline is as fast as can be.

    Layers differ only in having experts or not; the first part also has the embedding, the last the heads and MTP. The
    slowest stage sets the pace, and interleaved also the slowest chunk: both ways of dealing are tried.
    """
    tried = [_dealt(plan, profile, chunks, least, by_chunk) for by_chunk in ((False, True) if chunks > 1 else (False,))]
    return min(tried, key=lambda p: step_timeline(Costs(p, profile)).seconds)


def _dealt(plan: Plan, profile: DeviceProfile, chunks: int, least: int, by_chunk: bool) -> Plan:
    """Layers one after the other to the chunk or the stage that they make slow the least."""
    model = plan.model
    counts = [[least] * plan.pp for _ in range(chunks)]
    counts[0][0] = max(counts[0][0], 1)
    costs = Costs(replace(plan, layers=placed(model, counts)), profile)
    seconds = [[sum(map(sum, map(dict.values, costs.passes(c, s)))) for s in range(plan.pp)] for c in range(chunks)]
    dense = sum(not model.is_moe_layer(i) for i in range(model.num_layers))
    times = {m: sum(map(sum, map(dict.values, costs.layer(i)))) for m, i in ((True, model.num_layers - 1), (False, 0))}
    for _ in range(model.num_layers - sum(map(sum, counts))):

        def after(part: tuple[int, int]) -> tuple[float, float, int]:
            chunk, stage = part
            more = times[part != (0, 0) or counts[0][0] >= dense]
            of_chunk, of_stage = seconds[chunk][stage] + more, sum(row[stage] for row in seconds) + more
            return (of_chunk, of_stage, -stage) if by_chunk else (of_stage, of_chunk, -stage)

        best = min(((c, s) for c in range(chunks) for s in range(plan.pp)), key=after)
        chunk, stage = best
        seconds[chunk][stage] += times[best != (0, 0) or counts[0][0] >= dense]
        counts[chunk][stage] += 1
    return replace(plan, layers=placed(model, counts))
