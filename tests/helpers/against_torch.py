"""Run a cell of ours and a torch function on the same numbers, and compare results and gradients."""

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
import torch
from mindspore import Tensor

FLOAT32 = 1e-5  # relative to the largest value of a tensor


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Normal float32 values."""
    return (np.random.default_rng((seed, *shape)).standard_normal(shape) * scale).astype(np.float32)


def close(ours: np.ndarray, expected: np.ndarray, name: str, tolerance: float = FLOAT32) -> None:
    """Assert that the largest difference is within `tolerance` of the largest expected value."""
    assert ours.shape == expected.shape, f"{name}: {ours.shape} is not {expected.shape}"
    if ours.size:
        limit = tolerance * max(np.abs(expected).max(), 1e-2)  # 1e-7, float32's own rounding, where values cancel
        assert np.abs(ours - expected).max() <= limit, f"{name}: {np.abs(ours - expected).max()} > {limit}"


def run_ours(function: Callable, arrays: Sequence[np.ndarray], wanted: Sequence[int], dtype=None):
    """Result of `function` and the gradients of sum(result * weights) for the inputs in `wanted`, as float32."""
    tensors = [Tensor(x).astype(dtype) if dtype is not None and x.dtype == np.float32 else Tensor(x) for x in arrays]
    weights = Tensor(random(*function(*tensors).shape, seed=99))

    def loss(*inputs):
        return (function(*inputs).astype(ms.float32) * weights).sum()

    result = function(*tensors).astype(ms.float32).asnumpy()
    gradients = ms.grad(loss, tuple(wanted))(*tensors)
    return result, [g.astype(ms.float32).asnumpy() for g in (gradients if len(wanted) > 1 else [gradients])]


def run_torch(function: Callable, arrays: Sequence[np.ndarray], wanted: Sequence[int]):
    """The same of a torch function, in float64 rounded to float32."""
    tensors = [torch.from_numpy(x.copy()) for x in arrays]
    tensors = [x.double() if x.dtype == torch.float32 else x.long() if x.dtype == torch.int32 else x for x in tensors]
    for i in wanted:
        tensors[i].requires_grad_()
    result = function(*tensors)
    (result * torch.from_numpy(random(*result.shape, seed=99)).double()).sum().backward()
    gradients = [t.grad if t.grad is not None else torch.zeros_like(t) for t in (tensors[i] for i in wanted)]
    return result.detach().float().numpy(), [g.float().numpy() for g in gradients]


def compare(ours: Callable, theirs: Callable, arrays: Sequence[np.ndarray], wanted: Sequence[int]) -> None:
    """Assert equal results and gradients (float32, relative 1e-5)."""
    result, gradients = run_ours(ours, arrays, wanted)
    expected, expected_gradients = run_torch(theirs, arrays, wanted)
    close(result, expected, "result")
    for i, ours_i, theirs_i in zip(wanted, gradients, expected_gradients, strict=True):
        close(ours_i, theirs_i, f"gradient of input {i}")


def swiglu_experts(x, gates, ids, gate_up, down):
    """torch's routed experts: gates (T, K) of ids (T, K) on x (T, H), one expert after another."""
    y = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        gate, up = (x @ gate_up[e]).chunk(2, -1)
        weight = (gates * (ids == e)).sum(-1, keepdim=True)
        y = y + weight * ((torch.nn.functional.silu(gate) * up) @ down[e])
    return y


def attention(query, key, value, mask=None):
    """torch's attention with scale 0.3, causal where there is no mask; a query without keys gives 0."""
    scores = query @ key.transpose(-1, -2) * 0.3
    if mask is None:
        mask = torch.ones(scores.shape[-2:]).triu(1)
    return scores.masked_fill(mask.bool(), float("-inf")).softmax(-1).nan_to_num() @ value


def documents_mask(ends, length):
    """(B, 1, S, S) bool, True where a query may not see a key: later, or of another document; ends (B, L)."""
    place = torch.arange(length)
    document = (ends.unsqueeze(1) <= place[None, :, None]).sum(-1)
    return ((document[:, :, None] != document[:, None]) | (place > place[:, None]))[:, None]


def latent_attention(heads, query, kv, k_pe, cos, sin, mask=None):
    """MLA's core, written from the paper."""
    batch, length, rope = query.shape[0] // cos.shape[2], cos.shape[2], k_pe.shape[1]
    nope = query.shape[1] // heads - rope

    def by_head(x):
        return x.unflatten(0, (batch, length)).unflatten(2, (-1, x.shape[1] // heads)).transpose(1, 2)

    def turned(x):
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin

    query, kv = by_head(query), by_head(kv)
    shared = turned(k_pe.reshape(batch, 1, length, rope)).expand(-1, heads, -1, -1)
    query = torch.cat((query[..., :nope], turned(query[..., nope:])), -1)
    context = attention(query, torch.cat((kv[..., :nope], shared), -1), kv[..., nope:], mask)
    return context.transpose(1, 2).reshape(batch * length, -1)
