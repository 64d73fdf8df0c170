"""Rotary positions and their extension by YaRN (arXiv 2309.00071), as DeepSeek uses them.

Legend: B batch, N heads, S sequence, D width of the rotated part of a head.
"""

import math

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from sharding import shard

from mindformers_ext.layers.fused_ops import rotary

__all__ = ["RotaryEmbedding", "rope_tables", "softmax_scale", "yarn_frequencies"]


def rope_tables(config) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (max_position_embeddings, rope_dim) float32, each angle twice for its pair (facts 7, 8)."""
    dim, yarn = config.qk_rope_head_dim, config.yarn
    freq = config.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    scale = 1.0
    if yarn:
        freq = yarn_frequencies(freq, dim, config.theta, yarn)
        scale = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    angles = np.repeat(np.outer(np.arange(config.max_position_embeddings), freq), 2, axis=1)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


def yarn_frequencies(freq: np.ndarray, dim: int, theta: float, yarn) -> np.ndarray:
    """Blend extrapolated (fast) and interpolated (slow) frequencies linearly over the correction range (YaRN 3.2).

    As in DeepSeek's and transformers' code, only a range of no width is widened: one that ends before it begins (a
    short original context, a small theta, beta_fast below beta_slow) runs backwards.
    """

    def dimension(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / 2 / math.log(theta)

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
    return freq * (1 - ramp) + freq / yarn.factor * ramp


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature of a context extended by `factor` (YaRN eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config) -> float:
    """What query-key products are multiplied with (facts 8): 0.135234 for released V3, 0.0721688 without YaRN."""
    scale = config.qk_head_dim**-0.5
    if config.yarn and config.yarn.mscale_all_dim:
        scale *= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


class RotaryEmbedding(nn.Cell):
    """Turn interleaved pairs of the last axis by their position (facts 7)."""

    def __init__(self, config, axes: str):
        super().__init__()
        self.rotary_dtype = getattr(mstype, config.rotary_dtype)
        cos, sin = rope_tables(config)
        self.cos, self.sin = Tensor(cos, self.rotary_dtype), Tensor(sin, self.rotary_dtype)
        self.rotary, self.rotary_at = rotary(config), rotary(config, by_sample=True)
        shard(self.rotary, axes, config)
        shard(self.rotary_at, f"{axes}_at", config)

    def construct(self, x, position_ids=None):
        """x (B, N, S, D); position_ids (B, S) or None for 0..S-1."""
        y = ops.cast(x, self.rotary_dtype)
        cos, sin = self.tables(x.shape[2], position_ids)
        rotary = self.rotary if position_ids is None else self.rotary_at
        return ops.cast(rotary(y, cos, sin), x.dtype)

    def tables(self, seq, position_ids=None):
        """cos and sin of the first `seq` positions, (1, 1, S, D), or of each sequence's own, (B, 1, S, D)."""
        if position_ids is None:
            shape = (1, 1, seq, self.cos.shape[1])
            return self.cos[:seq].reshape(shape), self.sin[:seq].reshape(shape)
        cos, sin = ops.gather(self.cos, position_ids, 0), ops.gather(self.sin, position_ids, 0)
        return cos.expand_dims(1), sin.expand_dims(1)
