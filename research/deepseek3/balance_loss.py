"""The auxiliary losses that spread tokens over experts; V3 uses the sequence-wise one, V2 all three.

Legend: B batch, S sequence, T = B*S tokens, E experts.
"""

from mindspore import dtype as mstype
from mindspore import nn, ops
from sharding import shard

__all__ = ["BalanceLoss", "no_loss"]


class BalanceLoss(nn.Cell):
    """Auxiliary losses that spread tokens over experts (arXiv 2412.19437 eq. 17-20; arXiv 2405.04434 eq. 23-31).

    expert: alpha * sum_i f_i P_i in each sequence, then the mean over sequences. device, comm: the same for groups of
    experts. All are sums over global tokens, so they do not depend on the parallel layout.
    """

    def __init__(self, config):
        super().__init__()
        moe = config.moe_config
        self.topk, self.num_experts, self.n_group = moe.num_experts_chosen, moe.expert_num, moe.n_group
        self.topk_group, self.z_factor = moe.topk_group, moe.z_loss_factor
        self.factors = (
            dict(zip(moe.aux_loss_types, moe.aux_loss_factors, strict=True)) if config.return_extra_loss else {}
        )
        self.active = bool(self.factors) or (self.z_factor > 0 and config.return_extra_loss)
        self.is_sigmoid = moe.use_gating_sigmoid
        self.sum_experts = ops.ReduceSum(keep_dims=True)
        self.normalize, self.mask_mul, self.sum_tokens = ops.RealDiv(), ops.Mul(), ops.ReduceSum()
        shard(self, "balance_loss", config)

    def construct(self, scores, logits, counted, token_mask, batch):
        """scores, logits, counted (T, E), token_mask (T, 1) -> (1,) float32."""
        loss = no_loss()
        if not self.active:
            return loss
        if self.is_sigmoid:
            scores = self.normalize(scores, self.sum_experts(scores, -1))
        count = self._per_sequence(token_mask, batch)  # (B, 1) tokens
        frequency = self._per_sequence(self.mask_mul(ops.stop_gradient(counted), token_mask), batch)
        frequency = frequency * (self.num_experts / self.topk) / count  # f (B, E)
        probability = self._per_sequence(self.mask_mul(scores, token_mask), batch) / count  # P (B, E)
        if "expert" in self.factors:
            loss = loss + self.factors["expert"] * (frequency * probability).sum() / batch
        if "device" in self.factors:
            mean = self._by_group(frequency, batch) * (self.n_group / self.num_experts)
            loss = loss + self.factors["device"] * (mean * self._by_group(probability, batch)).sum() / batch
        if "comm" in self.factors:
            hit = counted.reshape((-1, self.n_group, self.num_experts // self.n_group)).sum(-1) > 0
            hit = ops.cast(hit, mstype.float32)  # token sent to a group of experts
            sent = self._per_sequence(hit * token_mask, batch) * (self.n_group / self.topk_group) / count
            loss = loss + self.factors["comm"] * (sent * self._by_group(probability, batch)).sum() / batch
        if self.z_factor > 0:
            z = ops.logsumexp(logits, -1, True)
            loss = loss + self.z_factor * (z * z * token_mask).sum() / token_mask.sum()
        return loss

    def _per_sequence(self, x, batch):
        """Sum over the tokens of each sequence: (B, X) <- (T, X)."""
        return self.sum_tokens(x.reshape((batch, -1, x.shape[-1])), 1)

    def _by_group(self, per_expert, batch):
        """Sum over the experts of each group: (B, G) <- (B, E)."""
        return per_expert.reshape((batch, self.n_group, -1)).sum(-1)


def no_loss():
    """A loss of 0, (1,) float32: a tensor, because pipeline stages send losses on, and cannot send a number."""
    return ops.zeros((1,), mstype.float32)
