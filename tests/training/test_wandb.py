"""The log in Weights & Biases, with the real package, which works offline."""

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import wandb
from etils import epath
from toy import source, train_toy
from wandb_files import history, read_runs

from guided_distill import cli
from guided_distill.data.pipeline import batches
from guided_distill.errors import UserError
from guided_distill.training import session
from guided_distill.training.job import Monitoring, Project
from guided_distill.training.record import read_metrics, read_speed
from guided_distill.training.wandb_log import FILE, WeightsAndBiases, sign_in

OFFLINE = Monitoring(wandb=Project("toys", "offline"))


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """Neither read nor write the settings of a person who runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for kind in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield
    wandb.teardown()


class Broken:
    """Batches that end by an error, without a save."""

    def __init__(self, count):
        self._iterator, self._left = batches(source(with_nan=True), batch_size=8, seed=3), count
        self.get_state, self.set_state = self._iterator.get_state, self._iterator.set_state

    def __next__(self):
        self._left -= 1
        if self._left < 0:
            self._iterator.close()
            raise KeyboardInterrupt
        return next(self._iterator)


def train(directory, *, count=None, monitoring=OFFLINE):
    if count is None:
        train_toy(directory, data=source(with_nan=True), monitoring=monitoring)
    else:
        with pytest.raises(KeyboardInterrupt):
            train_toy(directory, data=Broken(count), monitoring=monitoring)


def rows_of_log(directory):
    """Return the rows that a log's own files hold, under the tags of the charts."""
    speed = {row["step"]: row for row in read_speed(directory)}
    for row in read_metrics(directory):
        others = {f"speed/{name}": value for name, value in speed[row["step"]].items()}
        del others["speed/step"]
        tags = {name: value for name, value in row.items() if name != "step"}
        yield {"_step": row["step"], **tags, **others}


def sent(folder):
    rows = [row for records in read_runs(folder / "wandb") for row in history(records)]
    return [{k: v for k, v in row.items() if k == "_step" or not k.startswith("_")} for row in rows]


def test_a_project_gets_every_row_of_the_log(tmp_path):
    train(epath.Path(tmp_path))
    assert sent(tmp_path) == [
        {name: value for name, value in row.items() if value is not None}
        for row in rows_of_log(epath.Path(tmp_path))
    ]
    (records,) = read_runs(tmp_path / "wandb")
    (run,) = [each.run for each in records if each.HasField("run")]
    assert (run.project, run.run_group) == ("toys", tmp_path.parent.name)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["stage"] == "toy"


def test_a_resumed_stage_continues_its_run(tmp_path):
    directory = epath.Path(tmp_path)
    for count in (6, 5):
        train(directory, count=count)
    train(directory)
    runs = read_runs(tmp_path / "wandb")
    assert len(runs) == 3
    ids = {each.run.run_id for records in runs for each in records if each.HasField("run")}
    assert ids == {json.loads((tmp_path / FILE).read_text())["id"]}
    assert [row["_step"] for row in sent(tmp_path)] == [2, 4, 6, 8, 10, 12]
    losses = [row["loss"] for row in read_metrics(directory)]
    assert [row.get("loss") for row in sent(tmp_path)] == losses


def test_steps_that_are_computed_again_are_not_sent_twice(tmp_path):
    for step, steps in ((0, (2, 4, 6)), (2, (4,)), (4, (6, 8))):
        writer = WeightsAndBiases(OFFLINE.wandb, epath.Path(tmp_path), about={}, step=step)
        for each in steps:
            writer.write(each, {"loss": 1.0 / each}, speed={})
        writer.close()
    assert [row["_step"] for row in sent(tmp_path)] == [2, 4, 6, 8]


@pytest.mark.parametrize("before", [None, Monitoring(wandb=Project("another", "offline"))])
def test_a_project_that_is_given_later_gets_the_whole_series(tmp_path, before):
    options = {} if before is None else {"monitoring": before}
    train(epath.Path(tmp_path), count=6, **(options or {"monitoring": Monitoring()}))
    train(epath.Path(tmp_path))
    *_, last = read_runs(tmp_path / "wandb")
    assert [row["_step"] for row in history(last)] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"project": "toys", "id": 3, "step": 2}'])
