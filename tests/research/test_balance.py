"""Load counts and auxiliary losses against the papers' formulas, over micro-batches, with padding and recompute."""

import mindspore as ms
import numpy as np
from balance_loss import BalanceLoss
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.small_models import v2_config, v3_config
from mindspore import Tensor, nn

ALPHA = dict(aux_loss_types=["expert"], aux_loss_factors=[1e-4])


def batch(config, seed, padding=0):
    """input_ids and labels (2, S); the last `padding` tokens of the second sequence are padding."""
    ids = np.random.default_rng(seed).integers(2, config.vocab_size, (2, config.seq_length + 1)).astype(np.int32)
    if padding:
        ids[1, -padding - 1 :] = config.pad_token_id
    return Tensor(ids[:, :-1]), Tensor(ids[:, 1:])


def train_step(network, recompute=False):
    """Forward and backward, as one graph."""
    network.set_train(True)
    if recompute:
        for _, layer in network.decoder_layers():
            layer.recompute()
    return ms.value_and_grad(network, None, network.trainable_params())


def loads(network):
    return {name: router.expert_load.asnumpy().copy() for name, router in network.moe_routers()}


def test_counts_every_token_once_mtp_included_evaluation_excluded():
    config = v3_config(mtp_depth=1)
    network = DeepseekV3ForCausalLM(config)
    step = train_step(network)
    for seed in range(3):  # micro-batches add up
        step(*batch(config, seed))
    for load in loads(network).values():
        assert load.sum() == 3 * 2 * config.seq_length * config.moe_config.num_experts_chosen
    assert list(loads(network)) == ["layers.1", "mtp.0"]
    before = loads(network)
    network.set_train(False)
    network(*batch(config, 9))
    assert all((before[name] == load).all() for name, load in loads(network).items())


def test_recompute_does_not_count_twice_and_padding_does_not_count():
    config = v3_config()
    plain, recomputed = DeepseekV3ForCausalLM(config), DeepseekV3ForCausalLM(config)
    for a, b in zip(plain.get_parameters(), recomputed.get_parameters(), strict=True):
        b.set_data(a.value())
    inputs = batch(config, 0, padding=5)
    loss_a, _ = train_step(plain)(*inputs)
    loss_b, _ = train_step(recomputed, recompute=True)(*inputs)
    assert loss_a.asnumpy() == loss_b.asnumpy()
    np.testing.assert_array_equal(loads(plain)["layers.1"], loads(recomputed)["layers.1"])
    tokens = 2 * config.seq_length - 5
    assert loads(plain)["layers.1"].sum() == tokens * config.moe_config.num_experts_chosen


class Loss(nn.Cell):
    """BalanceLoss of given scores, every choice counted as the router counts it."""

    def __init__(self, config):
        super().__init__()
        self.loss = BalanceLoss(config)

    def construct(self, scores, logits, counted, mask):
        return self.loss(scores, logits, counted, mask, 2)


def random_scores(seq, experts, topk, seed=0):
    """scores, logits, chosen (2*S, E) and mask (2*S, 1) with three padded tokens in the second sequence."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2 * seq, experts)).astype(np.float32)
    chosen = (np.argsort(np.argsort(-logits, -1), -1) < topk).astype(np.float32)
    mask = np.ones((2 * seq, 1), np.float32)
    mask[-3:] = 0
    return logits, chosen, mask


def sequences(x, mask, seq):
    """The unpadded rows of each sequence."""
    return [x[i * seq : (i + 1) * seq][mask[i * seq : (i + 1) * seq, 0] > 0] for i in range(2)]


def test_sequence_wise_loss_is_equations_17_to_20():
    config = v3_config(moe=ALPHA)
    seq, experts, topk = config.seq_length, 8, 3
    logits, chosen, mask = random_scores(seq, experts, topk)
    scores = 1 / (1 + np.exp(-logits))
    expected = []
    for s, c in zip(sequences(scores, mask, seq), sequences(chosen, mask, seq), strict=True):
        f = experts / (topk * len(s)) * c.sum(0)
        p = (s / s.sum(-1, keepdims=True)).mean(0)
        expected.append(1e-4 * (f * p).sum())
    got = Loss(config)(*map(Tensor, (scores, logits, chosen, mask)))
    np.testing.assert_allclose(got.asnumpy(), np.mean(expected), rtol=1e-5)


def test_perfect_balance_costs_alpha():
    config = v3_config(moe=ALPHA)
    tokens = 2 * config.seq_length
    chosen = np.zeros((tokens, 8), np.float32)
    for i in range(tokens):
        chosen[i, [(3 * i + k) % 8 for k in range(3)]] = 1
    scores = np.full((tokens, 8), 0.5, np.float32)
    got = Loss(config)(Tensor(scores), Tensor(scores), Tensor(chosen), Tensor(np.ones((tokens, 1), np.float32)))
    np.testing.assert_allclose(got.asnumpy(), 1e-4, rtol=1e-5)


def test_v2_device_and_communication_losses_and_z_loss():
    """arXiv 2405.04434 eq. 23-31 with D = n_group devices, M = topk_group; z: ST-MoE eq. 5."""
    moe = dict(
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        aux_loss_types=["expert", "device", "comm"],
        aux_loss_factors=[0.003, 0.05, 0.02],
        z_loss_factor=0.001,
    )
    config = v2_config(moe=moe)
    seq, experts, topk, groups, limit = config.seq_length, 8, 3, 4, 2
    logits, chosen, mask = random_scores(seq, experts, topk, seed=2)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = []
    for s, c in zip(sequences(scores, mask, seq), sequences(chosen, mask, seq), strict=True):
        f, p = experts / (topk * len(s)) * c.sum(0), s.mean(0)
        f_device, p_device = f.reshape(groups, -1).mean(1), p.reshape(groups, -1).sum(1)
        sent = (c.reshape(len(c), groups, -1).sum(-1) > 0).sum(0) * groups / (limit * len(s))
        expected.append(0.003 * (f * p).sum() + 0.05 * (f_device * p_device).sum() + 0.02 * (sent * p_device).sum())
    kept = logits[mask[:, 0] > 0]
    z = 0.001 * (np.log(np.exp(kept).sum(-1)) ** 2).mean()
    got = Loss(config)(*map(Tensor, (scores, logits, chosen, mask)))
    np.testing.assert_allclose(got.asnumpy(), np.mean(expected) + z, rtol=1e-5)
