"""The documents are correct: commands parse, patches apply and train, links resolve."""

import argparse
import csv
import functools
import json
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from etils import epath

from guided_distill import cli, config
from guided_distill.evaluation import evaluate, reference
from guided_distill.evaluation.extractors import registry
from guided_distill.experiments.sweeps import name_of, with_overrides
from guided_distill.training.record import latest_step
from guided_distill.verbs import studies
from guided_distill.verbs.runs import read_config_file

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch" / "README.md"]
PAGES += sorted(DOCS.rglob("*.md"))

PATCH = re.compile(r"^```diff\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^(?: {4}|\t)\s*(?!$)(.*)$", re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Folders that exist on one machine only.
OWN_PLACES = re.compile(r"(?<![\w.:/-])(/(?:home|root|tmp|work|opt|mnt|Users)/|[A-Z]:\\)")
LONGEST_PATCH = 40


def prose(page):
    """The page without its patches, and with each multi-line command on one line."""
    return re.sub(r"\\\n\s*", "", PATCH.sub("", page.read_text()))


def block_commands(page):
    """Yield the words of each command in the page's code blocks, with 0 for shell variables."""
    for line in BLOCK.findall(prose(page)):
        if re.match(r"(guided-distill|make|launch/\w+\.sh) ", line):
            yield shlex.split(re.sub(r"\$\w+", "0", line), comments=True)


def inline_commands(page):
    """Yield the words of each command within the page's sentences."""
    for code in INLINE.findall(BLOCK.sub("", prose(page))):
        if re.match(r"(guided-distill|make) ", code):
            yield shlex.split(code)


def check_guided_distill(arguments, *, check_values=True):
    """Fail unless the verb has these flags, and the config these keys with values that fit."""
    options, rest = cli.parser().parse_known_args(arguments)
    assert not [word for word in rest if not word.startswith("--config.")]
    if rest or "config" in options:
        values = read_config_file(options.config, rest)
        if check_values:
            config.parse(values)
    return options


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    # Parsing a command doesn't require the client for buckets.
    monkeypatch.setattr("guided_distill.places.find_spec", lambda _: object())


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    # Names that a patch adds are checked by the test that applies it.
    whole = not PATCH.search(page.read_text())
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    inline = list(inline_commands(page))
    for program, *words in [*block_commands(page), *inline]:
        if program == "make":
            assert words[0] in targets
        elif program == "guided-distill" and [program, *words] in inline and len(words) == 1:
            verbs, _ = leaves(cli.parser())
            assert words[0] in {name.split()[1] for name in verbs}
        elif program == "guided-distill":
            check_guided_distill(words, check_values=whole)
        elif "--" in words:
            assert (ROOT / program).exists()
            check_guided_distill(words[words.index("--") + 1 :], check_values=whole)


@pytest.mark.usefixtures("at_root")
def test_overrides_within_sentences_fit_a_config():
    found = [
        code
        for page in PAGES
        for code in INLINE.findall(BLOCK.sub("", prose(page)))
        if code.startswith("--config.")
    ]
    assert len(found) > 10
    for code in found:
        read_config_file("configs/imagenet64.py", shlex.split(code))


def leaves(parser):
    """The parser of every verb by its whole name, and the verbs that only have sub-verbs."""
    found, holders = {}, []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            holders.append(parser.prog)
            for choice in action.choices.values():
                below, more = leaves(choice)
                found |= below
                holders += more
    return (found, holders) if holders else ({parser.prog: parser}, [])


VERBS, _ = leaves(cli.parser())


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize("name", VERBS)
def test_examples_of_help_parse(name):
    label, _, example = VERBS[name].epilog.partition(": ")
    assert label == "example"
    assert example == name or example.startswith(f"{name} ")
    check_guided_distill(shlex.split(example)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), link
        if anchor.startswith("guided_distill."):
            pkgutil.resolve_name(anchor)
            assert f"::: {anchor.rpartition('.')[0]}\n" in target.read_text() or (
                f"::: {anchor}\n" in target.read_text()
            ), link
        elif anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w]+", "-", title.lower()) for title in titles}, link


def test_links_of_the_site_lead_to_its_own_pages():
    hooks = runpy.run_path(str(DOCS / "site" / "hooks.py"))
    texts = {page: hooks["page_of"](source) for source, page in hooks["OUTSIDE"].items()}
    texts |= {str(page.relative_to(DOCS)): page.read_text() for page in DOCS.rglob("*.md")}
    for page, text in texts.items():
        for link in LINK.findall(PATCH.sub("", hooks["on_page_markdown"](text))):
            place = os.path.normpath(Path(page).parent / link.partition("#")[0])
            if "://" not in link and not link.startswith("#"):
                assert place in texts or (DOCS / place).is_file(), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_a_place_of_one_machine(page):
    assert not OWN_PLACES.findall(page.read_text())


def test_every_page_is_in_the_navigation():
    # The file names no Python objects, so a plain loader can read it.
    navigation = json.dumps(yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text())["nav"])
    for page in DOCS.rglob("*.md"):
        if DOCS / "results" / "cifar10_small" not in page.parents:
            assert f'"{page.relative_to(DOCS)}"' in navigation


