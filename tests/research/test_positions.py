"""Rotary positions, YaRN and masks: the released models' numbers (facts 7, 8), packed samples."""

import math

import mindspore as ms
import numpy as np
import pytest
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.small_models import v3_config
from mindspore import Tensor
from rope import rope_tables, softmax_scale, yarn_frequencies

RELEASED = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, max_position_embeddings=4096)


def test_softmax_scales():
    assert softmax_scale(v3_config(**RELEASED)) == pytest.approx(0.0721688, rel=1e-6)
    assert softmax_scale(v3_config(extend_method="YARN", **RELEASED)) == pytest.approx(0.135234, rel=1e-5)
    lite = dict(mscale=0.707, mscale_all_dim=0.707)
    assert softmax_scale(v3_config(extend_method="YARN", scaling_factor=lite, **RELEASED)) == pytest.approx(
        0.114721, rel=1e-5
    )


def test_yarn_interpolates_from_dimension_10_to_23_and_keeps_the_length_of_cos_sin():
    config = v3_config(extend_method="YARN", **RELEASED)
    plain = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    ratio = yarn_frequencies(plain, 64, 10000.0, config.yarn) / plain
    assert (ratio[:11] == 1).all() and ratio[11] < 1
    np.testing.assert_allclose(ratio[23:], 1 / 40)
    assert ratio[22] > 1 / 40
    cos, sin = rope_tables(config)
    np.testing.assert_allclose(cos**2 + sin**2, 1, rtol=1e-5)
    assert cos.shape == (4096, 64) and math.isclose(cos[1, 0], math.cos(1.0), rel_tol=1e-6)


def test_packed_documents_do_not_see_each_other():
    """With a block mask and positions that start anew, a packed sample scores as its documents alone do."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    config = v3_config(initializer_range=0.05)
    network = DeepseekV3ForCausalLM(config)
    network.set_train(False)
    ids = np.random.default_rng(0).integers(2, 128, (1, 24)).astype(np.int32)
    document = np.repeat([0, 1], [10, 14])
    allowed = np.tril(np.ones((24, 24))) * (document[:, None] == document[None])
    positions = np.concatenate((np.arange(10), np.arange(14))).astype(np.int32)[None]
    mask = Tensor((1 - allowed)[None, None].astype(np.uint8))
    packed = network(Tensor(ids), position_ids=Tensor(positions), attention_mask=mask).asnumpy()
    alone = [network(Tensor(ids[:, part])).asnumpy() for part in (slice(0, 10), slice(10, 24))]
    np.testing.assert_allclose(packed, np.concatenate(alone, 1), atol=1e-5)
