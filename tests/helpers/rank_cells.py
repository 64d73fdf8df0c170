"""Kernels that only graphs of ranks use, as cells with their gradients, to be compared with torch."""

from mindspore import dtype as mstype
from mindspore import nn, ops

from mindformers_ext.cpu_kernels.library import custom


class SwiGluHalves(nn.Cell):
    """silu(x1) * x2 of x (..., 2F) = [x1 | x2]."""

    def __init__(self):
        super().__init__()
        grad = custom("SwiGluHalvesGrad", lambda d, x: x, lambda d, x: x)

        def bprop(x, out, dout):
            return (grad(dout, x),)

        self.swiglu = custom("SwiGluHalves", lambda x: (*x[:-1], x[-1] // 2), lambda x: x, bprop)

    def construct(self, x):
        return self.swiglu(x)


class Permute(nn.Cell):
    """Sort tokens by expert, and mix what the experts made of them back into token order."""

    def __init__(self):
        super().__init__()
        unpermute_grad = custom("TokenUnpermuteGrad", lambda d, y, p, g: (y, g), lambda d, y, p, g: (y, g))

        def bprop(y, place, gates, out, dout):
            dy, dgates = unpermute_grad(dout, y, place, gates)
            return dy, ops.zeros_like(place), dgates

        self.mix = custom("TokenUnpermute", lambda y, p, g: (g[0], y[1]), lambda y, p, g: y, bprop)
        permute_grad = custom("TokenPermuteGrad", lambda d, p, i: (i[0], d[1]), lambda d, p, i: d)

        def permute_bprop(x, ids, out, dout):
            return permute_grad(dout[0], out[1], ids), ops.zeros_like(ids)

        self.sort = custom(
            "TokenPermute",
            lambda x, ids: ((ids[0] * ids[1], x[1]), (ids[0] * ids[1],)),
            lambda x, ids: (x, mstype.int32),
            permute_bprop,
        )

    def permute(self, x, ids, rows: int):
        """Rows (T*K, H) by expert, from x (T, H) and ids (T, K), and the row (T*K,) of each choice; rows is T*K."""
        return self.sort(x, ids)

    def unpermute(self, y, place, gates):
        """(T, H) <- rows y weighed with gates (T, K)."""
        return self.mix(y, place, gates)


class GroupedMatmul(nn.Cell):
    """Rows of group e times weight e: (R, N) <- x (R, K), weight (L, K, N), ends of the groups (L,) int.

    Rows after the last group are NaN, as are their gradients; a group may be empty.
    """

    def __init__(self):
        super().__init__()
        input_grad = custom("GroupedMatmulInputGrad", lambda d, w, e: (d[0], w[1]), lambda d, w, e: d)
        weight_grad = custom("GroupedMatmulWeightGrad", lambda x, d, e: (e[0], x[1], d[1]), lambda x, d, e: x)
        self.input_grad, self.weight_grad = input_grad, weight_grad

        def bprop(x, weight, group_ends, out, dout):
            dx, dweight = input_grad(dout, weight, group_ends), weight_grad(x, dout, group_ends)
            return dx, dweight, ops.zeros_like(group_ends)

        self.matmul = custom("GroupedMatmul", lambda x, w, e: (x[0], w[2]), lambda x, w, e: x, bprop)

    def construct(self, x, weight, group_ends):
        return self.matmul(x, weight, group_ends)


class PackedAttention(nn.Cell):
    """Attention of packed tokens: (T, N, Dv) <- query, key (T, N, D), value (T, N, Dv), ends of both (L,) int32."""

    def __init__(self, scale: float, to_last: bool):
        super().__init__()
        rule = dict(scale=scale, to_last=to_last)
        grad = custom("PackedAttentionGrad", lambda d, q, k, v, *_: (q, k, v), lambda d, q, k, v, *_: (q, k, v), **rule)

        def bprop(query, key, value, ends, key_ends, out, dout):
            gradients = grad(dout[3], query, key, value, out[3], out[1], ends, key_ends)
            return (*gradients, ops.zeros_like(ends), ops.zeros_like(key_ends))

        self.attention = custom(
            "PackedAttention",
            lambda q, k, v, *_: ((*q[:2], 8), (*q[:2], 8), (1,), (*q[:2], v[2])),
            lambda q, *_: (mstype.float32, mstype.float32, q, q),
            bprop,
            **rule,
        )

    def construct(self, *inputs):
        return self.attention(*inputs)[3]
