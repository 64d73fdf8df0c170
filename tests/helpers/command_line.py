"""run_mindformer.py as a user starts it, with a toy model."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOY = Path(__file__).resolve().parent / "toy"
WITHOUT_TORCH = Path(__file__).resolve().parent / "without_torch"


def run_environment() -> dict[str, str]:
    """Of a run: one thread, this Python first in PATH, no torch."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    folders = os.pathsep.join([str(WITHOUT_TORCH), *filter(None, [os.environ.get("PYTHONPATH")])])
    return dict(os.environ, PATH=path, PYTHONPATH=folders, OMP_NUM_THREADS="1", GLOG_v="3")


def run_command(arguments: list[str], folder: Path, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run a command in a folder, in `run_environment`."""
    return subprocess.run(arguments, cwd=folder, env=run_environment(), capture_output=True, text=True, timeout=timeout)


def run_mindformer(folder: Path, *arguments: str, config: Path = TOY / "train_toy.yaml") -> subprocess.CompletedProcess:
    """Run run_mindformer.py with the toy model."""
    command = [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(config), "--register_path", str(TOY)]
    return run_command([*command, *arguments], folder)
