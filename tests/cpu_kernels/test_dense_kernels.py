"""RMSNorm, SwiGLU, rotary, attention, linear, embedding and cross entropy against torch in float64."""

import numpy as np
import pytest
import torch
from helpers import rank_cells
from helpers.against_torch import attention, close, compare, documents_mask, latent_attention, random, run_ours
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from mindformers_ext.cpu_kernels import cells, library

size = st.integers(1, 70)
few = settings(max_examples=8, deadline=None, derandomize=True)


@few
@given(size, st.integers(2, 70))  # of one value, the gradient is nothing but rounding
def test_rms_norm(rows, width):
    def theirs(x, w):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w

    compare(cells.RmsNorm(1e-6), theirs, [random(rows, width), random(width, seed=1)], [0, 1])


@few
@given(size, size)
def test_swiglu(rows, width):
    def theirs(gate, up):
        return torch.nn.functional.silu(gate) * up

    arrays = [random(rows, width, scale=5.0), random(rows, width, seed=1)]
    compare(cells.SwiGlu(), theirs, arrays, [0, 1])
    halves = np.concatenate(arrays, 1)
    compare(rank_cells.SwiGluHalves(), lambda x: theirs(*x.chunk(2, -1)), [halves], [0])


def test_swiglu_of_extreme_gates():
    gate = np.array([[-1e4, -100, -88, 88, 100, 1e4, 0, -0.0]], np.float32)
    compare(cells.SwiGlu(), lambda g, u: torch.nn.functional.silu(g) * u, [gate, np.ones_like(gate)], [1])


@few
@given(st.integers(1, 3), st.integers(1, 4), size, st.integers(1, 20), st.booleans())
def test_rotary(batch, heads, length, half, per_sequence):
    angles = np.repeat(random(batch if per_sequence else 1, 1, length, half), 2, -1)

    def theirs(x, cos, sin):
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos + turned * sin

    compare(cells.Rotary(), theirs, [random(batch, heads, length, 2 * half), np.cos(angles), np.sin(angles)], [0])


def heads(batch, count, length, key_width, value_width):
    shapes = [(batch, count, length, key_width)] * 2 + [(batch, count, length, value_width)]
    return [random(*shape, seed=i) for i, shape in enumerate(shapes)]


@few
@given(st.integers(1, 2), st.integers(1, 3), st.sampled_from([2, 7, 63, 64, 65, 300, 511, 512, 513]), size, size)
def test_causal_attention(batch, count, length, key_width, value_width):
    ours = cells.FlashAttention(0.3)
    arrays = heads(batch, count, length, key_width, value_width)
    compare(lambda q, k, v: ours(q, k, v, None), attention, arrays, [0, 1, 2])


def test_attention_of_one_token_returns_its_value():
    ours = cells.FlashAttention(0.3)
    arrays = heads(2, 3, 1, 6, 5)
    compare(lambda q, k, v: ours(q, k, v, None), attention, arrays, [2])
    _, gradients = run_ours(lambda q, k, v: ours(q, k, v, None), arrays, [0, 1])
    assert all(np.abs(gradient).max() < 1e-6 for gradient in gradients)  # exactly 0 but for rounding


@few
@given(st.integers(1, 2), st.sampled_from([3, 130, 530]), st.lists(st.integers(1, 529), max_size=4), st.booleans())
def test_attention_of_packed_sequences(batch, length, starts, shared):
    document = np.isin(np.arange(length), starts).cumsum()
    place = np.arange(length)
    mask = (document[:, None] != document[None]) | (place[None] > place[:, None])
    mask = np.repeat(mask[None, None].astype(np.uint8), 1 if shared else batch, 0)
    compare(cells.FlashAttention(0.3), attention, [*heads(batch, 2, length, 24, 12), mask], [0, 1, 2])


packed_lengths = st.lists(st.integers(0, 600), min_size=1, max_size=5)


def ends_of(batch, length, lengths):
    """Where documents end (B, L) int32, in each sample others, filled up with the sample's length."""
    ends = np.minimum(np.cumsum(lengths), length)
    return np.stack([np.maximum(ends - 7 * row, 0) for row in range(batch)]).astype(np.int32)


@few
@given(st.integers(1, 2), st.sampled_from([3, 64, 130, 530]), packed_lengths)
def test_attention_of_documents(batch, length, lengths):
    arrays = [*heads(batch, 2, length, 24, 12), ends_of(batch, length, lengths)]
    compare(cells.FlashAttention(0.3), lambda q, k, v, e: attention(q, k, v, documents_mask(e, length)), arrays, [2])
    if length > 64:  # with few keys a gradient is nothing but rounding
        _, ours = run_ours(cells.FlashAttention(0.3), arrays, [0, 1])
        dense = documents_mask(torch.from_numpy(arrays[3]), length).numpy().astype(np.uint8)
        _, expected = run_ours(cells.FlashAttention(0.3), [*arrays[:3], dense], [0, 1])
        for one, other in zip(ours, expected, strict=True):
            close(one, other, "gradient")


@pytest.mark.parametrize("ends", [[4, 3, 9], [4, 10, 10], [-1, 4, 9]])
def test_ends_of_documents_that_cannot_be(ends, capfd):
    arrays = [*heads(1, 2, 9, 4, 4), np.array([ends], np.int32)]
    with pytest.raises(RuntimeError):
        cells.FlashAttention(0.3)(*map(Tensor, arrays)).asnumpy()
    assert "the ends of documents must not decrease" in capfd.readouterr().err


