"""Check parallel strategies without a card: every layout must train like the single process.

    python scripts/verify_parallel.py --config research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml \\
        [--layouts all|own|mp2,pp2] [--steps 5] [--out DIR] [--section.key value ...]

Each rank's graph is compiled by MindSpore's Ascend front end, lowered to CPU and run as a process; from the same
weights and data, losses must agree to 1e-5 on every step, gradients' norms and parameters (router biases too) to 1e-4,
all relative; elements whose gradient is only what rounding left are not compared. `own` is the layout of the YAML.
Exit code 1 when a layout fails.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON_PATH = (str(ROOT), str(ROOT / "tests"), str(ROOT / "research" / "deepseek3"))
sys.path[:0] = PYTHON_PATH

from mindformers_ext.cpu_parallel import verify  # noqa: E402 (after the project is on the path)
from mindformers_ext.cpu_parallel.run_problem import RunProblem  # noqa: E402
from mindformers_ext.errors import UserError, exit_code_of  # noqa: E402


def main() -> int:
    """Run the asked layouts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="YAML of a run")
    what.add_argument("--problem", help="or a module with LAYOUTS, build and build_single")
    parser.add_argument("--layouts", default="all", help="all, or names separated by commas")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="keep the graphs, logs and parameters here")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out or Path(temporary)).resolve()
        try:
            if args.config:
                problem = RunProblem.of(["--config", args.config, *rest], folder, args.steps)
            else:
                problem = verify.Problem(args.problem, PYTHON_PATH, args.steps)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        known = problem.layouts()
        names = list(known) if args.layouts == "all" else args.layouts.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            parser.error(f"--layouts {unknown[0]}: not a layout; there are {', '.join(known)}")
        started, passed = time.monotonic(), 0
        layouts = [known[name] for name in names]
        widths = verify.column_widths(layouts)
        print(verify.line(verify.COLUMNS, widths), flush=True)
        for row in verify.verify(problem, layouts, folder):
            print(verify.text_of(row, widths), flush=True)
            passed += row.passed
    print(f"{passed} of {len(names)} layouts agree with one process, in {time.monotonic() - started:.0f} s")
    return 0 if passed == len(names) else 1


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
