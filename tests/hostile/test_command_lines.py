"""Hostile command lines: every verb, with every flag that its parser knows."""

import argparse
import functools
import itertools

import numpy as np
import pytest
from etils import epath
from folders import write_run, write_text_run
from harness import Case, Refusal, begin, command
from PIL import Image
from test_configs import TINY

from guided_distill import cli, doctor, pipeline
from guided_distill.applications import text_to_image
from guided_distill.data import encode
from guided_distill.evaluation import evaluate
from guided_distill.experiments import study
from guided_distill.formats import hub, stablehlo_export
from guided_distill.plan import topologies
from guided_distill.prepare import minilm, packages
from guided_distill.report import grids, page, prompted
from guided_distill.sampling.latents import LatentSpace
from guided_distill.text.encoder import TextEncoder


def leaves(parser, words=()):
    """The parser of every verb, by the verb's words."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, each in action.choices.items():
                found |= leaves(each, (*words, name))
    return found or {words: parser}


VERBS = leaves(cli.parser())

NUMBERS = (
    *(
        "-1",
        "0",
        "1",
        "2",
        "3",
        "4",
        "7",
        "16",
        "0.5",
        "1e3",
        "-0",
        "+4",
        " 4",
        "4_0",
        "٤",
        "0x4",
        "1e-400",
    ),
    *(
        "nan",
        "inf",
        "-inf",
        "1e400",
        str(2**31),
        str(2**32 + 7),
        str(2**63),
        str(10**20),
        "9" * 5000,
    ),
)
TEXTS = (
    *(
        "",
        " ",
        "x",
        "-",
        "--",
        "None",
        "../..",
        "/",
        ".",
        "~",
        "~/x",
        "~nobody/x",
        "gs://x/y",
        "s3://x",
    ),
    *(
        "a\nb",
        "é",
        "\udc80",
        "\ufeffx",
        "v" * 300,
        "v" * 5000,
        "%s",
        "{}",
        "hub:",
        "hub:../x",
        "encoded:",
    ),
    *(
        "npz:",
        "folder:",
        "tfds:",
        "parquet:x",
        "ddim",
        "stochastic",
        "encode",
        "teacher",
        "halving_ddim_4",
        "a/b",
        "0/0",
    ),
    *(
        "1/2",
        "2/2",
        "-1/2",
        ",",
        "1,",
        ",1",
        "0,1",
        "1,nan",
        "1,x",
        "0,10",
        "teacher,teacher",
        "teacher,x",
    ),
    *(
        "lite0",
        "lite0:x",
        "clip:x",
        "inception:",
        "diffusers",
        "v5e:2x2",
        "v5e:0x0",
        "v4:2x2",
        "v5e:99x99",
    ),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with existing paths of every kind."""
    folder = tmp_path_factory.mktemp("places")
    rng = np.random.default_rng(0)
    for name in ("image", "mask"):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "prompts.txt").write_text("a red apple\n\n  two\n")
    (folder / "empty").mkdir()
    (folder / "file").write_bytes(b"\xff\x00")
    write_run(folder / "run")
    write_text_run(folder / "text")
    return folder


def good_values(verb, places, folder):
    """Valid values of the flags of a verb, by the flag's name."""
    pipe, run, text = (str(places / each) for each in ("text/pipeline", "run", "text/run"))
    new, empty, file = str(folder / "new"), str(places / "empty"), str(places / "file")
    stages = ["teacher", "guidance", "halving_ddim_4", "halving_ddim_1"]
    of_texts = verb[0] in ("generate", "edit", "inpaint")
    if of_texts:
        stages = ["teacher", "halving_ddim_4_None"]
    workdir = new if verb[0] in ("train", "import", "sweep") else text if of_texts else run
    return {
        "autoencoder": [f"{pipe}/vae"],
        "cache": [str(folder / "cache")],
        "config": [TINY],
        "data": ["digits", "photo10"],
        "decoder": ["halving_ddim_4", "halving_ddim_2"],
        "encoder": ["halving_encode_4", "halving_encode_1"],
        "format": ["checkpoint", "diffusers", "stablehlo"],
        "folder": [str(places), empty],
        "from_label": ["1", "7"],
        "host": ["127.0.0.1"],
        "image": [str(places / "image.png")],
        "images": ["data", str(places / "image.png"), empty],
        "labels": ["1", "0,5"],
        "mask": [str(places / "mask.png")],
        "out": [str(folder / "out")],
        "push": ["me/digits"],
        "prompt": ["a red apple", "", "\x00", "x" * 5000],
        "prompts": [str(places / "prompts.txt")],
        "reference": [file],
        "runs": [run, text],
        "sampler": ["ddim", "stochastic", "encode"],
        "source": [pipe, f"{pipe}/unet/diffusion_pytorch_model.safetensors"],
        "stage": stages,
        "stages": [*stages, "teacher,halving_ddim_4"],
        "start_timeout": ["5"],
        "sweep": ["guidance_range", "get_config"],
        "text_encoder": [f"clip:{pipe}"],
        "to": [run],
        "to_label": ["0", "9"],
        "tokenizer": [f"{pipe}/tokenizer"],
        "topology": ["v5e:2x2"],
        "w": ["1", "2.5"],
        "workdir": [workdir] * 8 + [run, text, new, empty],
    }


