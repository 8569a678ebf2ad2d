"""Every key of a config with its value, its default and its meaning: `guided-distill config show`.

A key's meaning is the docstring beneath its field.
"""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import MISSING, dataclass
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from guided_distill import kinds
from guided_distill.config import Experiment
from guided_distill.models.registry import MODELS, NOT_OPTIONS
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL
from guided_distill.objectives import autoencoder


@dataclass(frozen=True)
class Key:
    """A key by its dotted name. default: MISSING if it has none, because it must be set."""

    name: str
    value: Any
    default: Any
    meaning: str


def keys_of(experiment: Experiment) -> list[Key]:
    """Every key of an experiment, section by section, with the options of its networks."""
    modules: dict[str, tuple[type, Collection[str]]] = {}
    if experiment.model.name in MODELS:
        modules["model.options"] = MODELS[experiment.model.name], NOT_OPTIONS
    if experiment.autoencoder.steps:
        modules["autoencoder.options"] = AutoencoderKL, autoencoder.NOT_OPTIONS
    keys = []
    for key in _keys(experiment, Experiment(), ""):
        keys += _options(key, *modules[key.name]) if key.name in modules else [key]
    # The keys that aren't in a section come first.
    return sorted(keys, key=lambda key: "." in key.name)


def _keys(section: Any, defaults: Any, prefix: str) -> Iterator[Key]:
    texts = meanings(type(section))
    for field in dataclasses.fields(section):
        name, value = f"{prefix}{field.name}", getattr(section, field.name)
        default = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            yield from _keys(value, default, f"{name}.")
        else:
            yield Key(name, value, default, _meaning(field, texts))


def _options(key: Key, module: type, fixed: Collection[str]) -> list[Key]:
    """The options of a network, which are the fields of its module except those in `fixed`."""
    texts = meanings(module)
    return [
        Key(
            f"{key.name}.{field.name}",
            key.value.get(field.name, field.default),
            field.default,
            _meaning(field, texts),
        )
        for field in dataclasses.fields(module)
        if field.name not in fixed
    ]


def _meaning(field: dataclasses.Field, texts: dict[str, str]) -> str:
    names = kinds.names_of(field.type)
    text = texts.get(field.name, "")
    return f"{text} One of {', '.join(names)}.".strip() if names else text


def meanings(section: type) -> dict[str, str]:
    """The docstrings beneath the fields of one of this package's dataclasses, each on one line."""
    found: dict[str, str] = {}
    for each in reversed(section.__mro__):
        if not each.__module__.startswith("guided_distill."):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        for pair in itertools.pairwise(definition.body):  # type: ignore[attr-defined]
            match pair:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def key_lines(key: Key) -> Group:
    """A key as an override sets it, its default if that differs, and its meaning beneath."""
    line = Text.assemble((key.name, "bold"), f"={key.value if key.value is not MISSING else ''}")
    if key.default is not MISSING and key.value != key.default:
        line.append(f"  (default: {key.default})", "dim")
    return Group(line, *([Padding(Text(key.meaning), (0, 0, 0, 4))] if key.meaning else []))
