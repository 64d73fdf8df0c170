"""The CPU kernels as cells with the interfaces of `layers/fused_ops.py`: the one Python face of this folder.

Every operator carries its hand-written gradient. Inputs and results are float32 or bfloat16; sums are float32.

Legend: T tokens, H hidden, F expert width, L experts, K experts per token, R = T*K rows sorted by expert,
B batch, N heads, S sequence, D head width, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import signature as sig

from mindformers_ext.cpu_kernels.library import custom


class Kernel(nn.Cell):
    """One operator of the library (see `custom`), called with its inputs."""

    def __init__(self, *operator, **attributes):
        super().__init__()
        self.operator = custom(*operator, **attributes)

    def construct(self, *inputs):
        return self.operator(*inputs)


class FirstOf(Kernel):
    """An operator whose first output is the result; the others are kept for its gradient."""

    def construct(self, *inputs):
        return self.operator(*inputs)[0]


class Attention(nn.Cell):
    """An operator with a mask as its last input, which it does not have where that is None: causal.

    Its outputs are the context, L of attention.h and the largest score of every query; `with_scores` returns the last
    one too.
    """

    def __init__(self, operator: Callable, causal_bprop: Callable, masked_bprop: Callable):
        super().__init__()
        self.causal, self.masked = operator(bprop=causal_bprop), operator(bprop=masked_bprop)

    def construct(self, *inputs):
        return self.with_scores(*inputs)[0]

    def with_scores(self, *inputs):
        """The context and the largest score of every query (B, N, S) float32, which takes no gradient."""
        found = self.causal(*inputs[:-1]) if inputs[-1] is None else self.masked(*inputs)
        return found[0], found[2]


class RmsNorm(FirstOf):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, eps: float):
        grad = custom("RmsNormGrad", lambda dy, x, r, w: (x, w))

        def bprop(x, weight, out, dout):
            return grad(dout[0], x, out[1], weight)

        def shapes(x, w):
            return x, (math.prod(x[:-1]),)

        super().__init__("RmsNorm", shapes, lambda x, w: (x, mstype.float32), bprop, eps=eps)


class FlashAttention(Attention):
    """softmax(query key^T * scale) value without scores in memory; mask None (causal) or uint8, 1 may not be attended.

    query, key (B, N, S, D), value (B, N, S, Dv), mask (1 or B, 1, S, S) -> (B, N, S, Dv).
    """

    def __init__(self, scale: float):
        rule = dict(scale=scale, diagonal=0)
        grad = custom("FlashAttentionGrad", lambda d, q, k, v, *_: (q, k, v), **rule)

        def causal_bprop(query, key, value, out, dout):
            return grad(dout[0], query, key, value, out[0], out[1])

        def masked_bprop(query, key, value, mask, out, dout):
            return (*grad(dout[0], query, key, value, out[0], out[1], mask), ops.zeros_like(mask))

        def shapes(q, k, v, *_):
            return (*q[:3], v[3]), tuple(q[:3]), tuple(q[:3])

        types = (mstype.float32,) * 2
        operator = partial(custom, "FlashAttention", shapes, lambda q, *_: (q, *types), **rule)
        super().__init__(operator, causal_bprop, masked_bprop)


class LatentAttention(Attention):
    """Causal or masked attention of MLA from its projections to the context, heads, rotation and shared key included.

    (T, N*Dv) <- query (T, N*(nope+rope)), kv (T, N*(nope+Dv)): each head's key and value side by side, k_pe (T, rope),
    cos, sin (1 or B, 1, S, rope) float32 without gradient, mask None (causal) or uint8 (1 or B, 1, S, S), 1 may not be
    attended. T = B*S. As arXiv 2405.04434, eq. 10-19.
    """

    def __init__(self, heads: int, scale: float):
        rule = dict(heads=heads, scale=scale)
        grad = custom("LatentAttentionGrad", lambda d, q, kv, pe, *_: (q, kv, pe), **rule)

        def causal_bprop(query, kv, k_pe, cos, sin, out, dout):
            gradients = grad(dout[0], query, kv, k_pe, cos, sin, out[0], out[1])
            return (*gradients, ops.zeros_like(cos), ops.zeros_like(sin))

        def masked_bprop(query, kv, k_pe, cos, sin, mask, out, dout):
            gradients = grad(dout[0], query, kv, k_pe, cos, sin, out[0], out[1], mask)
            return (*gradients, ops.zeros_like(cos), ops.zeros_like(sin), ops.zeros_like(mask))

        def shapes(q, kv, pe, cos, *_):
            rows = (q[0] // cos[2], heads, cos[2])
            return (q[0], kv[1] - q[1] + heads * pe[1]), rows, rows

        types = (mstype.float32,) * 2
        operator = partial(custom, "LatentAttention", shapes, lambda q, *_: (q, *types), **rule)
        super().__init__(operator, causal_bprop, masked_bprop)


class SplitColumns(Kernel):
    """The first `width` columns of x (..., D) and the rest."""

    def __init__(self, width: int):
        join = custom("JoinColumns", lambda a, b: (*a[:-1], a[-1] + b[-1]), lambda a, b: a)

        def bprop(x, out, dout):
            return (join(dout[0], dout[1]),)

        def shapes(x):
            return (*x[:-1], width), (*x[:-1], x[-1] - width)

        # The width is an attribute because MindSpore remembers shapes by an operator's name, attributes and inputs.
        super().__init__("SplitColumns", shapes, lambda x: (x, x), bprop, width=width)


class Rotary(Kernel):
    """Turn each pair (x_2i, x_2i+1) of x (B, N, S, D) by its angle; cos, sin (1 or B, 1, S, D) get no gradient."""

    def __init__(self):
        back = custom("Rotary", lambda x, c, s: x, direction=-1, halves=False)

        def bprop(x, cos, sin, out, dout):
            return back(dout, cos, sin), ops.zeros_like(cos), ops.zeros_like(sin)

        super().__init__("Rotary", lambda x, c, s: x, bprop=bprop, direction=1, halves=False)


class SwiGlu(Kernel):
    """silu(gate) * up."""

    def __init__(self):
        grad = custom("SwiGluGrad", lambda d, g, u: (g, u))

        def bprop(gate, up, out, dout):
            return grad(dout, gate, up)

        super().__init__("SwiGlu", lambda g, u: g, bprop=bprop)


class FeedForward(FirstOf):
    """down(silu(gate(x)) * up(x)) in one operator: (T, H) <- x (T, H), gate (F, H), up (F, H), down (H, F).

    What lies between the products stays float32, whatever the type of the inputs.
    """

    def __init__(self):
        grad = custom("FeedForwardGrad", lambda d, x, g, u, v, h: (x, g, u, v))

        def bprop(x, gate, up, down, out, dout):
            return grad(dout[0], x, gate, up, down, out[1])

        super().__init__(
            "FeedForward", lambda x, g, u, v: (x, (x[0], 2 * g[0])), lambda x, g, u, v: (x, mstype.float32), bprop
        )


class RoutedExperts(FirstOf):
    """SwiGLU of the chosen experts, weighed with the gates, in one operator.

    (T, H) <- x (T, H), gates (T, K) float32, ids (T, K) int32, gate_up (L, H, 2F), down (L, F, H). A choice whose id
    lies outside 0..L-1 counts nothing (another device has that expert).
    """

    def __init__(self):
        grad = custom("RoutedExpertsGrad", lambda d, x, g, i, w, v, h: (x, g, w, v))

        def bprop(x, gates, ids, gate_up, down, out, dout):
            dx, dgates, dgate_up, ddown = grad(dout[0], x, gates, ids, gate_up, down, out[1])
            return dx, dgates, ops.zeros_like(ids), dgate_up, ddown

        super().__init__(
            "RoutedExperts",
            lambda x, g, i, w, v: (x, (i[0] * i[1], w[2])),
            lambda x, g, i, w, v: (x, mstype.float32),
            bprop,
        )


class TopkSelect(Kernel):
    """DeepSeek's choice of K experts, from logits (T, E) and bias (E,), both float32.

    Returns gates (T, K), ids (T, K) int32, scores (T, E), chosen (T, E) (1.0 where a token uses an expert) and the same
    for the K highest scores without bias and groups. `groups` 1 does not limit groups.
    """

    def __init__(self, topk: int, groups: int, topk_group: int, **rules: bool | float):
        shared = {name: rules[name] for name in ("sigmoid", "normalize", "scaling")}
        grad = custom("TopkRouterGrad", lambda w, d, s, i: s, **shared)

        def bprop(logits, bias, out, dout):
            return grad(dout[0], dout[2], out[2], out[1]), ops.zeros_like(bias)

        super().__init__(
            "TopkRouter",
            lambda z, b: ((z[0], topk), (z[0], topk), z, z, z),
            lambda z, b: (mstype.float32, mstype.int32, mstype.float32, mstype.float32, mstype.float32),
            bprop,
            groups=groups,
            topk_group=topk_group,
            two_best=rules["two_best"],
            **shared,
        )


class Linear(Kernel):
    """x weight^T: (T, O) <- x (T, I), weight (O, I)."""

    def __init__(self):
        grad = custom("LinearGrad", lambda d, x, w: (x, w))

        def bprop(x, weight, out, dout):
            return grad(dout, x, weight)

        super().__init__("Linear", lambda x, w: (x[0], w[0]), lambda x, w: x, bprop)


class Embedding(Kernel):
    """Rows of a table: (T, H) <- weight (V, H), ids (T,). A token outside the vocabulary stops the run."""

    def __init__(self):
        grad = custom("EmbeddingGrad", lambda d, i, w: w)

        def bprop(weight, ids, out, dout):
            return grad(dout, ids, weight), ops.zeros_like(ids)

        super().__init__("Embedding", lambda w, i: (i[0], w[1]), lambda w, i: w, bprop)


class LinearCrossEntropy(FirstOf):
    """Mean of -log softmax(hidden weight^T)[label] over the tokens of mask; logits are never stored.

    (1,) float32 <- hidden (T, H), weight (V, H), labels (T,) int32 in 0..V-1, mask (T,) float32. The forward computes
    the gradients too, so use it for training only.
    """

    def __init__(self):
        def bprop(hidden, weight, labels, mask, out, dout):
            scale = dout[0]
            dhidden = out[1] * ops.cast(scale, out[1].dtype)
            dweight = out[2] * ops.cast(scale, out[2].dtype)
            return dhidden, dweight, ops.zeros_like(labels), ops.zeros_like(mask)

        super().__init__(
            "LinearCrossEntropy", lambda x, w, n, m: ((1,), x, w), lambda x, w, n, m: (mstype.float32, x, w), bprop
        )


class GlobalNorm(nn.Cell):
    """Euclidean norm of all tensors together, (1,) float32."""

    def __init__(self):
        super().__init__()
        self.norm = custom("GlobalNorm", lambda *_: (1,), lambda *_: mstype.float32)

    def construct(self, tensors):
        return self.norm(*tensors)


class AdamWUpdate(nn.Cell):
    """One step of AdamW for all parameters in one operator, in place.

    Args:
        optimizer: MindFormers' AdamW, which keeps the parameters, moments and step count.
    """

    def __init__(self, optimizer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.step = optimizer.global_step
        self.states = ParameterTuple((*optimizer.parameters, *optimizer.exp_avg, *optimizer.exp_avg_sq))
        count = len(optimizer.parameters)
        decay = optimizer.weight_decay if optimizer.is_group else [optimizer.weight_decay] * count
        self.decay = Tensor(np.array([float(value) for value in decay], np.float32))
        rule = dict(beta1=float(optimizer.beta1), beta2=float(optimizer.beta2), eps=float(optimizer.eps))
        self.update = custom("AdamW", lambda *_: (1,), lambda *_: mstype.float32, **rule)
        self.update.set_signatures(
            [written("step"), read("rate"), read("factor"), read("decay")]
            + [written(f"state{i}") for i in range(3 * count)]
            + [read(f"gradient{i}") for i in range(count)]
        )
        self.update.add_prim_attr("side_effect_mem", True)

    def construct(self, rate, factor, gradients):
        """Train with `factor` times the gradients at rate `rate`; a factor that is not finite skips the step."""
        return self.update(self.step, rate, factor, self.decay, *self.states, *gradients)


def written(name: str) -> sig.Signature:
    """An input that the operator changes in place."""
    return sig.make_sig(name, sig.sig_rw.RW_WRITE)


def read(name: str) -> sig.Signature:
    """An input that the operator only reads."""
    return sig.make_sig(name, sig.sig_rw.RW_READ)
