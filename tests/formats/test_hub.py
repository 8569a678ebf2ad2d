"""Models on a hub: `export --push`, `import --from hub:`, and model cards with a run's numbers."""

import re
import sys

import hub_server
import pytest
import tiny
from etils import epath

from guided_distill import cli
from guided_distill.runs.trained import load_finished

NAME = "me/tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An imported teacher."""
    source = tiny.write_pipeline(tmp_path_factory.mktemp("source") / "tiny-diffusion")
    workdir = epath.Path(tmp_path_factory.mktemp("run") / "run")
    assert cli.main(["import", "--from", str(source), "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of this test, in place of huggingface.co, whose cache and token are this test's own."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with hub_server.serve() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield hub


@pytest.fixture
def quick_export(monkeypatch):
    """An export of two files, in place of one that loads and writes a model."""

    def export(workdir, out, *, stages, repository):
        out.mkdir()
        (out / "README.md").write_text(f"A model for {repository}")
        (out / "weights").write_bytes(bytes(1234))
        return [out]

    monkeypatch.setattr("guided_distill.formats.own_export.export_weights", export)


def push(*flags):
    return cli.main(["export", "--workdir", "run", "--push", NAME, *flags])


def said(capsys):
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("guided-distill: ")
    return line


def test_a_pushed_model_is_imported_again(run, hub, tmp_path, capsys, assert_same_weights):
    flags = ["--workdir", str(run), "--format", "diffusers", "--stages", "teacher"]
    assert cli.main(["export", *flags, "--push", NAME]) == 0
    *listed, address = capsys.readouterr().out.splitlines()
    assert address == f"{hub.address}/{NAME}"
    sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in listed}
    assert sizes == {name: len(content) for name, content in hub.files[NAME].items()}
    assert hub.private[NAME] is True
    assert f'from_pretrained("{NAME}")' in hub.files[NAME]["README.md"].decode()
    commit, workdir = hub.commit_of(NAME), epath.Path(tmp_path / "run")
    flags = ["--from", f"hub:{NAME}@{commit}", "--workdir", str(workdir)]
    assert cli.main(["import", *flags]) == 0
    teacher = load_finished(workdir / "teacher")
    assert_same_weights(teacher.params, tiny.unet())
    assert teacher.description.experiment.data.name == f"hub:{NAME}@{commit}"


@pytest.mark.parametrize("flags", [[], ["--public"]])
def test_a_new_repository_is_private_unless_it_is_to_be_public(quick_export, hub, flags):
    assert push(*flags) == 0
    assert hub.private[NAME] is (not flags)
    # One that exists stays as it is.
    assert push("--public") == 0
    assert hub.private[NAME] is (not flags)


def test_without_a_token_it_prints_what_would_be_uploaded(quick_export, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert push() == 2
    output = capsys.readouterr()
    listed = [line.split() for line in output.out.splitlines()]
    assert listed == [["19", "README.md"], ["1,234", "weights"]]
    (line,) = output.err.splitlines()
    assert f"nothing was uploaded to {NAME}, because there is no token" in line
    assert not hub.seen


def test_a_token_that_is_refused_is_one_sentence(quick_export, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert push() == 2
    assert re.search(rf"--push {NAME} can't be uploaded \(.*401", said(capsys))
    assert not hub.files


def test_without_a_network_it_is_one_sentence(quick_export, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert push() == 2
    assert f"--push {NAME} can't be uploaded" in said(capsys)
    flags = ["--from", f"hub:{NAME}", "--workdir", str(tmp_path / "run")]
    assert cli.main(["import", *flags]) == 2
    assert f"--from hub:{NAME} can't be downloaded" in said(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (NAME, f"--from hub:{NAME} is not a diffusers model"),
        (f"{NAME}@v2", f"--from hub:{NAME}@v2 can't be downloaded"),
        ("me/none", "--from hub:me/none can't be downloaded"),
    ],
)
def test_a_repository_that_cannot_be_imported_is_one_sentence(hub, tmp_path, capsys, name, words):
    hub.files[NAME] = {"README.md": b"Soon."}
    flags = ["--from", f"hub:{name}", "--workdir", str(tmp_path / "run")]
    assert cli.main(["import", *flags]) == 2
    assert words in said(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--push", "tiny"], "--push is 'tiny'; give USER/NAME"),
        (["--push", "me/../x"], "give USER/NAME"),
        (["--push", NAME], "needs the package huggingface_hub"),
        (["--push", NAME, "--out", "x"], "not allowed with"),
        (["--out", "x", "--public"], "--public is for --push"),
        ([], "one of the arguments --out --push is required"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_read(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["export", "--workdir", str(tmp_path / "none"), *flags]) == 2
    assert words in said(capsys)
