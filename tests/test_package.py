"""The installed package, its imports, and the verb doctor, which checks the installation."""

import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from guided_distill import cli
from guided_distill.verbs.runs import read_config_file

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))


def test_the_wheel_carries_configs_and_templates(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(about), validate=True)
    for file in [*ROOT.glob("configs/*.py"), *ROOT.glob("guided_distill/**/*.py")]:
        path = file.relative_to(ROOT)
        assert str(path if path.parts[0] == "guided_distill" else "guided_distill" / path) in names
    assert {
        "guided_distill/data/digits.npz",
        *(
            f"guided_distill/formats/{name}.md.jinja"
            for name in ("model_card", "stablehlo_card", "own_card", "evidence")
        ),
        *(
            f"guided_distill/report/{name}.html.jinja"
            for name in ("base", "parts", "page", "compare")
        ),
    } < names
    assert "guided_distill/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "docs", "configs"))]
    assert CITATION["version"] == str(metadata.version)
    assert CITATION["license"] == metadata.license_expression
    assert [each["name"] for each in CITATION["authors"]] == [metadata.author]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
@pytest.mark.parametrize(("folder", "megabytes"), [("docs", 15), (".", 20)])
def test_a_checkout_is_small(folder, megabytes):
    """Weights are published as a file each, in float16; commands recreate everything else."""
    tracked = ["git", "ls-files", "-z", folder]
    names = subprocess.run(tracked, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in names.split("\0") if (ROOT / name).is_file()]
    assert sum(file.stat().st_size for file in files) < megabytes * 10**6


def jobs(workflow):
    return yaml.safe_load(workflow.read_text())["jobs"].values()


def commands(job):
    """The shell commands of a job, with the values of each run of its matrix."""
    matrix = dict(job.get("strategy", {}).get("matrix", {}))
    runs = matrix.pop("include", [{}])
    for *values, run in itertools.product(*matrix.values(), runs):
        names = dict(zip(matrix, values, strict=True)) | run
        text = "\n".join(step.get("run", "") for step in job.get("steps", []))
        for name, value in names.items():
            text = text.replace(f"${{{{ matrix.{name} }}}}", value)
        yield text


def test_workflows_run_targets_and_workflows_that_exist():
    targets = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))
    wanted = {
        target
        for workflow in WORKFLOWS
        for job in jobs(workflow)
        for command in commands(job)
        for target in re.findall(r"\bmake (\S+)", command)
    }
    assert {"test", "colab", "parity", "notebooks", "dist"} <= wanted <= targets
    used = [job["uses"] for workflow in WORKFLOWS for job in jobs(workflow) if "uses" in job]
    assert used
    assert all((ROOT / path).is_file() for path in used)


def test_the_makefile_installs_from_locks_that_exist():
    locks = set(re.findall(r"[\w./-]*requirements[\w-]*\.lock", MAKEFILE))
    assert len(locks) > 3
    assert all((ROOT / lock).is_file() for lock in locks)


def test_workflows_use_actions_by_commit():
    steps = [
        step for workflow in WORKFLOWS for job in jobs(workflow) for step in job.get("steps", [])
    ]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in used)


def test_only_publishing_may_do_more_than_read():
    may_more = []
    for workflow in WORKFLOWS:
        assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}
        may_more += [job["permissions"] for job in jobs(workflow) if "permissions" in job]
    assert may_more == [{"id-token": "write"}]


def test_every_python_that_is_named_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {name.rpartition(" ")[2] for name in project["classifiers"] if " :: 3." in name}
    (job,) = jobs(ROOT / ".github" / "workflows" / "tests.yml")
    legs = job["strategy"]["matrix"]["include"]
    assert named == {leg["python"] for leg in legs if leg["target"] == "test"}


def test_an_installed_package_finds_its_configs_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.resources.files", lambda _: ROOT)
    monkeypatch.chdir(tmp_path)
    assert read_config_file("configs/digits.py:runlocal", []).data.name == "digits"


def test_a_checkout_finds_its_configs_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config_file("configs/digits.py:runlocal", []).data.name == "digits"


def locked(file: str) -> list[Requirement]:
    lines = (ROOT / file).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_installing_on_colab_changes_none_of_its_packages():
    """pip would replace a version below our bound, and another JAX than Colab's finds no GPU there."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    bounds = {}
    for text in [*project["dependencies"], *project["optional-dependencies"]["serve"]]:
        requirement = Requirement(text)
        bounds[canonicalize_name(requirement.name)] = requirement.specifier
    image = {
        each.name: next(iter(each.specifier)).version for each in locked("constraints-colab.txt")
    }
    assert {"flax", "jax", "jaxlib", "numpy"} < set(image)
    for name, version in image.items():
        assert version in bounds.get(name, SpecifierSet()), f"{name} {version} on Colab"
    pinned = {
        each.name: next(iter(each.specifier)).version for each in locked("requirements-colab.lock")
    }
    assert image.items() <= pinned.items()


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("guided-distill 0.")


def loaded_after(text: str) -> set[str]:
    """The top-level packages that a program has imported when it ends."""
    names = subprocess.run(
        [sys.executable, "-c", f"import sys\n{text}\nprint(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {module.partition(".")[0] for module in names.split()}


def test_what_takes_long_to_import_waits_until_it_is_needed():
    assert not {"jax", "flax", "matplotlib", "scipy"} & loaded_after("import guided_distill")
    loaded = loaded_after("import guided_distill\nguided_distill.load")
    assert "jax" in loaded
    slow = {"grain", "matplotlib", "scipy", "tensorboardX", "array_record", "tensorflow_datasets"}
    assert not (slow | {"tensorflow", "tokenizers", "pyarrow", "sklearn", "gradio"}) & loaded


def test_the_main_job_needs_no_extra_and_a_report_names_the_one_it_needs():
    program = """
import sys
for package in ("matplotlib", "tokenizers", "sklearn", "skimage", "gradio", "pyarrow"):
    sys.modules[package] = None  # As if it weren't installed.
from guided_distill import api, doctor, pipeline
from guided_distill.cli import main
from guided_distill.evaluation import evaluate
from guided_distill.formats import exporting, import_model
from guided_distill.report import samples
sys.exit(main(["report", "--workdir", "none"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "guided-distill: a figure needs the package matplotlib: pip install matplotlib "
        "(the extra `report`)"
    )


@pytest.mark.parametrize("arguments", ["--version", "--help", "train --help", "sample --num x"])
def test_the_command_line_runs_without_jax(arguments):
    program = f"""
from guided_distill.cli import main
try:
    main({arguments.split()})
except SystemExit:
    pass
"""
    assert not {"jax", "flax", "matplotlib", "scipy"} & loaded_after(program)


def test_grain_prints_nothing_when_it_is_imported():
    program = "from guided_distill import cli\ncli.main(['sample'])\nimport grain"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.count("\n") == 1, done.stderr  # The error of the command.


def test_doctor_reports_the_installation_and_tries_it(capsys):
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr()
    assert output.out == "all is well\n"
    assert "1 x cpu" in output.err
    assert "sampling in one step" in output.err


def test_doctor_names_what_fails(capsys, monkeypatch):
    monkeypatch.setattr("guided_distill.doctor.sample", lambda *_, **__: [float("nan")])
    assert cli.main(["doctor"]) == 2
    assert (
        "sampling in one step fails: ValueError: samples aren't finite" in capsys.readouterr().err
    )
