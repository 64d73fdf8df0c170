"""Build dataclasses from what YAML gives, by their annotations, and say of every wrong key and value what it must be.

msgspec compares a value with an annotation; this file walks through the dataclasses and finds the words. Annotations
are those of msgspec: `int`, `Annotated[float, Meta(gt=0)]`, `Literal["a", "b"]`, `list[int] | None`; a
`Meta(description=…)` completes the sentence "must be …" where the derived words would not say enough.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from mindformers_ext.config.yaml_files import nearest
from mindformers_ext.errors import ConfigError
from mindformers_ext.files.json_files import short

LARGEST_WHOLE, LARGEST_NUMBER = 2**62, 3e38  # what int64 and float32 can hold

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
PositiveNumber = Annotated[float, Meta(gt=0)]
NotNegativeNumber = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
FloatType = Literal["float32", "float16", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Only:
    """In an annotation: the one value that works here, and why no other does."""

    value: Any
    why: str


def only(value: Any, why: str) -> Any:
    """The annotation of a key that is known, and of which one value works; None: it must be left out."""
    return Annotated[Any, Only(value, why)]


class Choice:
    """A section whose `type` names its class; `kinds` are the classes whose keys are known without importing them.

    A section of another class, one of `others` or the user's own with `auto_register`, is kept as `Other`:
    config/check.py compares it with the class's constructor. `refused` are classes that exist and do not work here,
    with the reason.
    """

    kinds: ClassVar[dict[str, type]]
    others: ClassVar[str]
    refused: ClassVar[dict[str, str]] = {}


@dataclasses.dataclass(kw_only=True)
class Other(Choice):
    """A section of a class that is known by name only."""

    type: str
    settings: dict


class Reader:
    """Builds dataclasses and collects what is wrong with their values, a sentence each."""

    def __init__(self, path: str = ""):
        self.where = f"{path}: " if path else ""
        self.faults: list[str] = []

    def raise_faults(self) -> None:
        """Raise ConfigError with all sentences, if there is one."""
        if self.faults:
            raise ConfigError(*self.faults)

    def build(self, cls: type, values: Any, name: str, **parts: Any) -> Any:
        """`cls` made of a mapping, and of `parts` that come from elsewhere; None when something is wrong with it.

        `name` is the section's, '' for the top.
        """
        if not isinstance(values, dict):
            return self.refuse(name, values, "a mapping of keys")
        known = {key: hint for key, hint in annotations(cls).items() if key not in parts}
        chosen, before = dict(parts), len(self.faults)
        for key, value in values.items():
            full = f"{name}.{key}" if name else str(key)
            if key in known:
                chosen[key] = self.convert(known[key], value, full)
            else:
                told = getattr(cls, "elsewhere", {}).get(key) or nearest(key, known)
                self.faults.append(f"{self.where}{full}: unknown key with value {short(value)}; {told}")
        for missing in sorted(required(cls) - set(chosen)):
            full = f"{name}.{missing}" if name else missing
            self.faults.append(f"{self.where}{full} is missing; it must be {says(known[missing])}")
        if len(self.faults) > before:
            return None
        try:
            return cls(**{key: value for key, value in chosen.items() if key in cls.__dataclass_fields__})
        except ConfigError as error:
            self.faults += [f"{self.where}{sentence}" for sentence in error.sentences]
            return None

    def convert(self, hint: Any, value: Any, name: str) -> Any:
        """A value as its annotation wants it, dataclasses inside it built; None when it does not fit."""
        plain = [option for option in options(hint) if not is_section(option) and not is_list_of_sections(option)]
        for option in set(options(hint)) - set(plain):
            if is_section(option) and isinstance(value, dict):
                return self._section(option, value, name)
            if is_list_of_sections(option) and isinstance(value, list):
                item = typing.get_args(option)[0]
                return [self.convert(item, one, f"{name}[{index}]") for index, one in enumerate(value)]
        if not plain:
            return self.refuse(name, value, says(hint))
        try:
            converted = msgspec.convert(value, typing.Union[tuple(plain)])  # noqa: UP007 (made here)
        except msgspec.ValidationError:
            return self.refuse(name, value, says(hint))
        if not is_finite(converted):
            return self.refuse(name, value, f"{says(hint)} that a computer can hold")
        for meta in getattr(hint, "__metadata__", ()):
            if isinstance(meta, Only) and not is_same(converted, meta.value):
                return self.refuse(name, value, says(hint))
        return converted

    def _section(self, cls: type, value: dict, name: str) -> Any:
        if not issubclass(cls, Choice):
            return self.build(cls, value, name)
        kind = value.get("type")
        if not isinstance(kind, str):
            return self.refuse(f"{name}.type", kind, "the name of a class")
        if kind in cls.kinds:
            return self.build(cls.kinds[kind], value, name)
        if kind in cls.refused:
            self.faults.append(f"{self.where}{name}.type is {kind!r}, but {cls.refused[kind]}")
            return None
        names = [*cls.kinds, *cls.others.split()]
        if kind not in names and "auto_register" not in value:
            words = f"{name}.type is {kind!r}, which is not registered; {nearest(kind, names)}"
            self.faults.append(f"{self.where}{words} A class of your own needs auto_register: module.Class")
        return Other(type=kind, settings=value)

    def refuse(self, name: str, value: Any, must_be: str) -> None:
        """Note that a value must be something else."""
        self.faults.append(f"{self.where}{name} is {short(value)}, but must be {must_be}")


@functools.cache
def annotations(cls: type) -> dict[str, Any]:
    """The annotation of every field that a YAML may give."""
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for base in cls.__mro__:  # `passed_on` = {annotation: "key key"}: checked, and not kept
        for hint, keys in vars(base).get("passed_on", {}).items():
            known |= {key: hint for key in keys.split() if key not in known}
    return known


def dotted_keys(cls: type) -> Iterator[str]:
    """Every key of a section and of the sections inside it, as `key` and `section.key`."""
    for key, hint in annotations(cls).items():
        yield key
        for option in options(hint):
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                yield from (f"{key}.{inner}" for inner in dotted_keys(option))


@functools.cache
def required(cls: type) -> frozenset[str]:
    """Fields without a default."""
    return frozenset(
        field.name for field in dataclasses.fields(cls) if field.default is field.default_factory is dataclasses.MISSING
    )


@functools.cache
def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def is_section(hint: Any) -> bool:
    """True for a dataclass, or a section that names its class."""
    return isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, Choice))


def is_list_of_sections(hint: Any) -> bool:
    """True for a list of them."""
    return typing.get_origin(hint) is list and is_section(typing.get_args(hint)[0])


def is_finite(value: Any) -> bool:
    """False when a number somewhere in a value is infinite, not a number, or too large for the machine."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    if isinstance(value, float):
        return math.isfinite(value) and abs(value) <= LARGEST_NUMBER
    return not isinstance(value, int) or abs(value) <= LARGEST_WHOLE


