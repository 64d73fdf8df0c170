"""The class that a YAML names for DeepSeek-V3.2."""

from typing import ClassVar

from deepseek3_config import DeepseekV3Config
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mindformers_ext.config.model import ModelConfig, V32ModelConfig

__all__ = ["DeepseekV32Config"]


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class DeepseekV32Config(DeepseekV3Config, V32ModelConfig):
    """The configuration of a DeepSeek-V3.2 model; arguments as DeepseekV2Config's."""

    part: ClassVar[type[ModelConfig]] = V32ModelConfig
