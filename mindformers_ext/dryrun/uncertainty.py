"""How far an estimate may be off: what it was wrong by on published runs, and which of its numbers move it most."""

from dataclasses import replace

from mindformers_ext.config.run import Run
from mindformers_ext.dryrun.cost_model import estimate
from mindformers_ext.dryrun.device_profile import DeviceProfile
from mindformers_ext.dryrun.plan import Plan

# Largest errors of the bfloat16 runs in benchmarks/dryrun/published.py, estimated / published - 1.
LOWEST_ERROR, HIGHEST_ERROR = -0.10, 0.09
CHANGE = 0.10
VARIED = {
    "matmul_efficiency": "efficiency of products",
    "attention_efficiency": "efficiency of attention",
    "hbm_gb_per_s": "memory bandwidth",
    "across_nodes_gb_per_s": "bandwidth between nodes",
    "node_link_gb_per_s": "bandwidth inside a node",
    "latency_us": "start of a collective",
    "kernel_us": "start of an operator",
    "overlap_cost": "cost of what overlaps",
}


def likely(value: float) -> tuple[float, float]:
    """The range that a measured speed would lie in if the estimate were as wrong as it was on published runs."""
    return value / (1 + HIGHEST_ERROR), value / (1 + LOWEST_ERROR)


def sensitivities(plan: Run | Plan, profile: DeviceProfile) -> list[tuple[str, float]]:
    """(a number of the profile, relative change of the speed when it is 10 % higher), the strongest first."""
    plan = plan if isinstance(plan, Plan) else Plan.of(plan)
    base = estimate(plan, profile).step_seconds
    found = []
    for name, words in VARIED.items():
        other = replace(profile, **{name: getattr(profile, name) * (1 + CHANGE)})
        found.append((words, base / estimate(plan, other).step_seconds - 1))
    return sorted(found, key=lambda pair: -abs(pair[1]))
