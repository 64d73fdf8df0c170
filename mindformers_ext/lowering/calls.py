"""The collectives of a rank's lowered graph, as the lowering tells them; imports nothing heavy."""

from dataclasses import asdict, dataclass
from json import loads
from pathlib import Path
from typing import Any

from mindformers_ext.files.atomic import write_json

MESSAGES = ("Send", "Receive")


@dataclass(frozen=True)
class Call:
    """One collective of a rank's step, in its fixed place of the order."""

    operation: str
    ranks: tuple[int, ...]  # global ranks of the group; for Send and Receive (source, target)
    # What all members must agree on: reduction, dimensions, root; the tag of a message; AlltoAllV's counts both ways,
    # where they are constants.
    detail: tuple
    dtype: str
    elements: int  # of this rank's output (Send: of its input)
    bytes: int
    where: str  # the model's name for the operator

    def __str__(self) -> str:
        group = " -> ".join(map(str, self.ranks)) if self.operation in MESSAGES else list(self.ranks)
        return f"{self.operation} {group} of {self.elements} {self.dtype} ({self.where})"


def write_calls(path: Path, calls: list[Call]) -> None:
    write_json(path, [asdict(call) for call in calls])


def read_calls(path: Path) -> list[Call]:
    return [Call(**{key: _tuples(value) for key, value in entry.items()}) for entry in loads(path.read_text())]


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
