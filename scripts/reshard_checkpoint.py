"""Write a checkpoint again in another layout: in one file, or as the ranks of another run would have saved it.

    python scripts/reshard_checkpoint.py output/checkpoint resharded                      # one file
    python scripts/reshard_checkpoint.py output/checkpoint resharded --like OTHER         # as that checkpoint
    python scripts/reshard_checkpoint.py output/checkpoint resharded --like COMPILED      # as compiled ranks hold it

COMPILED holds rank_R/compiled.json of every rank, as the dry run and verify_parallel.py --out write them. Training
needs none of this: a checkpoint of any layout loads into any other. Exit code 2 when something does not fit.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.errors import ConfigError, UserError, exit_code_of
from mindformers_ext.files.json_files import read_object
from mindformers_ext.sharded_checkpoint.layout import Piece, compiled_slots
from mindformers_ext.sharded_checkpoint.reader import Checkpoint, check_names, load, open_source
from mindformers_ext.sharded_checkpoint.shards import Slot
from mindformers_ext.sharded_checkpoint.writer import Saver


def target(like: str | None, source: Checkpoint) -> list[dict[str, Slot]]:
    """What every rank of the new layout holds."""
    if like is None:
        return [{name: Slot.whole(source.read(name).shape) for name in source.names()}]
    compiled = sorted(Path(like).glob("rank_*/compiled.json"), key=lambda path: (len(str(path)), path))
    if compiled:
        contents = [read_object(path) for path in compiled]
        if len(contents) != contents[0].get("device_num"):
            count = contents[0].get("device_num")
            raise ConfigError(f"{like}: has {len(contents)} compiled ranks of {count}; compile all")
        try:
            return [compiled_slots(content) for content in contents]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ConfigError(f"{like}: compiled.json is damaged: {error!r}; compile again") from None
    other = open_source(like)
    if not isinstance(other, Checkpoint):
        raise ConfigError(f"{like}: is neither a checkpoint of ours nor a folder of compiled ranks")
    slots: list[dict[str, Slot]] = [{} for _ in range(other.meta.ranks)]
    for name, entry in other.layout.entries.items():
        for piece in entry.pieces:
            slots[piece.rank][name] = Slot(entry.shape, piece.ranges)
    return slots


def reshard(source: Checkpoint, ranks: list[dict[str, Slot]], output: Path) -> None:
    """Save the step of `source` as `ranks` would have; one rank's part is in memory at a time."""
    check_names(source, {name: slot for slots in ranks for name, slot in slots.items()})
    meta = replace(source.meta, ranks=len(ranks))
    for rank in reversed(range(len(ranks))):  # the first rank publishes, so it comes last
        own = {name: slot for name, slot in ranks[rank].items() if slot.copy == 0}
        pieces = {
            name: Piece(array, own[name])
            for name, array in tqdm(load(source, own), total=len(own), desc=f"rank {rank}", unit="parameter")
        }
        Saver(output, rank, len(ranks), keep=2**31).save(meta, pieces, source.private(rank))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of checkpoints, or a step's folder")
    parser.add_argument("output", type=Path, help="folder to write the step into")
    parser.add_argument("--step", help="name of a step; default the latest")
    parser.add_argument("--like", help="take the layout of this checkpoint, or of these compiled ranks")
    args = parser.parse_args()
    try:
        source = open_source(args.checkpoint, args.step)
        if not isinstance(source, Checkpoint):
            raise ConfigError(f"{args.checkpoint}: holds whole weights, there is nothing to reshard")
        if args.output.resolve() == source.path.resolve().parent:
            raise ConfigError(f"{args.output}: holds the checkpoint that is read; give another folder")
        ranks = target(args.like, source)
        reshard(source, ranks, args.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: step {source.meta.step}, {len(source.layout.entries)} parameters on {len(ranks)} rank(s)")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
