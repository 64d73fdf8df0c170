"""A rank compiled without the layers of other stages has the graph of one compiled with all of them."""

import json
from pathlib import Path

import pytest
from helpers.small_yaml import small_sizes

from mindformers_ext.rank_compiler import rank_pool
from mindformers_ext.rank_compiler.stand_in_cann import COMPILE

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny_8p.yaml"
SMALL = small_sizes(32, num_layers=4) | {
    "parallel_config.data_parallel": 1,
    "parallel_config.model_parallel": 1,
    "parallel_config.expert_parallel": 1,
    "parallel_config.pipeline_stage": 4,
    "parallel_config.micro_batch_num": 4,
    "parallel.dataset_strategy": [[1, 1]] * 4,
}
# Two stages of two chunks; the folded one turns back after the second.
CHUNKS = {
    "parallel_config.pipeline_stage": 2,
    "model.model_config.pp_interleave_num": 2,
    "model.model_config.offset": 0,
    "parallel.pipeline_config.pipeline_interleave": True,
}
PIPELINES = {
    "stages": ({}, 4),
    "chunks": (CHUNKS, 2),
    "folded": (CHUNKS | {"parallel.pipeline_config.pipeline_scheduler": "zero_bubble_v"}, 2),
}


def compiled(out: Path, other: dict, stages: int, *flags: str) -> list[dict]:
    """What the first rank of every stage holds and sends."""
    arguments = ["--config", str(CONFIG), "--register_path", str(ROOT / "research/deepseek3"), "--samples", "4", *flags]
    arguments += [text for key, value in (SMALL | other).items() for text in (f"--{key}", json.dumps(value))]
    jobs = rank_pool.RankJobs(
        module="mindformers_ext.rank_compiler.compile_run",
        arguments=lambda folder: ["--out", str(folder), *arguments],
        world_size=stages,
        devices_per_stage=1,
        out=out,
        level=COMPILE,
        python_path=(str(ROOT),),
    )
    ranks = [0, 2, 3] if stages == 4 else [0, 1]
    results = rank_pool.compile_ranks(jobs, ranks, 2)
    assert [result.status for result in results] == [rank_pool.COMPILED] * len(ranks), [
        (r.message, r.compiler_errors) for r in results
    ]
    return [result.compiled for result in results]


def as_set(collectives: list[dict]) -> list[str]:
    """The same in any order: which of two independent ones comes first is the compiler's choice."""
    return sorted(json.dumps(collective, sort_keys=True) for collective in collectives)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_same_parameters_layouts_and_collectives(tmp_path, name):
    pairs = zip(
        compiled(tmp_path / "short", *PIPELINES[name]),
        compiled(tmp_path / "whole", *PIPELINES[name], "--whole_model"),
        strict=True,
    )
    for short, whole in pairs:
        for key in ("parameters", "weights", "inputs", "flops"):
            assert short[key] == whole[key], key
        assert as_set(short["collectives"]) == as_set(whole["collectives"])
        own = {name: layout for name, layout in whole["layouts"].items() if name in whole["parameters"]}
        assert {name: short["layouts"][name] for name in own} == own
