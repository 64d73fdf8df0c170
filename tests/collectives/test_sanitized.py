"""The collectives and the job's shared memory under sanitizers, in a program whose threads are the ranks."""

import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "mindformers_ext" / "collectives"
SANITIZERS = {"memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], "threads": ["-fsanitize=thread"]}


@pytest.mark.parametrize("kind", ["threads", pytest.param("memory", marks=pytest.mark.slow)])
def test_no_wrong_memory_and_no_race(kind, tmp_path):
    program = tmp_path / "ranks"
    sources = [Path(__file__).with_name("sanitized_ranks.cc"), FOLDER / "shared_job.cc", FOLDER / "collectives.cc"]
    command = ["g++", "-std=c++17", "-O1", "-g1", *SANITIZERS[kind], "-Wl,--wrap=mmap,--wrap=munmap,--wrap=fcntl"]
    # The reductions have copies for several CPUs, which are chosen before a sanitizer is ready.
    command += ["-DCPU_PARALLEL_CLONES=", f"-I{FOLDER}", *map(str, sources), "-pthread", "-o", str(program)]
    subprocess.run(command, check=True)
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "PATH": "/usr/bin"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "all collectives ran" in done.stdout, done.stdout[-500:] + done.stderr[-4000:]
