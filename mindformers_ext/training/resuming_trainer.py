"""MindFormers' trainer that starts from our checkpoints, under the YAML name CausalLanguageModelingTrainer.

Extends mindformers.trainer.CausalLanguageModelingTrainer (MindFormers 1.9.0): upstream reads the step out of its own
checkpoint files and loads them before the callbacks exist. Here upstream is told of no checkpoint; the data starts at
the saved sample, and a callback loads the parameters. It can go when upstream separates reading a checkpoint from
training.
"""

from typing import Any

from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.trainer import CausalLanguageModelingTrainer
from mindspore.dataset import Dataset
from mindspore.train import Callback

from mindformers_ext.data.data_position import Start, position_of
from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.layout import Meta
from mindformers_ext.sharded_checkpoint.reader import Checkpoint
from mindformers_ext.training.checkpoint_monitor import CheckpointMonitor, RestoreCheckpoint
from mindformers_ext.training.metrics import samples_per_step


@MindFormerRegister.register(MindFormerModuleType.TRAINER, alias="CausalLanguageModelingTrainer")
class ResumingTrainer(CausalLanguageModelingTrainer):
    """Trains from the start, from the weights of a checkpoint, or on from a saved step.

    Reads `config.start_from`: {"source": where the parameters come from, "resume": False to take the weights only};
    absent for a training from the start.
    """

    def train(self, config: Any = None, **arguments: Any) -> None:
        """Train as upstream does, from the checkpoint."""
        start_from = config.start_from or {"source": None, "resume": False}
        self.source = start_from["source"]
        self.start = Start(self.source.meta.step) if start_from["resume"] else None
        super().train(config=config, **arguments)

    def create_train_dataset(self, default_args: dict | None = None) -> Dataset:
        """Build the dataset; with another batch size than before, its batches begin where the old ones ended."""
        dataset = super().create_train_dataset(default_args)
        if dataset.get_dataset_size() == 0:
            raise ConfigError(
                f"train_dataset gives no batch of {dataset.get_batch_size()} samples; raise train_dataset."
                "data_loader.sizes or lower the batch (runner_config.batch_size, micro batches)"
            )
        if self.start is None or self.config.ignore_data_skip:
            return dataset
        meta: Meta = self.source.meta
        check_data_is_same(dataset, meta, self.source)
        first = meta.consumed_samples % samples_per_step(dataset)
        if first:
            self.config.train_dataset.data_loader.first_sample = first
            dataset = super().create_train_dataset(default_args)
        steps = (meta.consumed_samples - first) // samples_per_step(dataset)
        self.start = Start(meta.step, steps, first)
        return dataset

    def set_train_dataset(self, dataset: Dataset) -> None:
        """Go to the saved batch; called when upstream has reset its counters, and the dataset has its final size."""
        if self.start is not None and not self.config.ignore_data_skip:
            size, runner = dataset.get_dataset_size(), self.config.runner_config
            done = self.source.meta.epoch * size + self.start.dataset_steps
            self.start = Start(self.start.step, done, self.start.first_sample)
            if done >= runner.epochs * size:
                raise ConfigError(
                    f"{self.source.path} has trained {done} of the {runner.epochs * size} steps that "
                    f"runner_config.epochs {runner.epochs} asks for; raise it to train on"
                )
            dataset.set_init_step(done)
            per_epoch = size
            if runner.sink_mode:
                per_epoch = runner.sink_size if runner.sink_size and runner.sink_size > 0 else size
            runner.initial_epoch = done // per_epoch
            logger.info("going on at step %d, batch %d of epoch %d", self.start.step, done % size, done // size)
        super().set_train_dataset(dataset)

    def sort_callbacks(self, default_callbacks: list[Callback]) -> list[Callback]:
        """Load before all others; save after them, so that metrics.jsonl holds every step that a checkpoint does."""
        ordered = super().sort_callbacks(default_callbacks)
        ordered.sort(key=lambda callback: isinstance(callback, CheckpointMonitor))
        return [*([RestoreCheckpoint(self.source, self.start)] if self.source else []), *ordered]


def check_data_is_same(dataset: Dataset, meta: Meta, source: Checkpoint) -> None:
    """Check that the saved position counts samples of this data, where both are known.

    Raises:
        ConfigError: it counts samples of other data.
    """
    here = position_of(dataset, 0)
    if here is not None and meta.data_hash and here.data_hash != meta.data_hash:
        raise ConfigError(
            f"{source.path} stands at sample {meta.consumed_samples} of other data: train_dataset's files, sizes, "
            "seq_length, split or random_seed differ; restore them, or set ignore_data_skip: True to begin this data "
            "from its start"
        )
