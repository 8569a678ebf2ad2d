"""Storage that fails: temporary errors are retried, and errors are reported in one sentence."""

import errno
import re
import time
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from toy import source, train_toy

from guided_distill import cli, places, storage
from guided_distill.errors import Interrupted, UserError
from guided_distill.storage import persistently, whole, write_text
from guided_distill.training.record import latest_step


@pytest.fixture
def waited(monkeypatch):
    """The seconds that the code waited; each wait takes only a tenth of a second."""
    seconds = []

    def sleep(length):
        seconds.append(length)
        time.sleep(0.1)  # What a failed save still writes in the background has to end.

    monkeypatch.setattr(storage, "time", types.SimpleNamespace(sleep=sleep))
    return seconds


def failing(error, times):
    """Return a function that raises the error for the first `times` calls."""
    left = [error] * times

    def write():
        if left:
            raise left.pop()

    return write


AWAY = (
    OSError(errno.EIO, "Input/output error"),
    ConnectionResetError("reset"),
    ValueError("UNAVAILABLE: Error writing"),
    OSError(errno.ECONNREFUSED, "Cannot connect to host"),
    ValueError("Error writing local file: write failed [OS error 116: ESTALE Stale file handle]"),
)


@pytest.mark.parametrize("error", AWAY, ids=str)
def test_a_temporary_error_is_retried_a_limited_number_of_times(waited, caplog, error):
    path = epath.Path("here")
    persistently(failing(error, 3), path)
    assert waited == [1, 4, 15]
    assert caplog.text.count("here can't be written") == 3
    with pytest.raises(UserError, match="here can't be written"):
        persistently(failing(error, 4), path)
    assert len(waited) == 6


class HttpError(Exception):
    """An error like those of buckets' clients: neither an OSError nor a ValueError."""


BUCKET = epath.Path("gs://bucket/run")


def test_any_error_of_a_buckets_client_is_retried(waited):
    persistently(failing(HttpError("502"), 3), BUCKET)
    assert waited == [1, 4, 15]
    with pytest.raises(UserError, match=r"gs://bucket/run can't be written \(502\)"):
        persistently(failing(HttpError("502"), 4), BUCKET)
    with pytest.raises(HttpError):
        persistently(failing(HttpError("a bug"), 1), epath.Path("here"))
    assert len(waited) == 6


