"""Build the C++ extensions; everything else is declared in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "mindformers_ext.bin_dataset._index_builder",
            ["mindformers_ext/bin_dataset/index_builder.cc"],
            cxx_std=17,
            # No fused multiply-add: blends must round like megatron-core's x86 build on every machine.
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
        ),
    ],
    cmdclass={"build_ext": build_ext},
)
