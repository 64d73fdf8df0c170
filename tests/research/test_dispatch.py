"""Both dispatch policies against a loop over tokens and experts in numpy."""

import numpy as np
import pytest
from helpers.small_models import v3_config
from mindspore import Tensor, nn

from mindformers_ext.layers.moe_dispatch import CapacityDispatch, DroplessDispatch, ExpertGroup

TOKENS, HIDDEN, EXPERTS, TOPK, WIDTH = 48, 48, 8, 3, 20


class Dispatch(nn.Cell):
    """One policy as a network."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def construct(self, *inputs):
        return self.policy.run(*inputs)


def make(policy, **moe):
    return Dispatch(policy(v3_config(moe=moe), ExpertGroup()))


def expert(x, gate_up, down):
    """SwiGLU of one row."""
    gate, up = np.split(x @ gate_up, 2)
    return (gate / (1 + np.exp(-gate)) * up) @ down


def reference(inputs, kept=None):
    """Sum over each token's experts; `kept` (T, K) says which choices are carried out."""
    x, weights, ids, gate_up, down = inputs
    y = np.zeros_like(x)
    for token in range(len(x)):
        for rank, e in enumerate(ids[token]):
            if kept is None or kept[token, rank]:
                y[token] += weights[token, rank] * expert(x[token], gate_up[e], down[e])
    return y


def kept_choices(ids, group, capacity, by_sequence):
    """Choices that fit: experts fill up in the order of the policy, group by group of tokens."""
    kept = np.zeros(ids.shape, bool)
    for start in range(0, len(ids), group):
        load = np.zeros(EXPERTS, int)
        places = [(t, k) for t in range(start, start + group) for k in range(TOPK)]
        for token, rank in places if by_sequence else sorted(places, key=lambda place: place[1]):
            kept[token, rank] = load[ids[token, rank]] < capacity
            load[ids[token, rank]] += 1
    return kept


def random_inputs(ids=None):
    rng = np.random.default_rng(5)
    if ids is None:
        ids = np.stack([rng.permutation(EXPERTS)[:TOPK] for _ in range(TOKENS)])
    weights = rng.uniform(0.1, 1, (TOKENS, TOPK))
    gate_up, down = rng.normal(0, 0.2, (EXPERTS, HIDDEN, 2 * WIDTH)), rng.normal(0, 0.2, (EXPERTS, WIDTH, HIDDEN))
    x = rng.normal(size=(TOKENS, HIDDEN))
    return (
        tuple(a.astype(np.float32) for a in (x, weights))
        + (ids.astype(np.int32),)
        + tuple(a.astype(np.float32) for a in (gate_up, down))
    )


def run(net, inputs):
    return net(*map(Tensor, inputs)).asnumpy()


ROUTINGS = {
    "random": None,
    "one_expert_gets_all": np.tile([5, 2, 7], (TOKENS, 1)),
    "half_of_the_experts_idle": np.stack([np.roll([0, 2, 4, 6], i)[:TOPK] for i in range(TOKENS)]),
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_nothing_dropped(routing):
    """Dropless, and capacity that suffices, give every choice its expert. float32 sums: 1e-5."""
    inputs = random_inputs(ROUTINGS[routing])
    expected = reference(inputs)
    np.testing.assert_allclose(run(make(DroplessDispatch), inputs), expected, atol=2e-5)
    enough = make(CapacityDispatch, use_gmm=False, capacity_factor=EXPERTS)
    np.testing.assert_allclose(run(enough, inputs), expected, atol=2e-5)


@pytest.mark.parametrize("sdrop", [False, True])
@pytest.mark.parametrize("group", [24, 8])
def test_capacity_drops_what_the_policy_says(sdrop, group):
    inputs = random_inputs()
    net = make(CapacityDispatch, use_gmm=False, capacity_factor=0.7, enable_sdrop=sdrop, expert_group_size=group)
    capacity = int(np.ceil(TOPK * group * 0.7 / EXPERTS))
    kept = kept_choices(inputs[2], group, capacity, sdrop)
    assert 0 < kept.mean() < 1
    np.testing.assert_allclose(run(net, inputs), reference(inputs, kept), atol=2e-5)


def test_top1_of_one_token():
    inputs = tuple(a[:1] for a in random_inputs()[:3]) + random_inputs()[3:]
    inputs = (inputs[0], inputs[1][:, :1], inputs[2][:, :1]) + inputs[3:]
    np.testing.assert_allclose(run(make(DroplessDispatch, num_experts_chosen=1), inputs), reference(inputs), atol=2e-5)
