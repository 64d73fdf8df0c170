"""Where the shared libraries are that setup.py builds into this package's folders."""

import sysconfig
from pathlib import Path


def built_library(folder: Path, *names: str) -> Path:
    """Path of the first of the libraries `names` that exists in `folder`.

    Raises ImportError when the project was installed without its extensions.
    """
    paths = [folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in names]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        raise ImportError(
            f"{paths[-1]} is missing: install the dependencies in pyproject.toml, then this project with "
            "`pip install --no-build-isolation .` (or run `python setup.py build_ext --inplace`)"
        )
    return found