def test_a_damaged_note_begins_a_new_run(tmp_path, damage):
    (tmp_path / FILE).write_bytes(damage)
    train(epath.Path(tmp_path))
    assert [row["_step"] for row in sent(tmp_path)] == [2, 4, 6, 8, 10, 12]


def test_only_process_0_sends(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "is_first", lambda: False)
    train(epath.Path(tmp_path))
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("part", ["log", "finish", "init"])
def test_a_failure_is_reported_once_and_does_not_hurt_the_training(
    tmp_path, monkeypatch, capfd, part
):
    def fail(*_, **__):
        raise wandb.errors.CommError("the network is gone\nand more")

    owner = wandb if part == "init" else wandb.Run
    with monkeypatch.context() as patch:
        patch.setattr(owner, part, fail)
        train(epath.Path(tmp_path))
    said = capfd.readouterr().err
    assert said.count("Weights & Biases failed (the network is gone), and gets no more") == 1
    assert "Traceback" not in said
    assert [row["step"] for row in read_metrics(epath.Path(tmp_path))] == [2, 4, 6, 8, 10, 12]


def test_a_server_that_cannot_be_reached_later_leaves_the_log_in_the_folder(
    tmp_path, monkeypatch, capfd
):
    init = wandb.init

    def unreachable(*arguments, mode, **options):
        if mode == "online":
            raise wandb.errors.CommError("timed out")
        return init(*arguments, mode=mode, **options)

    monkeypatch.setattr(wandb, "init", unreachable)
    train(epath.Path(tmp_path), monitoring=Monitoring(wandb=Project("toys", "online")))
    said = capfd.readouterr().err
    assert f"can't be reached (timed out), so the log stays in {tmp_path}: `wandb sync" in said
    assert len(sent(tmp_path)) == 6


class Refusing(BaseHTTPRequestHandler):
    """A server of Weights & Biases that knows no key."""

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        said = b'{"errors": [{"message": "user is not logged in"}]}'
        self.send_response(401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        yield
        wandb.teardown()
        server.shutdown()


@pytest.mark.parametrize("key", ["a" * 40, "short"])
def test_a_wrong_key_ends_the_command_before_it_begins(
    tiny_arguments, tmp_path, monkeypatch, capfd, refusing, key
):
    monkeypatch.setenv("WANDB_API_KEY", key)
    workdir = tmp_path / "run"
    assert cli.main(["train", *tiny_arguments, "--workdir", str(workdir), "--wandb", "toys"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("guided-distill: --wandb is toys, but the key")
    assert "correct WANDB_API_KEY or run `wandb login`, or set WANDB_MODE=offline" in line
    assert not workdir.exists()


def test_without_a_key_or_a_server_the_log_stays_offline(monkeypatch, capfd):
    assert sign_in("toys") == Project("toys", "offline")
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    wandb.teardown()
    assert sign_in("toys") == Project("toys", "offline")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Weights & Biases doesn't answer (")
    assert "`wandb sync STAGE/wandb/offline-run-*` sends it later" in line
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert sign_in("toys") == Project("toys", "disabled")


@pytest.mark.parametrize("name", ["", "a/b", "what?", "x" * 129])
def test_a_name_that_no_project_has_is_refused(name):
    with pytest.raises(UserError, match="give a project's name of at most 128 characters"):
        sign_in(name)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install wandb \(the extra `wandb`\)"):
        sign_in("toys")


def test_the_command_keeps_each_stage_in_its_own_run(tiny_arguments, tmp_path):
    workdir = tmp_path / "run"
    command = ["train", *tiny_arguments, "--workdir", str(workdir), "--wandb", "toys"]
    assert cli.main([*command, "--config.stage=teacher"]) == 0
    (records,) = read_runs(workdir / "teacher" / "wandb")
    (run,) = [each.run for each in records if each.HasField("run")]
    assert (run.run_group, run.display_name) == ("run", "run/teacher")
    steps = [row["step"] for row in read_metrics(epath.Path(workdir / "teacher"))]
    assert [row["_step"] for row in history(records)] == steps
