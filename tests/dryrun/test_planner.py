"""The search finds what trying everything finds, and its plans are YAMLs that the rules allow."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from mindformers_ext.config.run import read_run
from mindformers_ext.config.strategy_rules import check_plan
from mindformers_ext.dryrun.cost_model import Costs, estimate
from mindformers_ext.dryrun.device_profile import load_profile
from mindformers_ext.dryrun.frontier import frontier
from mindformers_ext.dryrun.plan import Plan, placed
from mindformers_ext.dryrun.planner import (
    Space,
    balanced,
    dealt_in_turn,
    families,
    least,
    overrides,
    search,
)

CLUSTER = Path(__file__).parents[1] / "helpers" / "runs" / "cluster_671b.yaml"
GIB = 2**30
SPACE = Space(mp=(1, 2), cp=(1,), chunks=(1, 2), batch_size=(1, 2), dispatchers=("alltoall",))
PIPELINES = replace(SPACE, pp=(2, 4))


def small(layers: int = 4):
    """A model of a few layers, whose experts are few too."""
    sizes = {
        "model.model_config.num_layers": layers,
        "model.model_config.offset": 0,
        "moe_config.expert_num": 32,
        "moe_config.use_fused_ops_permute": True,
        "moe_config.first_k_dense_replace": 1,
        "parallel_config.data_parallel": 8,
        "parallel_config.model_parallel": 1,
        "parallel_config.pipeline_stage": 1,
        "parallel_config.expert_parallel": 8,
        "parallel_config.micro_batch_num": 1,
    }
    return read_run(CLUSTER, 8, sizes.items())


def every_split(layers: int, parts: int):
    """All ways to give each part at least one layer."""
    if parts == 1:
        yield (layers,)
        return
    for first in range(1, layers - parts + 2):
        for rest in every_split(layers - first, parts - 1):
            yield first, *rest


def everything(base, profile, batch, space):
    """Every plan of every family: all chunks, all splits of the layers, all numbers of layers computed again."""
    for plan in families(base, 8, batch, space)[0]:
        for chunks in SPACE.chunks:
            parts = chunks * plan.pp
            if parts > plan.model.num_layers or (chunks > 1 and (plan.pp == 1 or plan.micro_batches % plan.pp)):
                continue
            costs = Costs(plan, profile)
            for split in every_split(plan.model.num_layers, parts):
                counts = [list(split[c * plan.pp : (c + 1) * plan.pp]) for c in range(chunks)]
                laid = replace(plan, layers=placed(plan.model, counts))
                order = [dealt_in_turn(laid, stage) for stage in range(plan.pp)]
                for again in product(*(range(len(layers) + 1) for layers in order)):
                    chosen = {i for layers, count in zip(order, again, strict=True) for i in layers[:count]}
                    each = replace(laid, recomputed=frozenset(chosen))
                    yield estimate(each, profile, costs.like(each))


@pytest.mark.parametrize("space", [replace(SPACE, pp=(1,)), PIPELINES], ids=["one-stage", "pipelines"])
def test_the_search_finds_the_best_of_all(space):
    base, profile = small(), load_profile()
    tried = [(c.memory_bytes / GIB, c.step_seconds) for c in everything(base, profile, 32, space)]
    for limit in (38, 45, 60, 100, 150):
        fitting = [seconds for memory, seconds in tried if memory <= limit]
        found = search(base, profile, 8, 32, limit * GIB, space, 3)
        assert found.best[0].cost.step_seconds == pytest.approx(min(fitting)), limit
        assert all(c.cost.memory_bytes <= limit * GIB for c in found.best)


def test_plans_become_yamls_of_the_same_estimate():
    base, profile = small(), load_profile()
    for candidate in search(base, profile, 8, 32, 60 * GIB, SPACE, 5).best:
        run = base.changed(overrides(base, candidate.plan), 8)
        assert check_plan(run) == []
        read = Plan.of(run)
        assert read == replace(candidate.plan, model=read.model)


def test_no_plan_is_faster_than_its_familys_least():
    base, profile = small(), load_profile()
    for candidate in search(base, profile, 8, 32, 60 * GIB, SPACE, 20).best:
        seconds, memory = least(candidate.plan, profile)
        assert seconds <= candidate.cost.step_seconds and memory <= candidate.cost.memory_bytes


def test_layers_are_dealt_by_time():
    """The last stage has the heads and MTP, which take as long as some layers: it gets fewer."""
    plan = replace(Plan.of(read_run(CLUSTER)), recomputed=frozenset())
    laid = balanced(Costs(plan, load_profile()), 1)
    counts = [len([i for i in layers if i < 61]) for layers in laid.layers[0]]
    assert sum(counts) == 61 and counts[-1] < min(counts[1:-1])
    seconds = [s.micro_batch_seconds for s in estimate(laid, load_profile()).stages[1:-1]]
    assert max(seconds) < 1.4 * min(seconds)


def test_frontier_keeps_what_nothing_beats():
    assert frontier([(3, 1), (1, 5), (2, 6), (2, 4), (4, 1)]) == [(1, 5), (2, 4), (3, 1)]
