"""DeepSeek-V3.2: V3 with sparse attention (sparse_attention.py)."""

import numpy as np
from deepseek3_model import DeepseekV3ForCausalLM
from deepseek32_config import DeepseekV32Config
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Tensor
from sharding import share_graph
from sparse_attention import SparseDecoderLayer
from weights import INDEXER, name_table

__all__ = ["DeepseekV32ForCausalLM"]


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class DeepseekV32ForCausalLM(DeepseekV3ForCausalLM):
    """A DeepSeek-V3.2 language model and its training loss, to which its indexers' are added.

    With `sparse_attention: warm_up` nothing but the indexers is trained, and the model's own loss is only reported.

    Args:
        config: DeepseekV32Config.
    """

    config_class = DeepseekV32Config
    decoder_layer = SparseDecoderLayer
    parts_reported = 5  # the indexers' loss, summed over layers, is the last

    @share_graph
    def __init__(self, config):
        super().__init__(config)
        self.is_indexer = Tensor(np.eye(self.parts_reported, dtype=np.float32)[-1])
        if config.warms_up:
            for parameter in self.get_parameters():
                parameter.requires_grad = parameter.requires_grad and INDEXER in parameter.name

    def add_up(self, main, mtp, of_layers):
        """As V2's; `of_layers` (2,) are balance losses and indexers' losses."""
        balance, indexer = of_layers[:1], of_layers[1:]
        parts = main * self.is_main + mtp * self.is_mtp + balance * self.is_balance + self.is_count
        parts = parts + indexer * self.is_indexer
        return main + mtp * self.mtp_factor() + balance + indexer, parts

    def frozen_names(self) -> set[str]:
        """Names of the weights that this training leaves as they were loaded: in the warm-up all but the indexers'."""
        if not self.config.warms_up:
            return super().frozen_names()
        names = {entry.ours for entry in name_table(self.config) if INDEXER not in entry.ours}
        return {name for name in names if not name.endswith("e_score_correction_bias")}

    def starts_anew(self, name: str) -> bool:
        """True for a weight that a checkpoint may do without: the warm-up makes an indexer for a V3 that has none."""
        new = self.config.warms_up and INDEXER in name
        return new or super().starts_anew(name)
