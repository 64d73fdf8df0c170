"""TopkRouterV2: DeepSeek's router, exact.

Extends `mindformers/modules/transformer/moe.py` (1.9.0), whose TopkRouterV2 masks losing groups with 0 instead of
-inf, and whose bias lives in the compute dtype. It can go when MindFormers routes as arXiv 2412.19437, eq. 12-20.

Legend: T tokens, E experts, K experts per token, G groups of E/G experts, B sequences of S tokens (T = B*S).
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal, initializer

from mindformers_ext.layers.fused_ops import Chosen, Topk, matrix_product, topk_select

TINY = 1e-20  # keeps the normalisation finite when every gate is 0 (HF modeling_deepseek_v3.py)


class TopkRouterV2(nn.Cell):
    """Choose K experts per token, count the load of each expert, and keep the selection bias that balances it.

    Args:
        config: model configuration; uses `hidden_size`, `initializer_range`, `param_init_type` and `moe_config`.
    """

    def __init__(self, config):
        super().__init__()
        moe = config.moe_config
        self.num_experts, self.topk = moe.expert_num, moe.num_experts_chosen
        self.n_group, self.topk_group = moe.n_group, moe.topk_group
        self.norm_topk_prob, self.scaling = moe.norm_topk_prob, moe.routed_scaling_factor
        self.has_bias = moe.topk_method == "noaux_tc"
        self.limits_groups = moe.topk_method != "greedy" and moe.topk_group < moe.n_group
        self.bias_update_rate = moe.topk_bias_update_rate if moe.balance_via_topk_bias else 0.0
        self.dense_type = getattr(mstype, config.router_dense_type)
        self.fused_select = topk_select(config)

        shape = (self.num_experts, config.hidden_size)
        init = initializer(Normal(config.initializer_range), shape, getattr(mstype, config.param_init_type))
        self.weight = Parameter(init, name="weight")
        if self.has_bias:
            self.e_score_correction_bias = self._per_expert("e_score_correction_bias")
        self.expert_load = self._per_expert("expert_load")  # tokens since the last update
        if moe.use_gmm and moe.dropless_rows == "bounded":
            self.dropped_choices = self._per_expert("dropped_choices", 1)  # since the last step that reported them

        self.gate = matrix_product()
        self.score = ops.Sigmoid() if moe.use_gating_sigmoid else ops.Softmax()
        self.select = Topk()
        self.gather = ops.GatherD()
        self.sum_group = ops.ReduceSum()
        self.max_group = ops.ReduceMax()
        self.selected, self.keep_groups = Chosen(self.num_experts), Chosen(self.n_group)
        self.minus_inf = Tensor(-np.inf, mstype.float32)

    def _per_expert(self, name: str, size: int = 0) -> Parameter:
        """Router state (E,) float32, or of another size, the same on every device; no gradient."""
        zeros = initializer("zeros", (size or self.num_experts,), mstype.float32)
        return Parameter(zeros, name=name, requires_grad=False, parallel_optimizer=False)

    def bias(self):
        """The selection bias (E,) float32; zeros for routers without one."""
        return self.e_score_correction_bias if self.has_bias else ops.zeros((self.num_experts,), mstype.float32)

    def route(self, x, weight, bias):
        """Route tokens; only local arithmetic, so each device can run it on its own tokens.

        Args:
            x: hidden states (T, H).
            weight: gate (E, H).
            bias: selection bias (E,), float32.

        Returns:
            topk_weights (T, K) float32, topk_ids (T, K) int32, scores (T, E) float32 and logits (T, E) float32.
        """
        return self.route_and_count(x, weight, bias)[:4]

    def route_and_count(self, x, weight, bias):
        """What `route` returns, `selected` of the choice, and `unbiased_selected`."""
        logits = self.gate(ops.cast(x, self.dense_type), ops.cast(weight, self.dense_type))  # (T, E) <- (T, H)
        logits = ops.cast(logits, mstype.float32)
        if self.fused_select is not None:
            topk_weights, topk_ids, scores, chosen, unbiased = self.fused_select(logits, bias)
            return topk_weights, topk_ids, scores, logits, chosen, unbiased
        topk_weights, topk_ids, scores = self._select(logits, bias)
        return topk_weights, topk_ids, scores, logits, self.selected(topk_ids), self.unbiased_selected(scores)

    def _select(self, logits, bias):
        """Gates (T, K), ids (T, K) and scores (T, E) of logits (T, E)."""
        scores = self.score(logits)
        choice = ops.stop_gradient(scores)
        if self.has_bias:
            choice = choice + bias
        if self.limits_groups:
            choice = self._mask_losing_groups(choice)
        _, topk_ids = self.select(choice, self.topk)  # (T, K)
        topk_weights = self.gather(scores, 1, topk_ids)  # gates come from the unbiased scores
        if self.norm_topk_prob:
            topk_weights = topk_weights / (topk_weights.sum(-1, keepdims=True) + TINY)
        return topk_weights * self.scaling, topk_ids, scores

    def unbiased_selected(self, scores):
        """`selected` for the K highest scores themselves, as the sequence-wise loss counts (eq. 18)."""
        _, ids = self.select(ops.stop_gradient(scores), self.topk)
        return self.selected(ids)

    def _mask_losing_groups(self, choice):
        """-inf on the experts outside the best `topk_group` groups (a 0 would win over negative scores)."""
        tokens = choice.shape[0]
        grouped = choice.reshape((tokens, self.n_group, self.num_experts // self.n_group))  # (T, G, E/G)
        if self.has_bias:  # V3: sum of the two best; V2: the best
            best, _ = self.select(grouped, 2)
            group_scores = self.sum_group(best, -1)  # (T, G)
        else:
            group_scores = self.max_group(grouped, -1)
        _, groups = self.select(group_scores, self.topk_group)
        loses = self.keep_groups(groups).expand_dims(-1) == 0  # (T, G, 1)
        return ops.masked_fill(grouped, loses, self.minus_inf).reshape((tokens, self.num_experts))

    def update_bias(self) -> None:
        """Move the bias one step towards balance and start counting anew (arXiv 2412.19437, section 2.1.2).

        b += rate * sign(mean load - load). Called once per optimizer step, by `TopkBiasBalanceCallback`.
        """
        load = self.expert_load.asnumpy()
        if self.has_bias and self.bias_update_rate > 0:
            bias = self.e_score_correction_bias.asnumpy()
            bias = bias + np.float32(self.bias_update_rate) * np.sign(load.mean(dtype=np.float64) - load)
            self.e_score_correction_bias.set_data(Tensor(bias.astype(np.float32)))
        self.expert_load.set_data(Tensor(np.zeros_like(load)))