def test_memory_and_time_of_documents_are_linear():
    """64K tokens in documents of 256: a mask would have 4 GiB; causal attention takes 256 times as long."""
    length = 1 << 16
    arrays = [*heads(1, 1, length, 16, 16), np.arange(256, length + 1, 256, np.int32)[None]]
    result = cells.FlashAttention(0.3)(*map(Tensor, arrays)).asnumpy()
    last = [x[:, :, -256:] for x in arrays[:3]]
    close(result[:, :, -256:], cells.FlashAttention(0.3)(*map(Tensor, last), None).asnumpy(), "the last document")


def test_a_query_without_keys_attends_to_nothing():
    mask = np.zeros((1, 1, 5, 5), np.uint8)
    mask[0, 0, 2] = 1
    arrays = [*heads(1, 1, 5, 4, 4), mask]
    compare(cells.FlashAttention(0.3), attention, arrays, [2])


@few
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from([1, 7, 130, 270]),
    st.tuples(st.integers(1, 20), st.integers(1, 6), st.integers(1, 20)),
    st.booleans(),
    st.sampled_from(["causal", "mask", "documents"]),
)
def test_latent_attention(batch, count, length, widths, per_sequence, rule):
    (nope, half, value), tokens = widths, batch * length
    angles = np.repeat(random(batch if per_sequence else 1, 1, length, half), 2, -1)
    arrays = [
        random(tokens, count * (nope + 2 * half)),
        random(tokens, count * (nope + value)),
        random(tokens, 2 * half),
    ]
    arrays += [np.cos(angles), np.sin(angles)]
    if rule == "mask":
        place = np.arange(length)
        arrays.append((place[None] > place[:, None])[None, None].astype(np.uint8))
    if rule == "documents":
        arrays.append(ends_of(batch, length, [length // 3, 1, length // 2]))
    cell = cells.LatentAttention(count, 0.3)
    wanted = [0, 1, 2] if length > 1 else [1]  # of one token, the other gradients are nothing but rounding
    compare(
        lambda q, kv, pe, c, s, mask=None: cell(q, kv, pe, c, s, mask),
        lambda *inputs: latent_attention(
            count, *inputs[:5], *(documents_mask(x, length) if rule == "documents" else x for x in inputs[5:])
        ),
        arrays,
        wanted,
    )


@few
@given(size, size, size)
def test_split_columns(rows, first, rest):
    arrays = [random(rows, first + rest)]
    for part in (0, 1):
        compare(
            lambda x, part=part: cells.SplitColumns(first)(x)[part],
            lambda x, part=part: x.split((first, rest), 1)[part],
            arrays,
            [0],
        )


@few
@given(size, size, size)
def test_feed_forward(rows, hidden, width):
    def theirs(x, gate, up, down):
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    arrays = [random(rows, hidden), random(width, hidden), random(width, hidden, seed=1), random(hidden, width)]
    compare(cells.FeedForward(), theirs, arrays, [0, 1, 2, 3])


@few
@given(size, size, size)
def test_linear(rows, inner, width):
    compare(cells.Linear(), lambda x, w: x @ w.T, [random(rows, inner), random(width, inner, seed=1)], [0, 1])


def test_linear_of_several_blocks():
    compare(cells.Linear(), lambda x, w: x @ w.T, [random(700, 130), random(333, 130, seed=1)], [0, 1])


def test_linear_with_rows_on_multiples_of_a_page():  # they are copied first
    compare(cells.Linear(), lambda x, w: x @ w.T, [random(40, 1024), random(50, 1024, seed=1)], [0, 1])


@few
@given(st.integers(1, 300))
def test_product_that_measures_the_peak(size):
    left, right = random(size, size), random(size, size, seed=1)
    out = np.empty_like(left)
    library.multiply(left, right, out)
    np.testing.assert_allclose(out, left.astype(np.float64) @ right, rtol=1e-5, atol=1e-5 * size**0.5)


def test_product_refuses_what_is_not_square_float32():
    with pytest.raises(ValueError, match="square float32"):
        library.multiply(random(4, 4), random(4, 5), random(4, 4))


@few
@given(size, st.integers(1, 3000), size)
def test_embedding(tokens, vocabulary, width):
    ids = np.random.default_rng(0).integers(0, vocabulary, tokens).astype(np.int32)
    arrays = [random(vocabulary, width), ids]
    compare(cells.Embedding(), lambda w, i: torch.nn.functional.embedding(i, w), arrays, [0])


def token_loss(hidden, weight, labels, mask):
    loss = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    return ((loss * mask).sum() / (mask.sum() + 1e-8)).reshape(1)


@few
@given(size, size, st.sampled_from([2, 33, 5000]), st.booleans())
def test_cross_entropy(tokens, width, vocabulary, masked):
    labels = np.random.default_rng(0).integers(0, vocabulary, tokens).astype(np.int32)
    mask = (np.arange(tokens) % 3 < 2 if masked else np.ones(tokens)).astype(np.float32)
    arrays = [random(tokens, width), random(vocabulary, width, seed=1), labels, mask]
    compare(cells.LinearCrossEntropy(), token_loss, arrays, [0, 1])


def test_cross_entropy_of_several_blocks_and_large_logits():
    labels = np.random.default_rng(0).integers(0, 40000, 120).astype(np.int32)
    arrays = [random(120, 8, scale=30.0), random(40000, 8, seed=1), labels, np.ones(120, np.float32)]
    compare(cells.LinearCrossEntropy(), token_loss, arrays, [0, 1])
