"""Plans, compared with closed forms, and the compiler, which needs no TPU."""

import importlib.util
import json
import math
import os
import runpy
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from guided_distill import cli, config
from guided_distill.chips import CHIPS
from guided_distill.data.outline import expected_outline
from guided_distill.errors import UserError
from guided_distill.plan import compiler
from guided_distill.plan.measured import (
    Collective,
    Measured,
    collectives_of,
    memory_required,
    with_loop,
)
from guided_distill.plan.plan import CALL, Plan, make_plans
from guided_distill.plan.programs import (
    held_bytes,
    kept_bytes,
    lower_call,
    lower_step,
    networks_of,
    student_of,
)
from guided_distill.plan.topologies import Topology, chips_of, find_topology
from guided_distill.report.plans import lines_under
from guided_distill.run_data import open_data, outline_for
from guided_distill.stages import all_stages
from guided_distill.training.mesh import DATA_AXIS, data_mesh

CONFIGS = Path(__file__).parents[2] / "configs"
MEASURED = Measured(
    flops=197e12,
    bytes=819e9 / 2,
    seconds=0.25,
    arguments=4 * 2**30,
    temporary=2**30,
    peak=8 * 2**30,
    collectives={"all-reduce": Collective(1, int(200e9)), "all-gather": Collective(2, int(100e9))},
)
PLAN = Plan(
    kind="teacher",
    updates=3600,
    batch_size=64,
    devices=16,
    chip=CHIPS["v5e"],
    parameters=1,
    kept=1,
    measured=MEASURED,
)

OLD = jax.__version__.startswith("0.7.")


def read(name, variant=""):
    return config.parse(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](variant))


def test_a_plan_follows_from_what_was_measured():
    # A second of computation, half a second of memory; all-reduce sends its result twice.
    assert PLAN.bounds == pytest.approx({"compute": 1.0, "memory": 0.5, "network": 2.5})
    assert PLAN.seconds == pytest.approx(2.5)
    assert PLAN.images_per_second == pytest.approx(64 / 2.5)
    assert PLAN.hours == pytest.approx(2.5)
    assert PLAN.spare == pytest.approx(0.5)
    # Four examples per device take 4 GiB, and 12 GiB are available.
    assert PLAN.largest_batch == 12 * 16
    slow = replace(PLAN, measured=MEASURED._replace(seconds=7.0))
    assert slow.seconds == 7.0


def test_a_program_that_does_not_fit_has_no_figures():
    plan = replace(PLAN, measured=None, why="too large")
    written = json.loads(json.dumps(plan.to_json()))
    assert written["why"] == "too large"
    assert written["hours"] is written["seconds"] is written["largest_batch"] is None


@pytest.mark.parametrize(
    "why",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(29.50G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 29.50G of 15.75G hbm.",
    ],
)
def test_the_required_memory_is_read_from_the_compilers_message(why):
    assert memory_required(why) == (29.5 * 2**30, 15.75 * 2**30)


def test_a_message_without_figures_gives_no_memory():
    assert memory_required("RESOURCE_EXHAUSTED: out of 3 tries") is None


def test_the_largest_batch_is_estimated_if_a_program_does_not_fit():
    # Four examples per device take 6 GiB, and 3 GiB are available.
    shortage = compiler.Shortage(needed=8 * 2**30, available=5 * 2**30, held=2 * 2**30)
    plan = replace(PLAN, measured=None, why="too large", shortage=shortage)
    assert plan.largest_batch == 2 * 16
    assert json.loads(json.dumps(plan.to_json()))["shortage"]["needed"] == 8 * 2**30
    full = shortage._replace(held=6 * 2**30)
    assert replace(plan, shortage=full).largest_batch == 0


def test_lines_report_the_hours_of_stages_and_the_seconds_of_samples():
    call = replace(PLAN, kind=CALL, updates=0, calls={4: 4, 1: 1})
    sampled = "64 samples take 10 s in 4 steps, 2.5 s in 1 step."
    assert lines_under([call]) == [sampled]
    assert lines_under([PLAN, call]) == [sampled, "All of teacher: 2.5 hours."]
    missing = replace(PLAN, kind="guidance", measured=None, why="too large")
    assert lines_under([PLAN, missing]) == [
        "guidance: too large",
        "Some stages have no plan, for the reasons above.",
    ]


