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
from mindspore import nn
from mindspore.dataset import Dataset
from mindspore.train import Callback

from mindformers_ext.config.run import Sections
from mindformers_ext.config.sections import MonitorConfig
from mindformers_ext.data.data_position import Start, position_of, read_before, source_of
from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.layout import Meta
from mindformers_ext.sharded_checkpoint.reader import Checkpoint
from mindformers_ext.training import muon
from mindformers_ext.training.bad_steps import BadSteps, StopAtNotFinite
from mindformers_ext.training.checkpoint_monitor import BeginAt, CheckpointMonitor, RestoreCheckpoint
from mindformers_ext.training.evaluation import Evaluation
from mindformers_ext.training.heartbeat import Heartbeat
from mindformers_ext.training.metrics import samples_per_step
from mindformers_ext.training.monitors import ForgetLogits
from mindformers_ext.training.recipe import Average, FollowRecipe
from mindformers_ext.training.steering import Steering
from mindformers_ext.training.wrapper import real_model


@MindFormerRegister.register(MindFormerModuleType.TRAINER, alias="CausalLanguageModelingTrainer")
class ResumingTrainer(CausalLanguageModelingTrainer):
    """Trains from the start, from the weights of a checkpoint, or on from a saved step.

    Reads `config.start_from`: {"source": where the parameters come from, "resume": False to take the weights only,
    "skip_steps": batches to leave out}, and `config.guards`, the sections that its own callbacks follow.
    """

    def train(self, config: Any = None, **arguments: Any) -> None:
        """Train as upstream does, from the checkpoint."""
        self.source, self.resume = config.start_from["source"], config.start_from["resume"]
        self.start = Start(self.source.meta.step) if self.resume else Start(0, config.start_from["skip_steps"])
        self.follows = self.resume and not config.ignore_data_skip  # the checkpoint says where the data goes on
        super().train(config=config, **arguments)

    def create_train_dataset(self, default_args: dict | None = None) -> Dataset:
        """Build the dataset; with another batch size than before, its batches begin where the old ones ended."""
        dataset = super().create_train_dataset(default_args)
        if dataset.get_dataset_size() == 0:
            raise ConfigError(
                f"train_dataset gives no batch of {dataset.get_batch_size()} samples; raise train_dataset."
                "data_loader.sizes or lower the batch (runner_config.batch_size, micro batches)"
            )
        if not self.follows:
            return dataset
        meta: Meta = self.source.meta
        check_data_is_same(dataset, meta, self.source)
        read = read_before(dataset, meta.consumed_samples)
        first = read % samples_per_step(dataset)
        if first:
            self.config.train_dataset.data_loader.first_sample = first
            dataset = super().create_train_dataset(default_args)
        steps = (read - first) // samples_per_step(dataset)
        self.start = Start(meta.step, steps, first)
        return dataset

    def create_lr_scheduler(self, lr_config: Any, *arguments: Any, **named: Any) -> Any:
        """Count a schedule's steps without sinking, whose count would leave out what `leave_out` does."""
        if lr_config and lr_config.total_steps in (None, -1):
            lr_config.total_steps = self.config.runner_config.origin_epochs * self.get_train_data_size()
        return super().create_lr_scheduler(lr_config, *arguments, **named)

    def create_optimizer_scheduler(self, network: nn.Cell, model_params: set) -> nn.Optimizer:
        """Let Muon ask the model which weights are matrices."""
        if self.config.optimizer.type == muon.REGISTERED:
            self.config.optimizer.model = real_model(network)
        return super().create_optimizer_scheduler(network, model_params)

    def set_train_dataset(self, dataset: Dataset) -> None:
        """Go to the first batch; called when upstream has reset its counters, and the dataset has its final size."""
        size, runner = dataset.get_dataset_size(), self.config.runner_config
        done = self.start.dataset_steps + (self.source.meta.epoch * size if self.follows else 0)
        if done:
            self.start = Start(self.start.step, done, self.start.first_sample)
            if done >= runner.epochs * size:
                who = f"{self.source.path} has trained" if self.follows else "data_skip_steps leaves out"
                raise ConfigError(
                    f"{who} {done} of the {runner.epochs * size} steps that "
                    f"runner_config.epochs {runner.epochs} asks for; raise it to train on"
                )
            dataset.set_init_step(done)
            per_epoch = size
            if runner.sink_mode:
                per_epoch = runner.sink_size if runner.sink_size and runner.sink_size > 0 else size
            runner.initial_epoch = done // per_epoch
            logger.info("going on at step %d, batch %d of epoch %d", self.start.step, done % size, done // size)
        super().set_train_dataset(dataset)

    def get_train_data_size(self) -> int:
        """Steps of a pass with no sample left out: the learning rate must not follow another schedule without some."""
        dataset, source = self.train_dataset, source_of(self.train_dataset)
        if not hasattr(source, "left_out") or len(source) == source.left_out.size:
            return dataset.get_dataset_size()
        return source.left_out.size // samples_per_step(dataset)

    def sort_callbacks(self, default_callbacks: list[Callback]) -> list[Callback]:
        """Load before all others; save after them, so that metrics.jsonl holds every step that a checkpoint does."""
        ordered = super().sort_callbacks(default_callbacks)
        ordered.sort(key=lambda callback: isinstance(callback, CheckpointMonitor))
        guards: Sections = self.config.guards
        first: list[Callback] = [BeginAt(self.start)]
        if guards.max_step_minutes is not None:
            first.append(Heartbeat(guards.max_step_minutes))
        if self.source:
            first.append(RestoreCheckpoint(self.source, self.resume))
        if guards.use_skip_data_by_global_norm:
            first.append(BadSteps(guards.monitor_config or MonitorConfig()))
        recipe = guards.recipe
        if self.config.run.model and self.config.run.model.track_max_attention_logit:
            first.append(ForgetLogits())
        if recipe:
            first.append(FollowRecipe(self.config.run))
        if recipe and recipe.ema_decay:
            first.append(Average(recipe.ema_decay, self.source if self.resume else None))
        if guards.use_graceful_exit or guards.max_train_hours is not None:
            first.append(Steering(guards.use_graceful_exit, guards.max_train_hours))
        monitors = [callback for callback in ordered if isinstance(callback, CheckpointMonitor)]
        last: list[Callback] = [Evaluation(monitors[0], **self.config.evaluation)] if self.config.evaluation else []
        if guards.check_for_nan_in_loss_and_grad:
            last.append(StopAtNotFinite())
        return [*first, *ordered, *last]


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
