"""A YAML scaled down to a few ranks keeps what its strategy is made of."""

from pathlib import Path

import pytest

from mindformers_ext.config.run import Run, read_run
from mindformers_ext.config.scale_down import scaled, write
from mindformers_ext.config.strategy_rules import check_plan
from mindformers_ext.errors import ConfigError

RESEARCH = Path(__file__).parents[2] / "research" / "deepseek3"
PIPELINED = ["deepseek3_671b/pretrain_deepseek3_671b.yaml", "deepseek3_1b/pretrain_deepseek3_1b.yaml"]
CLUSTER = RESEARCH / PIPELINED[0]
INTERLEAVED = [
    ("parallel.pipeline_config", {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}),
    ("model.model_config.pp_interleave_num", 2),
    ("model.model_config.offset", [[1] * 15 + [0], [1] * 14 + [0, 0]]),
    ("recompute_config.recompute", [[2] * 15 + [1], [1] * 15 + [0]]),
]


def structure(run: Run) -> dict:
    """What must stay."""
    moe = run.model.moe_config
    return {
        "degrees": [getattr(run, axis) > 1 for axis in ("dp", "cp", "mp", "pp", "ep")],
        "experts beyond mp": run.ep > run.cp * run.mp,
        "chunks": run.chunks,
        "uneven": len(set(run.pipeline.counts.values())) > 1,
        "mtp": run.model.mtp_depth,
        "dispatch": (moe.use_gmm, moe.group_wise_a2a, moe.topk_method, moe.n_group > 1, moe.balance_via_topk_bias),
        "operators": (run.model.use_flash_attention, run.model.use_fused_rope),
        "shards": (run.shard_optimizer, run.shard_gradients),
    }


@pytest.mark.parametrize("name", [*PIPELINED, "deepseek2_lite/pretrain_deepseek2_lite.yaml"])
def test_structure_stays(name, tmp_path):
    big = read_run(RESEARCH / name)
    small = scaled(big, 8)
    assert check_plan(small) == []
    assert small.device_num == small.dp * small.cp * small.mp * small.pp == 8
    assert structure(small) == structure(big)
    write(small, tmp_path / "small.yaml")
    assert read_run(tmp_path / "small.yaml").values == small.values


def test_chunks_and_lists_stay():
    big = read_run(CLUSTER, overrides=INTERLEAVED)
    assert check_plan(big) == []
    small = scaled(big, 8)
    assert check_plan(small) == []
    assert structure(small) == structure(big)
    counts = small.pipeline.counts
    assert [counts[stage, 0] > counts[stage, 1] for stage in range(2)] == [False, False]
    assert small.recompute[0][0] == counts[0, 0] and small.recompute[1][1] == 0


def test_too_few_ranks_are_a_sentence():
    with pytest.raises(ConfigError, match="data_parallel 2 x model_parallel 2 x pipeline_stage 2 .* at least 8"):
        scaled(read_run(CLUSTER), 4)
    with pytest.raises(ConfigError, match="power of two"):
        scaled(read_run(CLUSTER), 12)