def test_collectives_are_found_in_a_real_program(mesh_of):
    mesh = mesh_of(8)
    split = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    whole = NamedSharding(mesh, PartitionSpec())

    def both(x):
        return x.sum(axis=0), jax.lax.with_sharding_constraint(x, whole) * 2

    lowered = jax.jit(both, in_shardings=split, out_shardings=whole).lower(
        jax.ShapeDtypeStruct((8, 128), jnp.bfloat16)
    )
    found = collectives_of(lowered.compile().as_text())
    assert set(found) == {"all-reduce", "all-gather"}
    # The gathered array and the summed row, possibly in float32.
    assert found["all-gather"].bytes in (8 * 128 * 2, 8 * 128 * 4)
    assert found["all-reduce"].bytes in (128 * 2, 128 * 4)


def test_a_tuple_counts_all_its_arrays_and_an_asynchronous_collective_counts_once():
    text = """
      %a = (f32[2,3]{1,0}, /*index=1*/pred[5]{0}) all-reduce(%x, %y), replica_groups={}
      ROOT %b = bf16[7]{0:T(8)} all-gather-done(%s)
      %s = (bf16[1]{0}, bf16[7]{0}) all-gather-start(%z)
      %c = f32[9]{0} fusion(%all-to-all.3), calls=%f
    """
    assert collectives_of(text) == {
        "all-reduce": Collective(1, 24 + 5),
        "all-gather": Collective(1, 14),
    }


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    """Those in functions that its body calls count too, which is how TPUs write a reduce-scatter."""
    text = """
%all-reduce-scatter (p: f32[7]) -> f32[7] {
  %r = f32[7]{0} all-reduce(%p)
}

%body.1 (p: (f32[3])) -> (f32[3]) {
  %a = f32[3]{0} all-reduce(%x)
  %f = f32[7]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
}

ENTRY %main (p: f32[3]) -> f32[3] {
  %w = (f32[3]) while(%t), condition=%c, body=%body.1
  ROOT %b = f32[5]{0} all-reduce(%y)
}
"""
    assert collectives_of(text, loop_runs=4) == {"all-reduce": Collective(9, 4 * (28 + 12) + 20)}


@pytest.mark.parametrize("name", ["imagenet64", "sd15_laion512", "dit_imagenet256"])
def test_activations_of_an_example_are_computed_from_shapes(name):
    experiment = read(name, "runlocal")
    outline = outline_for(experiment)
    height, width, channels = outline.shape
    larger = replace(outline, shape=(2 * height, 2 * width, channels))
    one, four = (kept_bytes(student_of(experiment, each)) for each in (outline, larger))
    assert one > 4 * math.prod(outline.shape)
    # They exclude weights and include embeddings; those of attention grow with the square.
    assert 3.3 < four / one < 16


def test_stage_two_does_no_extra_work(mesh_of):
    """Two calls of the teacher, one of the student, and its backward pass, which costs two calls."""
    experiment = read("cifar10")
    outline, mesh = expected_outline(experiment.data), mesh_of(1)
    # Wide but shallow: it is lowered sooner, and what isn't a network's call remains small.
    options = experiment.model.options | {"blocks_per_level": 1, "channel_multipliers": (1, 1)}
    experiment = replace(
        experiment,
        model=replace(experiment.model, options=options),
        halving=replace(experiment.halving, batch_size=8),
    )
    stage = next(each for each in all_stages(experiment) if each.kind == "halving")
    step = lower_step(experiment, outline, stage, mesh).cost_analysis()["flops"]
    call = lower_call(student_of(experiment, outline), outline, mesh, batch_size=8)
    assert 4.9 < step / call.cost_analysis()["flops"] < 1.15 * 5


