"""Train a cell in one CPU process, and write down where it starts, what it is fed and where it ends.

    python -m mindformers_ext.cpu_parallel.reference --builder package.module:function --arguments JSON --out DIR

`function(**arguments)` returns `(cell, batches)`: the training cell as one process runs it, and the numpy inputs of
every step. Into DIR go `initial.npz` and `final.npz` (all parameters before and after), `moments.npz` and
`certain.npz` (see run_rank.train), `batches.npz`, and `result.json` with the outputs and seconds of every step.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from mindformers_ext.cpu_parallel import run_rank
from mindformers_ext.rank_compiler.compile_rank import named


def main() -> int:
    import mindspore as ms

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--builder", required=True)
    parser.add_argument("--arguments", type=json.loads, default={})
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    cell, batches = named(args.builder)(**args.arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez(args.out / "initial.npz", **run_rank.values(cell))
    run_rank.write_batches(args.out, batches)
    outputs, seconds = run_rank.train(cell, batches, args.out)
    np.savez(args.out / "final.npz", **run_rank.values(cell))
    (args.out / "result.json").write_text(json.dumps({"outputs": outputs, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
