"""Saving and going on, under the YAML name CheckpointMonitor.

Takes the place of mindformers.core.callback.CheckpointMonitor (MindFormers 1.9.0), which writes files in place, keeps
no data position and no random state, and needs the same layout to load. It can go when upstream's are whole, exact and
independent of the layout.
"""

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path
from mindspore import Parameter, nn
from mindspore.train import Callback, RunContext

from mindformers_ext.data.data_position import Start, place_after, position_of, start_of
from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.gate import Gate
from mindformers_ext.sharded_checkpoint.layout import Meta, is_state
from mindformers_ext.sharded_checkpoint.network import (
    check_model,
    is_split,
    load_into,
    model_facts,
    pieces_of,
    state_of,
)
from mindformers_ext.sharded_checkpoint.random_state import random_state, restore_random_state
from mindformers_ext.sharded_checkpoint.reader import Checkpoint, Source, open_source
from mindformers_ext.sharded_checkpoint.writer import Saver
from mindformers_ext.training.metrics import samples_per_step
from mindformers_ext.training.over_ranks import place_in_run
from mindformers_ext.training.pretrained import HuggingFaceFolder, is_huggingface, resolve
from mindformers_ext.training.wrapper import frozen_names, real_model


class BeginAt(Callback):
    """Tell the other callbacks where this process begins, and give them a place for what checkpoints keep of a run."""

    def __init__(self, start: Start):
        super().__init__()
        self.start = start

    def on_train_begin(self, run_context: RunContext) -> None:
        """Before all others."""
        cb_params = run_context.original_args()
        cb_params.start, cb_params.health = self.start, {}


class RestoreCheckpoint(Callback):
    """Load a checkpoint before the first step; before the other callbacks, which see what was loaded.

    Args:
        source: where the parameters come from; a HuggingFace folder is opened with the network.
        resume: go on from its step; False to load the weights only, for a new training.
    """

    def __init__(self, source: Source | HuggingFaceFolder, resume: bool):
        super().__init__()
        self.source, self.resume = source, resume

    def on_train_begin(self, run_context: RunContext) -> None:
        """Compile the network where that decides what this rank holds, then load it."""
        cb_params = run_context.original_args()
        network = cb_params.train_network
        if is_split():
            sinks = cb_params.dataset_sink_mode
            network.compile(*(() if sinks else next(cb_params.train_dataset.create_tuple_iterator(num_epochs=1))))
        model = real_model(network)
        source = resolve(self.source, model)
        check_model(source, model.config)
        parameters = state_of(network)
        if not self.resume:
            parameters = weights_of(model, source, parameters)
            cb_params.base = str(Path(source.path).resolve())
        else:
            private = source.private(place_in_run()[0])
            if "base" in private:
                parameters = load_base(network, parameters, private["base"], source.path)
                cb_params.base = private["base"]
            cb_params.restored = source.meta
            restore_random_state(private["random_state"])
        load_into(network, parameters, source, may_leave_mtp)
        logger.info("loaded %d parameters from %s", len(parameters), source.path)