def test_activations_of_a_network_of_points_grow_with_its_width():
    experiment = config.parse(
        {"model": {"name": "mlp", "options": {"width": 16, "depth": 1, "embedding_width": 8}}}
    )
    outline = expected_outline(config.Data(shape=(2,), condition={"label": 3}))
    one = kept_bytes(student_of(experiment, outline))
    wide = replace(experiment.model, options={"width": 32, "depth": 1, "embedding_width": 8})
    other = kept_bytes(student_of(replace(experiment, model=wide), outline))
    # A part of them doesn't depend on the width.
    assert 0 < one < other < 2 * one


def test_the_data_must_have_the_shapes_in_the_config():
    experiment = read("digits")
    assert outline_for(experiment).shape == (8, 8, 1)
    right = replace(experiment.data, shape=(8, 8, 1), condition={"label": 10})
    open_data(replace(experiment, data=right))
    for key, value in (("shape", (8, 8, 3)), ("condition", {"label": 9})):
        wrong = replace(right, **{key: value})
        with pytest.raises(
            UserError, match=rf"config.data.{key} is .*, but the {key} of digits is"
        ):
            open_data(replace(experiment, data=wrong))


@pytest.mark.parametrize(
    ("name", "slices"),
    [("v5e:4x4x4", 1), ("v9:2x2", 1), ("v4:2x2", 1), ("v5e:0x4", 1), ("v5e:4x4", 0)],
)
def test_topologies_that_do_not_exist_are_refused(name, slices):
    with pytest.raises(
        UserError, match=r"doesn't exist: give v5e or v6e and two sides, such as v5e:4x4"
    ):
        find_topology(name, slices=slices)


def test_a_compiler_that_is_not_installed_is_reported(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu, which isn't installed: .* \(the extra `tpu`\)"):
        find_topology("v5e:2x2")


def test_an_error_that_names_libtpu_does_not_mean_that_it_is_missing(monkeypatch):
    def fail(**_):
        raise RuntimeError("ABORTED: libtpu is in use")

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    with pytest.raises(UserError, match=r"--topology v5e:2x2 .* \(ABORTED: libtpu is in use\)"):
        find_topology("v5e:2x2")


@pytest.mark.parametrize(
    ("name", "slices", "devices", "chips"),
    [
        ("v5e:1x1", 1, 1, 1),
        ("v5e:2x2", 1, 4, 4),
        ("v4:2x2x1", 1, 4, 4),
        pytest.param(
            *("7x:2x2x1", 1, 8, 4),
            marks=pytest.mark.skipif(OLD, reason="its libtpu doesn't know 7x"),
        ),
        ("v5e:2x4", 2, 16, 16),
        ("v5p:2x2x1", 1, 4, 4),
        ("v6e:2x2", 1, 4, 4),
    ],
)
def test_topologies_have_the_devices_that_jax_will_see(name, slices, devices, chips):
    topology = find_topology(name, slices=slices)
    assert (len(topology.devices), chips_of(topology)) == (devices, chips)
    assert {each.device_kind for each in topology.devices} <= set(topology.chip.device_kinds)


def test_the_step_of_a_stage_compiles_for_a_slice_and_is_cached(tiny_arguments, tmp_path, capsys):
    command = ["plan", *tiny_arguments, "--topology", "v5e:2x2", "--cache", str(tmp_path)]
    assert cli.main([*command, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["topology"], written["slices"], written["optimization_level"]) == (
        "v5e:2x2",
        1,
        "O0",
    )
    assert "libtpu" in written["compiler"]
    assert written["hours"] == pytest.approx(sum(each["hours"] for each in written["plans"]))
    plans = {each["kind"]: each for each in written["plans"]}
    assert list(plans) == ["teacher", "guidance", "halving", "sampling"]
    for plan in plans.values():
        assert plan["devices"] == 4
        assert plan["measured"]["flops"] > 0
        assert "all-to-all" not in plan["measured"]["collectives"]
    # Gradients are summed over the devices once; sampling has none.
    reduced = plans["guidance"]["measured"]["collectives"]["all-reduce"]["bytes"]
    assert reduced == pytest.approx(4 * plans["guidance"]["parameters"], rel=0.1)
    assert not plans["sampling"]["measured"]["collectives"]
    seconds = plans["sampling"]["seconds"]
    of_samples = {str(n): pytest.approx(n * seconds) for n in (2, 1)}
    assert plans["sampling"]["sample_seconds"] == of_samples
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("plans/*.json")}
    assert len(kept) == 4
    assert cli.main([*command, "--stage", "halving"]) == 0
    assert "All of halving: " in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("plans/*.json")} == kept


