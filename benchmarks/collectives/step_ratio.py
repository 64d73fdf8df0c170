"""Time of a training step as four ranks against one process: the same YAML, global batch and cores, alternating.

    python benchmarks/collectives/step_ratio.py [--rounds 3] [--steps 30] [--section.key value ...]

Needs the quickstart's sample data (output/sample). The first round of the ranks compiles them unless that is done.
Prints the medians of seconds per step, the first five steps left out, and their ratio; the goal is 1.5.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "research/deepseek3/deepseek3_tiny"
GLOBAL_BATCH, TOKENS, SKIPPED, RANKS = 4, 4 * 256, 5, 4


def seconds_per_step(output: Path, steps: int, ranks: int, rest: list[str]) -> float:
    """Train and read what TrainingMetrics measured."""
    config = FOLDER / f"pretrain_deepseek3_tiny{'_4p' if ranks > 1 else ''}.yaml"
    settings = {
        "--config": config,
        "--output_dir": output,
        "--train_dataset.data_loader.sizes": [steps * GLOBAL_BATCH, 0, 0],
        "--callbacks": '[{"type": "TrainingMetrics", "per_print_times": 10}, {"type": "TopkBiasBalanceCallback"}]',
    }
    command = [str(ROOT / "run_mindformer.py"), *(str(word) for pair in settings.items() for word in pair), *rest]
    if ranks > 1:
        job = ["-m", "mindformers_ext.cpu_parallel.job", "--worker_num", str(ranks), "--log_dir", str(output / "log")]
        command = [*job, *command, "--use_parallel", "True"]
    metrics = output / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return median(TOKENS / line["tokens_per_s"] for line in lines[SKIPPED:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    options, rest = parser.parse_known_args()
    times: dict[int, list[float]] = {1: [], RANKS: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for ranks, measured in times.items():
                measured.append(seconds_per_step(Path(folder) / str(ranks), options.steps, ranks, rest))
    one, four = (median(measured) for measured in times.values())
    print(f"one process {one:.3f} s, {RANKS} ranks {four:.3f} s a step: {four / one:.2f} times")


if __name__ == "__main__":
    main()
