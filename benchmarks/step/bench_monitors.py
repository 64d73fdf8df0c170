"""The price of each monitor of TrainingMetrics: python benchmarks/step/bench_monitors.py [--steps 80]

The tiny YAML on random tokens, one run a monitor that looks at every fourth step. Its price is the time of the two
steps that it touches over that of the next two, the median over the run: what else the machine does meets both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter
from mindformers_ext.config.sections import Monitors

ROOT = Path(__file__).resolve().parents[2]
YAML = ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml"
EVERY = 4


def seconds(folder: Path, monitors: dict[str, int], steps: int) -> np.ndarray:
    """Of every step of a run, without the first few."""
    callbacks = [{"type": "TrainingMetrics", "monitors": monitors or None}, {"type": "TopkBiasBalanceCallback"}]
    options = {
        "output_dir": folder / "run",
        "callbacks": json.dumps(callbacks),
        "processor": "null",
        "train_dataset.data_loader.sizes": f"[{4 * steps}, 0, 0]",
        "train_dataset.data_loader.config.data_path": json.dumps(["1", str(folder / "random")]),
        "model.model_config.track_max_attention_logit": "attention_logits" in monitors,
    }
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    command = [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(YAML), *words]
    subprocess.run(command, check=True, capture_output=True)
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return np.array([1024 / record["tokens_per_s"] for record in records])[EVERY - 1 :]  # begins with a touched step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with IndexedDatasetWriter(folder / "random") as writer:
            writer.add_document(np.random.default_rng(0).integers(2, 4096, (steps + 2) * 4 * 256 * 2))
        names = [field.name for field in fields(Monitors)]
        cases = {"none": {}, **{name: {name: EVERY} for name in names}, "all": dict.fromkeys(names, EVERY)}
        for case, monitors in cases.items():
            found = seconds(folder, monitors, steps)
            groups = found[: len(found) // EVERY * EVERY].reshape(-1, EVERY)
            price = statistics.median((groups[:, :2].sum(1) - groups[:, 2:].sum(1)) / (groups[:, 2:].sum(1) / 2))
            print(
                f"{case:18}{1e3 * np.median(found):7.1f} ms a step, {100 * price:+5.1f} % of one each time", flush=True
            )


if __name__ == "__main__":
    main()