def test_slices_share_a_batch_and_split_weights_within(tiny_arguments, tmp_path, capsys):
    command = ["plan", *tiny_arguments, "--topology", "v4:2x2x1", "--slices=2", "--config.fsdp=0"]
    assert cli.main([*command, "--stage", "teacher", "--json", "--cache", str(tmp_path)]) == 0
    written = json.loads(capsys.readouterr().out)
    (plan,) = written["plans"]
    assert plan["devices"] == 8
    assert plan["measured"]["flops"] > 0
    assert any("Traffic between slices" in note for note in written["notes"])


@pytest.mark.parametrize(("name", "fsdp"), [("v5e:2x2", 2), ("v4:2x2x1", 0), ("v6e:4x4", 8)])
def test_weights_are_split_within_a_slice(name, fsdp):
    for count in (1, 2):
        mesh = data_mesh(find_topology(name, slices=count).devices, fsdp=fsdp)
        rows = [{getattr(each, "slice_index", 0) for each in row} for row in mesh.devices]
        assert all(len(row) == 1 for row in rows)
        assert set.union(*rows) == set(range(count))


def test_a_cache_that_cannot_be_written_is_reported_before_compiling(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    experiment = read("digits", "runlocal")
    task = compiler.CompileTask(experiment, outline_for(experiment), None, "v5e:2x2", 1, "O0")
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("it compiles"))
    with pytest.raises(UserError, match=r"file/plans, in the folder of --cache, can't be written"):
        compiler._cached_result(task, epath.Path(tmp_path / "file" / "plans"))


def test_a_loop_counts_as_often_as_it_runs():
    rest = MEASURED._replace(flops=1.0, bytes=2.0, seconds=3.0)
    whole = with_loop(rest._replace(flops=11.0, bytes=22.0, seconds=33.0), rest, runs=4)
    assert (whole.flops, whole.bytes, whole.seconds) == (41.0, 82.0, 123.0)
    assert with_loop(rest, rest._replace(seconds=None), runs=4).seconds is None


def test_accumulation_does_not_change_the_work(tmp_path):
    experiment, topology = replace(read("digits"), fsdp=0), find_topology("v5e:2x2")
    shallow = replace(experiment.model, options=experiment.model.options | {"depth": 2})
    experiment = replace(experiment, model=shallow)
    outline = outline_for(experiment)

    def measured(accumulation):
        guidance = replace(experiment.guidance, batch_size=1024, accumulation=accumulation)
        (plan,) = make_plans(
            replace(experiment, guidance=guidance),
            outline,
            topology,
            stage="guidance",
            level="O0",
            cache=epath.Path(tmp_path),
        )
        return plan.measured

    whole, parts = measured(1), measured(4)
    stage = next(each for each in all_stages(experiment) if each.kind == "guidance")
    held = held_bytes(experiment, outline, stage, data_mesh(topology.devices, fsdp=0))
    # The compiler's figure includes a batch, and padding of arrays.
    assert 0.9 * whole.arguments < held < whole.arguments
    assert parts.flops == pytest.approx(whole.flops, rel=0.05)
    # Weights are gathered once and read once per part; gradients are summed over the devices once.
    assert whole.bytes < parts.bytes < 4 * whole.bytes
    assert parts.collectives.keys() == whole.collectives.keys()
    for kind, sent in whole.collectives.items():
        assert parts.collectives[kind].bytes == pytest.approx(sent.bytes, rel=0.1)
    # The compiler of JAX 0.7 takes more memory for the loop over parts than for the whole batch.
    assert OLD or parts.peak < whole.peak


