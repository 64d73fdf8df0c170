"""Read a run's YAML and apply the command line's --section.key overrides; imports nothing heavy."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from mindformers_ext.errors import ConfigError


class Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number (to PyYAML only 1.0e-4 is), and a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")  # YAML 1.2's, with an exponent
Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def parse_value(text: str, where: str) -> Any:
    """A value of the command line, read as YAML. Raises ConfigError that begins with `where`."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {text!r} is not valid YAML: {' '.join(str(error).split())}") from None


def load_yaml(path: str | Path) -> dict:
    """Read a YAML file into a dictionary, its `base_config` files (MindFormers' way to inherit) underneath.

    Raises:
        ConfigError: a file is missing, is not YAML, or its top level is not a mapping.
    """
    try:
        config = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot read this YAML file: {reason}; check the path given to --config") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds {config!r:.80}, but must be a mapping of sections")
    bases = config.pop("base_config", [])
    merged: dict = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = merge(merged, load_yaml(Path(path).parent / base))
    return merge(merged, config)


def merge(below: dict, above: dict) -> dict:
    """Return `below` with the keys of `above` on top, mappings merged key by key."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def override(config: dict, dotted_key: str, value: Any, path: str | Path) -> None:
    """Set `section.key` in place; a list item is addressed by its number, as in `callbacks.0.per_print_times`.

    Raises:
        ConfigError: the key runs through something that is not a section.
    """
    *parents, last = dotted_key.split(".")
    section: Any = config
    for part in parents:
        if isinstance(section, list):
            section = section[int(part)] if part.isdigit() and int(part) < len(section) else None
        else:
            section = section.setdefault(part, {})
        if not isinstance(section, (dict, list)):
            raise ConfigError(f"{path}: --{dotted_key} {value}: {part!r} is not a section of this YAML")
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: --{dotted_key} {value}: {last!r} is not a key; write the item's number before it")
    section[last] = value


def lookup(config: dict, dotted_key: str) -> Any:
    """Return the value at `a.b.c`, None when any part is missing; the whole configuration for ''."""
    value: Any = config
    for part in dotted_key.split(".") if dotted_key else []:
        value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            return None
    return value


def nearest(key: Any, legal: Iterable[str]) -> str:
    """Say which legal key is closest to a mistyped one."""
    near = difflib.get_close_matches(str(key), map(str, legal), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"legal keys are {', '.join(sorted(map(str, legal)))}"
