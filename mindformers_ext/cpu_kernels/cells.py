"""The CPU kernels as cells with the interfaces of `layers/fused_ops.py`: the one Python face of this folder.

Every operator carries its hand-written gradient. Inputs and results are float32 or bfloat16; sums are float32.

Legend: T tokens, H hidden, F expert width, L experts, K experts per token, R = T*K rows sorted by expert,
B batch, N heads, S sequence, D head width, V vocabulary.
"""

import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import signature as sig

from mindformers_ext.cpu_kernels.library import custom


class RmsNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, eps: float):
        super().__init__()
        grad = custom("RmsNormGrad", lambda dy, x, r, w: (x, w), lambda dy, x, r, w: (x, w))

        def bprop(x, weight, out, dout):
            return grad(dout[0], x, out[1], weight)

        self.norm = custom("RmsNorm", lambda x, w: (x, rows_of(x)), lambda x, w: (x, mstype.float32), bprop, eps=eps)

    def construct(self, x, weight):
        return self.norm(x, weight)[0]


def rows_of(shape) -> tuple[int, ...]:
    """All axes but the last, as one."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return (rows,)


class FlashAttention(nn.Cell):
    """softmax(query key^T * scale) value without scores in memory; mask None (causal) or uint8, 1 may not be attended.

    query, key (B, N, S, D), value (B, N, S, Dv), mask (1 or B, 1, S, S) -> (B, N, S, Dv).
    """

    def __init__(self, scale: float):
        super().__init__()
        self.causal = self._operator(scale, masked=False)
        self.masked = self._operator(scale, masked=True)

    @staticmethod
    def _operator(scale: float, masked: bool) -> ops.Custom:
        rule = dict(scale=scale, diagonal=0)
        grad = custom("FlashAttentionGrad", lambda d, q, k, v, *_: (q, k, v), lambda d, q, k, v, *_: (q, k, v), **rule)

        def causal_bprop(query, key, value, out, dout):
            return grad(dout[0], query, key, value, out[0], out[1])

        def masked_bprop(query, key, value, mask, out, dout):
            dquery, dkey, dvalue = grad(dout[0], query, key, value, out[0], out[1], mask)
            return dquery, dkey, dvalue, ops.zeros_like(mask)

        return custom(
            "FlashAttention",
            lambda q, k, v, *_: (tuple(q[:3]) + (v[3],), tuple(q[:3])),
            lambda q, k, v, *_: (q, mstype.float32),
            masked_bprop if masked else causal_bprop,
            **rule,
        )

    def construct(self, query, key, value, mask):
        if mask is None:
            return self.causal(query, key, value)[0]
        return self.masked(query, key, value, mask)[0]


class LatentAttention(nn.Cell):
    """Causal or masked attention of MLA from its projections to the context, heads, rotation and shared key included.

    (T, N*Dv) <- query (T, N*(nope+rope)), kv (T, N*(nope+Dv)): each head's key and value side by side, k_pe (T, rope),
    cos, sin (1 or B, 1, S, rope) float32 without gradient, mask None (causal) or uint8 (1 or B, 1, S, S), 1 may not be
    attended. T = B*S. As arXiv 2405.04434, eq. 10-19.
    """

    def __init__(self, heads: int, scale: float):
        super().__init__()
        self.causal = self._operator(heads, scale, masked=False)
        self.masked = self._operator(heads, scale, masked=True)

    @staticmethod
    def _operator(heads: int, scale: float, masked: bool) -> ops.Custom:
        rule = dict(heads=heads, scale=scale)
        grad = custom(
            "LatentAttentionGrad", lambda d, q, kv, pe, *_: (q, kv, pe), lambda d, q, kv, pe, *_: (q, kv, pe), **rule
        )

        def causal_bprop(query, kv, k_pe, cos, sin, out, dout):
            gradients = grad(dout[0], query, kv, k_pe, cos, sin, out[0], out[1])
            return (*gradients, ops.zeros_like(cos), ops.zeros_like(sin))

        def masked_bprop(query, kv, k_pe, cos, sin, mask, out, dout):
            gradients = grad(dout[0], query, kv, k_pe, cos, sin, out[0], out[1], mask)
            return (*gradients, ops.zeros_like(cos), ops.zeros_like(sin), ops.zeros_like(mask))

        def shapes(q, kv, pe, cos, *_):
            return (q[0], kv[1] - q[1] + heads * pe[1]), (q[0] // cos[2], heads, cos[2])

        bprop = masked_bprop if masked else causal_bprop
        return custom("LatentAttention", shapes, lambda q, *_: (q, mstype.float32), bprop, **rule)

    def construct(self, query, kv, k_pe, cos, sin, mask):
        if mask is None:
            return self.causal(query, kv, k_pe, cos, sin)[0]
        return self.masked(query, kv, k_pe, cos, sin, mask)[0]


class SplitColumns(nn.Cell):
    """The first `width` columns of x (T, D) and the rest, (T, width) and (T, D - width)."""

    def __init__(self, width: int):
        super().__init__()
        join = custom("JoinColumns", lambda a, b: (a[0], a[1] + b[1]), lambda a, b: a)

        def bprop(x, out, dout):
            return (join(dout[0], dout[1]),)

        self.split = custom("SplitColumns", lambda x: ((x[0], width), (x[0], x[1] - width)), lambda x: (x, x), bprop)

    def construct(self, x):
        return self.split(x)


class Rotary(nn.Cell):
    """Turn each pair (x_2i, x_2i+1) of x (B, N, S, D) by its angle; cos, sin (1 or B, 1, S, D) get no gradient."""

    def __init__(self):
        super().__init__()
        back = custom("Rotary", lambda x, c, s: x, lambda x, c, s: x, direction=-1, halves=False)

        def bprop(x, cos, sin, out, dout):
            return back(dout, cos, sin), ops.zeros_like(cos), ops.zeros_like(sin)

        self.rotary = custom("Rotary", lambda x, c, s: x, lambda x, c, s: x, bprop, direction=1, halves=False)

    def construct(self, x, cos, sin):
        return self.rotary(x, cos, sin)


class SwiGlu(nn.Cell):
    """silu(gate) * up."""

    def __init__(self):
        super().__init__()
        grad = custom("SwiGluGrad", lambda d, g, u: (g, u), lambda d, g, u: (g, u))

        def bprop(gate, up, out, dout):
            return grad(dout, gate, up)

        self.swiglu = custom("SwiGlu", lambda g, u: g, lambda g, u: g, bprop)

    def construct(self, gate, up):
        return self.swiglu(gate, up)


class FeedForward(nn.Cell):
    """down(silu(gate(x)) * up(x)) in one operator: (T, H) <- x (T, H), gate (F, H), up (F, H), down (H, F).

    What lies between the products stays float32, whatever the type of the inputs.
    """

    def __init__(self):
        super().__init__()
        grad = custom("FeedForwardGrad", lambda d, x, g, u, v, h: (x, g, u, v), lambda d, x, g, u, v, h: (x, g, u, v))

        def bprop(x, gate, up, down, out, dout):
            return grad(dout[0], x, gate, up, down, out[1])

        self.feed_forward = custom(
            "FeedForward",
            lambda x, g, u, v: (x, (x[0], 2 * g[0])),
            lambda x, g, u, v: (x, mstype.float32),
            bprop,
        )

    def construct(self, x, gate, up, down):
        return self.feed_forward(x, gate, up, down)[0]


class RoutedExperts(nn.Cell):
    """SwiGLU of the chosen experts, weighed with the gates, in one operator.

    (T, H) <- x (T, H), gates (T, K) float32, ids (T, K) int32, gate_up (L, H, 2F), down (L, F, H). A choice whose id
    lies outside 0..L-1 counts nothing (another device has that expert).
    """

    def __init__(self):
        super().__init__()
        grad = custom(
            "RoutedExpertsGrad", lambda d, x, g, i, w, v, h: (x, g, w, v), lambda d, x, g, i, w, v, h: (x, g, w, v)
        )

        def bprop(x, gates, ids, gate_up, down, out, dout):
            dx, dgates, dgate_up, ddown = grad(dout[0], x, gates, ids, gate_up, down, out[1])
            return dx, dgates, ops.zeros_like(ids), dgate_up, ddown

        self.experts = custom(
            "RoutedExperts",
            lambda x, g, i, w, v: (x, (i[0] * i[1], w[2])),
            lambda x, g, i, w, v: (x, mstype.float32),
            bprop,
        )

    def construct(self, x, gates, ids, gate_up, down):
        return self.experts(x, gates, ids, gate_up, down)[0]


class TopkSelect(nn.Cell):
    """DeepSeek's choice of K experts, from logits (T, E) and bias (E,), both float32.

    Returns gates (T, K), ids (T, K) int32, scores (T, E), chosen (T, E) (1.0 where a token uses an expert) and the same
    for the K highest scores without bias and groups. `groups` 1 does not limit groups.
    """

    def __init__(self, topk: int, groups: int, topk_group: int, **rules: bool | float):
        super().__init__()
        shared = {name: rules[name] for name in ("sigmoid", "normalize", "scaling")}
        grad = custom("TopkRouterGrad", lambda w, d, s, i: s, lambda w, d, s, i: s, **shared)

        def bprop(logits, bias, out, dout):
            return grad(dout[0], dout[2], out[2], out[1]), ops.zeros_like(bias)

        self.select = custom(
            "TopkRouter",
            lambda z, b: ((z[0], topk), (z[0], topk), z, z, z),
            lambda z, b: (mstype.float32, mstype.int32, mstype.float32, mstype.float32, mstype.float32),
            bprop,
            groups=groups,
            topk_group=topk_group,
            two_best=rules["two_best"],
            **shared,
        )

    def construct(self, logits, bias):
        return self.select(logits, bias)


class Linear(nn.Cell):
    """x weight^T: (T, O) <- x (T, I), weight (O, I)."""

    def __init__(self):
        super().__init__()
        grad = custom("LinearGrad", lambda d, x, w: (x, w), lambda d, x, w: (x, w))

        def bprop(x, weight, out, dout):
            return grad(dout, x, weight)

        self.linear = custom("Linear", lambda x, w: (x[0], w[0]), lambda x, w: x, bprop)

    def construct(self, x, weight):
        return self.linear(x, weight)


class Embedding(nn.Cell):
    """Rows of a table: (T, H) <- weight (V, H), ids (T,). A token outside the vocabulary stops the run."""

    def __init__(self):
        super().__init__()
        grad = custom("EmbeddingGrad", lambda d, i, w: w, lambda d, i, w: w)

        def bprop(weight, ids, out, dout):
            return grad(dout, ids, weight), ops.zeros_like(ids)

        self.look_up = custom("Embedding", lambda w, i: (i[0], w[1]), lambda w, i: w, bprop)

    def construct(self, weight, ids):
        return self.look_up(weight, ids)


class LinearCrossEntropy(nn.Cell):
    """Mean of -log softmax(hidden weight^T)[label] over the tokens of mask; logits are never stored.

    (1,) float32 <- hidden (T, H), weight (V, H), labels (T,) int32 in 0..V-1, mask (T,) float32. The forward computes
    the gradients too, so use it for training only.
    """

    def __init__(self):
        super().__init__()

        def bprop(hidden, weight, labels, mask, out, dout):
            scale = dout[0]
            dhidden = out[1] * ops.cast(scale, out[1].dtype)
            dweight = out[2] * ops.cast(scale, out[2].dtype)
            return dhidden, dweight, ops.zeros_like(labels), ops.zeros_like(mask)

        self.loss = custom(
            "LinearCrossEntropy", lambda x, w, n, m: ((1,), x, w), lambda x, w, n, m: (mstype.float32, x, w), bprop
        )

    def construct(self, hidden, weight, labels, mask):
        return self.loss(hidden, weight, labels, mask)[0]


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
