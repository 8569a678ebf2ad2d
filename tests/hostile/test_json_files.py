"""JSON, JSON lines and CSV files in runs, models and data."""

import csv
import io
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from etils import epath
from folders import write_run
from harness import Case, Refusal, attempt, begin, command
from PIL import Image
from test_configs import TINY

from guided_distill import pipeline
from guided_distill.data import encoded, sources
from guided_distill.data.encode import write_encoding
from guided_distill.evaluation import evaluate
from guided_distill.evaluation.results import COLUMNS, read_results
from guided_distill.formats import import_model
from guided_distill.formats.diffusers_autoencoder import read_autoencoder
from guided_distill.formats.diffusers_configs import read_denoiser, read_scheduler
from guided_distill.formats.diffusers_folder import read_json, read_weights
from guided_distill.report import grids, page
from guided_distill.runs import folder as runs
from guided_distill.runs.model_file import write_model_file
from guided_distill.runs.trained import load_finished
from guided_distill.text.tokenizers import clip_tokenizer
from guided_distill.training.record import read_metrics

VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        9,
        -1,
        2**31,
        2**63,
        10**20,
        10**400,
        0.5,
        -0.5,
        1e308,
        math.nan,
    ),
    *(
        math.inf,
        "",
        "x",
        "1",
        "a\nb",
        "\ud800",
        "\0",
        "../x",
        "/",
        "x" * 5000,
        [],
        {},
        [1],
        [None],
        [[]],
    ),
    *(
        {"a": 1},
        ["x"],
        [2, 4],
        {"content": "x"},
        {"content": None},
        {"0": None},
        [1, "x"],
        [1] * 5000,
    ),
)
TAILS = (
    b"",
    b"\n",
    b"{}",
    b",",
    b"]",
    b"\0",
    b"\xff",
    b"\n\n",
    b"\r\n",
    b"\n[]",
    b"\nnull\n",
    b"x" * 9999,
)
WHOLE = (
    *(
        b"",
        b"\0",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"{}",
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\0}\0",
        b"NaN",
    ),
    *(
        b"[" * 10**5,
        b'{"a":' * 10**5,
        b"9" * 5000,
        b"\x80",
        b" " * 10**6,
        b"{'a': 1}",
        b"1,2\n3",
        b"\n",
    ),
)


def mutate(rng, path):
    """Change a file: one value, a few bytes, or its whole content."""
    text = path.read_bytes()
    draw = rng.random()
    if draw < 0.6:
        changed = with_other_value(rng, text)
    elif draw < 0.75:
        changed = text[: rng.randrange(len(text) + 1)] + rng.choice(TAILS)
    elif draw < 0.9:
        place = rng.randrange(len(text) + 1)
        changed = (
            text[:place] + rng.choice((*TAILS, rng.randbytes(1))) + text[place + rng.randrange(3) :]
        )
    else:
        changed = rng.choice(WHOLE)
    print(f"{path.name}: {text[:200]!r} -> {changed[:4000]!r}")
    path.write_bytes(changed)


def with_other_value(rng, text):
    """Change one value of a JSON file, of a line of a JSON lines file, or a cell of a table."""
    lines = text.split(b"\n")
    try:
        return dumped(changed_tree(rng, json.loads(text)))
    except ValueError:
        place = rng.randrange(len(lines))
    try:
        lines[place] = dumped(changed_tree(rng, json.loads(lines[place])))
    except ValueError:
        cells = lines[place].split(b",")
        cells[rng.randrange(len(cells))] = str(rng.choice(VALUES)).encode(errors="surrogatepass")
        lines[place] = b",".join(cells)
    return b"\n".join(lines)


def dumped(tree):
    return json.dumps(tree, ensure_ascii=False).encode(errors="surrogatepass")


