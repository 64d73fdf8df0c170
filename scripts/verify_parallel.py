"""Check parallel strategies without a card: every layout must train like the single process.

    python scripts/verify_parallel.py --layouts mp2,pp2 --steps 5
    python scripts/verify_parallel.py --like research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml --ranks 8

Each rank's graph is compiled by MindSpore's Ascend front end, lowered to CPU and run as a process; from the same
weights and data, losses must agree to 1e-5 on every step, gradients' norms and parameters (router biases too) to 1e-4,
all relative; elements whose gradient is only what rounding left are not compared. Without --config the tiny YAML is
taken, with every part as small as it can be. `own` is the layout of the YAML; --like scales a YAML to a few ranks that
keep its structure (scale_down.py) and checks that. A row is printed as its layout ends. Exit code 1 when one fails.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml"
PYTHON_PATH = (str(ROOT), str(ROOT / "tests"), str(ROOT / "research" / "deepseek3"))
sys.path[:0] = PYTHON_PATH

from mindformers_ext.config import scale_down  # noqa: E402 (after the project is on the path)
from mindformers_ext.config.run import read_run  # noqa: E402
from mindformers_ext.cpu_parallel import verify  # noqa: E402
from mindformers_ext.cpu_parallel.command import read_plan  # noqa: E402
from mindformers_ext.cpu_parallel.run_problem import RunProblem  # noqa: E402
from mindformers_ext.errors import UserError, exit_code_of  # noqa: E402


def small_yaml(args: argparse.Namespace, overrides: list[str], folder: Path) -> str:
    """The YAML to check where none is given as it is: --like scaled down, or the tiny one with a smaller model."""
    if args.like:
        small = scale_down.scaled(read_plan(["--config", args.like, *overrides]), args.ranks)
    else:
        tiny = read_run(TINY)
        small = tiny.changed(scale_down.small_model(tiny).items())
    small = small.changed(
        [("train_dataset.data_loader.config.data_path", ["1", str(folder / "none")])], small.device_num
    )
    folder.mkdir(parents=True, exist_ok=True)
    scale_down.write(small, folder / "small.yaml")
    return str(folder / "small.yaml")


def main() -> int:
    """Run the asked layouts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", help="YAML of a run; the small tiny one when there is none")
    what.add_argument("--like", help="or a YAML that is scaled down first")
    what.add_argument("--problem", help="or a module with LAYOUTS, build and build_single")
    parser.add_argument("--ranks", type=int, default=8, help="of --like")
    parser.add_argument("--layouts", help="all, own, or names separated by commas; all, with --like own")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="keep the graphs, logs and parameters here")
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out or Path(temporary)).resolve()
        try:
            if args.problem:
                problem = verify.Problem(args.problem, PYTHON_PATH, args.steps)
            else:
                command = ["--config", args.config or small_yaml(args, rest, folder), *rest]
                problem = RunProblem.of(command, folder, args.steps)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        known = problem.layouts()
        asked = args.layouts or ("own" if args.like else "all")
        names = list(known) if asked == "all" else asked.split(",")
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
