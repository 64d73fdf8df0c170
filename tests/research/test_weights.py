"""The name table: every parameter once, every HuggingFace tensor once, counts of the released model."""

import numpy as np
import pytest
from deepseek2_model import DeepseekV2ForCausalLM
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.small_models import v2_config, v3_config
from weights import from_huggingface, name_table, parameter_count, to_huggingface

from mindformers_ext.config.run import read_run

RELEASED = read_run("research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml").model


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
