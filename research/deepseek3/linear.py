"""The matrix product of every layer, with its weight and, where a LoRA training asks for one, its adapter."""

from lora import LoraAdapter
from mindspore import Parameter, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal, initializer
from sharding import shard

from mindformers_ext.layers.fused_ops import activation_type, matrix_product

__all__ = ["Linear", "weight"]


def weight(config, *shape: int) -> Parameter:
    """A trainable matrix, normal with `initializer_range`; nothing is allocated before it is needed."""
    init = initializer(Normal(config.initializer_range), shape, getattr(mstype, config.param_init_type))
    return Parameter(init, name="weight")


class Linear(nn.Cell):
    """x W^T in compute_dtype, as the type of activations; the weight is (out, in) as in HuggingFace.

    Where pet_config names `target`, a LoRA adapter lies beside the weight.
    """

    def __init__(self, config, in_dim: int, out_dim: int, axes: str, target: str = ""):
        super().__init__()
        self.weight = weight(config, out_dim, in_dim)
        self.compute_dtype, self.out_type = getattr(mstype, config.compute_dtype), activation_type(config)
        self.matmul, self.axes = matrix_product(), axes
        shard(self, axes, config)
        self.adapted = config.lora.has(target)
        if self.adapted:
            self.lora = LoraAdapter(config, in_dim, out_dim, axes)
            self.add_lora = ops.Add()
            shard(self, f"adapted_{axes}", config)

    def construct(self, x):
        x = ops.cast(x, self.compute_dtype)
        y = self.matmul(x, ops.cast(self.weight, self.compute_dtype))
        if self.adapted:
            y = self.add_lora(y, self.lora(x))
        return ops.cast(y, self.out_type)
