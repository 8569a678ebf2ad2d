"""Configs: overrides on the command line, and config files, which are the user's programs."""

import json
import math
from pathlib import Path

import jax
import pytest
from harness import Case, Refusal, command

from guided_distill import pipeline
from guided_distill.config import default_config
from guided_distill.data.outline import outline_of
from guided_distill.runs.trained import network_of

DIGITS = Path(__file__).parents[2] / "configs" / "digits.py"
TINY = f"{DIGITS}:runlocal"


def flat(tree, prefix=""):
    """The values of a config by dotted key."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


KEYS = flat(default_config().to_dict()) | {
    f"model.options.{name}": 8 for name in ("width", "depth", "embedding_width")
}
MAY_BE_NEGATIVE = ("guidance.w_min", "guidance.w_max", "evaluation.weights", "seed")

GOOD = {
    "seed": 11,
    "teacher.steps": 7,
    "teacher.learning_rate": 0.25,
    "teacher.weighting": "snr",
    "guidance.w_max": 6.5,
    "halving.samplers": ("stochastic", "ddim"),
    "model.parameterization": "x",
    "model.options.width": 24,
    "evaluation.teacher_num_steps": (3, 5),
    "data.channels": 1,
    "teacher.label_dropout": 0.5,
    "halving.weight_decay": 0.01,
    "fsdp": 1,
    "guidance.clipped": False,
}

NUMBERS = (
    *(-1, 0, 1, 2, 3, 5, 7, 63, 1000, 10**6, 2**31, 2**32, 2**63, 10**20, 10**400),
    *(math.nan, math.inf, -math.inf, 0.0, -0.5, 0.5, 1.0, 1e-320, 1e-45, 1e308, 3.0),
)
TEXTS = (
    *("", " ", "x", "None", "nan", "True", "1", "0x10", "1e5", "()", "(1,)", "[1, 2]", "{}", "é"),
    *(
        "a\nb",
        "\0",
        "ddim",
        "snr",
        "teacher",
        "bfloat16",
        "float64",
        "npz:",
        "folder:.",
        "encoded:",
    ),
    *(
        "../x",
        "tfds:nothing",
        "parquet:.",
        "9" * 5000,
        "(" * 500,
        "'",
        '"',
        "\\",
        "%s",
        "{0}",
        "lambda: 0",
        "v" * 9999,
    ),
)


def value(rng, like=None):
    """Return any value, such as a number, a text or a tuple; mostly one with the type of `like`."""
    draw = rng.random()
    if like is not None and draw < 0.6:
        if isinstance(like, tuple):
            return tuple(value(rng, each) for each in like * rng.randrange(3))
        return rng.choice([each for each in (*NUMBERS, *TEXTS, True) if type(each) is type(like)])
    draw = rng.random()
    if draw < 0.5:
        return rng.choice(NUMBERS)
    if draw < 0.75:
        return rng.choice(TEXTS)
    if draw < 0.9:
        return tuple(value(rng) for _ in range(rng.randrange(4)))
    return rng.choice((None, True, False, {}, {"a": 1}, b"x", 1j, object))


def written(given):
    """Return a value as source text, for a config file or the command line."""
    if isinstance(given, float) and not math.isfinite(given):
        return f"float('{given}')"
    if isinstance(given, tuple):
        return f"({''.join(f'{written(each)}, ' for each in given)})"
    return "object" if given is object else repr(given)


def draw_values(rng, keys):
    chosen = rng.sample(sorted(keys), rng.choice((1, 1, 1, 2, 3)))
    return {key: value(rng, KEYS.get(key)) for key in chosen}


def overrides(case):
    """Overrides of some keys on the command line."""
    values = draw_values(case.rng, KEYS)
    texts = {
        key: each if isinstance(each, str) else written(each).removeprefix("float('").rstrip("')")
        for key, each in values.items()
    }
    return TINY, [f"--config.{key}={text}" for key, text in texts.items()], {}


def odd_overrides(case):
    """Malformed overrides on the command line."""
    odd = (
        "",
        "=",
        ".",
        ".=1",
        "..a=1",
        "teacher=1",
        "teacher",
        "teacher.steps",
        "teacher.steps.x=1",
    )
    odd += ("__class__=1", "lock=1", "é=1", "model.options=1", "data.condition.label=3", "a b=1")
    odd += ("halving.samplers[0]=ddim", "halving.samplers[9]=ddim", "nothing", "teacher.steps=1=2")
    return TINY, [f"--config.{case.rng.choice(odd)}" for _ in range(case.rng.choice((1, 2)))], {}


def good(case):
    """Valid values, which must be accepted on the command line and in a config file."""
    keys = case.rng.sample(sorted(GOOD), case.rng.randrange(1, 6))
    values = {key: GOOD[key] for key in keys}
    if case.rng.random() < 0.5:
        texts = {key: each if isinstance(each, str) else repr(each) for key, each in values.items()}
        return TINY, [f"--config.{key}={text}" for key, text in texts.items()], values
    return config_file(case, values), [], values


def config_file(case, values):
    lines = [f"    config.{key} = {written(each)}" for key, each in values.items()]
    return write(case, "\n".join([PREAMBLE, *lines, "    return config", ""]))


PREAMBLE = f"""
import runpy

