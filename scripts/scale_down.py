"""Scale a YAML of a cluster to a few ranks that keep its structure, for machines without a card.

    python scripts/scale_down.py --config research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml --ranks 8 \
        --write small.yaml

The result trains with scripts/msrun_launcher.sh and is checked by scripts/verify_parallel.py --layouts own
(--like Y does both). mindformers_ext/config/scale_down.py says what stays and what shrinks.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mindformers_ext.config.run_rules import refuse  # noqa: E402 (after the project is on the path)
from mindformers_ext.config.scale_down import scaled, write  # noqa: E402
from mindformers_ext.config.strategy_rules import check_plan  # noqa: E402
from mindformers_ext.cpu_parallel.command import read_plan  # noqa: E402
from mindformers_ext.errors import exit_code_of  # noqa: E402


def main() -> int:
    """Read, scale, check and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML of a run")
    parser.add_argument("--ranks", type=int, default=8, help="a power of two")
    parser.add_argument("--write", type=Path, required=True, help="the YAML to write")
    args, rest = parser.parse_known_args()
    small = scaled(read_plan(["--config", args.config, *rest]), args.ranks)
    refuse(small, check_plan(small))
    write(small, args.write)
    degrees = " ".join(f"{name}{getattr(small, name)}" for name in ("dp", "cp", "mp", "pp", "ep"))
    print(f"{args.write}: {degrees}, {small.model.num_layers} layers in {small.chunks} x {small.pp} chunks")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
