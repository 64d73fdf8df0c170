"""The plans name the operators that the cells have, and reach them; no compiler, no device."""

import mindspore as ms
import pytest
import sharding
from deepseek2_model import FeedForward
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.small_models import v3_config
from mindformers.modules.transformer import TransformerOpParallelConfig

from mindformers_ext.layers import vocabulary


@pytest.fixture
def semi_auto(monkeypatch):
    """Semi-automatic parallelism without a cluster, as rank 0."""
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=8)
    monkeypatch.setattr(sharding, "get_rank", lambda: 0)
    monkeypatch.setattr(vocabulary, "create_group", lambda *_: None)
    yield
    ms.reset_auto_parallel_context()


def parallel(**degrees):
    return TransformerOpParallelConfig(**degrees)


@pytest.mark.parametrize("use_seq_parallel", [False, True])
@pytest.mark.parametrize("moe", [{}, {"use_gmm": False}, {"shared_expert_num": 0}])
def test_every_plan_fits_its_cell(semi_auto, use_seq_parallel, moe):
    config = v3_config(
        parallel_config=parallel(data_parallel=2, model_parallel=4, use_seq_parallel=use_seq_parallel),
        mtp_depth=1,
        moe=moe,
    )
    network = DeepseekV3ForCausalLM(config)
    layer = network.model.layers[1]
    tokens = 8 if use_seq_parallel else 2
    assert layer.self_attn.q_b_proj.matmul.in_strategy == ((2, 1), (4, 1))
    assert layer.self_attn.o_proj.matmul.in_strategy == ((2, 4), (1, 4))
    assert layer.self_attn.o_proj.matmul.out_strategy == ((tokens, 1),)
    assert layer.self_attn.core_attention.softmax.in_strategy == ((2, 4, 1, 1),)
    assert layer.add_mlp.in_strategy == ((tokens, 1), (tokens, 1))


def test_numbers_are_used_only_where_they_mean_the_same_as_names():
    sizes = {"dp": 2, "cp": 2, "mp": 2}
    assert sharding.in_grid_order((("dp", "cp", "mp"), "None"), sizes)
    assert not sharding.in_grid_order(sharding.heads(), sizes)  # heads come before the sequence
    assert sharding.in_grid_order(sharding.heads(), sizes | {"cp": 1})


def test_a_plan_for_a_missing_operator_is_an_error(semi_auto):
    config = v3_config(parallel_config=parallel(data_parallel=8))
    cell = FeedForward(config, 8)
    del cell.swiglu.gate_mul
    with pytest.raises(AttributeError, match="gate_mul"):
        sharding.shard(cell.swiglu, "feed_forward_width", config)


@pytest.mark.parametrize(
    ("offset", "stages", "layers"),
    [(0, 2, [1, 2]), (0, 1, [3]), ([1, 0], 2, [2, 1]), ([1, -1, 0], 3, [2, 0, 1])],
)
def test_layers_of_each_stage(offset, stages, layers):
    config = v3_config(
        num_layers=3, offset=offset, parallel_config=parallel(pipeline_stage=stages, micro_batch_num=stages)
    )
    assert config.placed().layers_per_stage == layers
    placed = [place.stage for place in config.placed().places]
    assert [placed.count(stage) for stage in range(stages)] == layers
    assert config.placed().last.stage == stages - 1  # MTP, norm and head


def test_recompute_counts_layers_of_each_stage():
    pipeline = v3_config(num_layers=4, parallel_config=parallel(pipeline_stage=2, micro_batch_num=2)).placed()
    assert pipeline.covered([1, 2]) == [0, 2, 3]
    assert pipeline.covered(True) == [0, 1, 2, 3]
