"""Saving a LoRA training, under the YAML name AdapterMonitor: all but the frozen weights, and a folder for peft.

Extends CheckpointMonitor (this package), which saves everything. The PEFT folder is put together from the saved step,
so that it is whole whatever the layout of the run.
"""

from pathlib import Path
from typing import Any

from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path

from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.network import pieces_of
from mindformers_ext.sharded_checkpoint.random_state import random_state
from mindformers_ext.sharded_checkpoint.reader import Checkpoint
from mindformers_ext.sharded_checkpoint.writer import step_name
from mindformers_ext.training.checkpoint_monitor import CheckpointMonitor
from mindformers_ext.training.pretrained import is_huggingface
from mindformers_ext.training.wrapper import frozen_names, real_model


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class AdapterMonitor(CheckpointMonitor):
    """Save the trained adapters every few steps and at the end; the frozen weights stay where they came from.

    `checkpoint/step_N` holds the adapters of a step, what the training needs to go on from them, and where the frozen
    weights are; `adapter/` in the output_dir holds the newest adapters in PEFT's format.

    Args:
        base_model: base_model_name_or_path of the PEFT folder; default the HuggingFace folder that was loaded.
        **options: CheckpointMonitor's.
    """

    def __init__(self, base_model: str = "", save_checkpoint_steps: int = 1, keep_checkpoint_max: int = 5, **options):
        super().__init__(
            save_checkpoint_steps=save_checkpoint_steps, keep_checkpoint_max=keep_checkpoint_max, **options
        )
        self.base_model = base_model
        self.folder = Path(get_output_root_path()) / "adapter"

    def save(self, cb_params: Any, step: int) -> None:
        """Save this rank's part of the adapters; the first rank writes the PEFT folder."""
        network = cb_params.train_network
        model = real_model(network)
        if not model.config.lora.lora_rank:
            raise ConfigError("callbacks: AdapterMonitor saves adapters, but model_config.pet_config asks for none")
        frozen = frozen_names(network)
        kept = {name: piece for name, piece in pieces_of(network).items() if name not in frozen}
        base = cb_params.get("base", "")
        private = {"random_state": random_state(), "base": base}
        self.saver.save(self.meta(cb_params, step), kept, private)
        self.last_saved = step
        if self.saver.rank:
            return
        self.saver.wait()
        saved = Checkpoint(self.saver.root / step_name(step))
        adapters = {parameter.name: saved.read(parameter.name)[:] for parameter in model.trainable_params()}
        base_model = self.base_model or (base if base and is_huggingface(base) else "")  # peft reads no folder of ours
        model.save_adapter(self.folder, adapters, base_model)
        logger.info("saved the adapters of step %d in %s", step, self.folder)
