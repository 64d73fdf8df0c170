"""A packed sample of 32K tokens trains on CPU: no mask of its length squared is made anywhere."""

import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import ROOT, run_command
from helpers.small_yaml import small_sizes

from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter, loss_mask_prefix

from .test_resume import metrics

LENGTH, EOD = 32768, 1
DATA = "train_dataset.data_loader.config"
COLUMNS = '["input_ids", "labels", "loss_mask", "position_ids", "actual_seq_len"]'
OVERRIDES = small_sizes(LENGTH) | {
    "model.model_config.max_position_embeddings": LENGTH,
    "model.model_config.mtp_depth": 1,
    "runner_config.batch_size": 1,
    "runner_config.gradient_accumulation_steps": 1,
    "train_dataset.data_loader.sizes": "[3, 0, 0]",
    f"{DATA}.data_path": '["1", "chats_text_document"]',
    f"{DATA}.eod": EOD,
    f"{DATA}.reset_position_ids": True,
    f"{DATA}.eod_mask_loss": True,
    f"{DATA}.create_compressed_eod_mask": True,
    f"{DATA}.eod_pad_length": 300,
    "train_dataset.input_columns": COLUMNS,
    "train_dataset.construct_args_key": COLUMNS,
    "lr_schedule.warmup_steps": 1,
    "eval_dataset": "null",
    "processor": "null",
}
WITH_PEAK = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
    "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Conversations of 200 to 3000 tokens, of which the second halves are to be learnt."""
    rng, prefix = np.random.default_rng(0), tmp_path / "chats_text_document"
    with (
        IndexedDatasetWriter(prefix, np.uint16) as tokens,
        IndexedDatasetWriter(loss_mask_prefix(prefix), np.uint8) as mask,
    ):
        for length in rng.integers(200, 3000, 90):
            tokens.add_document(np.append(rng.integers(2, 2000, length), EOD))
            mask.add_document((np.arange(length + 1) >= length // 2).astype(np.uint8))
    return tmp_path


@pytest.mark.slow
def test_a_packed_sample_of_32k_tokens_trains(folder):
    yaml = ROOT / "research/deepseek3/deepseek3_tiny/finetune_deepseek3_tiny.yaml"
    sizes = [text for key, value in OVERRIDES.items() for text in (f"--{key}", str(value))]
    run = [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(yaml), "--load_checkpoint", "", *sizes]
    result = run_command([sys.executable, "-c", WITH_PEAK, *run], folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    losses = [record["loss"] for record in metrics(folder / "output_finetune")]
    assert len(losses) == 3 and np.isfinite(losses).all()
    peak = int(result.stdout.rpartition("peak ")[2].split()[0]) * 1024
    assert peak < 4 * LENGTH * LENGTH, "the mask alone, int32 from the loader, would take as much"