def patches(page):
    return PATCH.findall((DOCS / page).read_text())


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """f(page): a copy of the repository with a page's patches applied one after the other."""
    made = {}

    def make(page):
        if page in made:
            return made[page]
        copy = tmp_path_factory.mktemp("patched")
        for folder in ("guided_distill", "configs", "launch"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
        # In a folder of another repository, git would skip every file.
        subprocess.run(["git", "init", "--quiet"], cwd=copy, check=True)
        for mode in (["--check"], []):
            for patch in patches(page):
                assert len(patch.splitlines()) <= LONGEST_PATCH
                apply = ["git", "apply", *mode, "-"]
                subprocess.run(apply, cwd=copy, check=True, input=patch, text=True)
        made[page] = copy
        return copy

    return make


def made_small(words, workdir):
    """The command with the config's variant that takes seconds, and with the test's own workdir."""
    words = [f"{word}:runlocal" if word.endswith(".py") else word for word in words]
    if "--workdir" in words:
        words[words.index("--workdir") + 1] = str(workdir)
    return words


def test_what_extends_the_program_trains(patched, tmp_path):
    copy = patched("extend.md")
    blocks = [words for _, *words in block_commands(DOCS / "extend.md")]
    # The last command needs both last patches.
    assert len(blocks) == len(patches("extend.md")) - 1 == 5
    evaluate = blocks.pop(3)
    commands = [made_small(words, tmp_path / str(index)) for index, words in enumerate(blocks)]
    commands.append([*made_small(evaluate, tmp_path / "0"), "--num_samples=32", "--w=1"])
    # Networks and stages are also conditioned on w; the other patches take effect in the first stage.
    for index in (0, 2):
        commands[index].append("--config.stage=teacher")
    script = "import json, sys; from guided_distill import cli\n"
    script += "sys.exit(max(cli.main(words) for words in json.loads(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Read as JSON, because this program doesn't know the names that the patches add.
    configs = [json.loads((tmp_path / str(i) / "config.json").read_text()) for i in range(4)]
    assert configs[0]["data"]["name"] == "moons"
    assert configs[1]["model"]["name"] == "convnet"
    assert configs[2]["teacher"]["weighting"] == "min_snr"
    for index, stage in enumerate(("teacher", "halving_ddim_1", "teacher", "direct_ddim_1")):
        steps = latest_step(epath.Path(tmp_path / str(index) / stage))
        assert steps == configs[index][stage.partition("_")[0]]["steps"] * (2 if index == 1 else 1)
    with (tmp_path / "0" / "results.csv").open() as table:
        coverages = [float(row["coverage"]) for row in csv.DictReader(table)]
    assert len(coverages) > 1
    assert all(0 <= each <= 1 for each in coverages)
    assert max(coverages) > 0


def test_sweeps_of_the_page_fit_their_config(patched, monkeypatch):
    monkeypatch.chdir(patched("sweeps.md"))
    found = set()
    for program, *words in block_commands(DOCS / "sweeps.md"):
        if program == "guided-distill":
            options, overrides = cli.parser().parse_known_args(words)
            studies._shard(options.shard)
            base = read_config_file(options.config, overrides)
            points = studies._points_of(options, base)
            for point in points:
                config.parse(with_overrides(base, point))
            assert len({name_of(point) for point in points}) == len(points) > 1
            found.add(options.sweep)
    assert {"lengths", "losses"} < found


def test_shards_on_clusters_fit_their_schemas(patched):
    schemas = ROOT / "tests" / "launch"
    (words,) = (
        words for words in block_commands(DOCS / "sweeps.md") if words[0] == "launch/jobset.sh"
    )
    dry = [words[0], "--dry-run", *words[1:]]
    output = subprocess.run(dry, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    jobset = yaml.safe_load(output)
    jsonschema.validate(jobset, json.loads((schemas / "jobset_schema.json").read_text()))
    assert jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] == 1
    task = yaml.safe_load((patched("sweeps.md") / "launch" / "skypilot.yaml").read_text())
    jsonschema.validate(task, json.loads((schemas / "skypilot_schema.json").read_text()))
    _, _, command = task["run"].replace("\\\n", " ").partition("guided-distill ")
    values = {"CONFIG": str(ROOT / "configs" / "digits.py"), "SHARD": "0/4"}
    values["{overrides[@]}"] = "--config.halving.steps=600"
    words = [values.get(word[1:], word) for word in shlex.split(command)]
    assert studies._shard(check_guided_distill(words).shard) == (0, 4)
    (given,) = re.findall(r"sky jobs launch .*", prose(DOCS / "sweeps.md"))
    given = {word.split("=")[0] for word in shlex.split(given) if "=" in word}
    assert given == set(task["envs"]) - {"OVERRIDES"}


def test_the_quick_start_runs(tmp_path, monkeypatch, capsys):
    # As in test_configs_run.py, this test doesn't need a trained classifier.
    extractor = functools.partial(registry.train_extractor, steps=1)
    monkeypatch.setattr(registry, "train_extractor", extractor)
    for module in (evaluate, reference):
        monkeypatch.setattr(module, "MAX_EXAMPLES", 64)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    page = DOCS / "quick_start.md"
    for program, *words in block_commands(page):
        if program == "guided-distill":
            assert cli.main(made_small(words, "runs/digits")) == 0, words
    (code,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out == "(2, 8, 8, 1) 1 0.0 4.0\n"
    files = re.findall(r"`([\w.]+\.\w+)` \|", page.read_text())
    assert len(files) >= 3
    for file in files:
        assert (tmp_path / "runs" / "digits" / file).exists()