@MindFormerRegister.register(MindFormerModuleType.CALLBACK, alias="CheckpointMonitor")
class CheckpointMonitor(Callback):
    """Save everything that the training needs to go on exactly, every few steps and at the end.

    Args:
        prefix: name of the run, kept in the checkpoint.
        directory: folder of the checkpoints; default `checkpoint` in the run's output_dir. All ranks must see it.
        save_checkpoint_steps: steps between two checkpoints.
        keep_checkpoint_max: newest checkpoints to keep.
        async_save: write in the background while the training goes on.
        keep_every_steps: checkpoints at multiples of this step stay besides the newest.
        check_health: give a state with a value that is not finite, or an embedding or router bias that is far off,
            another name (sharded_checkpoint/gate.py, which says what the next two are).
        integrated_save: must be False; every rank writes its own part, which any layout can load.
        checkpoint_format: must be safetensors.
        **trainer_options: what the Trainer gives to upstream's class.
    """

    def __init__(
        self,
        prefix: str = "",
        directory: str | None = None,
        save_checkpoint_steps: int = 1,
        keep_checkpoint_max: int = 5,
        async_save: bool = False,
        integrated_save: bool = False,
        checkpoint_format: str = "safetensors",
        keep_every_steps: int | None = None,
        check_health: bool = False,
        embedding_norm_factor: float = 2.0,
        max_expert_bias: float | None = None,
        **trainer_options: Any,
    ):
        super().__init__()
        self.prefix = prefix
        self.every = save_checkpoint_steps
        self.last_saved = 0
        self.saver = Saver(
            Path(directory or Path(get_output_root_path()) / "checkpoint"),
            *place_in_run()[:2],
            keep_checkpoint_max,
            async_save,
            keep_every=keep_every_steps,
            gate=Gate(embedding_norm_factor, max_expert_bias) if check_health else None,
        )

    def on_train_begin(self, run_context: RunContext) -> None:
        """Begin with no half written checkpoint; nothing is saved before the first step."""
        self.saver.clear()
        cb_params = run_context.original_args()
        self.last_saved = start_of(cb_params).step
        if "restored" in cb_params:
            self.saver.health = dict(cb_params.restored.health)

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Save when a multiple of save_checkpoint_steps was reached, or passed in sink mode, or somebody asked."""
        cb_params = run_context.original_args()
        step = start_of(cb_params).step + cb_params.cur_step_num
        if step // self.every > self.last_saved // self.every or cb_params.get("save_now"):
            self.save(cb_params, step)

    def on_train_end(self, run_context: RunContext) -> None:
        """Save the last step, and wait until it is on the disk."""
        cb_params = run_context.original_args()
        step = start_of(cb_params).step + cb_params.cur_step_num
        if step > self.last_saved:
            self.save(cb_params, step)
        self.saver.wait()

    def save(self, cb_params: Any, step: int) -> None:
        """Save this rank's part of the step that has ended."""
        network = cb_params.train_network
        saved = partial(logger.info, "saved step %d in %s", step, self.saver.root)
        pieces = pieces_of(network) | cb_params.get("average", {})
        self.saver.save(self.meta(cb_params, step), pieces, {"random_state": random_state()}, saved)
        self.last_saved = step

    def meta(self, cb_params: Any, step: int) -> Meta:
        """Where the training stands."""
        dataset, start = cb_params.train_dataset, start_of(cb_params)
        epoch, steps = divmod(start.dataset_steps + cb_params.cur_step_num, dataset.get_dataset_size())
        read = start.first_sample + steps * samples_per_step(dataset) if steps else 0
        consumed = place_after(dataset, read)
        position = position_of(dataset, consumed)
        return Meta(
            step=step,
            ranks=self.saver.ranks,
            epoch=epoch,
            consumed_samples=consumed,
            data_hash=position.data_hash if position else "",
            prefix=self.prefix,
            model=model_facts(real_model(cb_params.train_network).config),
            versions={name: version(name) for name in ("mindspore", "mindformers")},
            health={name: list(values) for name, values in cb_params.get("health", {}).items()},
        )


def load_weights(network: nn.Cell, source: Source) -> None:
    """Load every weight of a network for evaluation or prediction; what only training needs stays unread.

    The checkpoint of a LoRA training holds the adapters; the frozen weights come from where the training had them.

    Raises:
        ConfigError: the checkpoint is damaged or is not of this model.
    """
    check_model(source, network.config)
    parameters = {parameter.name: parameter for parameter in network.get_parameters() if is_state(parameter.name)}
    private = source.private(0) if isinstance(source, Checkpoint) else {}
    if "base" in private:
        if not frozen_names(network):
            raise ConfigError(
                f"{source.path}: holds LoRA adapters only; set model_config.pet_config as in their training, or merge "
                "them first (convert_reversed.py --merge_lora) and load the merged folder"
            )
        if not private["base"]:
            raise ConfigError(
                f"{source.path}: holds adapters that were trained on random weights, which no file holds; train them "
                "on a checkpoint (load_checkpoint)"
            )
        parameters = load_base(network, parameters, private["base"], source.path)
    load_into(network, parameters, source, may_leave_mtp)


def load_base(
    network: nn.Cell, parameters: dict[str, Parameter], base: str, adapters: str | Path
) -> dict[str, Parameter]:
    """Load the frozen weights from where a LoRA training had them; returns the rest of `parameters`.

    `base` is "" for a training that began with random weights: the YAML's seed has made them again.

    Raises:
        ConfigError: they are not there any more; `adapters` is the checkpoint that needs them.
    """
    frozen = frozen_names(network)
    if base:
        try:
            found = HuggingFaceFolder(Path(base), adapters) if is_huggingface(base) else open_source(base)
            weights = {name: parameter for name, parameter in parameters.items() if name in frozen}
            own = parameters.keys()  # the adapters' checkpoint has the router biases too
            load_into(network, weights, resolve(found, real_model(network)), lambda n: may_leave_mtp(n) or n in own)
        except ConfigError as error:
            raise ConfigError(f"{adapters}: its adapters were trained on the weights of {base}: {error}") from None
        logger.info("loaded %d frozen parameters from %s", len(weights), base)
    return {name: parameter for name, parameter in parameters.items() if name not in frozen}


def weights_of(model: nn.Cell, source: Source, parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    """The model's own among `parameters`; what the source does not have and the model can make starts anew."""
    known = set(source.names())
    own = {parameter.name for parameter in model.get_parameters()}
    starts_anew = getattr(model, "starts_anew", lambda name: False)  # adapters and the like
    own = {name for name in own if name in known or not starts_anew(name)}
    return {name: parameter for name, parameter in parameters.items() if name in own}


def may_leave_mtp(name: str) -> bool:
    """True for a weight of multi-token prediction, which a model may do without."""
    return name.startswith("mtp.")
