"""Compile programs for TPUs in a separate process, because the compiler may crash; cache the results."""

import hashlib
import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
from etils import epath

from guided_distill.config import Experiment
from guided_distill.errors import UserError
from guided_distill.models.outline import Outline
from guided_distill.objectives.stage import Stage
from guided_distill.plan.measured import (
    Collective,
    Measured,
    compile_and_measure,
    memory_required,
    with_loop,
)
from guided_distill.plan.programs import (
    held_bytes,
    lower_call,
    lower_rest_of_step,
    lower_step,
    student_of,
)
from guided_distill.plan.topologies import Topology, find_topology
from guided_distill.runs.trained import package_version
from guided_distill.storage import check_writable, first_line, write_text
from guided_distill.training.mesh import data_mesh

_COMPILER_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


class CompileTask(NamedTuple):
    """A program and how to compile it: a stage's update, or a call of the student if stage is None.

    topology: the name of a slice, such as v5e:4x4. level: the compiler's optimization level.
    """

    experiment: Experiment
    outline: Outline
    stage: Stage | None
    topology: str
    slices: int
    level: str


class Shortage(NamedTuple):
    """Bytes of a device's memory: needed by a program, available, and held for any batch size."""

    needed: int
    available: int
    held: int


class CompileResult(NamedTuple):
    """The compiler's figures, or None and the reason: the program doesn't fit, or the compiler crashed.

    broke: whether the compiler crashed. shortage: of a program that doesn't fit, if the compiler gives
    figures.
    """

    measured: Measured | None
    why: str = ""
    broke: bool = False
    shortage: Shortage | None = None


def run_compiler(task: CompileTask, *, cache: epath.Path) -> CompileResult:
    """Return the result of compiling the task, from the folder `cache` if an earlier call wrote it there.

    Raises UserError if a new result can't be written to `cache`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_compile_and_send, args=(task, cache, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        received: CompileResult | Exception = ours.recv()
    except EOFError:
        process.join()
        return CompileResult(None, _exit_reason(process.exitcode or 0), broke=True)
    finally:
        process.kill()
        process.join()
    if isinstance(received, Exception):
        raise received
    return received


def _exit_reason(status: int) -> str:
    if status >= 0:
        return f"the compiler's process ended with status {status}: see its messages above"
    return (
        f"the compiler itself crashed ({signal.Signals(-status).name}), so it is unknown whether this "
        f"fits: try another --topology, --optimization_level or batch size, or another libtpu"
    )


def _compile_and_send(task: CompileTask, cache: epath.Path, to: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent process ends this one.
    jax.config.update("jax_platforms", "cpu")  # Leaves an accelerator to the parent process.
    try:
        to.send(_cached_result(task, cache))
    except Exception as error:
        to.send(error)


def _cached_result(task: CompileTask, cache: epath.Path) -> CompileResult:
    topology = find_topology(task.topology, slices=task.slices)
    program, rest = _programs(task, topology)
    key = (
        program.as_text(),
        rest and rest.as_text(),
        topology.name,
        topology.slices,
        topology.compiler,
        task.level,
        package_version(),
        *(os.environ.get(name) for name in _COMPILER_FLAGS),
    )
    path = cache / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        try:  # Check this before compiling, which can take long.
            check_writable(cache)
        except OSError as error:
            raise UserError(
                f"{cache}, in the folder of --cache, can't be written ({first_line(error)}): choose "
                f"another --cache"
            ) from error
        write_text(path, json.dumps(_compile(task, program, rest)))
    measured, why = json.loads(path.read_text())
    if measured is None:
        return CompileResult(None, why, shortage=_shortage(task, topology, why))
    collectives = {kind: Collective(*each) for kind, each in measured["collectives"].items()}
    return CompileResult(Measured(**{**measured, "collectives": collectives}))


def _shortage(task: CompileTask, topology: Topology, why: str) -> Shortage | None:
    memory = memory_required(why)
    if memory is None:
        return None
    experiment, outline, stage = task.experiment, task.outline, task.stage
    mesh = data_mesh(topology.devices, fsdp=experiment.fsdp)
    return Shortage(*memory, held_bytes(experiment, outline, stage, mesh))


def _programs(
    task: CompileTask, topology: Topology
) -> tuple[jax.stages.Lowered, jax.stages.Lowered | None]:
    """Return the program and, if it loops over the parts of a batch, the program without the loop."""
    experiment, outline, stage = task.experiment, task.outline, task.stage
    mesh = data_mesh(topology.devices, fsdp=experiment.fsdp)
    if stage is None:
        size = experiment.guidance.batch_size
        return lower_call(student_of(experiment, outline), outline, mesh, batch_size=size), None
    looped = stage.settings.accumulation > 1
    return (
        lower_step(experiment, outline, stage, mesh),
        lower_rest_of_step(experiment, outline, stage, mesh) if looped else None,
    )


def _compile(
    task: CompileTask, program: jax.stages.Lowered, rest: jax.stages.Lowered | None
) -> tuple[dict[str, Any] | None, str]:
    runs = task.stage.settings.accumulation if task.stage else 1
    try:
        measured = compile_and_measure(program, level=task.level, loop_runs=runs)
        if rest is not None:
            unlooped = compile_and_measure(rest, level=task.level)
            measured = with_loop(measured, unlooped, runs=runs)
    except MemoryError as error:
        return None, str(error)
    return measured._asdict(), ""
