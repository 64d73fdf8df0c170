"""The kernels under sanitizers of addresses, undefined behaviour and threads, in programs of their own."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mindspore
import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("", "mindspore", "mindspore/core/include", "mindspore/ccsrc", "mindspore/ops/include", "third_party")


def test_the_thread_pool_has_no_data_race(tmp_path):
    # A race here ended about one training run in ten with a segmentation fault.
    kernels, program = ROOT / "mindformers_ext" / "cpu_kernels", tmp_path / "pool_rounds"
    sources = [Path(__file__).with_name("pool_rounds.cc"), kernels / "thread_pool.cc"]
    command = ["g++", "-std=c++17", "-O1", "-g1", "-fsanitize=thread", f"-I{kernels}", *sources, "-pthread"]
    subprocess.run([*command, "-o", program], check=True)
    done = subprocess.run([program], env={"PATH": "/usr/bin"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "all rounds ran" in done.stdout, done.stdout[-500:] + done.stderr[-4000:]


@pytest.mark.slow
def test_no_kernel_touches_memory_beside_its_tensors(tmp_path):
    package = Path(mindspore.__file__).parent
    include = [package / "include" / folder for folder in (*FOLDERS, "third_party/robin_hood_hashing")]
    kernels = ROOT / "mindformers_ext" / "cpu_kernels"
    command = ["g++", "-std=c++17", "-O1", "-g1", "-w", "-march=native", "-fopenmp-simd", "-fno-omit-frame-pointer"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    command += ["-D_GLIBCXX_USE_CXX11_ABI=0", "-DENABLE_FAST_HASH_TABLE=1", f"-I{kernels}"]
    command += [f"-I{folder}" for folder in include]
    sources = [Path(__file__).with_name("sanitized_calls.cc"), *sorted(kernels.glob("*.cc"))]

    def compiled(source: Path) -> str:
        made = str(tmp_path / f"{source.stem}.o")
        subprocess.run([*command, "-c", str(source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        link = [*command, *compilers.map(compiled, sources)]
    link += [f"-L{package / 'lib'}", f"-Wl,-rpath,{package / 'lib'}", "-lmindspore_core", "-l:libdnnl.so.3"]
    program = tmp_path / "sanitized"
    subprocess.run([*link, "-pthread", "-Wl,--allow-shlib-undefined", "-o", str(program)], check=True)
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "PATH": "/usr/bin"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "all kernels ran" in done.stdout, done.stdout[-500:] + done.stderr[-4000:]
