"""TopkRouterV2 against a plain numpy reading of DeepSeek's inference/model.py (class Gate)."""

import mindspore as ms
import numpy as np
import pytest
from helpers.small_models import v2_config, v3_config
from mindspore import Tensor, nn

from mindformers_ext.layers.router import TopkRouterV2

TOKENS = 1000


class Route(nn.Cell):
    """The router alone, its scores given: the gate's matrix is the identity."""

    def __init__(self, config):
        super().__init__()
        self.router = TopkRouterV2(config)
        self.router.weight.set_data(Tensor(np.eye(config.moe_config.expert_num, dtype=np.float32)))

    def construct(self, x, bias):
        return self.router.route(x, self.router.weight, bias)


def reference(logits, bias, moe):
    """Gates of every expert (0 where not chosen), the biased scores that compete, and the scores."""
    if moe.use_gating_sigmoid:
        scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    else:
        scores = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
        scores /= scores.sum(-1, keepdims=True)
    scores = scores.astype(np.float32)
    choice = scores + bias if moe.topk_method == "noaux_tc" else scores.copy()
    if moe.topk_method != "greedy" and moe.n_group > 1:
        grouped = choice.reshape(len(choice), moe.n_group, -1)
        ordered = np.sort(grouped, -1)
        group_scores = ordered[..., -2:].sum(-1) if moe.topk_method == "noaux_tc" else ordered[..., -1]
        limit = np.sort(group_scores, -1)[:, -moe.topk_group][:, None]
        grouped[group_scores < limit] = -np.inf
        choice = grouped.reshape(choice.shape)
    return choice, scores


CASES = {
    "v3": v3_config(hidden_size=32, moe=dict(expert_num=32, num_experts_chosen=6, n_group=8, topk_group=3)),
    "v3_one_group": v3_config(hidden_size=16, moe=dict(expert_num=16, num_experts_chosen=4, n_group=1, topk_group=1)),
    "v3_top1": v3_config(hidden_size=8, moe=dict(num_experts_chosen=1)),
    "v2": v2_config(
        hidden_size=32,
        moe=dict(expert_num=32, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16),
    ),
    "v2_lite": v2_config(hidden_size=64, moe=dict(expert_num=64, num_experts_chosen=6)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scores", ["random", "negative_bias"])
def test_random_cases(name, scores):
    """10 x 1000 tokens: chosen set, gates and their order; V3 with biases that make every score negative."""
    config = CASES[name]
    moe = config.moe_config
    rng = np.random.default_rng(len(name))
    logits = rng.normal(size=(TOKENS, moe.expert_num)).astype(np.float32)
    low, high = (-3, -1.2) if scores == "negative_bias" else (-0.5, 0.5)
    bias = rng.uniform(low, high, moe.expert_num).astype(np.float32)
    weights, ids, got_scores, _ = (t.asnumpy() for t in Route(config)(Tensor(logits), Tensor(bias)))
    choice, expected_scores = reference(logits, bias, moe)
    np.testing.assert_allclose(got_scores, expected_scores, rtol=1e-5, atol=1e-7)
    best = np.argsort(-choice, -1, kind="stable")[:, : moe.num_experts_chosen]
    np.testing.assert_array_equal(np.sort(ids, -1), np.sort(best, -1))
    gates = np.take_along_axis(expected_scores, ids, 1)
    if moe.norm_topk_prob:
        gates = gates / gates.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, gates * moe.routed_scaling_factor, rtol=1e-5)
    if moe.norm_topk_prob:
        np.testing.assert_allclose(weights.sum(-1), moe.routed_scaling_factor, rtol=1e-5)


def test_ties_choose_k_different_experts_of_the_best_scores():
    """Which of several equal scores wins is open (torch leaves it open too); that K distinct best ones win is not."""
    config = CASES["v3_one_group"]
    rng = np.random.default_rng(1)
    logits = rng.integers(0, 3, (TOKENS, 16)).astype(np.float32)
    _, ids, scores, _ = (t.asnumpy() for t in Route(config)(Tensor(logits), Tensor(np.zeros(16, np.float32))))
    assert all(len(set(row)) == 4 for row in ids)
    np.testing.assert_array_equal(np.sort(np.take_along_axis(scores, ids, 1)), np.sort(scores)[:, -4:])


def test_gradient_flows_through_the_gates_only():
    """The bias selects and is never trained; scores that are not chosen get gradient only from normalising."""
    config = CASES["v3_top1"]  # K = 1, normalised: the gate is constant
    net = Route(config)

    def total(x, bias):
        return net(x, bias)[0].sum()

    x, bias = Tensor(np.random.default_rng(0).normal(size=(7, 8)).astype(np.float32)), Tensor(np.ones(8, np.float32))
    grad_x, grad_bias = ms.grad(total, (0, 1))(x, bias)
    assert np.abs(grad_bias.asnumpy()).max() == 0
    assert np.abs(grad_x.asnumpy()).max() < 1e-5


def test_bias_moves_against_the_load():
    """b += rate * sign(mean load - load): facts 4."""
    router = TopkRouterV2(v3_config(moe=dict(balance_via_topk_bias=True, topk_bias_update_rate=0.001)))
    router.expert_load.set_data(Tensor(np.array([0, 10, 5, 5, 5, 5, 2, 8], np.float32)))  # mean 5
    router.update_bias()
    expected = np.array([1, -1, 0, 0, 0, 0, 1, -1], np.float32) * np.float32(0.001)
    np.testing.assert_array_equal(router.e_score_correction_bias.asnumpy(), expected)
    assert router.expert_load.asnumpy().sum() == 0


def test_frozen_bias_stays():
    """balance_via_topk_bias False (fine-tuning): counting goes on, the bias does not move."""
    router = TopkRouterV2(v3_config())
    router.expert_load.set_data(Tensor(np.arange(8, dtype=np.float32)))
    router.update_bias()
    assert np.abs(router.e_score_correction_bias.asnumpy()).max() == 0
