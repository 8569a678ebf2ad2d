"""Dry runs of launch/: its commands and manifests are correct."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from guided_distill.errors import Interrupted

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
VERB = ["train", "--config", "configs/my file.py", "--workdir", "gs://bucket/run"]


# The files that the package is built from.
PARTS = {"guided_distill", "configs", "pyproject.toml", "README.md", "LICENSE"}

TFDS = "TFDS_DATA_DIR=gs://bucket/my data"


def call(script, *arguments, env=None):
    return subprocess.run(
        [str(LAUNCH / script), *arguments], capture_output=True, text=True, timeout=20, env=env
    )


def dry_run(script, *arguments):
    done = call(script, *arguments, "--dry-run", "--", *VERB)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(text):
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


def validate(manifest, schema):
    jsonschema.validate(manifest, json.loads((HERE / schema).read_text()))


def jobset(*options):
    text = dry_run("jobset.sh", "--name", "run", "--image", "there/image:1", *options)
    return yaml.safe_load(text)


def test_multiprocess_tells_every_process_which_it_is():
    lines = commands(dry_run("multiprocess.sh", "--processes", "3"))
    assert len(lines) == 3
    for index, (address, count, which, *command) in enumerate(lines):
        assert address.startswith("JAX_COORDINATOR_ADDRESS=127.0.0.1:")
        assert count == "JAX_NUM_PROCESSES=3"
        assert which == f"JAX_PROCESS_ID={index}"
        assert command == ["guided-distill", *VERB]


def test_a_queued_resource_is_requested_awaited_installed_and_started():
    where = ["--name", "run", "--project", "p", "--zone", "z"]
    options = ["--accelerator-type", "v6e-16", "--spot", "--env", TFDS]
    text = dry_run("queued_resource.sh", "start", *where, *options)
    create, describe, look, archive, copy, install, start = commands(text)
    assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert {"--spot", "v6e-16", "v2-alpha-tpuv6e"} <= set(create)
    assert describe[4] == "describe"
    assert archive[0] == "git"
    assert set(archive[archive.index("HEAD") + 1 :]) == PARTS
    assert copy[5].startswith("FOLDER/")
    for command in (look, copy, install, start):
        assert command[command.index("--worker") + 1] == "all"
    assert "guided-distill[tpu,report,text]" in install[-1]
    # The hosts' shell parses it once more.
    program = shlex.split(start[-1].split("nohup", 1)[1].split(">>")[0])
    assert program == ["env", TFDS, "../environment/bin/guided-distill", *VERB]
    for action, said in (("watch", "tail"), ("stop", "kill -TERM"), ("delete", "delete")):
        (command,) = commands(call("queued_resource.sh", action, *where, "--dry-run").stdout)
        assert said in " ".join(command)


# Prints the next state in the file `states`; fails with an error if that line isn't in capitals.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >>log
case "$*" in
  *describe*)
    read -r state <states
    sed -i 1d states
    [[ $state == [A-Z]* ]] && echo "WARNING: there is a new version" >&2 && echo "$state" && exit
    echo "ERROR: (gcloud.describe) ${state:-NOT_FOUND}: the resource" >&2
    exit 1
    ;;
  *kill*) bash -c "${@: -1}" ;;
  *scp*)
    echo "$5 $(stat --format %A "$(dirname "$5")")" >copied
    ;;
esac
"""

