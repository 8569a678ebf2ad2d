"""What the compiler for TPUs says of a program: asked in a process of its own, for it may end that."""

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
    memory_asked,
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


class Question(NamedTuple):
    """A program and how to compile it: a stage's update, or without a stage a call of the student.

    level: how much the compiler optimizes.
    """

    experiment: Experiment
    outline: Outline
    stage: Stage | None
    topology: str
    slices: int
    level: str


class Shortage(NamedTuple):
    """Bytes of a device's memory that a program needs, that it may have, and, of those that it needs,
    that it holds whatever the batch.
    """

    needed: int
    available: int
    held: int


class Answer(NamedTuple):
    """What the compiler says; or why it says nothing: the program doesn't fit, or the compiler broke.

    shortage: of a program that doesn't fit, where the compiler gives figures.
    """

    measured: Measured | None
    why: str = ""
    broke: bool = False
    shortage: Shortage | None = None


def ask(question: Question, *, cache: epath.Path) -> Answer:
    """What the compiler says, now or in an earlier call, which the folder `cache` keeps.

    Raises UserError if it has to keep it there, and can't.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(question, cache, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        said: Answer | Exception = ours.recv()
    except EOFError:
        process.join()
        return Answer(None, _ending(process.exitcode or 0), broke=True)
    finally:
        process.kill()
        process.join()
    if isinstance(said, Exception):
        raise said
    return said


def _ending(status: int) -> str:
    if status >= 0:
        return f"the process that compiles ended with status {status}: see what it said above"
    return (
        f"the compiler itself broke down ({signal.Signals(-status).name}), which says nothing of whether "
        f"this fits: try another --topology, --optimization_level or batch size, or another libtpu"
    )


def _answer(question: Question, cache: epath.Path, to: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The asker ends this process.
    jax.config.update("jax_platforms", "cpu")  # An accelerator is the asker's.
    try:
        to.send(_kept(question, cache))
    except Exception as error:
        to.send(error)


def _kept(question: Question, cache: epath.Path) -> Answer:
    topology = find_topology(question.topology, slices=question.slices)
    program, rest = _programs(question, topology)
    key = (
        program.as_text(),
        rest and rest.as_text(),
        topology.name,
        topology.slices,
        topology.compiler,
        question.level,
        package_version(),
        *(os.environ.get(name) for name in _COMPILER_FLAGS),
    )
    path = cache / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        try:  # Before compiling, which can take long.
            check_writable(cache)
        except OSError as error:
            raise UserError(
                f"{cache}, in the folder of --cache, can't be written ({first_line(error)}): choose "
                f"another folder"
            ) from error
        write_text(path, json.dumps(_compiled(question, program, rest)))
    measured, why = json.loads(path.read_text())
    if measured is None:
        return Answer(None, why, shortage=_shortage(question, topology, why))
    collectives = {kind: Collective(*each) for kind, each in measured["collectives"].items()}
    return Answer(Measured(**{**measured, "collectives": collectives}))


def _shortage(question: Question, topology: Topology, why: str) -> Shortage | None:
    asked = memory_asked(why)
    if asked is None:
        return None
    experiment, outline, stage = question.experiment, question.outline, question.stage
    mesh = data_mesh(topology.devices, fsdp=experiment.fsdp)
    return Shortage(*asked, held_bytes(experiment, outline, stage, mesh))


def _programs(
    question: Question, topology: Topology
) -> tuple[jax.stages.Lowered, jax.stages.Lowered | None]:
    """The program; and where it loops over the parts of a batch, what is not of the loop."""
    experiment, outline, stage = question.experiment, question.outline, question.stage
    mesh = data_mesh(topology.devices, fsdp=experiment.fsdp)
    if stage is None:
        size = experiment.guidance.batch_size
        return lower_call(student_of(experiment, outline), outline, mesh, batch_size=size), None
    looped = stage.settings.accumulation > 1
    return (
        lower_step(experiment, outline, stage, mesh),
        lower_rest_of_step(experiment, outline, stage, mesh) if looped else None,
    )


def _compiled(
    question: Question, program: jax.stages.Lowered, rest: jax.stages.Lowered | None
) -> tuple[dict[str, Any] | None, str]:
    runs = question.stage.settings.accumulation if question.stage else 1
    try:
        measured = compile_and_measure(program, level=question.level, loop_runs=runs)
        if rest is not None:
            unlooped = compile_and_measure(rest, level=question.level)
            measured = with_loop(measured, unlooped, runs=runs)
    except MemoryError as error:
        return None, str(error)
    return measured._asdict(), ""
