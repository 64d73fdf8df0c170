"""Show what a checkpoint holds, check every byte of it, and compare it with another.

    python scripts/inspect_checkpoint.py output/checkpoint --step step_000100 --parameters

Exit code 1 when the checkpoint is damaged or the two differ, 2 when there is no checkpoint.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.errors import ConfigError, exit_code_of
from mindformers_ext.sharded_checkpoint import audit
from mindformers_ext.sharded_checkpoint.layout import is_weight
from mindformers_ext.sharded_checkpoint.reader import Checkpoint, Source, open_source


def describe(source: Source, with_parameters: bool) -> str:
    """Where the training stood, the sums, and on demand every parameter."""
    rows = audit.rows(source)
    lines = [f"{source.path}"]
    if isinstance(source, Checkpoint):
        meta = source.meta
        lines += [
            f"  step {meta.step}, epoch {meta.epoch}, {meta.consumed_samples} samples of it read",
            f"  saved by {meta.ranks} rank(s); run {meta.prefix or '-'}; "
            + ", ".join(f"{name} {number}" for name, number in meta.versions.items()),
            "  model: " + ", ".join(f"{name} {size}" for name, size in meta.model.items()),
        ]
    names = {row.name for row in rows}
    for title, wanted in (("weights", True), ("training state", False)):
        kind = [row for row in rows if is_weight(row.name, names) is wanted]
        types = Counter(row.dtype for row in kind)
        values = sum(row.bytes for row in kind)
        lines.append(f"  {title}: {len(kind)} parameters, {values:,} bytes ({dict(types)})")
    if with_parameters:
        width = max(len(row.name) for row in rows)
        lines += [
            f"  {row.name:{width}}  {row.dtype:9} {str(list(row.shape)):20} {row.bytes:>14,} bytes, "
            f"{row.parts} part(s), split {list(row.split)}"
            for row in rows
        ]
    return "\n".join(lines)


def is_huggingface(source: Source) -> bool:
    """True for a folder as transformers has it."""
    return (Path(source.path) / "config.json").is_file()


def report_differences(first: Source, second: Source) -> int:
    """Print every parameter that differs; returns how many."""
    found = list(audit.differences(first, second))
    for difference in found:
        size = "" if difference.largest is None else f", largest difference {difference.largest:.3e}"
        print(f"  {difference.name}: {difference.what}{size}")
    same = len(set(first.names()) & set(second.names())) - sum(" only" not in f" {d.what}" for d in found)
    print(f"{len(found)} parameters differ, {same} are the same bit for bit")
    return len(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of checkpoints, a step's folder, or safetensors files")
    parser.add_argument("other", nargs="?", help="checkpoint to compare with")
    parser.add_argument("--step", help="name of a step; default the latest")
    parser.add_argument("--parameters", action="store_true", help="list every parameter")
    args = parser.parse_args()
    try:
        sources = [open_source(path, args.step) for path in (args.checkpoint, args.other) if path]
        if len({is_huggingface(source) for source in sources}) == 2:
            raise ConfigError("only one of the two has HuggingFace's names; compare them with scripts/compare_hf.py")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if "damaged" not in str(error) and "not whole" not in str(error) else 1
    for source in sources:
        print(describe(source, args.parameters))
        if not isinstance(source, Checkpoint):
            print("  no checksums to compare with")
            continue
        try:
            audit.verify_all(source)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print("  every byte as it was written")
    return int(len(sources) == 2 and report_differences(*sources) > 0)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
