"""What watching and saving add to a step: python benchmarks/step/bench_monitors.py [--looks 10]

One training of the tiny YAML on random tokens, in which each monitor alone, all of them, and a save in the background
take turns, with free steps between them. Medians over the turns: processor time while the training waits, which other
programs on the machine change little, and the wall time of the step over that of the free one after it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter  # noqa: E402
from mindformers_ext.config.sections import Monitors  # noqa: E402
from mindformers_ext.training import start  # noqa: E402

YAML = ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml"
NAMES = [field.name for field in fields(Monitors)]
CASES = [*NAMES, "all"]
FREE = 4  # steps without anything after the one that saves
TURN = 2 * len(CASES) + 1 + FREE
clocks: list[tuple[float, float, float]] = []  # before every step: wall, processor, what of it the training waited for
waited = 0.0


def counted(function: Callable) -> Callable:
    """The function, whose processor time is added to what the training has waited for."""

    def call(*arguments: Any) -> Any:
        global waited
        begin = time.process_time()
        found = function(*arguments)
        waited += time.process_time() - begin
        return found

    return call


def due(name: str, step: int) -> bool:
    """Whether a monitor looks at this step: each case has one of a turn, and a free one after it."""
    case, other = divmod(step % TURN - FREE - 1, 2)
    return case >= 0 and not other and CASES[case] in (name, "all")


def train(folder: Path, looks: int) -> None:
    """The run; a step whose number is a multiple of TURN saves."""
    from mindformers_ext.training import checkpoint_monitor, metrics

    class ByTurns(metrics.RunMonitors):
        def due(self, name: str, step: int) -> bool:
            return due(name, step)

        def begin(self, network: Any, step: int) -> None:
            clocks.append((time.perf_counter(), time.process_time(), waited))
            counted(super().begin)(network, step)

        end = counted(metrics.RunMonitors.end)

    metrics.RunMonitors = ByTurns
    monitor = checkpoint_monitor.CheckpointMonitor
    monitor.on_train_step_end = counted(monitor.on_train_step_end)
    steps = TURN * (looks + 1) + 2  # the first turn warms up
    with IndexedDatasetWriter(folder / "random") as writer:
        writer.add_document(np.random.default_rng(0).integers(2, 4096, (steps + 2) * 4 * 256 * 2))
    callbacks = [
        {"type": "TrainingMetrics", "monitors": dict.fromkeys(NAMES, 1)},
        {"type": "TopkBiasBalanceCallback"},
        {"type": "CheckpointMonitor", "save_checkpoint_steps": TURN, "keep_checkpoint_max": 1, "async_save": True},
    ]
    options = {
        "output_dir": folder / "run",
        "callbacks": json.dumps(callbacks),
        "processor": "null",
        "train_dataset.data_loader.sizes": f"[{4 * steps}, 0, 0]",
        "train_dataset.data_loader.config.data_path": json.dumps(["1", str(folder / "random")]),
        "model.model_config.track_max_attention_logit": True,
    }
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    start.run(["--config", str(YAML), *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--looks", type=int, default=10)
    looks = parser.parse_args().looks
    with tempfile.TemporaryDirectory() as name:
        train(Path(name), looks)
    taken = np.diff(np.array(clocks), axis=0)  # [i]: step i + 1, with what follows it
    turns = taken[TURN - 1 : TURN * (looks + 1) - 1].reshape(looks, TURN, 3)  # a turn begins with the step that saves
    free = turns[:, -1]
    wall, processor, _ = np.median(free, axis=0)
    alone = processor / os.cpu_count()
    print(f"a free step: {1e3 * wall:.0f} ms, {1e3 * alone:.0f} alone on the machine; load {os.getloadavg()[0]:.1f}")

    def tell(name: str, paid: np.ndarray, base: np.ndarray) -> None:
        more = statistics.median(paid[:, 2] - base[:, 2])
        ratio = statistics.median(paid[:, 0] / base[:, 0])
        print(
            f"{name:18}{1e3 * more:6.1f} ms = {100 * more / alone:5.1f} % of a step; wall {100 * (ratio - 1):+5.1f} %"
        )

    for index, case in enumerate(CASES):
        first = FREE + 1 + 2 * index
        tell(case, turns[:, first], turns[:, first + 1])
    for later in range(FREE):
        tell(f"save, step +{later}", turns[:, later], free)


if __name__ == "__main__":
    main()
