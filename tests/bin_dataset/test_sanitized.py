"""The extensions that take numpy arrays, under sanitizers of addresses and undefined behaviour."""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mindformers_ext"
SOURCES = [PACKAGE / name for name in ("bin_dataset/index_builder.cc", "files/transpose.cc", "files/finite.cc")]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all")


@pytest.mark.slow
def test_no_call_touches_memory_beside_its_arrays(tmp_path):
    def compiled(source: Path) -> str:
        made = str(tmp_path / f"_{source.stem}.so")
        include = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        command = ["g++", "-std=c++17", "-O0", "-g1", "-w", "-shared", "-fPIC", *SANITIZERS, *include, str(source)]
        subprocess.run([*command, "-pthread", "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        modules = list(compilers.map(compiled, SOURCES))
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    # Sizes that no machine has are to be refused, not to end the program.
    environment = os.environ | {"LD_PRELOAD": " ".join(runtimes), "OPENBLAS_NUM_THREADS": "1"}
    environment["ASAN_OPTIONS"] = "detect_leaks=0:allocator_may_return_null=1"
    calls = [sys.executable, str(Path(__file__).with_name("sanitized_calls.py")), *modules]
    done = subprocess.run(calls, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "all calls ran" in done.stdout, done.stdout[-500:] + done.stderr[-4000:]
