"""Kernels that only the graphs of ranks use, against torch in float64."""

import numpy as np
import pytest
import torch
from helpers import rank_cells
from helpers.against_torch import close, compare, random
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from mindformers_ext.cpu_kernels import cells
from mindformers_ext.cpu_kernels.library import custom

size = st.integers(1, 70)
few = settings(max_examples=8, deadline=None, derandomize=True)


def run(kernel: str, shape: tuple[int, ...], *inputs, **attributes) -> np.ndarray:
    """Result (of `shape`, type of the first input) of a kernel."""
    operator = custom(kernel, lambda *_: shape, lambda x, *_: x, **attributes)
    return operator(*(Tensor(x) for x in inputs)).asnumpy()


@few
@given(st.integers(1, 40), st.integers(2, 60), st.integers(1, 4), st.sampled_from([1.0, 40.0]))
def test_cross_entropy_of_a_split_vocabulary(tokens, width, parts, scale):
    logits = random(tokens, parts * width, scale=scale)
    labels = np.random.default_rng(1).integers(0, parts * width, tokens).astype(np.int32)
    shares = np.split(logits, parts, 1)
    own = [labels - width * i for i in range(parts)]  # outside 0..width-1 on the other devices
    gradient = random(tokens, 1, seed=2)

    mine = [((label >= 0) & (label < width)).astype(np.float32)[:, None] for label in own]
    rows = [(z, np.clip(label, 0, width - 1)[:, None]) for z, label in zip(shares, own, strict=True)]
    own_log_sums = [run("PickColumn", (tokens, 1), *row) - run("PickLogSoftmax", (tokens, 1), *row) for row in rows]
    log_sum = np.logaddexp.reduce(own_log_sums, 0)
    picked = np.sum([run("PickColumn", (tokens, 1), *row) * m for row, m in zip(rows, mine, strict=True)], 0)
    loss = (log_sum - picked)[:, 0]
    dlogits = [
        run("SplitCrossEntropyGrad", (tokens, width), z, 2 * gradient * np.exp(own - log_sum), place, -2 * gradient * m)
        for (z, place), m, own in zip(rows, mine, own_log_sums, strict=True)
    ]

    z = torch.from_numpy(logits).double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(z, torch.from_numpy(labels).long(), reduction="none")
    (2 * expected * torch.from_numpy(gradient).double()[:, 0]).sum().backward()
    close(loss, expected.detach().float().numpy(), "loss")
    close(np.concatenate(dlogits, 1), z.grad.float().numpy(), "gradient of the logits")


@few
@given(size, size, size, st.booleans(), st.booleans())
def test_matmul(rows, columns, inner, turned_a, turned_b):
    a, b = random(rows, inner), random(inner, columns, seed=1)
    stored = [x.T.copy() if turned else x for x, turned in ((a, turned_a), (b, turned_b))]
    ours = run("MatMul", (rows, columns), *stored, transpose_a=turned_a, transpose_b=turned_b)
    close(ours, (a.astype(np.float64) @ b).astype(np.float32), "product")


@few
@given(st.integers(1, 3), st.integers(1, 4), size, st.integers(1, 20))
def test_rotary_of_halves_turns_the_pairs_of_the_interleaved_one(batch, heads, length, half):
    x, angles = random(batch, heads, length, 2 * half), random(batch, 1, length, half, seed=1)
    sorted_x = np.concatenate((x[..., ::2], x[..., 1::2]), -1)
    a, b, cos, sin = *np.split(sorted_x.astype(np.float64), 2, -1), np.cos(angles), np.sin(angles)
    expected = np.concatenate((a * cos - b * sin, b * cos + a * sin), -1).astype(np.float32)
    tables = [np.concatenate((table, table), -1) for table in (cos, sin)]
    ours = run("Rotary", x.shape, sorted_x, *tables, direction=1, halves=True)
    close(ours, expected, "turned")
    close(run("Rotary", x.shape, expected, *tables, direction=-1, halves=True), sorted_x, "turned back")


def test_columns_and_masked_rows_are_copied():
    x = random(3, 5, 7)
    first, rest = (part.asnumpy() for part in cells.SplitColumns(2)(Tensor(x)))
    np.testing.assert_array_equal(first, x[..., :2])
    np.testing.assert_array_equal(rest, x[..., 2:])
    np.testing.assert_array_equal(run("JoinColumns", x.shape, first, rest), x)
    mask, number = np.array([[True], [False], [True]]), np.float32(-2)
    expected = np.where(mask, number, x[0, :3])
    np.testing.assert_array_equal(run("MaskedRows", (3, 7), x[0, :3].copy(), mask, number), expected)


@pytest.mark.parametrize("sizes", [(1,), (3, 40000, 0, 17)])
def test_weighted_square_sum(sizes):
    tensors = [random(size, seed=i) for i, size in enumerate(sizes)]
    weights = random(len(sizes), seed=9)
    expected = sum(w * np.square(x.astype(np.float64)).sum() for w, x in zip(weights, tensors, strict=True))
    close(run("WeightedSquareSum", (1,), weights, *tensors), np.array([expected], np.float32), "sum")


@few
@given(st.integers(1, 3), st.lists(st.integers(0, 90), min_size=1, max_size=5), st.booleans(), st.integers(0, 40))
def test_attention_of_packed_tokens(heads, lengths, to_last, behind):
    """Ascend's layout TND: with to_last, a rank of context parallelism has the later queries of a document only."""
    lengths = np.array(lengths)
    queries = lengths // 2 if to_last else lengths
    tokens, rows = lengths.sum() + behind, queries.sum() + behind
    arrays = [random(rows, heads, 20), random(tokens, heads, 20, seed=1), random(tokens, heads, 12, seed=2)]
    arrays += [np.cumsum(queries).astype(np.int32), np.cumsum(lengths).astype(np.int32)]

    def theirs(q, k, v, ends, key_ends):
        result = torch.zeros(len(q), heads, 12, dtype=torch.float64)
        begin = key_begin = 0
        for end, key_end in zip(ends.tolist(), key_ends.tolist(), strict=True):
            scores = torch.einsum("qnd,knd->nqk", q[begin:end], k[key_begin:key_end]) * 0.3
            hidden = torch.ones(scores.shape[1:]).triu(1 + scores.shape[2] - scores.shape[1]).bool()
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            result[begin:end] = torch.einsum("nqk,knd->qnd", weights, v[key_begin:key_end])
            begin, key_begin = end, key_end
        return result + 0 * (q.sum() + k.sum() + v.sum())  # rows behind the last document are zero

    if rows and tokens:
        compare(rank_cells.PackedAttention(0.3, to_last), theirs, arrays, [2])
        longest = max(lengths) > 20
        if longest:
            compare(rank_cells.PackedAttention(0.3, to_last), theirs, arrays, [0, 1, 2])
