"""Token permute, grouped matmul, routed experts and router against torch in float64, with uneven and empty experts."""

import numpy as np
import pytest
import torch
from helpers import rank_cells
from helpers.against_torch import close, compare, random, run_ours, run_torch, swiglu_experts
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from mindformers_ext.cpu_kernels import cells

size = st.integers(1, 40)
few = settings(max_examples=8, deadline=None, derandomize=True)
LOADS = ("random", "one expert", "two experts", "some absent")


def choose(tokens: int, topk: int, experts: int, load: str) -> np.ndarray:
    """ids (T, K) int32; with "some absent" ids also point to experts of other devices."""
    rng = np.random.default_rng(3)
    if load == "one expert":
        return np.full((tokens, topk), experts - 1, np.int32)
    if load == "two experts":
        return rng.choice([0, experts - 1], (tokens, topk)).astype(np.int32)
    return rng.integers(0, experts + (2 if load == "some absent" else 0), (tokens, topk)).astype(np.int32)


@few
@given(size, st.integers(1, 4), st.integers(1, 9), size, size, st.sampled_from(LOADS))
def test_routed_experts(tokens, topk, experts, hidden, width, load):
    ids = choose(tokens, topk, experts, load)
    arrays = [random(tokens, hidden), random(tokens, topk), ids, random(experts, hidden, 2 * width)]
    arrays.append(random(experts, width, hidden, seed=1))
    compare(cells.RoutedExperts(), swiglu_experts, arrays, [0, 1, 3, 4])


def test_routed_experts_of_several_blocks():
    ids = choose(600, 2, 3, "two experts")
    arrays = [random(600, 300, scale=0.1), random(600, 2), ids, random(3, 300, 22), random(3, 11, 300, seed=1)]
    compare(cells.RoutedExperts(), swiglu_experts, arrays, [0, 1, 3, 4])


@few
@given(st.lists(st.integers(0, 150), min_size=1, max_size=6), st.integers(0, 3), size, size)
def test_grouped_matmul(counts, spare, inner, width):
    rows, ends = sum(counts) + spare + (sum(counts) + spare == 0), np.cumsum(counts)

    def theirs(x, weight, _):
        parts, first = [], 0
        for group, end in enumerate(ends):
            parts.append(x[first:end] @ weight[group])
            first = end
        return torch.cat([*parts, x[first:] @ torch.zeros_like(weight[0])])

    arrays = [random(rows, inner), random(len(counts), inner, width), ends.astype(np.int64)]
    (y, (dx, dweight)) = run_ours(rank_cells.GroupedMatmul(), arrays, [0, 1])
    (expected, (expected_dx, expected_dweight)) = run_torch(theirs, arrays, [0, 1])
    close(y[: ends[-1]], expected[: ends[-1]], "result")
    close(dx[: ends[-1]], expected_dx[: ends[-1]], "gradient of x")
    close(dweight, expected_dweight, "gradient of the weights")
    # As Ascend's operator leaves them: rows of no group hold what the memory held.
    assert np.isnan(y[ends[-1] :]).all()
    assert np.isnan(dx[ends[-1] :]).all()


def test_grouped_matmul_refuses_ends_beyond_the_rows(capfd):
    with pytest.raises(RuntimeError):
        rank_cells.GroupedMatmul()(Tensor(random(4, 2)), Tensor(random(1, 2, 3)), Tensor(np.array([5]))).asnumpy()
    assert "group_list must ascend and end within the rows" in capfd.readouterr().err


