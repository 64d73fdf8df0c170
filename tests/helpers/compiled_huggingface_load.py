"""As one simulated Ascend rank: compile a small DeepSeek-V3 and load a HuggingFace folder into it, as a run does.

    python compiled_huggingface_load.py ARGUMENTS HF_DIR OUT

ARGUMENTS are those of cpu_parallel.small_deepseek.build, as JSON. Writes OUT/loaded.npz, the rank's part of every
weight, and OUT/loaded.json: where the parts lie, and the bytes that were read of the folder's tensors.
"""

import json
import sys
from pathlib import Path

import numpy as np
from cpu_parallel.small_deepseek import build

from mindformers_ext.files import safetensors_format as safetensors_files
from mindformers_ext.rank_compiler.compile_rank import compile_cell, start_as_rank
from mindformers_ext.sharded_checkpoint.network import load_into, pieces_of, state_of
from mindformers_ext.training.checkpoint_monitor import weights_of
from mindformers_ext.training.pretrained import HuggingFaceFolder, resolve
from mindformers_ext.training.wrapper import real_model

read_bytes = 0


def count_reads() -> None:
    """Every read of a stored tensor is counted from now on."""
    read = safetensors_files.StoredTensor.__getitem__

    def counted(tensor, slices):
        global read_bytes
        values = read(tensor, slices)
        read_bytes += values.nbytes
        return values

    safetensors_files.StoredTensor.__getitem__ = counted


def main() -> None:
    arguments, folder, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    start_as_rank()
    cell, inputs = build(**arguments)
    compile_cell(cell, inputs, out, values=True)
    model = real_model(cell)
    source = resolve(HuggingFaceFolder(folder, "run.yaml"), model)
    count_reads()
    weights = weights_of(model, source, state_of(cell))
    load_into(cell, weights, source)
    pieces = {name: piece for name, piece in pieces_of(cell).items() if name in weights}
    np.savez(out / "loaded.npz", **{name: piece.array for name, piece in pieces.items()})
    places = {name: piece.slot.ranges for name, piece in pieces.items()}
    (out / "loaded.json").write_text(json.dumps({"places": places, "read_bytes": read_bytes}))


if __name__ == "__main__":
    main()