def changed_tree(rng, tree):
    """Return the tree with one node replaced, removed, duplicated or renamed."""
    if isinstance(tree, dict) and tree and rng.random() < 0.95:
        key = rng.choice(sorted(tree))
        if rng.random() < 0.6:
            return tree | {key: changed_tree(rng, tree[key])}
        if rng.random() < 0.5:
            return {name: each for name, each in tree.items() if name != key}
        return tree | {rng.choice(("x", "", key.upper(), key + "s", "__class__")): tree[key]}
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        place = rng.randrange(len(tree))
        new = changed_tree(rng, tree[place])
        return [*tree[:place], *rng.choice(([new], [], [new, new])), *tree[place + 1 :]]
    return rng.choice(VALUES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Valid folders."""
    folder = epath.Path(tmp_path_factory.mktemp("whole"))
    write_run(folder / "run")
    tiny.write_pipeline(folder / "texts")
    tiny.write_dit(folder / "classes")
    write_encoded(folder / "encoded")
    write_images(folder / "images")
    return folder


def write_images(folder):
    (folder / "sub").mkdir(parents=True)
    names = [f"sub/{index}.png" for index in range(5)]
    for index, name in enumerate(names):
        Image.new("RGB", (6, 6), (40 * index, 0, 0)).save(folder / name)
    rows = [{"file_name": name, "text": f"number {name}"} for name in names]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_encoded(folder):
    """Write encoded digits, whose latents are zero."""
    splits = {split: sources.load_source("digits", split=split) for split in sources.SPLITS}
    for split, source in splits.items():
        captions = np.array([f"a {index % 3}" for index in range(9)])
        splits[split] = encoded.Source(**(vars(source) | {"size": 9, "captions": captions}))
    about = encoded.Encoding(
        data="digits",
        image_size=None,
        autoencoder="a",
        text_encoder="t",
        shape=(4, 4, 1),
        text_shape=(2, 3),
        class_names=(),
        mirrored=False,
        sizes=dict.fromkeys(splits, 9),
        shard_size=5,
    )
    write_encoding(
        folder,
        about,
        splits,
        to_latents=lambda images: np.zeros((len(images), 4, 4, 1), np.float32),
        to_states=lambda texts: np.ones((len(texts), 2, 3), np.float32),
        batch_size=4,
    )


def config_of_run(case, whole):
    """config.json, and a verb that reads it."""
    run = copied(case, whole / "run")
    mutate(case.rng, run / "config.json")
    found = attempt(lambda: runs.read_config(run))
    use(case, run)
    if not isinstance(found, Refusal):
        agree(json.loads((run / "config.json").read_bytes()), found)


def agree(values, found):
    """Assert that every value of a JSON object equals the field of that name."""
    for key, each in values.items():
        field = found[key] if isinstance(found, dict) else getattr(found, key)
        if isinstance(each, dict):
            agree(each, field)
        else:
            same = (list(field) if isinstance(field, tuple) else field) == each
            # NaN doesn't equal itself.
            assert same or (each != each and field != field), key


def table_of_run(case, whole):
    """results.csv, compared with independently parsed rows."""
    run = copied(case, whole / "run")
    path = run / "results.csv"
    mutate(case.rng, path)
    found = attempt(lambda: read_results(path))
    use(case, run)
    if isinstance(found, Refusal):
        return
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert len(rows) == len(found)
    for row, result in zip(rows, found, strict=True):
        for name in row.keys() & COLUMNS:
            each, cell = getattr(result, name), row[name]
            written = type(each)(cell) if cell else None
            # NaN doesn't equal itself.
            assert each == written or (each != each and written != written), name


def log_of_stage(case, whole):
    """metrics.jsonl, compared with its independently parsed lines."""
    run = copied(case, whole / "run")
    path = run / "teacher" / "metrics.jsonl"
    mutate(case.rng, path)
    found = attempt(lambda: read_metrics(run / "teacher"))
    use(case, run)
    if not isinstance(found, Refusal):
        lines = path.read_bytes().split(b"\n")
        assert found == [json.loads(line) for line in lines[: len(found)]]


def checkpoint(case, whole):
    """A file of a checkpoint: the weights are restored as they were saved, or not at all."""
    run = copied(case, whole / "run")
    stage = run / case.rng.choice(("teacher", "halving_ddim_4"))
    files = [path for path in Path(stage).rglob("*") if path.is_file()]
    mutate(case.rng, case.rng.choice(sorted(files)))
    found = attempt(lambda: load_finished(stage))
    if not isinstance(found, Refusal):
        for leaf in jax.tree.leaves(found.params):
            np.testing.assert_array_equal(np.asarray(leaf), np.float32(0.1))


def description(case, whole):
    """A model file's self-description, with a matching digest: it is read as it is, or refused."""
    trained, path = load_finished(whole / "run" / "halving_ddim_4"), case.folder / "x.safetensors"
    about = changed_tree(case.rng, json.loads(json.dumps(trained.description.to_json())))
    print(f"about: {about}"[:4000])
    write_model_file(epath.Path(path), trained.params, about=about, dtype="float32")
    found = attempt(lambda: load_finished(epath.Path(path)))
    if not isinstance(found, Refusal):
        agree(about, found.description.to_json())
    command(["sample", "--workdir", str(path), "--num", "1", "--num_steps", "x"])


def model(case, whole):
    """A config.json, model_index.json or scheduler config of a model, read alone or in an import."""
    source = copied(case, whole / case.rng.choice(("texts", "classes")))
    path = case.rng.choice([each for each in json_files(source) if each.parent.name != "tokenizer"])
    mutate(case.rng, path)
    readers = {
        "unet": lambda: read_denoiser(read_json(path), path),
        "transformer": lambda: read_denoiser(read_json(path), path),
        "scheduler": lambda: read_scheduler(read_json(path), path),
        "vae": lambda: read_autoencoder(path.parent),
    }
    read = readers.get(path.parent.name)
    if read is None or case.rng.random() < 0.15:
        command(["import", "--from", str(source), "--workdir", str(case.folder / "new")])
    else:
        attempt(read)


def tokenizer(case, whole):
    """A tokenizer's files: prompts are converted to token ids."""
    folder = copied(case, whole / "texts" / "tokenizer")
    mutate(case.rng, case.rng.choice(sorted(folder.iterdir())))
    prompts = ["a b", "", "é 😀", "<|endoftext|>"]
    found = attempt(lambda: (made := clip_tokenizer(folder), made(prompts)))
    if not isinstance(found, Refusal):
        made, (tokens, mask) = found
        assert tokens.shape == mask.shape == (len(prompts), made.length)
        assert tokens.min() >= 0
        assert (tokens[:, 0] == made.start).all()


def captions(case, whole):
    """metadata.jsonl, compared with independently parsed rows."""
    folder = copied(case, whole / "images")
    path = folder / "metadata.jsonl"
    mutate(case.rng, path)
    found = attempt(lambda: sources.load_source(f"folder:{folder}").captions)
    if not isinstance(found, Refusal):
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        assert set(found.tolist()) <= {row["text"] for row in rows}
        assert all(isinstance(row["text"], str) for row in rows)


def encoding(case, whole):
    """The JSON files of encoded data: the examples are those that were encoded."""
    folder = copied(case, whole / "encoded")
    mutate(case.rng, case.rng.choice(json_files(folder)))
    found = attempt(lambda: sources.load_source(f"encoded:{folder}").read(np.arange(9)))
    if not isinstance(found, Refusal):
        assert found["image"].shape == (9, 4, 4, 1)
        np.testing.assert_array_equal(found["image"], 0)
        np.testing.assert_array_equal(found["text"], np.ones((9, 2, 3), np.float32))


def index(case, whole):
    """The index of weights in two files: tensors have their values, or the index is refused."""
    tensors = {name: np.full(3, place, np.float32) for place, name in enumerate("abcd")}
    weight_map = {}
    for file, names in {"1.safetensors": "ab", "2.safetensors": "cd"}.items():
        safetensors.numpy.save_file({name: tensors[name] for name in names}, case.folder / file)
        weight_map |= dict.fromkeys(names, file)
    path = epath.Path(case.folder / "model.safetensors.index.json")
    path.write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": weight_map}))
    mutate(case.rng, path)
    found = attempt(lambda: read_weights(path.parent, "model"))
    if not isinstance(found, Refusal):
        for name, each in found.items():
            np.testing.assert_array_equal(each, tensors[name])


def copied(case, folder):
    target = epath.Path(case.folder / "copy")
    shutil.copytree(folder, target)
    return target


def json_files(folder):
    return sorted(map(epath.Path, Path(folder).rglob("*.json")))


def use(case, run):
    """Run a verb that reads a run's folder."""
    verbs = {
        "report": ["report", "--workdir", str(run)],
        "compare": ["compare", str(run)],
        "evaluate": ["evaluate", "--workdir", str(run)],
        "sample": ["sample", "--workdir", str(run), "--stage", "nothing"],
        "last": [
            "transfer",
            "--workdir",
            str(run),
            "--images",
            "x",
            "--from_label=1",
            "--to_label=2",
        ],
        "export": ["export", "--workdir", str(run), "--stages", "teacher", "--out", "exported"],
        "train": ["train", "--config", TINY, "--workdir", str(run)],
    }
    command(case.kind(verbs))


KINDS = {
    each.__name__: each
    for each in (
        *(
            config_of_run,
            table_of_run,
            log_of_stage,
            checkpoint,
            description,
            model,
            tokenizer,
            captions,
            encoding,
            index,
        ),
    )
}


def test_json_files(case: Case, whole, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "load_extractor", begin)
    monkeypatch.setattr(pipeline.Pipeline, "train", begin)
    monkeypatch.setattr(import_model, "StageCheckpoints", begin)
    for module in (page, grids):
        monkeypatch.setattr(module, "data_url", lambda *_: "data:,")
    case.kind(KINDS)(case, whole)
