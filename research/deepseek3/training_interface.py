"""What a run, its callbacks and the converters ask of the model, besides its loss."""

import numpy as np
from attention_logits import rows_to_clip
from hf_weights import HuggingFaceWeights
from linear import Linear
from lora import frozen_names, is_adapter, save_peft
from mindspore import Parameter, nn
from sharding import experts_plan, plans

from mindformers_ext.config.flops import flops_per_token
from mindformers_ext.layers.router import TopkRouterV2

__all__ = ["TrainingInterface"]


class TrainingInterface:
    """Methods of a causal language model; it has a `config`, and its layers in `model.layers`."""

    def decoder_layers(self) -> list[tuple[str, nn.Cell]]:
        """(name, layer) of every decoder layer, MTP's included, by depth."""
        return [(f"layers.{i}", layer) for i, layer in enumerate(self.model.layers)]

    def moe_routers(self) -> list[tuple[str, TopkRouterV2]]:
        """(layer name, router) of every MoE layer."""
        return [(name, layer.mlp.gate) for name, layer in self.decoder_layers() if layer.is_moe]

    def attention_logits(self) -> list[tuple[str, Parameter]]:
        """(layer name, largest logit of each head) of every layer, where the configuration tracks them."""
        layers = self.decoder_layers() if self.config.track_max_attention_logit else []
        return [(name, layer.self_attn.track.max_logits) for name, layer in layers]

    def matrices(self) -> dict[str, tuple[tuple[str, ...], int]]:
        """Weights that Muon trains: {name: (the axis that splits each dimension, matrices side by side)}.

        The projections of attention and feed-forward, and of every expert its own; not the head, embedding and router.
        """
        weights, (_, _, _, stacked, _) = plans(self.config), experts_plan(0)[0]
        linears = [cell for _, cell in self.cells_and_names() if isinstance(cell, Linear) and cell is not self.lm_head]
        found = {cell.weight.name: (weights[cell.axes]["matmul"][1], 1) for cell in linears}
        for experts in (layer.mlp.experts for _, layer in self.decoder_layers() if layer.is_moe):
            found |= {experts.gate_up_proj.name: (stacked, 2), experts.down_proj.name: (stacked, 1)}
        return found

    def rows_to_clip(self) -> dict[str, tuple[Parameter, np.ndarray]]:
        """What qk-clip scales in all layers; see attention_logits.py."""
        return {
            name: found for _, layer in self.decoder_layers() for name, found in rows_to_clip(layer.self_attn).items()
        }

    def update_topk_bias(self) -> None:
        """Move every router's bias one step towards balance (facts 4); once per optimizer step, before saving."""
        for _, router in self.moe_routers():
            router.update_bias()

    def huggingface_weights(self, folder: str) -> HuggingFaceWeights:
        """The weights of this model in a HuggingFace folder. Raises ConfigError where the folder does not fit."""
        return HuggingFaceWeights(folder, self.config)

    def frozen_names(self) -> set[str]:
        """Names of the weights that a LoRA training leaves as they were loaded; none without LoRA."""
        return frozen_names(self.config)

    def starts_anew(self, name: str) -> bool:
        """True for a weight that a checkpoint to start from may do without."""
        return is_adapter(name)

    def save_adapter(self, folder: str, values: dict[str, np.ndarray], base: str = "") -> None:
        """Write LoRA adapters, whole arrays by our names, as a folder of the peft package."""
        save_peft(folder, self.config, values, base)

    def flops_per_token(self, seq_length: int | None = None) -> float:
        """Forward and backward FLOPs of one token at the given (default: the configured) sequence length."""
        return flops_per_token(self.config, seq_length or self.config.seq_length)
