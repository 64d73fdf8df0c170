"""Running the programs of dataset_tools/ as a user does."""

import subprocess
import sys
from pathlib import Path

from mindformers_ext.bin_dataset.indexed_dataset import bin_path, idx_path

TOOLS = Path(__file__).resolve().parents[2] / "dataset_tools"


def run_tool(name, *arguments, check=True, **how):
    """Run a tool from another folder."""
    done = subprocess.run(
        [sys.executable, str(TOOLS / f"{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd="/",
        **how,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def bytes_of(prefix):
    """Of both files of a pair."""
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()
