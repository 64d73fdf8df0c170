"""The name table: every parameter once, every HuggingFace tensor once, counts of the released model."""

import numpy as np
import pytest
from deepseek2_model import DeepseekV2ForCausalLM
from deepseek3_config import DeepseekV3Config
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.small_models import v2_config, v3_config
from weights import from_huggingface, name_table, parameter_count, to_huggingface

RELEASED = DeepseekV3Config(
    moe_config=dict(
        expert_num=256,
        num_experts_chosen=8,
        shared_expert_num=1,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
    )
)


def test_released_model_counts():
    """Facts 12 (derived from the release), minus the FP8 scales."""
    assert parameter_count(RELEASED) == 671_026_419_200
    assert parameter_count(RELEASED, mtp=True) == 671_026_419_200 + 11_610_068_224
    names = [name for entry in name_table(RELEASED) for name in entry.theirs + entry.copies]
    assert len(names) == len(set(names)) == 46_183


@pytest.mark.parametrize("make", ["v3", "v3_mtp", "v2"])
def test_table_covers_the_model_exactly(make):
    config = {"v3": v3_config(), "v3_mtp": v3_config(mtp_depth=1), "v2": v2_config()}[make]
    network = (DeepseekV2ForCausalLM if make == "v2" else DeepseekV3ForCausalLM)(config)
    counters = ("expert_load", "loss_parts")  # counters are no checkpoint state
    ours = {p.name: p.shape for p in network.get_parameters() if not p.name.endswith(counters)}
    assert {entry.ours: entry.shape for entry in name_table(config)} == ours


def test_round_trip_is_bit_equal_with_more_than_ten_experts():
    config = v3_config(mtp_depth=1, moe=dict(expert_num=12, num_experts_chosen=2))
    rng = np.random.default_rng(0)
    for entry in name_table(config):
        value = rng.normal(size=entry.shape).astype(np.float32)
        stored = to_huggingface(entry, value)
        assert set(stored) == set(entry.theirs + entry.copies)
        assert (from_huggingface(entry, stored.__getitem__) == value).all()
