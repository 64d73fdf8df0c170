"""Rotary positions, YaRN and masks: the released models' numbers (facts 7, 8), packed samples."""

import math
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import torch
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.small_models import v3_config
from mindspore import Tensor
from rope import rope_tables, softmax_scale, yarn_frequencies
from transformers.modeling_rope_utils import _compute_yarn_parameters

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


# Where the correction range begins and ends, of the 4 frequencies of 8 dimensions.
RANGES = {
    "usual": (dict(), (1, 3)),
    "no_width": (dict(original_max_position_embeddings=5), (0, 0)),
    "ends_below_zero": (dict(theta=100.0, original_max_position_embeddings=1), (0, -1)),
    "begins_past_the_last": (dict(theta=2.0), (17, 7)),
    "betas_turned_around": (
        dict(theta=100.0, original_max_position_embeddings=1024, beta_fast=1.0, beta_slow=32.0),
        (4, 2),
    ),
}


@pytest.mark.parametrize("name", RANGES)
def test_yarn_follows_transformers_where_the_range_is_clipped(name):
    """Against transformers 4.57.1, whose ramp may run backwards; the range by hand, from YaRN's formula."""
    values, (low, high) = RANGES[name]
    yarn = dict(factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0)
    yarn |= {key: value for key, value in values.items() if key != "theta"}
    theta, length = values.get("theta", 10000.0), yarn["original_max_position_embeddings"]
    ends = [8 * math.log(length / (2 * math.pi * yarn[b])) / (2 * math.log(theta)) for b in ("beta_fast", "beta_slow")]
    assert (max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), 7)) == (low, high)
    theirs = SimpleNamespace(
        rope_theta=theta, head_dim=8, hidden_size=32, num_attention_heads=4, rope_scaling={**yarn, "rope_type": "yarn"}
    )
    expected, _ = _compute_yarn_parameters(theirs, torch.device("cpu"))
    ours = yarn_frequencies(theta ** (-np.arange(0, 8, 2) / 8), 8, theta, SimpleNamespace(**yarn))
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


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


ENDS = np.array([[10, 16, 24, 24], [24, 24, 24, 24], [1, 2, 23, 24]], np.int32)  # where documents of three samples end


def packed_step(network, mode, arrays, **more):
    """Loss and gradients of a batch: input_ids, labels, loss_mask, position_ids."""
    ms.set_context(mode=mode)
    network.set_train(True)

    def forward(*inputs):
        return network(*inputs, **more)

    step = ms.value_and_grad(forward, None, network.trainable_params())
    loss, gradients = step(*map(Tensor, arrays))
    return loss.asnumpy(), [g.asnumpy() for g in gradients]


@pytest.mark.parametrize(
    ("mode", "flash", "rope"),
    [(ms.PYNATIVE_MODE, True, True), (ms.PYNATIVE_MODE, True, False), (ms.PYNATIVE_MODE, False, False),
     (ms.GRAPH_MODE, True, True)],
    ids=["latent", "heads", "basic", "compiled"],
)  # fmt: skip
def test_packed_documents_train_as_they_do_alone(mode, flash, rope):
    """By their ends (actual_seq_len): loss and gradients, with multi-token prediction, are the documents' sum."""
    config = v3_config(initializer_range=0.05, mtp_depth=1, use_flash_attention=flash, use_fused_rope=rope)
    network = DeepseekV3ForCausalLM(config)
    rng, length = np.random.default_rng(0), 24
    ids, labels = (rng.integers(2, 128, (3, length)).astype(np.int32) for _ in range(2))
    loss_mask = (rng.random((3, length)) < 0.8).astype(np.float32)
    parts = [
        (row, slice(begin, end))
        for row, ends in enumerate(ENDS)
        for begin, end in zip([0, *ends], ends, strict=False)
        if begin < end
    ]
    positions = np.zeros_like(ids)
    for row, part in parts:
        positions[row, part] = np.arange(part.stop - part.start)
        loss_mask[row, part.stop - 1] = 0  # what follows is another document: eod_mask_loss
    arrays = [ids, labels, loss_mask, positions]
    loss, gradients = packed_step(network, mode, arrays, actual_seq_len=Tensor(ENDS))
    counted = ENDS + length * np.arange(3, dtype=np.int32)[:, None]  # as MindFormers counts over a micro-batch
    assert packed_step(network, mode, arrays, actual_seq_len=Tensor(counted))[0] == loss

    main, further = loss_mask.sum(), sum(loss_mask[row, part][1:].sum() for row, part in parts)
    total, sums = 0.0, [np.zeros_like(g) for g in gradients]
    for row, part in parts:
        own = [x[row : row + 1, part] for x in arrays]
        share, share_further = own[2].sum() / main, own[2][:, 1:].sum() / further
        if share == 0:
            continue
        network.factor = float(0.3 * share_further / share)
        alone, own_gradients = packed_step(network, ms.PYNATIVE_MODE, own)
        total += share * alone
        sums = [x + share * g for x, g in zip(sums, own_gradients, strict=True)]
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    for one, other in zip(gradients, sums, strict=True):
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other) + 1e-7


def test_further_tokens_of_other_documents_do_not_count():
    network = DeepseekV3ForCausalLM(v3_config(mtp_depth=3, seq_length=24))
    document = (ENDS[:, None] <= np.arange(24)[:, None]).sum(-1)
    for depth, predictor in enumerate(network.mtp, 1):
        counts = predictor.in_document(Tensor(ENDS)).asnumpy()
        for row, own in enumerate(document):
            for place in range(24 - depth):  # later ones predict nothing
                assert counts[row, place] == (own[place] == own[min(place + depth + 1, 23)])