@pytest.mark.parametrize("waits", [(), (1,)])
@pytest.mark.parametrize("error", [*AWAY, HttpError("502")], ids=str)
def test_several_processes_leave_a_temporary_error_to_a_restart(waited, monkeypatch, error, waits):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(Interrupted, match=r"gs://bucket/run .*; the same command resumes"):
        persistently(failing(error, 2), BUCKET, waits=waits)
    assert waited == list(waits)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ImportError("Please install gcsfs"),
            r"Please install gcsfs\): install the package's extra `tpu`",
        ),
        (HttpError("Invalid credentials\nand more"), r"Invalid credentials\): check .* access"),
        (HttpError(), r"HttpError\): check its name, the network"),
    ],
    ids=str,
)
@pytest.mark.parametrize("verb", ["train", "sample"])
def test_an_unreachable_bucket_is_reported_in_one_sentence(
    monkeypatch, capsys, tiny_arguments, verb, error, said
):
    kind = type(BUCKET)
    exists = kind.exists

    def exists_or_fails(path):
        if str(path).startswith("gs://"):
            raise error
        return exists(path)

    monkeypatch.setattr(kind, "exists", exists_or_fails)
    monkeypatch.setattr(places, "find_spec", lambda name: name)
    config = tiny_arguments if verb == "train" else []
    assert cli.main([verb, *config, "--workdir", str(BUCKET)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"gs://bucket/run/\S+ can't be reached \({said}", line)


def test_a_config_in_a_bucket_is_refused_by_its_whole_name(tmp_path, capsys):
    config = "gs://bucket/digits.py:runlocal"
    assert cli.main(["train", "--config", config, "--workdir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--config {config} is not on this machine" in line


@pytest.mark.parametrize("verb", ["train", "sample"])
def test_an_empty_workdir_is_not_the_current_folder(
    monkeypatch, tmp_path, capsys, tiny_arguments, verb
):
    monkeypatch.chdir(tmp_path)
    assert cli.main([verb, *(tiny_arguments if verb == "train" else []), "--workdir", ""]) == 2
    assert "--workdir is empty" in capsys.readouterr().err


CANNOT_PASS = (
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("Forbidden: the caller does not have storage.objects.create access"),
    PermissionError(errno.EACCES, "Permission denied"),
    ValueError("RESOURCE_EXHAUSTED: write failed [OS error 28: ENOSPC No space left on device]"),
)


@pytest.mark.parametrize("path", [epath.Path("here"), BUCKET], ids=str)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("error", CANNOT_PASS, ids=str)
def test_a_permanent_error_is_reported_at_once(waited, monkeypatch, error, processes, path):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(UserError, match="make room or choose another place"):
        persistently(failing(error, 1), path)
    assert waited == []


def test_a_small_file_is_whole_after_a_failure(waited, monkeypatch, tmp_path):
    replace, left = type(epath.Path(tmp_path)).replace, [OSError(errno.EIO, "Input/output error")]

    def once(self, target):
        if left:
            raise left.pop()
        return replace(self, target)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", once)
    write_text(epath.Path(tmp_path) / "small.txt", "all of it")
    assert waited == [1]
    assert (tmp_path / "small.txt").read_text() == "all of it"


def test_a_small_file_is_written_whole_or_not_at_all(monkeypatch, tmp_path):
    path, full = epath.Path(tmp_path / "folder" / "text"), tmp_path / "folder" / "full"
    write_text(path, "old")
    full.symlink_to("/dev/full")
    monkeypatch.setattr(storage, "_part", lambda _: epath.Path(full))
    with pytest.raises(UserError, match=r"No space left.*make room"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in path.parent.iterdir()] == ["text"]


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path, texts = epath.Path(tmp_path / "shared"), [digit * 100_000 for digit in "0123"]

    def write(text):
        for _ in range(50):
            write_text(path, text)
            assert path.read_text() in texts

    with ThreadPoolExecutor(len(texts)) as threads:
        list(threads.map(write, texts))
    assert [each.name for each in tmp_path.iterdir()] == ["shared"]


def write_folder(path, files):
    with whole(path) as part:
        part.mkdir()
        for name in files:
            (part / name).write_text(name)
        assert not path.exists()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    path = epath.Path(tmp_path / "above" / "folder")
    with pytest.raises(FileNotFoundError):
        write_folder(path, ["first", "nowhere/second"])
    assert not list(path.parent.iterdir())
    write_folder(path, ["first"])
    assert [str(each) for each in (tmp_path / "above").rglob("*")] == [
        str(path),
        str(path / "first"),
    ]


class Away:
    """A background write that fails."""

    def result(self, timeout=None):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("failed_save", [1, 2, 3])
def test_a_save_that_fails_in_the_background_is_repeated(
    waited, monkeypatch, tmp_path, assert_same_weights, failed_save
):
    save, count = ocp.JsonCheckpointHandler.async_save, []

    async def failing_save(self, *arguments, **options):
        futures = await save(self, *arguments, **options)
        count.append(1)
        # Three items of each checkpoint are JSON; a run of twelve steps saves three times.
        return [*futures, Away()] if len(count) == 3 * failed_save else futures

    data = source(with_nan=False)
    expected, _ = train_toy(epath.Path(tmp_path) / "whole", data=data)
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "async_save", failing_save)
    state, _ = train_toy(epath.Path(tmp_path) / "cut", data=data)
    assert waited in ([1], [1, 4])
    assert_same_weights(state, expected)
    assert latest_step(epath.Path(tmp_path) / "cut") == 12
    resumed, _ = train_toy(epath.Path(tmp_path) / "cut", data=data)
    assert_same_weights(resumed, expected)


def test_a_folder_that_cannot_be_written_is_reported_before_the_first_step(
    tmp_path, tiny_arguments, capsys
):
    (tmp_path / "file").write_text("")
    assert cli.main(["train", *tiny_arguments, "--workdir", str(tmp_path / "file" / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run/.lock can't be written" in line
    assert "another place" in line
