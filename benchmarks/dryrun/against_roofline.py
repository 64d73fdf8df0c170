"""The cost model's micro-batch beside the roofline of every operator of a compiled rank.

    python benchmarks/dryrun/against_roofline.py [--out output/graph]

The ranks are ours of benchmarks/graph/against_mindformers.py, compiled unless they lie in --out. Both at the A2's share
of the peak and its whole bandwidth, without collectives; exit code 1 when they differ by more than 5 %.
"""

import argparse
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "graph")]

import against_mindformers as graphs  # noqa: E402

from mindformers_ext.config.run import read_run  # noqa: E402
from mindformers_ext.dryrun.cost_model import Costs  # noqa: E402
from mindformers_ext.dryrun.device_profile import load_profile  # noqa: E402
from mindformers_ext.dryrun.operators import ATTENTION, HOST, PRODUCTS  # noqa: E402
from mindformers_ext.dryrun.plan import Plan  # noqa: E402
from mindformers_ext.dryrun.rooflines import balanced_rows, roofline_record  # noqa: E402
from mindformers_ext.rank_compiler import mindir  # noqa: E402
from mindformers_ext.rank_compiler.roofline import count_operators  # noqa: E402

WITHIN = 0.05


def estimated(run, profile) -> Counter:
    """Seconds by cause of a micro-batch on the last stage, collectives left out."""
    found = Counter()
    for seconds in Costs(Plan.of(run), profile).passes(0, run.pp - 1):
        found.update({cause: value for cause, value in seconds.items() if "parallel" not in cause and cause != HOST})
    return found


def main() -> int:
    """Print a line for each layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "output/graph", help="folder for what is compiled")
    options = parser.parse_args()
    os.environ[graphs.GRAPH_KERNEL_FLAGS] = graphs.FLAGS
    profile = replace(load_profile(), memory_efficiency=1.0, kernel_us=0.0)
    missed = False
    for name in ("pp2", "ep32"):
        layout = graphs.LAYOUTS[name]
        _, arguments = graphs.our_job(layout, graphs.MICRO_BATCHES)
        overrides = arguments[arguments.index("--register_path") + 2 :]
        pairs = zip(overrides[::2], overrides[1::2], strict=True)
        run = read_run(graphs.OUR_YAML, layout.world, [(key[2:], graphs.json.loads(value)) for key, value in pairs])
        path, _ = graphs.compiled(name, graphs.OURS, options.out, False, graphs.MICRO_BATCHES)
        works = count_operators(mindir.load_model(path.read_bytes()), graphs.FLAGS)
        record = roofline_record(works, profile, balanced_rows(run), graphs.MICRO_BATCHES)
        ours, counted = estimated(run, profile), record["micro_batch_seconds"]
        error = ours.total() / counted - 1
        missed |= abs(error) > WITHIN
        kinds = ", ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in record["seconds_by_kind"].items())
        print(
            f"{layout}: {ours.total() * 1e3:.1f} ms estimated (products {ours[PRODUCTS] * 1e3:.1f}, attention "
            f"{ours[ATTENTION] * 1e3:.1f} without recomputation), {counted * 1e3:.1f} counted ({kinds}): {error:+.1%}"
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
