"""Build the C++ extensions; everything else is declared in pyproject.toml."""

from pybind11.setup_helpers import build_ext
from setuptools import setup

setup(
    ext_modules=[],
    cmdclass={"build_ext": build_ext},
)
