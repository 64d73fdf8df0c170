"""Data in which one sample makes a loss NaN and one makes a gradient large, through rows of the embedding."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mindformers_ext.bin_dataset.blended_dataset import build_datasets
from mindformers_ext.bin_dataset.gpt_dataset import GPTDatasetConfig
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter, bin_path, idx_path
from mindformers_ext.bin_dataset.sample_order import passages

NAN_TOKEN, SPIKE_TOKEN = 62, 63
NAN_SAMPLE, SPIKE_SAMPLE = 5, 18  # of the order of train_toy.yaml's data: in its steps 2 and 5
LENGTH, DOCUMENTS = 50, 20


def write_data(prefix: Path) -> dict[str, str]:
    """The toy's corpus with the two tokens, each in the middle of its sample; returns the documents they are in."""
    tokens = np.random.default_rng(0).integers(0, NAN_TOKEN, (DOCUMENTS, LENGTH))
    write(prefix, tokens)
    config = GPTDatasetConfig(random_seed=1234, sequence_length=16, split="1, 0, 0", create_attention_mask=False)
    dataset = build_datasets(config, [32, None, None], ["1", str(prefix)])[0]
    places = {}
    for sample, token in ((NAN_SAMPLE, NAN_TOKEN), (SPIKE_SAMPLE, SPIKE_TOKEN)):
        part = max(passages(dataset, sample), key=lambda part: part.tokens)
        tokens[part.document, part.offset + part.tokens // 2] = token
        places[token] = f"document {part.document}, "
    write(prefix, tokens)
    return places


def write(prefix: Path, tokens: np.ndarray) -> None:
    for path in (bin_path(prefix), idx_path(prefix)):
        path.unlink(missing_ok=True)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in tokens:
            writer.add_document(document)


def write_toy_weights(path: Path) -> None:
    """Weights of the toy model with the two rows."""
    rng = np.random.default_rng(1)
    embedding = rng.normal(0, 0.1, (64, 16)).astype(np.float32)
    embedding[NAN_TOKEN], embedding[SPIKE_TOKEN] = np.nan, 1e4
    weights = {
        "embedding": embedding,
        "scale": np.ones((4, 16), np.float32),
        "head.weight": rng.normal(0, 0.1, (64, 16)).astype(np.float32),
        "head.bias": np.zeros(64, np.float32),
        "router.expert_bias": np.zeros(4, np.float32),
    }
    save_file(weights, path)
