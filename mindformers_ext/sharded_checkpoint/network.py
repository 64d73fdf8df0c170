"""The parameters of a MindSpore network: what this process holds of them, saved from it and loaded into it."""

from collections.abc import Callable, Mapping
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
from mindformers.tools.utils import get_real_group_size, get_real_rank
from mindspore import Parameter, Tensor, nn

from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.layout import Piece, is_state
from mindformers_ext.sharded_checkpoint.reader import Checkpoint, Source, check_names, load
from mindformers_ext.sharded_checkpoint.shards import LAYOUT_FIELDS, Slot, slot_of

# Sizes by which a model and a checkpoint that do not belong together are told apart in words.
MODEL_FACTS = ("vocab_size", "num_layers", "hidden_size", "num_heads", "intermediate_size")


def is_split() -> bool:
    """True when MindSpore splits parameters over devices."""
    return ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")


def is_lowered(network: nn.Cell) -> bool:
    """True for the training step of a rank on CPU (cpu_parallel.lowered_step), which says itself what it holds."""
    return hasattr(network, "stored")


def state_of(network: nn.Cell) -> dict[str, Parameter]:
    """The parameters that this process must save, by name; a split network must have been compiled."""
    split = is_split()
    found = {}
    for parameter in network.get_parameters():
        elsewhere = split and (not parameter.sliced or parameter.has_init)  # on another pipeline stage
        if is_state(parameter.name) and not elsewhere and not parameter.param_info.is_pipeline_shared_param:
            found[parameter.name] = parameter
    if is_lowered(network):  # the parts, and numbers that are constants of the graph
        found = {name: parameter for name, parameter in found.items() if "." not in name}
        found |= {name: part.value for name, part in network.stored() if is_state(name)}
    return found


def slots_of(network: nn.Cell, parameters: Mapping[str, Parameter]) -> dict[str, Slot]:
    """The part of every parameter that this process holds."""
    if is_lowered(network):
        parts = {name: part.slot for name, part in network.stored()}
        return {name: parts.get(name, Slot.whole(p.shape, network.job.rank)) for name, p in parameters.items()}
    rank = get_real_rank()
    if not is_split():
        return {name: Slot.whole(parameter.shape, copy=rank) for name, parameter in parameters.items()}
    layouts = {name: dict(zip(LAYOUT_FIELDS, e, strict=True)) for name, e in network.parameter_layout_dict.items()}
    index = rank % (get_real_group_size() // ms.get_auto_parallel_context("pipeline_stages"))
    return {name: slot_of(name, p.shape, layouts.get(name), index) for name, p in parameters.items()}


def pieces_of(network: nn.Cell) -> dict[str, Piece]:
    """What this process saves; on CPU the arrays share the parameters' memory."""
    parameters = state_of(network)
    slots = slots_of(network, parameters)
    return {name: Piece(to_numpy(parameter), slots[name]) for name, parameter in parameters.items()}


def to_numpy(parameter: Parameter) -> np.ndarray:
    """Its values; bfloat16 as ml_dtypes has it."""
    array = parameter.asnumpy()
    return array.view(np.uint16).view(ml_dtypes.bfloat16) if parameter.dtype == ms.bfloat16 else array


def load_into(
    network: nn.Cell,
    parameters: Mapping[str, Parameter],
    source: Source,
    may_leave: Callable[[str], bool] | None = None,
) -> None:
    """Give `parameters` of `network` their values from a checkpoint of any layout.

    Values of another type are converted to the parameter's.

    Raises:
        ConfigError: the checkpoint does not fit or is damaged; no parameter has changed.
    """
    slots = slots_of(network, parameters)
    holds_all = network.job.stages == 1 if is_lowered(network) else not is_split()
    check_names(source, slots, holds_all, may_leave)
    for name, array in load(source, slots):
        parameter = parameters[name]
        parameter.set_data(Tensor(array, parameter.dtype), slice_shape=parameter.sliced)


def model_facts(config: Any) -> dict[str, int]:
    """The sizes of a model's configuration that MODEL_FACTS names."""
    found = {name: getattr(config, name, None) for name in MODEL_FACTS}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def check_model(source: Source, config: Any) -> None:
    """Check that a checkpoint was saved from a model of these sizes.

    Raises:
        ConfigError: every size that differs, with both values.
    """
    if not isinstance(source, Checkpoint):
        return
    here, there = model_facts(config), source.meta.model
    other = [f"{name} {there[name]}, not {size}" for name, size in here.items() if there.get(name, size) != size]
    if other:
        raise ConfigError(f"{source.path}: is of a model with {'; '.join(other)}; give a checkpoint of this model")
