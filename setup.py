"""Build the C++ extensions; everything else is declared in pyproject.toml."""

import importlib.util
import platform
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup

X86 = platform.machine() == "x86_64"


def package_folder(name: str, requirement: str) -> Path:
    """Folder of an installed package whose headers and library the Custom operators are built against."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"The C++ operators are compiled against {name}'s own headers: install it first "
            f"(pip install {requirement}), then this project with `pip install --no-build-isolation .`"
        )
    return Path(spec.origin).parent


def custom_operator(name: str, sources: list[str], depends: list[str]) -> Extension:
    """A shared library of MindSpore AOT Custom operators (loaded by path, not imported)."""
    mindspore = package_folder("mindspore", "mindspore==2.9.0")
    include = mindspore / "include"
    return Extension(
        name,
        sources,
        depends=depends,
        include_dirs=["mindformers_ext/collectives/mindspore_log"]
        + [
            str(include / folder)
            for folder in (
                "",
                "mindspore",
                "mindspore/core/include",
                "mindspore/core/mindrt",
                "mindspore/core/mindrt/include",
                "mindspore/ccsrc",
                "mindspore/ops/include",
                "third_party",
                "third_party/robin_hood_hashing",
            )
        ],
        library_dirs=[str(mindspore / "lib")],
        libraries=["mindspore_core"],
        # MindSpore is built with the old string ABI and the hash table of its third_party folder.
        define_macros=[("_GLIBCXX_USE_CXX11_ABI", "0"), ("ENABLE_FAST_HASH_TABLE", "1")],
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-w"],
        extra_link_args=[f"-Wl,-rpath,{mindspore / 'lib'}"],
    )


def cpu_kernels(name: str, *options: str) -> Extension:
    """The CPU kernels of the fused operators: vector code, and a tuned library for the matrix products."""
    folder = Path("mindformers_ext/cpu_kernels")
    extension = custom_operator(
        f"mindformers_ext.cpu_kernels.{name}",
        sorted(map(str, folder.glob("*.cc"))),
        sorted(map(str, folder.glob("*.h"))) + ["mindformers_ext/files/transpose.h"],
    )
    if X86:
        extension.libraries.append(":libdnnl.so.3")  # oneDNN, which MindSpore brings
    else:  # whose oneDNN has tuned products for x86 only
        openblas = package_folder("scipy_openblas32", "scipy-openblas32")
        extension.include_dirs.append(str(openblas / "include"))
        extension.library_dirs.append(str(openblas / "lib"))
        extension.libraries.append("scipy_openblas")
        extension.extra_link_args.append(f"-Wl,-rpath,{openblas / 'lib'}")
    extension.extra_link_args.append("-pthread")
    extension.extra_compile_args += ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", *options]
    return extension


def cpu_kernel_builds() -> list[Extension]:
    """The kernels once for every kind of CPU; mindformers_ext/cpu_kernels/library.py takes the best that runs."""
    if not X86:
        return [cpu_kernels("_kernels")]
    return [
        cpu_kernels("_kernels", "-march=x86-64-v3"),  # AVX2 and FMA: any x86 since 2013-2015
        cpu_kernels("_kernels_avx512", "-march=x86-64-v4", "-mprefer-vector-width=512"),
    ]


COLLECTIVES = "mindformers_ext/collectives"

ParallelCompile(default=0).install()  # the files of an extension at once, one on each core
setup(
    ext_modules=[
        custom_operator(
            "mindformers_ext.collectives._collectives",
            [f"{COLLECTIVES}/{name}.cc" for name in ("shared_job", "collectives", "collective_op", "kernel_threads")],
            [f"{COLLECTIVES}/{name}.h" for name in ("shared_job", "reduce", "collectives")]
            + ["mindformers_ext/cpu_kernels/vector_math.h"],
        ),
        *cpu_kernel_builds(),
        Extension("mindformers_ext.training._interrupt", ["mindformers_ext/training/interrupt.c"]),
        Pybind11Extension(
            "mindformers_ext.bin_dataset._index_builder",
            ["mindformers_ext/bin_dataset/index_builder.cc"],
            cxx_std=17,
            # No fused multiply-add: blends must round like megatron-core's x86 build on every machine.
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
        ),
        Pybind11Extension(
            "mindformers_ext.files._transpose",
            ["mindformers_ext/files/transpose.cc"],
            depends=["mindformers_ext/files/transpose.h"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        ),
        Pybind11Extension(
            "mindformers_ext.files._finite",
            ["mindformers_ext/files/finite.cc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        ),
    ],
    cmdclass={"build_ext": build_ext},
)