def draw(case, verb, good):
    """A command line of a verb with valid values, except for up to two that may be anything."""
    rng, arguments = case.rng, []
    actions = [
        each
        for each in VERBS[verb]._actions
        if each.dest != "help"
        and (each.dest == "cache" or rng.random() < (0.98 if each.required else 0.3))
    ]
    odd = rng.sample(actions, min(len(actions), rng.choice((0, 1, 1, 1, 2))))
    for action in actions:
        if action.option_strings:
            arguments.append(action.option_strings[-1])
        if action.nargs != 0:
            suits = list(action.choices or good.get(action.dest) or "1234")
            anything = [*NUMBERS, *TEXTS, *itertools.chain(*good.values())]
            arguments.append(rng.choice(anything if action in odd else suits))
    if rng.random() < 0.05:
        arguments.insert(rng.randrange(len(arguments) + 1), rng.choice([*TEXTS, "--nothing"]))
    return [*verb, *arguments]


@pytest.fixture
def no_work(monkeypatch):
    """Replace everything that compiles, trains, downloads or waits for a browser; keep all checks."""
    for owner, name in (
        *((pipeline.Pipeline, "train"), (pipeline, "latents_of"), (study.pipeline, "run")),
        *((evaluate, "load_extractor"), (encode, "write_encoding"), (doctor, "self_test")),
        *(
            (packages, "_download"),
            (minilm, "_download"),
            (topologies.topologies, "get_topology_desc"),
        ),
        *((stablehlo_export, "export_stablehlo"), (hub, "upload")),
    ):
        monkeypatch.setattr(owner, name, begin)
    for module in (page, grids):
        monkeypatch.setattr(module, "data_url", lambda *_: "data:,")
    monkeypatch.setattr(
        "guided_distill.sampling.sample.compiled_noise",
        lambda shape, _: (
            lambda key, rows: (np.zeros((len(rows), *shape), np.float32), np.zeros(len(rows)))
        ),
    )
    monkeypatch.setattr(
        "guided_distill.sampling.sample.compiled_sampler",
        lambda *_, **__: lambda params, inputs: np.asarray(inputs.z),
    )
    monkeypatch.setattr(
        TextEncoder, "encode", lambda self, texts: np.zeros((len(texts), *self.shape), np.float32)
    )
    monkeypatch.setattr(
        LatentSpace, "to_images", lambda self, z: np.zeros((len(z), 32, 32, 3), np.float32)
    )
    monkeypatch.setattr(
        LatentSpace, "to_latents", lambda self, x: np.zeros((len(x), 8, 8, 4), np.float32)
    )
    monkeypatch.setattr(prompted, "load_text_to_image", load_once)


load_once = functools.cache(text_to_image.load_text_to_image)


def test_command_lines(case: Case, no_work, places, monkeypatch) -> None:
    verb = case.kind({" ".join(verb): verb for verb in VERBS})
    if verb == ("serve",):
        monkeypatch.setattr("guided_distill.serve.page.build_page", begin)
    arguments = draw(case, verb, good_values(verb, places, case.folder))
    found = command(arguments)
    if isinstance(found, Refusal):
        return
    for line in found.splitlines():
        if line.startswith("/") and verb != ("plan",):
            assert epath.Path(line).exists(), f"{line} was printed, but doesn't exist"
    if verb == ("sample",) and found:
        options = cli.parser().parse_args(arguments)
        with np.load(found.splitlines()[1]) as arrays:
            assert len(arrays["image"]) == options.num
            labels = [int(each) for each in options.labels or range(10)]
            np.testing.assert_array_equal(arrays["label"], np.resize(labels, options.num))
