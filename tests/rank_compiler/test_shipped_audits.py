"""Every shipped YAML, all its stages: no operator breaks what Ascend documents, and what is doubtful has its reason."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "research" / "deepseek3"
DEVICES = {"671b": 1024}  # of the YAMLs whose name has it; the others have the devices of their degrees
PACKED = {  # a local batch of two sequences, each of several documents with positions of their own
    "runner_config.batch_size": 2,
    "train_dataset.data_loader.config.eod": 1,
    "train_dataset.data_loader.config.reset_position_ids": True,
    "train_dataset.construct_args_key": ["input_ids", "labels", "loss_mask", "position_ids"],
}
COLUMNS = ["input_ids", "labels", "loss_mask", "position_ids", "actual_seq_len"]
DOCUMENTS = {  # by their ends, with a context that is split too
    "runner_config.batch_size": 2,
    "train_dataset.data_loader.config.eod": 1,
    "train_dataset.data_loader.config.reset_position_ids": True,
    "train_dataset.data_loader.config.create_compressed_eod_mask": True,
    "train_dataset.input_columns": COLUMNS,
    "train_dataset.construct_args_key": COLUMNS,
    "parallel_config.data_parallel": 64,
    "parallel_config.context_parallel": 2,
    "parallel.dataset_strategy": [[64, 1]] * 5,
}
CAPACITY = {"moe_config.use_gmm": False}
BIG = "deepseek3_671b/pretrain_deepseek3_671b.yaml"
SLICE = {  # the ends of the 671B run: its widths, two stages
    "model.model_config.num_layers": 4,
    "model.model_config.offset": 0,
    "moe_config.first_k_dense_replace": 1,
    "parallel_config.pipeline_stage": 2,
    "parallel_config.data_parallel": 128,
    "recompute_config.recompute": True,
    "parallel.dataset_strategy": [[128, 1]] * 4,
}
CASES = [
    *((str(path.relative_to(RUNS)), {}) for path in sorted(RUNS.glob("*/*.yaml"))),
    (BIG, SLICE | PACKED),
    (BIG, SLICE | DOCUMENTS),
    (BIG, SLICE | CAPACITY),
    (BIG, SLICE | CAPACITY | PACKED),
]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "overrides"), CASES)
def test_audit(tmp_path, config, overrides):
    command = [sys.executable, str(ROOT / "scripts/dryrun.py"), "--config", str(RUNS / config), "--out", str(tmp_path)]
    devices = next((number for name, number in DEVICES.items() if name in config), None)
    command += ["--device_num", str(devices)] if devices else []
    command += [text for key, value in overrides.items() for text in (f"--{key}", json.dumps(value))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ranks"] and all(rank["status"] == "compiled" for rank in report["ranks"]), done.stdout
    assert [f for f in report["audit"] if f["verdict"] == "violation"] == []
    without_reason = {
        f"{f['operator']}: {f['demand']}; {f['remedy']}"
        for f in report["audit"]
        if f["verdict"] == "doubtful" and not f["remedy"].startswith("stays: ")
    }
    assert without_reason == set()
