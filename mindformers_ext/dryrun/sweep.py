"""Try every combination of some YAML keys with the instant check and the cost model, and rank the legal ones."""

import difflib
import itertools
from dataclasses import dataclass
from typing import Any

from mindformers_ext.config.run import Run, read_run
from mindformers_ext.config.strategy_rules import check_plan, wrong_form
from mindformers_ext.config.yaml_files import parse_value
from mindformers_ext.dryrun.cost_model import PlanCost, estimate
from mindformers_ext.dryrun.device_profile import DeviceProfile
from mindformers_ext.dryrun.report import memory_limit
from mindformers_ext.errors import ConfigError


@dataclass
class Candidate:
    """A legal combination and its estimate."""

    overrides: list[tuple[str, Any]]
    plan: Run
    cost: PlanCost
    fits: bool


def parse_axes(arguments: list[str], plan: Run) -> dict[str, list[Any]]:
    """{'parallel_config.pipeline_stage': [8, 16]} from ['parallel_config.pipeline_stage=8,16'].

    Raises:
        ConfigError: an argument without '=' or without values, or a key that neither the YAML nor the check knows.
    """
    known = {key for key in plan.known_keys() if key.startswith(SWEPT)}
    axes = {}
    for argument in arguments:
        key, equals, values = argument.partition("=")
        if not equals or not values:
            raise ConfigError(f"--sweep {argument}: write section.key=value,value,..., for example {EXAMPLE}")
        key = key.removeprefix("--")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"write it as section.key, for example {EXAMPLE}"
            raise ConfigError(f"--sweep {argument}: {plan.path} has no key {key}; {hint}")
        axes[key] = parse_value(f"[{values}]", f"--sweep {argument}")
    return axes


EXAMPLE = "parallel_config.expert_parallel=8,16"
# Sections whose keys may be swept.
SWEPT = ("parallel_config.", "recompute_config.", "runner_config.", "moe_config.", "model.model_config.", "parallel.")


def sweep(
    config: str, device_num: int, overrides: list[tuple[str, Any]], axes: dict[str, list[Any]], profile: DeviceProfile
) -> tuple[list[Candidate], list[str]]:
    """(legal candidates, those within memory first and the fastest first; a sentence for each illegal combination).

    The devices and the global batch stay what they are: data_parallel and the number of micro-batches follow the other
    degrees unless they are swept themselves, and per-stage lists that no longer fit pipeline_stage become even.
    """
    base = read_run(config, device_num, overrides)
    legal, illegal = [], []
    for values in itertools.product(*axes.values()):
        chosen = overrides + list(zip(axes, values, strict=True))
        chosen += followers(base, read_run(config, device_num, chosen), axes)
        plan = read_run(config, device_num, chosen)
        if violations := check_plan(plan):
            tried = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in zip(axes, values, strict=True))
            illegal.append(f"{tried}: {violations[0].sentence}")
        else:
            cost = estimate(plan, profile)
            legal.append(
                Candidate(chosen[len(overrides) :], plan, cost, cost.memory_bytes <= memory_limit(plan, profile))
            )
    legal.sort(key=lambda c: (not c.fits, c.cost.step_seconds / c.plan.tokens_per_step))
    return legal, illegal


def followers(base: Run, plan: Run, axes: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    """Overrides that keep the device number and the global batch where the swept keys leave them open."""
    found = []
    dp = plan.dp
    others = plan.cp * plan.mp * plan.pp
    if "parallel_config.data_parallel" not in axes and plan.device_num % others == 0:
        dp = plan.device_num // others
        found.append(("parallel_config.data_parallel", dp))
    per_micro_batch = plan.batch_size * dp
    # Without a pipeline MindFormers reads another key.
    micro = "parallel_config.micro_batch_num" if plan.pp > 1 else "runner_config.gradient_accumulation_steps"
    if micro not in axes and base.global_batch % per_micro_batch == 0:
        found.append((micro, base.global_batch // per_micro_batch))
    strategy = plan.sections.parallel.dataset_strategy
    if isinstance(strategy, list):
        rows = [[dp if row[0] == base.dp else row[0], *row[1:]] for row in strategy]
        found.append(("parallel.dataset_strategy", rows))
    for key, even in (("model.model_config.offset", 0), ("recompute_config.recompute", True)):
        value = plan.value(key)
        if key not in axes and isinstance(value, list) and [*wrong_form(key, value, plan)]:
            found.append((key, even))
    return found
