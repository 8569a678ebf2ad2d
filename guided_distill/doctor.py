"""Check that the package works on this machine: versions, hardware, and a tiny run."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.table import Table

from guided_distill import pipeline
from guided_distill.config import default_config, parse
from guided_distill.errors import UserError
from guided_distill.recipes import shrink
from guided_distill.runs.trained import load_finished
from guided_distill.sampling.labels import cycling_labels, of_labels
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import sample
from guided_distill.training.progress import console

PACKAGES = (
    "guided_distill",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "libtpu",
)


def installed() -> Table:
    """Return a table of package versions, devices, memory and free disk space."""
    table = Table(show_header=False, box=None)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    for kind, devices in _devices().items():
        table.add_row("devices", f"{len(devices)} x {kind}{_memory_of(devices[0])}")
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    table.add_row("host", f"{os.cpu_count()} cores, {pages * size / 2**30:.1f} GiB of memory")
    free = shutil.disk_usage(tempfile.gettempdir()).free
    table.add_row("disk", f"{free / 2**30:.1f} GiB free in {tempfile.gettempdir()}")
    return table


def _devices() -> dict[str, list[Any]]:
    kinds: dict[str, list[Any]] = {}
    for device in jax.local_devices():
        kinds.setdefault(device.device_kind, []).append(device)
    return kinds


def _memory_of(device: Any) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f", {limit / 2**30:.1f} GiB each" if limit else ""


def self_test() -> None:
    """Compute on every device, then train, distill, reopen and sample a tiny run, printing each time.

    Raises UserError that names the first check that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        workdir = epath.Path(folder)
        config = default_config()
        config.model.options = {"width": 16, "depth": 1, "embedding_width": 16}
        config = shrink(config)
        # Every device gets an example of each batch.
        for stage in (config.teacher, config.guidance, config.halving):
            stage.batch_size = 8 * jax.device_count()
        experiment = parse(config)
        last = f"halving_ddim_{experiment.halving.last_num_steps}"

        def draw() -> None:
            student = load_finished(workdir / last)
            labels = cycling_labels(4, len(student.description.class_names))
            images = sample(student, Request(condition=of_labels(labels), w=1.0, num_steps=1))
            if not np.isfinite(images).all():
                raise ValueError("samples aren't finite")

        _check("multiplying matrices on every device", _multiply)
        _check(
            "training and distilling for a few updates", lambda: pipeline.run(experiment, workdir)
        )
        _check("reopening the run", lambda: pipeline.run(experiment, workdir))
        _check("sampling in one step", draw)


def _multiply() -> None:
    for device in jax.local_devices():
        ones = jax.device_put(jnp.ones((256, 256)), device)
        if float((ones @ ones).mean()) != 256.0:
            raise ValueError(f"{device} returns a wrong product")


def _check(title: str, work: Callable[[], Any]) -> None:
    start = time.perf_counter()
    try:
        work()
    except Exception as error:  # Any problem of the machine or its packages.
        raise UserError(f"{title} fails: {type(error).__name__}: {error}") from error
    console.print(f"{title}: {time.perf_counter() - start:.1f} s", highlight=False)