# Stands in for git archive: writes to the path of --output.
GIT = """#!/usr/bin/env bash
while (($#)); do
  [[ $1 == --output ]] && echo archive >"$2"
  shift
done
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """f(*states): the finished `start` and its steps, while gcloud reports these states of the slice."""
    idle = "#!/bin/sh\n"
    for name, text in (("gcloud", GCLOUD), ("sleep", idle), ("git", GIT)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    options = ["--name", "run", "--project", "p", "--zone", "z", "--accelerator-type", "v6e-16"]

    def run(*states):
        Path("states").write_text("".join(f"{state}\n" for state in states))
        done = call("queued_resource.sh", "start", *options, "--", *VERB, env=os.environ | path)
        steps = [line.split()[3] for line in Path("log").read_text().splitlines()]
        return done, [step for step in steps if step != "describe"]

    return run


NOT_THERE, DENIED, STARTED = "", "permission_denied", ["ssh", "scp", "ssh", "ssh"]


@pytest.mark.parametrize(
    ("states", "steps"),
    [
        ([NOT_THERE, NOT_THERE, "PROVISIONING", "ACTIVE"], ["create"]),
        (["ACTIVE", "ACTIVE"], []),
        (["SUSPENDED", NOT_THERE, "ACTIVE"], ["delete", "create"]),
        (["DELETING", "DELETING", NOT_THERE, "ACTIVE"], ["create"]),
        (["DELETING", NOT_THERE, NOT_THERE, "ACTIVE"], ["create"]),
    ],
)
def test_a_slice_is_requested_when_there_is_none(start, states, steps):
    done, taken = start(*states)
    assert done.returncode == 0, done.stderr
    assert taken == steps + STARTED


def test_the_copied_archive_is_in_a_new_private_folder(start, tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("TMPDIR", str(shared))
    copied = []
    for _ in range(2):
        done, _ = start("ACTIVE", "ACTIVE")
        assert done.returncode == 0, done.stderr
        copied.append(Path("copied").read_text().split())
        assert list(shared.iterdir()) == []
    (first, rights), (second, _) = copied
    assert Path(first).parent.parent == shared
    assert rights == "drwx------"
    assert first != second


@pytest.mark.parametrize("before", [[], ["PROVISIONING", "PROVISIONING"]])
def test_an_error_of_gcloud_ends_the_script(start, before):
    done, taken = start(*before, DENIED)
    assert done.returncode == 1
    assert f"{DENIED}: the resource" in done.stderr
    assert taken == []


def test_a_run_that_is_alive_is_left_alone(start):
    Path("guided-distill.pid").write_text(f"{os.getpid()}\n")
    done, taken = start("ACTIVE", "ACTIVE")
    assert done.returncode == 2
    said = "queued_resource.sh: run still has a run: use the action watch or stop\n"
    assert done.stderr == said
    assert taken == ["ssh"]


def test_the_jobset_fits_its_schema_and_its_slices():
    manifest = jobset("--topology", "4x8", "--slices", "2", "--queue", "ours", "--env", TFDS)
    validate(manifest, "jobset_schema.json")
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ours"
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    work = job["template"]["spec"]
    assert work["parallelism"] == work["completions"] == 8
    (container,) = work["template"]["spec"]["containers"]
    assert container["args"] == VERB
    assert container["env"] == [{"name": "TFDS_DATA_DIR", "value": "gs://bucket/my data"}]
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    codes = work["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes["containerName"] == container["name"]
    assert codes["values"] == [2, Interrupted.STATUS]


def test_kubernetes_expands_nothing():
    """Kubernetes would expand $(NAME), and reads $$ as $."""
    words = ["train", "--workdir", "/$(HOME)/$x/$$"]
    options = ["--name", "a", "--image", "b", "--env", "A=$(HOME)", "--dry-run", "--"]
    manifest = yaml.safe_load(call("jobset.sh", *options, *words).stdout)
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["train", "--workdir", "/$$(HOME)/$$x/$$$$"]
    assert container["env"] == [{"name": "A", "value": "$$(HOME)"}]


def test_skypilot_uploads_what_the_package_is_built_from():
    ignored = (LAUNCH.parent / ".skyignore").read_text().splitlines()
    assert PARTS.isdisjoint(line.strip("/") for line in ignored)
    assert {"/docs", "/runs", "/.git"} <= set(ignored)


def test_the_image_is_built_from_what_the_package_is_built_from():
    root = LAUNCH.parent
    copies = re.findall(r"^COPY (.+) \S+$", (root / "Dockerfile").read_text(), re.MULTILINE)
    copied = {name for line in copies for name in line.split()}
    assert copied == PARTS | {"requirements-dev.lock"}
    sent = re.findall(r"^!/(.+)$", (root / ".dockerignore").read_text(), re.MULTILINE)
    assert copied == set(sent)


@pytest.mark.parametrize("name", ["true", "null"])
def test_a_name_that_yaml_knows_stays_a_name(name):
    manifest = jobset("--name", name)
    assert manifest["metadata"]["name"] == name
    assert manifest["metadata"]["labels"]["xpk.google.com/workload"] == name


def test_the_schema_is_strict():
    manifest = jobset()
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "nodSelector"
    ] = {}
    with pytest.raises(jsonschema.ValidationError, match="nodSelector"):
        validate(manifest, "jobset_schema.json")


def test_the_skypilot_task_fits_its_schema_and_recovers_from_a_preemption():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    validate(task, "skypilot_schema.json")
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [Interrupted.STATUS]
    task["resources"]["spot"] = True
    with pytest.raises(jsonschema.ValidationError, match="spot"):
        validate(task, "skypilot_schema.json")


@pytest.mark.parametrize("overrides", [[], ["--config.a=1", "--config.b=(2, 'it is *')", "-c"]])
def test_the_skypilot_task_runs_what_its_variables_say(tmp_path, overrides):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    program = tmp_path / "environment" / "bin" / "guided-distill"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    given = {"CONFIG": VERB[2], "WORKDIR": VERB[4], "HOME": str(tmp_path)}
    if overrides:
        given["OVERRIDES"] = "\n".join(overrides)
    done = subprocess.run(
        ["bash", "-euc", task["run"]],
        env=os.environ | task["envs"] | given,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == VERB + overrides


QUEUED = ["watch", "--name", "a", "--project", "b", "--zone", "c"]
JOBSET = ["--name", "a", "--image", "b"]


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("multiprocess.sh", ["train"], "put -- before"),
        ("multiprocess.sh", ["--processes", "two"], "--processes is 'two'"),
        ("multiprocess.sh", ["--processes", "0"], "--processes is '0'"),
        ("multiprocess.sh", ["--processes", "08"], "--processes is '08'"),
        ("multiprocess.sh", ["--processes"], "--processes has no value"),
        ("multiprocess.sh", ["--grace", "1.5"], "--grace is '1.5'"),
        ("multiprocess.sh", ["--port", "0"], "--port is '0'"),
        ("multiprocess.sh", ["--port", "65536"], "--port is '65536'"),
        # 1 in the shell's arithmetic, which overflows.
        ("multiprocess.sh", ["--port", "18446744073709551617"], "--port is '1844"),
        ("multiprocess.sh", ["--processes", "2"], "nothing to run"),
        ("queued_resource.sh", ["begin"], "action is 'begin'"),
        ("queued_resource.sh", ["watch", "--name", "a", "--zone", "b"], "--project is missing"),
        ("queued_resource.sh", [*QUEUED, "--name", "A b"], "--name is 'A b'"),
        ("queued_resource.sh", [*QUEUED, "--wait", "soon"], "--wait is 'soon'"),
        ("queued_resource.sh", [*QUEUED, "--wait", "0"], "--wait is '0'"),
        ("queued_resource.sh", [*QUEUED, "--env", "TFDS_DATA_DIR"], "--env is 'TFDS_DATA_DIR'"),
        ("jobset.sh", ["--name", "a", "--", "train"], "--image is missing"),
        ("jobset.sh", [*JOBSET, "--name", "a: b"], "--name is 'a: b'"),
        ("jobset.sh", [*JOBSET, "--name", "Bad-Name"], "--name is 'Bad-Name'"),
        ("jobset.sh", [*JOBSET, "--name", "123"], "--name is '123'"),
        ("jobset.sh", [*JOBSET, "--name", "a-"], "--name is 'a-'"),
        ("jobset.sh", [*JOBSET, "--image", "i #x"], "--image is 'i #x'"),
        ("jobset.sh", [*JOBSET, "--queue", 'a"'], "--queue is 'a\"'"),
        ("jobset.sh", [*JOBSET, "--accelerator", "a: b"], "--accelerator is 'a: b'"),
        ("jobset.sh", [*JOBSET, "--topology", "08x8"], "--topology is '08x8'"),
        ("jobset.sh", [*JOBSET, "--topology", "0x4"], "--topology is '0x4'"),
        ("jobset.sh", [*JOBSET, "--topology", "4"], "--topology is '4'"),
        ("jobset.sh", [*JOBSET, "--topology", "1x1", "--", "train"], "--topology 1x1 has 1 chips"),
        ("jobset.sh", [*JOBSET, "--slices", "0"], "--slices is '0'"),
        ("jobset.sh", [*JOBSET, "--chips-per-host", "04"], "--chips-per-host is '04'"),
        ("jobset.sh", [*JOBSET, "--max-restarts", "-1"], "--max-restarts is '-1'"),
        ("jobset.sh", [*JOBSET, "--env", "1A=2"], "--env is '1A=2'"),
    ],
)
def test_a_bad_argument_is_reported_in_one_sentence(script, arguments, said):
    done = call(script, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_zero_restarts_and_zero_seconds_are_allowed():
    assert jobset("--max-restarts", "0")["spec"]["failurePolicy"]["maxRestarts"] == 0
    assert len(commands(dry_run("multiprocess.sh", "--grace", "0"))) == 2


def test_a_missing_program_is_reported_in_one_sentence():
    env = os.environ | {"GUIDED_DISTILL": "no-such-program -m x"}
    done = call("multiprocess.sh", "--", *VERB, env=env)
    assert done.returncode == 2
    assert "the program 'no-such-program' isn't installed" in done.stderr
    assert len(done.stderr.splitlines()) == 1
