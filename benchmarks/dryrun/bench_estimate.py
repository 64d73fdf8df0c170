"""What the estimate of a plan takes: python benchmarks/dryrun/bench_estimate.py (CPU ms, the fastest of 20)."""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mindformers_ext.config.run import read_run  # noqa: E402
from mindformers_ext.dryrun.cost_model import estimate  # noqa: E402
from mindformers_ext.dryrun.device_profile import load_profile  # noqa: E402
from mindformers_ext.dryrun.plan import Plan  # noqa: E402


def main() -> None:
    """Print a line for each 671B YAML."""
    profile = load_profile()
    for path in sorted((ROOT / "research/deepseek3/deepseek3_671b").glob("pretrain*.yaml")):
        plan, taken = Plan.of(read_run(path)), []
        for _ in range(20):
            started = time.process_time()
            estimate(plan, profile)
            taken.append(time.process_time() - started)
        print(f"{path.name}: {min(taken) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
