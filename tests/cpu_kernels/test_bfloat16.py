"""bfloat16 tensors: results and gradients lie within 2 units in the last place of exact ones rounded to bfloat16."""

import mindspore as ms
import numpy as np
import pytest
import torch
from helpers import rank_cells
from helpers.against_torch import attention, latent_attention, random, run_ours, swiglu_experts
from mindspore import Tensor

from mindformers_ext.cpu_kernels import cells


def rounded(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 values, as float32."""
    return torch.from_numpy(x).bfloat16().float().numpy()


def flash(query, key, value):
    return cells.FlashAttention(0.3)(query, key, value, None)


ANGLES = np.repeat(random(1, 1, 140, 2), 2, -1)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)
IDS = np.random.default_rng(0).integers(0, 4, (37, 2)).astype(np.int32)
CASES = {
    "linear": (cells.Linear, lambda x, w: x @ w.T, [random(37, 21), random(45, 21, seed=1)], [0, 1]),
    "swiglu": (
        cells.SwiGlu,
        lambda g, u: torch.nn.functional.silu(g) * u,
        [random(37, 21), random(37, 21, seed=1)],
        [0, 1],
    ),
    "rms_norm": (
        lambda: cells.RmsNorm(1e-6),
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
        [random(37, 21), random(21, seed=1)],
        [0, 1],
    ),
    "attention": (lambda: flash, attention, [random(1, 2, 140, 12, seed=i) for i in range(3)], [0, 1, 2]),
    "latent_attention": (
        lambda: lambda q, kv, pe: cells.LatentAttention(2, 0.3)(q, kv, pe, Tensor(COS), Tensor(SIN), None),
        lambda q, kv, pe: latent_attention(2, q, kv, pe, torch.from_numpy(COS), torch.from_numpy(SIN)),
        [random(2 * 140, 2 * 12), random(2 * 140, 2 * 17), random(2 * 140, 4)],
        [0, 1, 2],
    ),
    "feed_forward": (
        cells.FeedForward,
        lambda x, g, u, d: (torch.nn.functional.silu(x @ g.T) * (x @ u.T)) @ d.T,
        [random(37, 24), random(13, 24), random(13, 24, seed=1), random(24, 13)],
        [0, 1, 2, 3],
    ),
    "split_columns": (lambda: lambda x: cells.SplitColumns(5)(x)[1], lambda x: x[:, 5:], [random(37, 21)], [0]),
    "experts": (
        cells.RoutedExperts,
        swiglu_experts,
        [random(37, 24), random(37, 2), IDS, random(4, 24, 26), random(4, 13, 24)],
        [0, 1, 3, 4],
    ),
    "grouped_matmul": (
        rank_cells.GroupedMatmul,
        lambda x, w, _: torch.cat([x[:5] @ w[0], x[5:5] @ w[1], x[5:] @ w[2]]),
        [random(37, 21), random(3, 21, 17), np.array([5, 5, 37])],
        [0, 1],
    ),
    "embedding": (
        cells.Embedding,
        lambda w, i: torch.nn.functional.embedding(i, w),
        [random(50, 21), IDS[:, 0].copy()],
        [0],
    ),
}


def within_two_units(ours: np.ndarray, exact: np.ndarray) -> bool:
    """True when every value is within 2 bfloat16 units of the rounded exact one.

    Where terms cancel, float32 sums add their own error: 1e-6 of the largest value.
    """
    reference = rounded(exact.astype(np.float32))
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(reference), 1e-30)))) * 2.0**-7
    return bool((np.abs(ours - reference) <= np.maximum(2 * unit, 1e-6 * np.abs(reference).max())).all())


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name):
    make, theirs, arrays, wanted = CASES[name]
    result, gradients = run_ours(make(), arrays, wanted, ms.bfloat16)
    tensors = [torch.from_numpy(rounded(x) if x.dtype == np.float32 else x.copy()) for x in arrays]
    tensors = [x.double() if x.dtype == torch.float32 else x.long() for x in tensors]
    for i in wanted:
        tensors[i].requires_grad_()
    exact = theirs(*tensors)
    (exact * torch.from_numpy(rounded(random(*exact.shape, seed=99))).double()).sum().backward()
    assert within_two_units(result, exact.detach().numpy()), "result"
    for i, gradient in zip(wanted, gradients, strict=True):
        assert within_two_units(gradient, tensors[i].grad.numpy()), f"gradient of input {i}"


def test_not_a_number_survives_rounding():
    values = np.array([[np.nan, np.inf, -np.inf, 3.4e38, 1.00390625]], np.float32)
    table = Tensor(values.T.copy()).astype(ms.bfloat16)
    assert np.isnan(cells.Embedding()(table, Tensor(np.zeros(1, np.int32))).astype(ms.float32).asnumpy()).all()
    kept = cells.Embedding()(table, Tensor(np.arange(1, 5, dtype=np.int32))).astype(ms.float32).asnumpy()
    assert np.array_equal(kept, rounded(values.T)[1:])
