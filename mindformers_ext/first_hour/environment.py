"""What this machine has of what a run needs: each version, what is wanted, and what to do where it differs."""

import importlib.metadata
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CANN_VERSIONS = ("8.2", "8.3", "8.5", "9.0")  # of MindSpore 2.9.0 (mindspore/run_check/_check_version.py)
DRIVER_INFO = Path("/usr/local/Ascend/driver/version.info")
TOOLKIT = Path("/usr/local/Ascend/ascend-toolkit/latest")


@dataclass(frozen=True)
class Row:
    """One line of the table; `right` is None where there is no card to need it."""

    name: str
    found: str
    wanted: str
    right: bool | None
    to_do: str = ""


def cards() -> int:
    """Ascend devices that this machine shows."""
    return len([path for path in Path("/dev").glob("davinci[0-9]*") if path.name[7:].isdigit()])


def check_environment() -> list[dict[str, Any]]:
    """The table, a dictionary a row."""
    rows = [
        _version("Python", platform.python_version(), "3.11", "install Python 3.11; the wheels are for it"),
        _version("MindSpore", _package("mindspore"), "2.9.0", "bash scripts/install.sh"),
        _version("MindFormers", _package("mindformers"), "1.9.0", "bash scripts/install.sh"),
        *_of_a_card(cards()),
    ]
    return [asdict(row) for row in rows]


def _of_a_card(count: int) -> list[Row]:
    home = Path(os.environ.get("ASCEND_HOME_PATH", TOOLKIT))
    cann, driver = _cann_version(home), _driver_version()
    hccl = next((str(path) for path in (home / "lib64").glob("libhccl.so*")), "missing")
    rows = [
        Row("cards", str(count), "1 or more", count > 0, "map /dev/davinci* into the container"),
        Row(
            "CANN",
            cann,
            ", ".join(CANN_VERSIONS),
            cann.startswith(CANN_VERSIONS),
            "install CANN and its operators for this card, then source its set_env.sh",
        ),
        Row(
            "HCCL", hccl, "libhccl.so of CANN", hccl != "missing", "source CANN's set_env.sh; it sets ASCEND_HOME_PATH"
        ),
        Row("driver", driver, "that CANN's release notes name", driver != "missing", "install driver and firmware"),
        Row(
            "te, hccl (Python)",
            "present" if _package("te") != "missing" else "missing",
            "of the same CANN",
            _package("te") != "missing",
            "pip install the .whl files under CANN's lib64: te, hccl",
        ),
    ]
    return (
        rows
        if count
        else [Row(r.name, r.found, r.wanted, None, "no card here: CPU kernels run in its place") for r in rows]
    )


def _version(name: str, found: str, wanted: str, to_do: str) -> Row:
    return Row(name, found, wanted, found.startswith(wanted), to_do)


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _cann_version(home: Path) -> str:
    for name in ("version.cfg", "version.info", "compiler/version.info", "runtime/version.info"):
        path = home / name
        found = (
            re.search(r"[vV]ersion\w*=\[?(?:\d+:)?([\d.]+)", path.read_text(errors="replace"))
            if path.exists()
            else None
        )
        if found:
            return found[1]
    return "missing"


def _driver_version() -> str:
    text = DRIVER_INFO.read_text(errors="replace") if DRIVER_INFO.exists() else ""
    found = re.search(r"[vV]ersion=([\w.]+)", text)
    return found[1] if found else "missing"
