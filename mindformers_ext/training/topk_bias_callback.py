"""The balancing bias of the router, updated once per optimizer step (DeepSeek-V3, sec. 2.1.2).

Extends mindformers.core.callback.TopkBiasBalanceCallback (MindFormers 1.9.0): upstream reaches into
`feed_forward.routed_experts.router.router` and takes the mean load from its arguments; here the model does its own
update. Deriving from upstream's class keeps its place in the Trainer's order, before CheckpointMonitor wherever the
YAML lists it, so every checkpoint holds the updated bias. It can go when upstream calls the model alone.
"""

import numpy as np
from mindformers.core.callback.callback import TopkBiasBalanceCallback as UpstreamTopkBiasBalanceCallback
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Tensor, get_auto_parallel_context, nn, ops
from mindspore.train import Callback, RunContext

from mindformers_ext.training.wrapper import real_model, was_left_out


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum a tensor over the data-parallel ranks; the tensor itself in every other parallel mode."""
    if get_auto_parallel_context("parallel_mode") != "data_parallel":
        return value
    return ops.AllReduce()(value)


def read_expert_load(model: nn.Cell) -> dict[str, np.ndarray]:
    """Tokens per expert since the last bias update, (E,) by layer name, summed over data-parallel ranks.

    The sums are written back to the routers, so that the bias update that follows sees the whole global batch.
    """
    loads = {}
    for name, router in model.moe_routers():
        total = sum_over_ranks(router.expert_load)
        if total is not router.expert_load:
            ops.assign(router.expert_load, total)
        loads[name] = total.asnumpy().copy()
    return loads


def reset_expert_load(model: nn.Cell) -> None:
    """Begin to count anew."""
    for _, router in model.moe_routers():
        ops.assign(router.expert_load, ops.zeros_like(router.expert_load))


@MindFormerRegister.register(MindFormerModuleType.CALLBACK, alias="TopkBiasBalanceCallback")
class TopkBiasBalanceCallback(UpstreamTopkBiasBalanceCallback):
    """Call the model's own `update_topk_bias()` after every optimizer step.

    A step that was left out moves no bias. The loads of the step are left in `cb_params.expert_load` for the callbacks
    that report them.

    Args:
        balance_via_topk_bias: False switches the update off; the model's moe_config decides the rest.
        **upstream_arguments: topk_bias_update_rate, expert_num, micro_batch_num and gradient_accumulation_steps of
            upstream's YAMLs; the model knows these numbers itself.
    """

    def __init__(self, balance_via_topk_bias: bool = True, **upstream_arguments):
        Callback.__init__(self)
        self.balance_via_topk_bias = balance_via_topk_bias

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Publish the loads of this step, then update the bias from them."""
        if not self.balance_via_topk_bias:
            return
        cb_params = run_context.original_args()
        model = real_model(cb_params.train_network)
        cb_params.expert_load = read_expert_load(model)
        if was_left_out(cb_params.train_network, cb_params.net_outputs):
            reset_expert_load(model)
        else:
            model.update_topk_bias()