@few
@given(size, st.integers(1, 4), st.integers(1, 9), size, st.sampled_from(LOADS))
def test_permute_and_unpermute(tokens, topk, experts, hidden, load):
    ids = choose(tokens, topk, experts, load)
    order = torch.from_numpy(ids.reshape(-1)).argsort(stable=True)
    permute = rank_cells.Permute()
    rows, place = permute.permute(Tensor(random(tokens, hidden)), Tensor(ids), ids.size)
    assert np.array_equal(rows.asnumpy(), random(tokens, hidden)[order.numpy() // topk])
    assert np.array_equal(place.asnumpy(), order.argsort().numpy())

    def sort(x, i):
        return permute.permute(x, i, ids.size)[0]

    compare(sort, lambda x, i: x[order // topk], [random(tokens, hidden), ids], [0])

    def mix(y, place, gates):
        return (y[place].reshape(tokens, topk, hidden) * gates[..., None]).sum(1)

    arrays = [random(ids.size, hidden), place.asnumpy(), random(tokens, topk)]
    compare(permute.unpermute, mix, arrays, [0, 2])


def route(logits, bias, rules, topk):
    """Gates and scores by torch, written from the report."""
    scores = logits.sigmoid() if rules["sigmoid"] else logits.softmax(-1)
    choice = scores.detach() + bias
    groups = rules["groups"]
    if groups > 1:
        grouped = choice.unflatten(-1, (groups, -1))
        best = grouped.topk(2, -1).values.sum(-1) if rules["two_best"] else grouped.amax(-1)
        kept = torch.zeros_like(best).scatter(-1, best.topk(rules["topk_group"]).indices, 1).bool()
        choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    ids = choice.topk(topk).indices
    gates = scores.gather(-1, ids)
    if rules["normalize"]:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    return gates * rules["scaling"], ids, scores


ROUTERS = {
    "v3": dict(groups=4, topk_group=2, sigmoid=True, two_best=True, normalize=True, scaling=2.5),
    "v3_one_group": dict(groups=1, topk_group=1, sigmoid=True, two_best=True, normalize=True, scaling=1.0),
    "v2": dict(groups=4, topk_group=3, sigmoid=False, two_best=False, normalize=False, scaling=16.0),
    "v2_lite": dict(groups=1, topk_group=1, sigmoid=False, two_best=False, normalize=False, scaling=1.0),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("low", [-0.1, -3.0])
def test_router(name, low):
    rules, topk, tokens, experts = ROUTERS[name], 3, 77, 16
    logits = random(tokens, experts)
    bias = np.random.default_rng(1).uniform(low, low + 0.2, experts).astype(np.float32)
    bias = bias if rules["two_best"] else np.zeros_like(bias)
    select = cells.TopkSelect(topk, **rules)
    gates, ids, scores, chosen, unbiased = (x.asnumpy() for x in select(Tensor(logits), Tensor(bias)))
    expected = route(torch.from_numpy(logits).double(), torch.from_numpy(bias).double(), rules, topk)
    assert np.array_equal(ids, expected[1].numpy())
    assert np.array_equal(chosen, np.eye(experts)[ids].sum(1))
    assert np.array_equal(unbiased, np.eye(experts)[expected[2].topk(topk).indices.numpy()].sum(1))
    for index in (0, 2):  # gates, scores
        compare(
            lambda z, b, index=index: select(z, b)[index],
            lambda z, b, index=index: route(z, b, rules, topk)[index],
            [logits, bias],
            [0],
        )


def test_router_of_equal_scores_takes_the_lower_ids():
    select = cells.TopkSelect(3, **ROUTERS["v3_one_group"])
    ids = select(Tensor(np.zeros((2, 8), np.float32)), Tensor(np.zeros(8, np.float32)))[1]
    assert ids.asnumpy().tolist() == [[0, 1, 2]] * 2


def test_router_of_invalid_logits_stays_in_range():
    select = cells.TopkSelect(3, **ROUTERS["v3"])
    ids = select(Tensor(np.full((2, 16), np.nan, np.float32)), Tensor(np.zeros(16, np.float32)))[1].asnumpy()
    assert ids.min() >= 0 and ids.max() < 16


def test_no_gradient_for_the_selection_bias():
    select = cells.TopkSelect(3, **ROUTERS["v3"])
    _, (gradient,) = run_ours(lambda z, b: select(z, b)[0], [random(5, 16), random(16)], [1])
    assert not gradient.any()