def is_same(value: Any, other: Any) -> bool:
    """Equal, where True is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def says(hint: Any) -> str:
    """What completes "must be …"."""
    if len(options(hint)) > 1:
        return " or ".join(dict.fromkeys(map(says, options(hint))))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        one = next((meta for meta in arguments[1:] if isinstance(meta, Only)), None)
        if one is not None:
            return f"{'left out' if one.value is None else repr(one.value)}: {one.why}"
        inner, metas = arguments[0], [meta for meta in arguments[1:] if isinstance(meta, Meta)]
        return next((meta.description for meta in metas if meta.description), None) or with_bounds(inner, metas)
    if origin is Literal:
        words = ", ".join(map(repr, arguments))
        return words if len(arguments) == 1 else f"one of {words}"
    if origin is list:
        return f"a list of items, each {says(arguments[0])}"
    return "a mapping of keys" if is_section(hint) or origin is dict else NAMES[hint]


def with_bounds(inner: Any, metas: list[Meta]) -> str:
    """The words of a type with its limits."""
    text = says(inner)
    for meta in metas:
        if meta.min_length is not None and meta.min_length == meta.max_length:
            text = text.replace("a list of", f"a list of {meta.min_length}")
        elif meta.min_length is not None:
            text = f"{text}, at least {meta.min_length}" if text.startswith("a list") else "a text that is not empty"
        limits = {"of at least": meta.ge, "above": meta.gt, "at most": meta.le, "below": meta.lt}
        text = f"{text} {' and '.join(f'{word} {limit}' for word, limit in limits.items() if limit is not None)}"
    return text.strip()


NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    type(None): "empty",
    dict: "a mapping of keys",
    list: "a list",
    Any: "anything",
}


def require(holds: bool, key: str, value: Any, rule: str) -> None:
    """Raise ConfigError `key is value, but rule` unless `holds`; for rules between the fields of a section."""
    if not holds:
        raise ConfigError(f"{key} is {short(value)}, but {rule}")


def nearest_legal(value: int, legal: Callable[[int], bool], limit: int) -> list[int]:
    """The closest legal numbers at or below and above `value`, within 1..limit."""
    below = next((n for n in range(min(value, limit), 0, -1) if legal(n)), None)
    above = next((n for n in range(value + 1, limit + 1) if legal(n)), None)
    return [n for n in (below, above) if n is not None]


def divisors_near(value: int, of: int) -> str:
    """'nearest legal: 4 or 8', the divisors of `of` around `value`."""
    return legal_words(nearest_legal(value, lambda n: of % n == 0, of))


def legal_words(values: list[int]) -> str:
    """'nearest legal: 4 or 8', or that there is none."""
    return f"nearest legal: {' or '.join(map(str, values))}" if values else "no value is legal"
