"""Check parallel strategies without a card: every layout must train like the single process.

    python scripts/verify_parallel.py --problem collectives.toy_transformer [--layouts all|mp2,pp2] [--steps 5]

Each rank's graph is compiled by MindSpore's Ascend front end, lowered to CPU and run as a process; from the same
weights and data, losses must agree to 1e-5 on every step, gradients' norms and parameters to 1e-4 (all relative).
Exit code 1 when a layout fails.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PYTHON_PATH = (str(ROOT), str(ROOT / "tests"), str(ROOT / "research" / "deepseek3"))
sys.path[:0] = PYTHON_PATH

from mindformers_ext.cpu_parallel import verify  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", required=True, help="module with LAYOUTS, build and build_single")
    parser.add_argument("--layouts", default="all", help="all, or names separated by commas")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="keep the graphs, logs and parameters here")
    args = parser.parse_args()
    problem = verify.Problem(args.problem, PYTHON_PATH, args.steps)
    known = problem.layouts()
    names = list(known) if args.layouts == "all" else args.layouts.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--layouts {unknown[0]}: not a layout of {args.problem}; it has {', '.join(known)}")
    with tempfile.TemporaryDirectory() as temporary:
        rows = verify.verify(problem, [known[name] for name in names], args.out or Path(temporary))
        done = list(tqdm(rows, total=len(names), unit="layout"))
    print(verify.table(done))
    return 0 if all(row.passed for row in done) else 1


if __name__ == "__main__":
    sys.exit(main())
