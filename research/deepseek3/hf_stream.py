"""A training model's weights under HuggingFace's names, one tensor at a time, for an engine that generates."""

from collections.abc import Iterator

import numpy as np
from mindspore import nn
from weights import boxes, name_table, write_part

from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.live import LiveWeights

__all__ = ["huggingface_tensors"]


def huggingface_tensors(network: nn.Cell, config) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 tensor) of every weight but MTP's, which transformers does not have.

    Of a network that is split over ranks each tensor is gathered when it is asked for, so no rank holds more than one;
    every rank must go through all of them. Experts come one by one.

    Args:
        network: the model, or its training step.
        config: the model's.
    """
    if config.lora.lora_rank:
        raise ConfigError(
            "model.model_config.pet_config: adapters are not merged while they train; save and merge them"
        )
    entries = [entry for entry in name_table(config) if not entry.ours.startswith("mtp.")]
    live = LiveWeights(network, {entry.ours: entry.shape for entry in entries})
    for entry in entries:
        ours = live.read(entry.ours)
        for name, box in boxes(entry, 0, entry.shape[0]):
            yield name, write_part(entry, ours, box)
