"""What a DeepSeek-V3 run asks for: V2's keys with V3's values, and multi-token prediction."""

from dataclasses import dataclass

from deepseek2_config import DeepseekV2Config
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

__all__ = ["DeepseekV3Config"]


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
@dataclass(init=False, kw_only=True, eq=False, repr=False)
class DeepseekV3Config(DeepseekV2Config):
    """The `model_config` section of a DeepSeek-V3 run; the defaults are the released 671B model's.

    Raises:
        ConfigError: unknown key, or a value that cannot work, in one sentence.
    """

    model_type = "deepseekv3"

    hidden_size: int = 7168
    num_layers: int = 61
    num_heads: int = 128
    intermediate_size: int | None = 18432
    vocab_size: int = 129280
    q_lora_rank: int | None = 1536
    initializer_range: float = 0.006
    bos_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int = 1
    mtp_depth: int = 1  # tokens predicted beyond the next one
    mtp_loss_factor: float = 0.3  # lambda; divided by mtp_depth

    def default_moe_config(self) -> dict:
        """V3's router: sigmoid scores, bias for balance, gates normalised."""
        return {"use_gating_sigmoid": True, "topk_method": "noaux_tc", "norm_topk_prob": True}
