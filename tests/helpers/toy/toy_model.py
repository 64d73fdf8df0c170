"""A tiny language model with the interface that the run machinery needs from DeepseekV3ForCausalLM."""

import mindspore as ms
from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.models.modeling_utils import PreTrainedModel
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class ToyConfig(PretrainedConfig):
    """Sizes of the toy model."""

    model_type = "toy"

    def __init__(
        self, vocab_size=64, hidden_size=16, seq_length=16, num_experts=4, batch_size=1, max_decode_length=6, **kwargs
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.seq_length = seq_length
        self.num_experts = num_experts
        self.batch_size = batch_size
        self.max_decode_length = max_decode_length
        self.do_sample, self.temperature, self.top_k, self.top_p = False, 1.0, 0, 1.0
        super().__init__(**kwargs)
        self.eos_token_id = -1  # no token ends the text


class ToyRouter(nn.Cell):
    """Counts tokens per expert; the choice depends on the token id only."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.expert_bias = Parameter(Tensor([0.0] * num_experts, ms.float32), name="expert_bias", requires_grad=False)
        self.expert_load = Parameter(Tensor([0.0] * num_experts, ms.float32), name="expert_load", requires_grad=False)

    def construct(self, input_ids):
        chosen = ops.one_hot(input_ids % self.num_experts, self.num_experts, Tensor(1.0), Tensor(0.0))
        ops.assign_add(self.expert_load, chosen.sum((0, 1)))
        return chosen


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class ToyForCausalLM(PreTrainedModel):
    """Embedding, expert-wise scale, head; loss parts and expert loads as the real model keeps them."""

    config_class = ToyConfig
    base_model_prefix = "toy"

    def __init__(self, config: ToyConfig):
        super().__init__(config, auto_prefix=True)
        self.embedding = Parameter(
            ms.common.initializer.initializer(Normal(0.1), (config.vocab_size, config.hidden_size)), name="embedding"
        )
        self.router = ToyRouter(config.num_experts)
        self.scale = Parameter(Tensor([[1.0] * config.hidden_size] * config.num_experts, ms.float32), name="scale")
        self.head = nn.Dense(config.hidden_size, config.vocab_size, weight_init=Normal(0.1))
        self.loss_parts = Parameter(Tensor([0.0] * 4, ms.float32), name="loss_parts", requires_grad=False)

    def construct(self, input_ids, labels=None, loss_mask=None, position_ids=None):
        chosen = self.router(input_ids)
        hidden = ops.gather(self.embedding, input_ids, 0) * ops.matmul(chosen, self.scale)
        logits = self.head(hidden)
        if labels is None:
            return logits
        losses = ops.cross_entropy(logits.reshape((-1, logits.shape[-1])), labels.reshape((-1,)), reduction="mean")
        one = Tensor([1.0], ms.float32)
        ops.assign_add(self.loss_parts, ops.concat((losses.reshape((1,)), one * 0.5, one * 0.25, one)))
        return losses

    def mtp_factor(self) -> float:
        """The parts for show, 0.5 and 0.25, cancel out: the loss is the main loss."""
        return -0.5

    def moe_routers(self):
        return [("toy", self.router)]

    def update_topk_bias(self):
        load = self.router.expert_load
        bias = self.router.expert_bias
        ops.assign(bias, bias + 0.001 * ops.sign(load.mean() - load))
        ops.assign(load, ops.zeros_like(load))

    def flops_per_token(self, seq_length: int) -> float:
        return 6.0 * sum(parameter.size for parameter in self.trainable_params())
