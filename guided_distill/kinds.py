"""Kinds of values: the type, range and names that a config key, a flag or a field of the page allows.

A kind is a type, annotated with a `Range` if it is a number and with a `OneOf` if it is a name. Kinds
annotate the fields of configs and networks. `parse_value` checks a value's type and name, `check` checks
its range, and `read_number` reads a number from the command line.
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
    """Numbers from `low` to `high`. `above` excludes `low` itself, and `below` excludes `high`."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether `value` is in the range; NaN never is."""
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
    """One of these names."""

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
"""Count and Whole fit into an int32, Positive and NotNegative into a float32, and a Seed has 64 bits.
Width is the width of an image or a layer, NumSteps a sampler's, and Weight the guidance weight w."""

_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}


def without_none(kind: Any) -> Any:
    """Return the kind without None: X for X | None."""
    options = [each for each in typing.get_args(kind) if each is not type(None)]
    return options[0] if type(None) in typing.get_args(kind) else kind


def type_of(kind: Any) -> Any:
    """Return the bare type of a kind that isn't a tuple."""
    kind = without_none(kind)
    return kind.__origin__ if typing.get_origin(kind) is Annotated else kind


def parse_value(where: str, value: Any, kind: Any) -> Any:
    """Return the value converted to its kind: an int to float if the kind is float, a list to a tuple.

    kind: a type, annotated or not, a tuple of one, or dict; each can also allow None. Raises UserError,
    naming the key `where`, if the value has another type or is a name that the kind doesn't allow. Kinds
    other than numbers, strings and bools aren't checked.
    """
    if value is None and without_none(kind) is not kind:
        return None
    kind = without_none(kind)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a section with its own keys, not {value!r}")
        return {
            name: tuple(each) if isinstance(each, list | tuple) else each
            for name, each in value.items()
        }
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a tuple, not {value!r}")
        return tuple(parse_value(where, each, typing.get_args(kind)[0]) for each in value)
    form = type_of(kind)
    if form not in _WORDS:
        return value
    if form is float and isinstance(value, int) and not isinstance(value, bool):
        # An integer too large for a float is outside every range.
        value = float(value) if abs(value) < _FLOAT32 else math.inf * (1 if value > 0 else -1)
    if not isinstance(value, form) or (isinstance(value, bool) and form is not bool):
        raise UserError(f"{where} must be {_WORDS[form]}, not {value!r}")
    for choice in getattr(kind, "__metadata__", ()):
        if isinstance(choice, OneOf) and value not in choice.names:
            raise UserError(f"{where} is {value!r}; choose one of {', '.join(choice.names)}")
    return value


def parse_section(where: str, values: Mapping[str, Any], section: Any) -> Any:
    """Return the dataclass `section` filled with `values`; its fields are kinds or dataclasses.

    Raises UserError, naming the key under `where`, if a key isn't a field, and as `parse_value` does.
    """
    fields = {field.name: field.type for field in dataclasses.fields(section)}
    parsed = {}
    for name, value in values.items():
        key = f"{where}.{name}"
        if name not in fields:
            raise UserError(f"{key} is not a key; those of {where} are {', '.join(sorted(fields))}")
        kind = fields[name]
        if not dataclasses.is_dataclass(kind):
            parsed[name] = parse_value(key, value, kind)
        else:
            parsed[name] = parse_section(key, parse_value(key, value, dict[str, Any]), kind)
    return section(**parsed)


def kind_at(key: str, section: Any) -> Any:
    """Return the kind of a dotted key in a dataclass; None if it has no such key."""
    for name in key.split("."):
        fields = dataclasses.fields(section) if dataclasses.is_dataclass(section) else ()
        section = {field.name: field.type for field in fields}.get(name)
    return section


def check_section(where: str, section: Any) -> None:
    """Like `check`, for every field of a dataclass and of the dataclasses in it."""
    for field in dataclasses.fields(section):
        key, value = f"{where}.{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            check_section(key, value)
        else:
            check(key, value, field.type)


def range_of(kind: Any) -> Range | None:
    """Return the range of a number, or of the numbers in a tuple; None if the kind has no range."""
    own = [each for each in getattr(kind, "__metadata__", ()) if isinstance(each, Range)]
    return next((each for each in (*own, *map(range_of, typing.get_args(kind))) if each), None)


def names_of(kind: Any) -> tuple[str, ...]:
    """Return the names that a kind, or the elements of its tuple, allow; none if it allows any."""
    own = [each.names for each in getattr(kind, "__metadata__", ()) if isinstance(each, OneOf)]
    return next((each for each in (*own, *map(names_of, typing.get_args(kind))) if each), ())


def check(where: str, value: Any, kind: Any) -> None:
    """Raise UserError, naming the key or flag `where`, if a number is outside the range of its kind.

    value: a number, a tuple of them, or None.
    """
    allowed = range_of(kind)
    for each in value if isinstance(value, tuple) else (value,):
        if allowed is not None and each is not None and each not in allowed:
            verb = "holds" if isinstance(value, tuple) else "is"
            raise UserError(f"{where} {verb} {each}; make it {allowed}")


def read_number(text: str, kind: Any) -> Any:
    """Parse a number of this kind. Raises ValueError with a message to put after the flag's name."""
    form, allowed = type_of(kind), range_of(kind)
    try:
        value = form(text)
    except ValueError:
        raise ValueError(f"is {text!r}; give {_WORDS[form]}") from None
    if allowed is not None and value not in allowed:
        raise ValueError(f"is {text}; make it {allowed}")
    return value