def get_config(variant=""):
    config = runpy.run_path({str(DIGITS)!r})["get_config"]("runlocal")
    config.unlock()"""


def file_of_values(case):
    """A config file that sets keys to arbitrary values."""
    return config_file(case, draw_values(case.rng, KEYS)), [], {}


def file_of_mapping(case):
    """A config file whose values haven't been checked by a ConfigDict."""
    lines = "".join(
        f"    section, name = tree, {key!r}\n"
        f"    for part in name.split('.')[:-1]: section = section[part]\n"
        f"    section[name.split('.')[-1]] = {written(each)}\n"
        for key, each in draw_values(
            case.rng, [*KEYS, "teacher", "model", "extra", "model.options"]
        ).items()
    )
    end = case.rng.choice(("ml_collections.ConfigDict(tree)", "tree"))
    start = f"{PREAMBLE}\n    import ml_collections\n    tree = config.to_dict()\n"
    return write(case, f"{start}{lines}    return {end}\n"), [], {}


def broken_file(case):
    """A config file that isn't a valid program, or that doesn't return a config."""
    body = case.rng.choice(
        (
            *(
                "",
                "\0",
                "get_config = 3",
                "def get_config(): return 1",
                "def get_config(v): return None",
            ),
            *(
                "def get_config(v): return get_config(v)",
                "import nothing_of_that_name",
                "1/0",
                "(" * 300,
            ),
            *(
                "def get_config(v): raise SystemExit(3)",
                "raise SystemExit('bye')",
                "import sys; sys.exit()",
            ),
            *(
                "def get_config(v): raise ValueError('two\\nlines')",
                "def get_config(v): raise OSError",
            ),
            *(
                "def get_config(v): yield 1",
                "def get_config(v): return v",
                "class get_config: pass",
            ),
            *(
                "def get_config(v): return object()",
                "def get_config(v): return {}",
                "# coding: nothing",
            ),
            *("def get_config(v): return {'teacher': {'steps': 1}}", "\ufeffx =", "é = 'é'"),
            *("assert False",),
        )
    )
    if case.rng.random() < 0.2:
        body = DIGITS.read_text()[: case.rng.randrange(2000)]
    return write(case, body), [], {}


def odd_path(case):
    """Odd paths for --config."""
    (case.folder / "folder.py").mkdir()
    (case.folder / "bytes.py").write_bytes(b"\xff\xfe\x00")
    odd = (
        "",
        ":",
        "::",
        "folder.py",
        "bytes.py",
        "nothing",
        "x" * 5000,
        "gs://x/y.py",
        "/dev/null",
        "~",
    )
    odd += (
        f"{DIGITS}:",
        f"{DIGITS}:no",
        f"{DIGITS}:runlocal,x",
        f"{DIGITS}:é",
        f"{DIGITS.parent}",
        "\udc80",
    )
    return case.rng.choice(odd), [], {}


def write(case, source):
    path = case.folder / "config.py"
    path.write_text(source, errors="surrogatepass")
    print(source[-2000:])
    return str(path)


KINDS = {
    each.__name__: each
    for each in (
        *(overrides, odd_overrides, good, file_of_values, file_of_mapping, broken_file, odd_path),
    )
}


@pytest.fixture
def up_to_training(monkeypatch):
    """Instead of training, only computes the network's shapes after the checks of a config."""

    def shapes(self, parts):
        network = network_of(self._experiment.model, outline_of(self._source))
        jax.eval_shape(network.init, jax.random.key(0))

    monkeypatch.setattr(pipeline.Pipeline, "train", shapes)
    monkeypatch.setattr(pipeline, "latents_of", lambda source, *_: source)


def test_configs(case: Case, up_to_training) -> None:
    config, more, wanted = case.kind(KINDS)(case)
    workdir = case.folder / "run"
    found = command(["train", "--config", config, "--workdir", str(workdir), *more])
    if isinstance(found, Refusal):
        assert not wanted, "refused, although it is valid"
        assert not workdir.exists(), "refused, but the workdir was created"
        return
    values = flat(json.loads((workdir / "config.json").read_text()))
    for key, each in (wanted | read_again(more)).items():
        assert values[key] == json.loads(json.dumps(each)), key
    for key, each in values.items():
        for number in each if isinstance(each, list) else [each]:
            if isinstance(number, int | float):
                assert math.isfinite(number), f"{key} is {number}"
                assert number >= 0 or key in MAY_BE_NEGATIVE, f"{key} is {number}"


def read_again(overrides):
    """Parse overrides with Python's own types; the last one of a key counts."""
    values = {}
    for override in overrides:
        key, _, text = override.removeprefix("--config.").partition("=")
        if isinstance(KEYS.get(key), bool):
            values[key] = text.lower() in ("", "1", "t", "true", "y", "yes")
        elif isinstance(KEYS.get(key), int | float):
            values[key] = type(KEYS[key])(text)
        elif isinstance(KEYS.get(key), str):
            values[key] = text
    return values
