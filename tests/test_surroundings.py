"""The preparation of the process: variables, accelerators and output streams."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from guided_distill import cli, surroundings
from guided_distill.surroundings import lacks_tpu

# Vendor and class of Google's devices, as lspci shows them on machines of its cloud.
NETWORK, DISK = ("0x1ae0", "0x020000"), ("0x1ae0", "0x010802")
OLD_TPU, NEW_TPU = ("0x1ae0", "0x088000"), ("0x1ae0", "0xff0000")
OTHER = ("0x8086", "0xff0000")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """f(device files, devices on the bus): the root folder of a machine with these and libtpu."""
    monkeypatch.setattr(surroundings, "_installed", lambda module: module == "libtpu")

    def make(files=(), bus=()):
        for file in ("null", "vfio/vfio", *files):
            (tmp_path / "dev" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "dev" / file).touch()
        for index, (vendor, kind) in enumerate(bus):
            folder = tmp_path / "sys/bus/pci/devices" / f"0000:00:0{index}.0"
            folder.mkdir(parents=True)
            (folder / "vendor").write_text(f"{vendor}\n")
            (folder / "class").write_text(f"{kind}\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("environ", "files", "bus"),
    [
        ({}, [], []),
        ({"TPU_SKIP_MDS_QUERY": "1", "HOME": "/"}, [], [NETWORK, DISK, OTHER]),
    ],
)
def test_without_a_sign_of_a_tpu_none_is_searched(machine, environ, files, bus):
    assert lacks_tpu(environ, machine(files, bus))


@pytest.mark.parametrize(
    ("environ", "files", "bus"),
    [
        ({}, ["accel0"], []),
        ({}, ["vfio/3"], []),
        ({}, [], [NETWORK, OLD_TPU]),
        ({}, [], [NEW_TPU]),
        ({"TPU_WORKER_ID": "0"}, [], []),
        ({"TPU_NAME": "local"}, [], []),
        ({"JAX_FORCE_TPU_INIT": "1"}, [], []),
        # Another accelerator, which "cpu" would exclude.
        ({}, ["nvidia0"], []),
        ({}, ["kfd"], []),
        # The user's choice, which can also be JAX's own rules.
        ({"JAX_PLATFORMS": ""}, [], []),
        ({"JAX_PLATFORMS": "tpu"}, [], []),
    ],
)
def test_jax_chooses_its_platform_if_there_may_be_a_device(machine, environ, files, bus):
    assert not lacks_tpu(environ, machine(files, bus))


@pytest.mark.parametrize("installed", [[], ["libtpu", "jax_plugins"]])
def test_jax_chooses_its_platform_without_libtpu_or_with_other_plugins(
    machine, monkeypatch, installed
):
    monkeypatch.setattr(surroundings, "_installed", installed.__contains__)
    assert not lacks_tpu({}, machine())


def program(text, **environ):
    # As from a shell: without the variables that conftest.py and planning for a TPU set in this process.
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_PLATFORMS", "TPU_"))
    }
    return subprocess.run(
        [sys.executable, "-c", text], env=variables | environ, capture_output=True, text=True
    )


@pytest.mark.skipif(sys.platform != "linux", reason="looks into Linux's /proc")
def test_libtpu_is_not_loaded_and_matplotlib_draws_to_files():
    if not lacks_tpu({"TPU_LIBRARY_PATH": "libtpu.so"}):
        pytest.skip("there is no libtpu, or there may be an accelerator")
    done = program(
        """
from guided_distill.surroundings import prepare
prepare()
import jax, matplotlib, matplotlib.figure
print(jax.default_backend(), matplotlib.get_backend(), "libtpu" in open("/proc/self/maps").read())
""",
        MPLBACKEND="a_backend_of_a_notebook",
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["cpu", "agg", "False"]


CLI = "from guided_distill.cli import run; run(['--version'])"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_behind_a_stream(stream):
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        done = subprocess.run([sys.executable, "-c", CLI], **streams, text=True)
    if stream == "stderr":
        assert (done.returncode, done.stdout[:14]) == (0, "guided-distill")
        return
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "standard output can't be written ([Errno 28]" in line


def test_streams_that_are_closed():
    closed = 'exec "$0" -c "$1" >&- 2>&-'
    done = subprocess.run(["sh", "-c", closed, sys.executable, CLI], check=False)
    assert done.returncode == 0


def test_a_config_that_exits_is_one_sentence(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text("import sys\nsys.exit(3)\n")
    assert cli.main(["train", "--config", str(config), "--workdir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--config {config} can't be read: SystemExit: 3" in line
