"""The class that a YAML names for DeepSeek-V3."""

from typing import ClassVar

from deepseek2_config import DeepseekV2Config
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mindformers_ext.config.model import ModelConfig, V3ModelConfig

__all__ = ["DeepseekV3Config"]


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class DeepseekV3Config(DeepseekV2Config, V3ModelConfig):
    """The configuration of a DeepSeek-V3 model; arguments as DeepseekV2Config's, defaults those of the 671B model."""

    part: ClassVar[type[ModelConfig]] = V3ModelConfig
