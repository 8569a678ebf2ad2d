"""Strict numerics for every test, and eight simulated devices for the tests that request them."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Tests spend most of their time compiling, mostly on optimization, and many compile the same programs.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
if tuple(map(int, version("jax").split(".")[:2])) < (0, 12):
    # Without these emitters, compiling takes half as long; later versions don't know the flag.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Threads of several processes on the same cores would spend most of their time waiting for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="guided_distill_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import contextlib
import functools
import gc
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
from jax.sharding import Mesh

from guided_distill.training.mesh import data_mesh

jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("Agg")

DEVICES = jax.devices()
os.environ["JAX_NUM_CPU_DEVICES"] = "1"  # For the processes that tests start.

QUICK = ("data", "diffusion", "evaluation", "objectives", "text")
"""Folders of tests that need no trained run and compile little. They get the mark `quick`."""

LONGEST = (
    "test_notebooks.py",
    "test_configs_run.py",
    "test_pipeline.py",
    "test_text_to_image.py",
    "test_exactness.py",
    "test_mesh.py",
    "test_plan.py",
    "test_processes.py",
    "test_paper_configs.py",
    "test_kill_and_resume.py",
    "test_full_disk.py",
    "test_serve.py",
    "test_docs.py",
)
"""The slowest test files, which start first so that none is still running alone at the end. They get
the mark `slow`."""

FOLDERS = {**dict.fromkeys(QUICK, "quick"), "parity": "parity", "plan": "tpu"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag --kills, and --count and --seed for tests/hostile."""
    parser.addoption(
        "--kills",
        type=int,
        default=3,
        help="number of kills in the test that kills at random instants (default: %(default)s)",
    )
    parser.addoption(
        "--count", type=int, default=500, help="number of hostile inputs (default: %(default)s)"
    )
    parser.addoption(
        "--seed", type=int, default=0, help="seed of the first hostile input (default: %(default)s)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files, keep the order of tests within a file, and mark tests by their folders."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
    for item in items:
        if item.path.name in rank:
            item.add_marker("slow")
        if mark := FOLDERS.get(item.path.parent.name):
            item.add_marker(mark)


def pytest_collection_finish() -> None:
    """Collect garbage less often: imports stay, and tracing allocates many short-lived objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session")
def tiny_arguments() -> list[str]:
    """The arguments of the command line for a tiny config, whose stages take seconds."""
    file = Path(__file__).parents[1] / "configs" / "digits.py"
    return ["--config", f"{file}:runlocal"]


@pytest.fixture(scope="session")
def mesh_of() -> Callable[..., Mesh]:
    """f(count): a mesh of the first `count` devices; f(count, fsdp=n) shards weights over n of them."""
    return lambda count, fsdp=1: data_mesh(DEVICES[:count], fsdp=fsdp)


@contextlib.contextmanager
def _seen(count: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: DEVICES[:count])
        patch.setattr(jax, "local_devices", lambda *process, **backend: DEVICES[:count])
        patch.setattr(jax, "device_count", lambda *backend: count)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_device() -> Iterator[None]:
    """Show programs one device, to compile a third faster; tests get more devices from `mesh_of`."""
    with _seen(1):
        yield


@pytest.fixture(scope="module")
def eight_devices(one_device: None) -> Iterator[None]:
    """Show programs all devices."""
    with _seen(8):
        yield


@pytest.fixture(scope="session")
def assert_same_weights() -> Callable[[object, object], None]:
    """f(one, other): fail unless two trees have the same structure and the same bits in every leaf."""

    def check(one: object, other: object) -> None:
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(np.asarray(left), np.asarray(right))

    return check


@pytest.fixture(scope="session")
def served() -> Iterator[Callable[..., str]]:
    """f(workdir, *flags): the address of a page that samples from a run, served by another process."""
    servers: list[subprocess.Popen[str]] = []

    @functools.cache
    def serve(workdir: Path, *flags: str) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "guided_distill.cli", "serve", "--workdir", str(workdir)]
        servers.append(
            subprocess.Popen(
                [*command, "--port", str(port), *flags], stdout=subprocess.PIPE, text=True
            )
        )
        url = servers[-1].stdout.readline().strip()
        assert url == f"http://127.0.0.1:{port}/"
        return url

    yield serve
    for server in servers:
        server.terminate()
        server.communicate()
