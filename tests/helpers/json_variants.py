"""Wrong copies of what a JSON file holds."""

import copy
from collections.abc import Iterator

WRONG = [None, -1, "x", [], {}, 1e99, True, 0, 2**64, [0, 2**63], [[]], 1.5]


def variants(value: object) -> Iterator[object]:
    """Copies of a JSON value with each value in it replaced by each of WRONG, and with each key removed or renamed."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            for other in [*WRONG, *variants(value[key])]:
                changed = copy.copy(value)
                changed[key] = other
                yield changed
            changed = copy.copy(value)
            del changed[key]
            yield changed
