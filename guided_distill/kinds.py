"""Kinds of values: what a key of a config, a flag or a field of the page may hold.

A kind is a type, with its `Range` where it is of numbers, and with its `OneOf` where it is of names. They
annotate the fields of a config and of a network. `parse` holds a value to its type and its names, `check`
to its range, and `read` makes a number of a word of the command line.
"""

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from guided_distill.errors import UserError

_INT32 = 2**31 - 1
_FLOAT32 = 3.4e38


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `low` itself unless `above`, `high` itself unless `below`."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether `value` is in the range; NaN is in none."""
        return self.low <= value <= self.high and not (
            (self.above and value == self.low) or (self.below and value == self.high)
        )

    def __str__(self) -> str:
        """The range in words, such as "at least 0 and below 1"."""
        low = f"{'greater than' if self.above else 'at least'} {self.low}"
        high = f"{'below' if self.below else 'at most'} {self.high}"
        return f"{low} and {high}"


@dataclass(frozen=True)
class OneOf:
    """A name of these."""

    names: tuple[str, ...]

    def __init__(self, names: Iterable[str]) -> None:
        object.__setattr__(self, "names", tuple(names))


Count = Annotated[int, Range(1, _INT32)]
Whole = Annotated[int, Range(0, _INT32)]
Seed = Annotated[int, Range(0, 2**64 - 1)]
Width = Annotated[int, Range(1, 2**16)]
BatchSize = Annotated[int, Range(1, 2**20)]
NumSteps = Annotated[int, Range(1, 2**14)]
Positive = Annotated[float, Range(0, _FLOAT32, above=True)]
NotNegative = Annotated[float, Range(0, _FLOAT32)]
Fraction = Annotated[float, Range(0, 1, below=True)]
Weight = Annotated[float, Range(-1000, 1000)]
Strength = Annotated[float, Range(0, 1, above=True)]
Port = Annotated[int, Range(1, 2**16 - 1)]
"""Count, Whole: what an int32 of JAX holds. Seed: of 64 bits. Width: of an image or a layer.
NumSteps: of a sampler. Positive, NotNegative: what a float32 holds. Weight: of guidance."""

_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}


def without_none(kind: Any) -> Any:
    """The kind that a value has where it isn't None."""
    options = [each for each in typing.get_args(kind) if each is not type(None)]
    return options[0] if type(None) in typing.get_args(kind) else kind


def type_of(kind: Any) -> Any:
    """The bare type of a kind that isn't a tuple."""
    kind = without_none(kind)
    return kind.__origin__ if typing.get_origin(kind) is Annotated else kind


def parse(where: str, value: Any, kind: Any) -> Any:
    """The value as its kind has it: numbers as floats where they are to be, lists as tuples.

    kind: a type, annotated or not, a tuple of one, or dict, and whether it may be None. Raises UserError,
    naming the key `where`, for a value of another type, and for a name that isn't among those there are.
    What is no number, string or bool is left to who takes it.
    """
    if value is None and without_none(kind) is not kind:
        return None
    kind = without_none(kind)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a section with keys of its own, not {value!r}")
        return {
            name: tuple(each) if isinstance(each, list | tuple) else each
            for name, each in value.items()
        }
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a tuple, not {value!r}")
        return tuple(parse(where, each, typing.get_args(kind)[0]) for each in value)
    form = type_of(kind)
    if form not in _WORDS:
        return value
    if form is float and isinstance(value, int) and not isinstance(value, bool):
        # A whole number that no float holds is in no range either.
        value = float(value) if abs(value) < _FLOAT32 else math.inf * (1 if value > 0 else -1)
    if not isinstance(value, form) or (isinstance(value, bool) and form is not bool):
        raise UserError(f"{where} must be {_WORDS[form]}, not {value!r}")
    for choice in getattr(kind, "__metadata__", ()):
        if isinstance(choice, OneOf) and value not in choice.names:
            raise UserError(f"{where} is {value!r}; choose one of {', '.join(choice.names)}")
    return value


def parse_section(where: str, values: Mapping[str, Any], section: Any) -> Any:
    """The dataclass `section` made of `values`, whose fields are kinds or dataclasses again.

    Raises UserError, naming the key under `where`, as `parse` does, and for one that is no field.
    """
    fields = {field.name: field.type for field in dataclasses.fields(section)}
    parsed = {}
    for name, value in values.items():
        key = f"{where}.{name}"
        if name not in fields:
            raise UserError(f"{key} is not a key; those of {where} are {', '.join(sorted(fields))}")
        kind = fields[name]
        if not dataclasses.is_dataclass(kind):
            parsed[name] = parse(key, value, kind)
        else:
            parsed[name] = parse_section(key, parse(key, value, dict[str, Any]), kind)
    return section(**parsed)


def kind_at(key: str, section: Any) -> Any:
    """The kind of a dotted key in a dataclass; None if it has no such key."""
    for name in key.split("."):
        fields = dataclasses.fields(section) if dataclasses.is_dataclass(section) else ()
        section = {field.name: field.type for field in fields}.get(name)
    return section


def check_section(where: str, section: Any) -> None:
    """As `check`, for the fields of a dataclass and of those in it."""
    for field in dataclasses.fields(section):
        key, value = f"{where}.{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            check_section(key, value)
        else:
            check(key, value, field.type)


def range_of(kind: Any) -> Range | None:
    """The range of a kind's numbers, also of those in a tuple; None for a kind without one."""
    own = [each for each in getattr(kind, "__metadata__", ()) if isinstance(each, Range)]
    return next((each for each in (*own, *map(range_of, typing.get_args(kind))) if each), None)


def check(where: str, value: Any, kind: Any) -> None:
    """Raises UserError, naming the key or flag `where`, for a number outside the range of its kind.

    value: a number, a tuple of them, or None.
    """
    allowed = range_of(kind)
    for each in value if isinstance(value, tuple) else (value,):
        if allowed is not None and each is not None and each not in allowed:
            verb = "holds" if isinstance(value, tuple) else "is"
            raise UserError(f"{where} {verb} {each}; make it {allowed}")


def read(text: str, kind: Any) -> Any:
    """The number of a kind that a text holds. Raises ValueError, whose words follow a flag's name."""
    form, allowed = type_of(kind), range_of(kind)
    try:
        value = form(text)
    except ValueError:
        raise ValueError(f"is {text!r}; give {_WORDS[form]}") from None
    if allowed is not None and value not in allowed:
        raise ValueError(f"is {text}; make it {allowed}")
    return value
