"""What compiling a rank of DeepSeek-V3 costs over layers and over ranks: python benchmarks/dryrun/bench_curves.py

Layers: the 671B YAML with 8 to 61 layers, four on a stage as in the YAML, a rank of the middle stage. Ranks: 8 to 8192
devices, four layers on two stages, more devices being more data parallelism.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml"
LAYERS = (8, 16, 32, 61)
RANKS = (8, 64, 512, 1024, 8192)
LAYERS_PER_STAGE = 4


def layout(layers: int, dp: int, pp: int, ep: int) -> dict[str, str]:
    """Overrides for `layers` layers on dp * 4 * pp devices."""
    return {
        "model.model_config.num_layers": str(layers),
        "model.model_config.offset": "0",
        "moe_config.first_k_dense_replace": "1",
        "recompute_config.recompute": "True",
        "parallel_config.data_parallel": str(dp),
        "parallel_config.pipeline_stage": str(pp),
        "parallel_config.expert_parallel": str(ep),
        "parallel.dataset_strategy": str([[dp, 1]] * 4),
    }


def runs(layer_counts: list[int], rank_counts: list[int]) -> Iterator[tuple[str, int, int, dict[str, str]]]:
    """(curve, layers, devices, overrides) of every point."""
    for layers in layer_counts:
        stages = -(-layers // LAYERS_PER_STAGE)
        whole = layers == 61  # the YAML as it is
        yield "layers", layers, 64 * stages, {} if whole else layout(layers, 16, stages, 8)
    for ranks in rank_counts:
        yield "ranks", 4, ranks, layout(4, ranks // 8, 2, 4)


def compile_middle(devices: int, overrides: dict[str, str]) -> tuple[str, float, float, float]:
    """First rank of the middle stage: its layers; seconds, CPU seconds and peak memory in GiB of its compiler."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "scripts/dryrun.py"), "--config", str(CONFIG), "--out", folder]
        command += ["--device_num", str(devices), "--ranks", str(devices // 2)]
        command += [text for key, value in overrides.items() for text in (f"--{key}", value)]
        done = subprocess.run(command, capture_output=True, text=True)
        (rank,) = json.loads((Path(folder) / "report.json").read_text())["ranks"]
    if rank["status"] != "compiled":
        raise SystemExit(f"error: {' '.join(command)} did not compile:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    compiled = rank["compiled"]
    return rank["layers"], rank["seconds"], compiled["cpu_seconds"], compiled["peak_rss_bytes"] / 2**30


def main() -> None:
    """Print a table, a line a point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=LAYERS, help="points of the first curve")
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS, help="points of the second")
    options = parser.parse_args()
    print(f"{'curve':8}{'layers':>8}{'devices':>9}{'the rank has':>16}{'seconds':>9}{'CPU s':>7}{'GiB':>6}", flush=True)
    for name, layers, devices, overrides in tqdm([*runs(options.layers, options.ranks)], unit="rank"):
        own, seconds, cpu, gib = compile_middle(devices, overrides)
        tqdm.write(f"{name:8}{layers:8}{devices:9}{own:>16}{seconds:9.0f}{cpu:7.0f}{gib:6.1f}")


if __name__ == "__main__":
    main()
