"""The largest logit of each attention head: what a monitor shows and what qk-clip (arXiv 2507.20534) acts on."""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from sharding import shard

__all__ = ["LargestLogits", "rows_to_clip"]


class LargestLogits(nn.Cell):
    """Keeps the largest logit of each head since somebody reset it to minus infinity, over all devices."""

    def __init__(self, config):
        super().__init__()
        nothing = Tensor(np.full(config.num_heads, -np.inf), mstype.float32)
        self.max_logits = Parameter(nothing, name="max_logits_val", requires_grad=False, parallel_optimizer=False)
        self.largest, self.larger, self.keep = ops.ReduceMax(), ops.Maximum(), ops.Assign()
        shard(self, "largest_logits", config)

    def construct(self, scores):
        """scores (B, N, S) or (B, N, S, ...)."""
        axes = (0, 2) if scores.ndim == 3 else (0, 2, 3)
        largest = self.largest(ops.cast(ops.stop_gradient(scores), mstype.float32), axes)  # (N,)
        return self.keep(self.max_logits, self.larger(self.max_logits, largest))


def rows_to_clip(attention: nn.Cell) -> dict[str, tuple[Parameter, np.ndarray]]:
    """What qk-clip scales in a layer: {weight: (largest logit of each head, for each row N * kind + its head)}.

    The kinds: 0, what a query multiplies with a key of the head's own; 1, with the key that all heads share; 2,
    anything else.
    """
    heads = np.arange(attention.num_heads)[:, None]
    kinds = {
        (attention.q_b_proj if attention.has_q_lora else attention.q_proj): (attention.rope, 1),
        attention.kv_b_proj: (attention.value_dim, 2),
    }
    found = {}
    for projection, (width, kind) in kinds.items():
        own, other = (np.full(size, k) for size, k in ((attention.nope, 0), (width, kind)))
        rows = np.concatenate((own, other))[None] * attention.num_heads + heads
        found[projection.weight.name] = attention.track.max_logits, rows.reshape(-1).astype(np.int32)
    return found
