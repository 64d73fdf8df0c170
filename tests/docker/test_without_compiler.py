"""An image may lack a compiler once its extensions and stand-in libraries are built: they are found again."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from helpers.command_line import ROOT

from mindformers_ext.rank_compiler.stand_in_cann import ascend_environment

COMPILERS = re.compile(r"(.*-)?(cc|gcc|g\+\+|c\+\+|cpp|c89|c99|clang|clang\+\+|ld|as|nvcc)(-[\d.]+)?")


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH with all programs of this machine but compilers."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in folder.iterdir() if folder.is_dir() else ():
            if not COMPILERS.fullmatch(program.name) and not (programs / program.name).is_symlink():
                (programs / program.name).symlink_to(program)
    ascend_environment(0, 1)  # what an image builds ahead
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CC", raising=False)
    assert shutil.which("g++") is None and shutil.which("cc") is None


def test_a_rank_is_compiled_and_kernels_compute(no_compiler: None, tmp_path: Path) -> None:
    environment = ascend_environment(1, 4)
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests/rank_compiler'}:{environment['PYTHONPATH']}"
    toy = {"dp": 2, "mp": 2, "pp": 1}
    command = [sys.executable, "-m", "mindformers_ext.rank_compiler.compile_rank", "--builder", "toy_cells:build"]
    command += ["--arguments", json.dumps(toy), "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "compiled.json").exists(), done.stdout[-2000:] + done.stderr[-2000:]
    code = (
        "import numpy as np\n"
        "from mindformers_ext.cpu_kernels.library import multiply\n"
        "out = np.empty((8, 8), np.float32)\n"
        "multiply(np.eye(8, dtype=np.float32), np.full((8, 8), 3, np.float32), out)\n"
        "print(out.sum())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "192.0", done.stderr


def test_install_asks_for_a_compiler_only_to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of the project whose pip does nothing."""
    for name in ("scripts/install.sh", "pyproject.toml", "setup.py", "mindformers_ext/files/finite.cc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    venv.create(tmp_path / ".venv", symlinks=True)
    pip = tmp_path / ".venv/lib/python3.11/site-packages/pip"
    pip.mkdir(parents=True)
    (pip / "__main__.py").touch()

    def install() -> subprocess.CompletedProcess:
        return subprocess.run(["bash", tmp_path / "scripts/install.sh"], capture_output=True, text=True)

    assert install().stdout.startswith("Installing into")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "find", "sha256sum", "sort", "touch"):
        (tools / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tools))
    again = install()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    (tmp_path / "mindformers_ext/files/finite.cc").write_text("// changed")
    changed = install()
    assert changed.returncode == 2 and "g++ is not installed" in changed.stderr
