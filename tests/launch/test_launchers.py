"""What launch/ would do, without doing it: its commands and manifests say what they should."""

import json
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


def call(script, *arguments):
    return subprocess.run(
        [str(LAUNCH / script), *arguments], capture_output=True, text=True, timeout=20
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


def test_a_queued_resource_is_asked_for_awaited_installed_and_started():
    where = ["--name", "run", "--project", "p", "--zone", "z"]
    text = dry_run("queued_resource.sh", "start", *where, "--accelerator-type", "v6e-16", "--spot")
    create, describe, archive, copy, install, start = commands(text)
    assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert {"--spot", "v6e-16", "v2-alpha-tpuv6e"} <= set(create)
    assert describe[4] == "describe"
    assert archive[0] == "git"
    for command in (copy, install, start):
        assert command[command.index("--worker") + 1] == "all"
    assert "guided-distill[tpu]" in install[-1]
    # The hosts' shell reads it once more.
    program = shlex.split(start[-1].split("nohup", 1)[1].split(">>")[0])
    assert program == ["../environment/bin/guided-distill", *VERB]
    for action, said in (("watch", "tail"), ("stop", "kill -TERM"), ("delete", "delete")):
        (command,) = commands(call("queued_resource.sh", action, *where, "--dry-run").stdout)
        assert said in " ".join(command)


def test_the_jobset_fits_its_schema_and_its_slices():
    manifest = jobset("--topology", "4x8", "--slices", "2", "--queue", "ours")
    validate(manifest, "jobset_schema.json")
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ours"
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    work = job["template"]["spec"]
    assert work["parallelism"] == work["completions"] == 8
    (container,) = work["template"]["spec"]["containers"]
    assert container["args"] == VERB
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    codes = work["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes["containerName"] == container["name"]
    assert codes["values"] == [2, Interrupted.STATUS]


def test_the_schema_is_strict():
    manifest = jobset()
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "nodSelector"
    ] = {}
    with pytest.raises(jsonschema.ValidationError, match="nodSelector"):
        validate(manifest, "jobset_schema.json")


def test_the_skypilot_task_fits_its_schema_and_recovers_from_a_pre_emption():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    validate(task, "skypilot_schema.json")
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [Interrupted.STATUS]
    task["resources"]["spot"] = True
    with pytest.raises(jsonschema.ValidationError, match="spot"):
        validate(task, "skypilot_schema.json")


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("multiprocess.sh", ["train"], "put -- before"),
        ("multiprocess.sh", ["--processes", "two"], "--processes is 'two'"),
        ("multiprocess.sh", ["--processes", "2"], "nothing to run"),
        ("queued_resource.sh", ["begin"], "action is 'begin'"),
        ("queued_resource.sh", ["watch", "--name", "a", "--zone", "b"], "--project is missing"),
        ("jobset.sh", ["--name", "a", "--", "train"], "--image is missing"),
        (
            "jobset.sh",
            ["--name", "a", "--image", "b", "--topology", "1x1", "--", "train"],
            "--topology 1x1 has 1 chips",
        ),
    ],
)
def test_what_launchers_cannot_do_is_one_sentence(script, arguments, said):
    done = call(script, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
