"""Alternating runs of two sides in fresh processes, and their medians."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

ENVIRONMENT = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python", "PYTHONWARNINGS": "ignore"}
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)  # Both sides run from compiled modules, as on a user's machine.


def child(script: str, *arguments: object) -> dict[str, float]:
    """Run ``script`` in a fresh process; its last line is a JSON object of measurements."""
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT
    )
    if done.returncode:
        raise RuntimeError(f"{script} {arguments} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def alternate(sides: dict[str, Callable[[], dict[str, float]]], repeats: int) -> dict[str, dict[str, float]]:
    """Measure the sides by turns, ``repeats`` times each; the median of every measurement."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            runs[name].append(measure())
    return {
        name: {key: statistics.median(run[key] for run in taken) for key in taken[0]} for name, taken in runs.items()
    }