def _kill_this_process(*_, **__):
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_of_the_compiler_is_reported(tmp_path, monkeypatch, capfd):
    # The separate process runs this function, which it imports by module and name.
    monkeypatch.setattr(compiler, "_compile_and_send", _kill_this_process)
    experiment = read("digits")
    (plan,) = make_plans(
        experiment,
        outline_for(experiment),
        find_topology("v5e:2x2"),
        stage="teacher",
        level="O0",
        cache=epath.Path(tmp_path),
    )
    assert plan.measured is None
    assert "the compiler itself crashed (SIGSEGV)" in plan.why
    assert json.loads(json.dumps(plan.to_json()))["broke"]


def test_missing_stages_and_bad_batch_sizes_are_refused(tmp_path):
    experiment, topology = read("digits"), find_topology("v5e:2x4")
    more = {"topology": topology, "level": "O0", "cache": epath.Path(tmp_path)}
    outline = outline_for(experiment)
    with pytest.raises(UserError, match=r"--stage is autoencoder, which this config doesn't have"):
        make_plans(experiment, outline, stage="autoencoder", **more)
    odd = replace(experiment, teacher=replace(experiment.teacher, batch_size=12))
    said = r"teacher.batch_size is 12, which 8 devices can't share: make it a multiple of 8"
    with pytest.raises(UserError, match=said):
        make_plans(odd, outline, stage="teacher", **more)
    # This comes before compiling anything, even if the bad stage isn't the first.
    halving = replace(experiment.halving, batch_size=24, accumulation=2)
    with pytest.raises(UserError, match=r"in 2 parts \(config.halving.accumulation\): .* of 16"):
        make_plans(replace(experiment, halving=halving), outline, stage="all", **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("guided", {"teacher": 4, "guidance": 4, "halving": 16, CALL: 0}),
        ("naive", {"teacher": 4, "halving of the teacher": 8, "halving of a student": 8, CALL: 0}),
        ("two_student", {"teacher": 4, "halving": 16, CALL: 0}),
    ],
)
def test_rounds_with_different_teachers_have_separate_plans(
    method, expected, monkeypatch, tmp_path
):
    """The first naive round applies guidance to its teacher, with two calls; later rounds need one."""
    experiment = replace(read("digits", "runlocal"), method=method)
    outline = outline_for(experiment)
    command = []

    def answer(task, cache):
        command.append(task.stage)
        return compiler.CompileResult(None)

    monkeypatch.setattr("guided_distill.plan.plan.run_compiler", answer)
    topology = Topology("here", 1, CHIPS["v5e"], tuple(jax.devices()))
    plans = make_plans(experiment, outline, topology, stage="all", level="O0", cache=tmp_path)
    assert {plan.kind: plan.updates for plan in plans} == expected
    for stage in command[:-1]:
        teacher = networks_of(experiment, outline, stage)[1]
        from_student = {"guided": stage.kind == "halving", "naive": stage.num_steps == 1}
        assert teacher.w_conditioned == from_student.get(method, False)


def test_results_are_cached_by_compiler_flags_and_package_version(tmp_path, monkeypatch):
    text = SimpleNamespace(as_text=lambda: "the same program")
    topology = SimpleNamespace(name="here", slices=1, compiler="libtpu 1")
    compiled = []
    monkeypatch.setattr(compiler, "find_topology", lambda *_, **__: topology)
    monkeypatch.setattr(compiler, "_programs", lambda *_: (text, None))
    monkeypatch.setattr(
        compiler, "_compile", lambda *_: compiled.append(0) or (MEASURED._asdict(), "")
    )
    task = compiler.CompileTask(None, None, None, "here", 1, "O0")

    def times():
        assert compiler._cached_result(task, epath.Path(tmp_path)).measured == MEASURED
        return len(compiled)

    assert [times(), times()] == [1, 1]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=1024")
    assert [times(), times()] == [2, 2]
    monkeypatch.setenv("XLA_FLAGS", "--xla_something=1")
    assert times() == 3
    monkeypatch.setattr(compiler, "package_version", lambda: "another")
    assert times() == 4
