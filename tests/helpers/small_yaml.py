"""The tiny YAML, cut smaller."""

from typing import Any


def small_sizes(seq_length: int, num_layers: int = 2) -> dict[str, Any]:
    """Overrides of run_mindformer.py's command line for a model that compiles in seconds."""
    return {
        "model.model_config.hidden_size": 64,
        "model.model_config.num_layers": num_layers,
        "moe_config.moe_intermediate_size": 32,
        "model.model_config.seq_length": seq_length,
        "train_dataset.data_loader.config.seq_length": seq_length,
    }
