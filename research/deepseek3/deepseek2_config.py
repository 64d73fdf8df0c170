"""The class that a YAML names for DeepSeek-V2: mindformers_ext/config/model.py's model, as MindFormers wants one."""

from dataclasses import asdict
from typing import Any, ClassVar

import mindformers_ext  # noqa: F401  first: it prepares the import of MindFormers (later_imports.py)

# isort: split
import mindspore as ms
from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.modules.transformer import TransformerOpParallelConfig
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mindformers_ext.config.model import LoraConfig, ModelConfig, MoeConfig, YarnConfig
from mindformers_ext.config.pipeline import Pipeline
from mindformers_ext.config.typed import Reader
from mindformers_ext.errors import ConfigError

__all__ = ["ConfigError", "DeepseekV2Config", "LoraConfig", "MoeConfig", "YarnConfig"]

# What MindFormers' Trainer adds to model_config for parts of MindFormers that this model does not use.
TRAINER_KEYS = ("disable_lazy_inline", "dataset_config", "calculate_per_token_loss", "use_eod_attn_mask_compression")


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class DeepseekV2Config(ModelConfig, PretrainedConfig):
    """The configuration of a DeepSeek-V2 model (V2, V2-Lite, Coder-V2-Lite).

    Args:
        experts: the `moe_config` section as a run hands it on, with every key (training/run_modes.py).
        moe_config: the same as a mapping or a MoeConfig; MindFormers' own object, which cannot hold all of our keys, is
            passed over.
        parallel_config: the degrees of parallelism, a mapping or MindFormers' object; default: one device.
        moves_mtp_factor: the factor of the MTP loss is changed while the training runs.
        given: keys of `model.model_config`.

    Raises:
        ConfigError: unknown keys, or values that cannot work, a sentence each.
    """

    part: ClassVar[type[ModelConfig]] = ModelConfig  # what is read from the YAML

    def __init__(
        self,
        experts: dict | None = None,
        moe_config: Any = None,
        parallel_config: Any = None,
        moves_mtp_factor: bool = False,
        **given: Any,
    ):
        PretrainedConfig.__init__(self)
        self.moves_mtp_factor = moves_mtp_factor
        reader = Reader()
        ours = experts if experts is not None else moe_config
        if not isinstance(ours, MoeConfig):
            ours = reader.build(
                MoeConfig, {**self.assumed_moe, **(ours if isinstance(ours, dict) else {})}, "moe_config"
            )
        for key in (*TRAINER_KEYS, "type", "auto_register"):
            given.pop(key, None)
        values = reader.build(self.part, given, "model.model_config", moe_config=ours or MoeConfig())
        reader.raise_faults()
        self.__dict__.update(vars(values))
        parallel = parallel_config or TransformerOpParallelConfig()
        self.parallel_config = TransformerOpParallelConfig(**parallel) if isinstance(parallel, dict) else parallel

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "moe_config" or isinstance(value, MoeConfig):  # the Trainer sets MindFormers' object once more
            super().__setattr__(name, value)

    def to_dict(self) -> dict:
        """All values, ready for JSON."""
        values = super().to_dict()
        for key in ("moe_config", "pet_config", "scaling_factor"):
            part = getattr(self, key)
            values[key] = None if part is None else asdict(part)
        return values

    def placed(self) -> Pipeline:
        """Where every decoder layer lies in the pipeline that MindSpore was told of."""
        scheduler = ms.get_auto_parallel_context("pipeline_scheduler")
        return self.pipeline(self.parallel_config.pipeline_stage, scheduler)
