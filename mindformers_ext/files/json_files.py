"""Read JSON that others wrote: an object or one sentence, with the keys that its reader knows and no others.

A reader of an outside format gives the table of its keys and their types (msgspec's annotations); what the table does
not name is refused, because a key that is passed over may have meant other numbers.
"""

import json
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from mindformers_ext.errors import ConfigError

Positive = Annotated[int, msgspec.Meta(ge=1)]
Whole = Annotated[int, msgspec.Meta(ge=0)]
PositiveNumber = Annotated[float, msgspec.Meta(gt=0, le=sys.float_info.max)]  # finite
SHOWN = 5  # problems in a sentence


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8 or not JSON (which has no NaN), or holds something else.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"), parse_constant=refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {short(content)}, but must be a JSON object, {{...}}")
    return content


def refuse_constant(name: str) -> None:
    """Python reads NaN and Infinity, which JSON does not have."""
    raise ValueError(f"it has the value {name}, which is not a number of JSON")


def check_keys(
    values: Mapping[str, Any],
    known: Mapping[str, Any],
    no_effect: Collection[str],
    where: str | Path,
    section: str = "",
) -> dict[str, Any]:
    """The values of the known keys, converted to their types.

    Args:
        known: type of every key that is read.
        no_effect: keys that may have any value, since nothing follows from them.
        where: the file, for errors.
        section: the key that holds `values`, with a dot.

    Raises:
        ConfigError: names every unknown key and every value of another type.
    """
    found, problems = {}, []
    for key, value in values.items():
        if key in known:
            try:
                found[key] = msgspec.convert(value, known[key])
            except (msgspec.ValidationError, OverflowError) as error:
                problems.append(f"{section}{key} is {short(value)}: {str(error)[:1].lower()}{str(error)[1:]}")
        elif key not in no_effect:
            problems.append(f"{section}{key} ({short(value)}) is an unknown key, which may change what the model does")
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ConfigError(f"{where}: {'; '.join(problems[:SHOWN])}{more}; correct or remove them")
    return found


def convert(content: Any, kind: Any, where: str | Path) -> Any:
    """A value of type `kind` from what JSON holds; keys of dictionaries may be numbers.

    Raises:
        ConfigError: names the place that does not fit.
    """
    try:
        return msgspec.convert(content, kind, str_keys=True)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{where}: {re.sub(r'`[$][.]?', '`', str(error))}") from None


def short(value: Any) -> str:
    """A value as it is shown in a sentence, cut to one readable piece."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
