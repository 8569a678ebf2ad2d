"""The verbs import and export: a folder in, the same folder out, and all that a student's folder says."""

import json
import re
import shutil
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from etils import epath
from text_models import write_minilm

from guided_distill import cli
from guided_distill.config import Guidance
from guided_distill.errors import UserError
from guided_distill.formats.diffusers_export import check_exportable
from guided_distill.formats.diffusers_folder import WEIGHTS
from guided_distill.runs.trained import load_finished
from guided_distill.text.minilm import LENGTH
from guided_distill.text.registry import copy_text_encoder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("source") / "tiny-diffusion")


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("run") / "run")
    assert cli.main(["import", "--from", str(source), "--workdir", str(workdir)]) == 0
    return workdir


def files(folder):
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def read_json(path):
    return json.loads(path.read_text())


def said(capsys):
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("guided-distill: ")
    return line


def export(workdir, stage, out):
    arguments = ["--workdir", str(workdir), "--stages", stage, "--out", str(out)]
    return cli.main(["export", "--format", "diffusers", *arguments])


def test_an_import_is_a_finished_teacher(run, assert_same_weights):
    teacher = load_finished(run / "teacher")
    assert_same_weights(teacher.params, tiny.unet())
    about = teacher.description
    assert about.latent
    assert about.data_shape == (tiny.SIZE, tiny.SIZE, tiny.LATENTS)
    assert about.condition_shapes == {"text": (tiny.LENGTH, tiny.WIDTH)}
    assert about.model.parameterization == "eps"
    assert about.model.schedule_options == {"beta_start": 0.00085, "beta_end": 0.012}


def test_companions_are_all_but_the_denoisers_weights_byte_for_byte(source, run):
    companions = files(run / "companions")
    assert json.loads(companions.pop("unet/config.json")) == tiny.UNET
    whole = files(source)
    assert companions == {
        name: each for name, each in whole.items() if not name.startswith("unet/")
    }


def test_what_has_no_effect_here_goes_out_as_it_came_in(source, tmp_path, caplog):
    """Stable Diffusion 2.1 has upcast_attention; DDIM's default of clip_sample is for pixels."""
    folder, run = tmp_path / "source", epath.Path(tmp_path / "run")
    shutil.copytree(source, folder)
    tiny.write_json(folder / "unet" / "config.json", {**tiny.UNET, "upcast_attention": True})
    tiny.write_json(
        folder / "scheduler" / "scheduler_config.json", {**tiny.SCHEDULER, "clip_sample": True}
    )
    assert cli.main(["import", "--from", str(folder), "--workdir", str(run)]) == 0
    assert "clip_sample is ignored" in caplog.text
    assert export(run, tiny.add_student(run, num_steps=2, sampler="ddim"), tmp_path / "out") == 0
    assert read_json(tmp_path / "out" / "unet" / "config.json")["upcast_attention"] is True
    scheduler = read_json(tmp_path / "out" / "scheduler" / "scheduler_config.json")
    assert scheduler["clip_sample"] is False


def test_a_model_conditioned_by_minilm_comes_back(source, tmp_path):
    write_minilm(tmp_path / "minilm", hidden_size=tiny.WIDTH, num_attention_heads=1)
    folder = tmp_path / "own"
    shutil.copytree(source, folder)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    copy_text_encoder(f"minilm:{tmp_path / 'minilm'}", epath.Path(folder))
    run = epath.Path(tmp_path / "run")
    assert cli.main(["import", "--from", str(folder), "--workdir", str(run)]) == 0
    about = load_finished(run / "teacher").description
    assert about.condition_shapes == {"text": (LENGTH, tiny.WIDTH)}


def test_a_teacher_goes_out_as_it_came_in(source, run, tmp_path):
    assert export(run, "teacher", tmp_path / "out") == 0
    before, after = files(source), files(tmp_path / "out")
    assert "time_cond_proj_dim" in read_json(tmp_path / "out" / "unet" / "config.json")
    assert after.keys() == before.keys() | {"README.md"}
    config = "unet/config.json"
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {config, "model_index.json"}
    index = [json.loads(each["model_index.json"]) for each in (before, after)]
    assert index[0] == index[1]


def test_a_students_folder(run, tmp_path):
    stage = tiny.add_student(run, parameterization="v", num_steps=4, sampler="ddim")
    assert export(run, stage, tmp_path) == 0
    config = read_json(tmp_path / "unet" / "config.json")
    assert config["time_cond_proj_dim"] == 256
    assert tuple(map(int, config["_diffusers_version"].split(".")[:2])) >= (0, 9)
    tensors = safetensors.numpy.load_file(tmp_path / "unet" / f"{WEIGHTS}.safetensors")
    assert tensors["time_embedding.cond_proj.weight"].shape == (32, 256)
    scheduler = read_json(tmp_path / "scheduler" / "scheduler_config.json")
    expected = {
        "_class_name": "DDIMScheduler",
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction",
        "beta_start": 0.00085,
    }
    assert {key: scheduler[key] for key in expected} == expected
    index = read_json(tmp_path / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    card = (tmp_path / "README.md").read_text()
    assert "| guidance_scale | 2 to 14:" in card
    assert "num_inference_steps=4" in card
    assert not re.search(r"\{[%{]|\n\n\n", card)


def test_a_stochastic_students_folder_has_its_scheduler(run, tmp_path):
    stage = tiny.add_student(run, num_steps=4, sampler="stochastic")
    assert export(run, stage, tmp_path) == 0
    script = tmp_path / "scheduler" / "scheduling_guided_distill.py"
    compile(script.read_text(), "file", "exec")
    name = "GuidedDistillStochasticScheduler"
    assert read_json(tmp_path / "model_index.json")["scheduler"] == [script.stem, name]
    scheduler = read_json(tmp_path / "scheduler" / "scheduler_config.json")
    assert (scheduler["_class_name"], scheduler["trained_steps"]) == (name, 4)
    assert (
        'from_pretrained("FOLDER", trust_remote_code=True)' in (tmp_path / "README.md").read_text()
    )


@pytest.mark.parametrize("changes", [{"num_steps": 16, "sampler": "ddim"}, {"stage": "guidance"}])
def test_steps_that_ddim_would_miss_get_another_scheduler(run, tmp_path, changes):
    assert export(run, tiny.add_student(run, **changes), tmp_path) == 0
    scheduler = read_json(tmp_path / "scheduler" / "scheduler_config.json")
    assert scheduler["_class_name"] == "DPMSolverMultistepScheduler"
    assert scheduler["solver_order"] == 1


def test_steps_that_no_scheduler_visits_are_listed(run, tmp_path):
    assert export(run, tiny.add_student(run, num_steps=3 * 16, sampler="ddim"), tmp_path) == 0
    card = (tmp_path / "README.md").read_text()
    (listed,) = re.findall(r"    timesteps=(\[.*\]),", card)
    assert json.loads(listed)[:4] == [999, 978, 957, 937]
    assert "    num_inference_steps=" not in card


def test_a_card_names_its_data_without_their_place(run, tmp_path):
    values = load_finished(run / "teacher").description.to_json()
    values["experiment"]["data"]["name"] = "encoded:/home/somebody/data/laion512"
    experiment = values["experiment"]
    stage = tiny.add_student(run, num_steps=2, sampler="ddim", experiment=experiment)
    assert export(run, stage, tmp_path) == 0
    card = (tmp_path / "README.md").read_text()
    assert "# laion512, distilled to 2 steps" in card
    assert "somebody" not in card


def test_in_painting_goes_in_and_out(tmp_path):
    source = tiny.write_pipeline(tmp_path / "inpaint", inpaint=True)
    run = epath.Path(tmp_path / "run")
    assert cli.main(["import", "--from", str(source), "--workdir", str(run)]) == 0
    shapes = load_finished(run / "teacher").description.condition_shapes
    assert shapes["inpaint"] == (tiny.SIZE, tiny.SIZE, 1 + tiny.LATENTS)
    stage = tiny.add_student(run, num_steps=2, sampler="ddim")
    assert export(run, stage, tmp_path / "out") == 0
    assert read_json(tmp_path / "out" / "unet" / "config.json")["in_channels"] == 9
    index = read_json(tmp_path / "out" / "model_index.json")
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    weights = f"unet/{WEIGHTS}.safetensors"
    assert export(run, "teacher", tmp_path / "again") == 0
    assert files(tmp_path / "again")[weights] == files(source)[weights]


def test_a_model_of_classes_goes_in_and_out(tmp_path):
    source = tiny.write_pipeline(tmp_path / "classes", num_classes=3)
    run = epath.Path(tmp_path / "run")
    assert cli.main(["import", "--from", str(source), "--workdir", str(run)]) == 0
    about = load_finished(run / "teacher").description
    assert about.class_names == ("0", "1", "2")
    assert about.condition_shapes == {"label": ()}
    stage = tiny.add_student(run, num_steps=1, sampler="ddim")
    assert export(run, stage, tmp_path / "out") == 0
    assert "prompt_embeds=table[label]" in (tmp_path / "out" / "README.md").read_text()
    assert export(run, "teacher", tmp_path / "again") == 0
    before, after = files(source), files(tmp_path / "again")
    for part in ("unet", "class_embedder"):
        assert after[f"{part}/{WEIGHTS}.safetensors"] == before[f"{part}/{WEIGHTS}.safetensors"]


def test_a_dit_goes_in_and_out(tmp_path, assert_same_weights):
    source = tiny.write_dit(tmp_path / "dit")
    run = epath.Path(tmp_path / "run")
    assert cli.main(["import", "--from", str(source), "--workdir", str(run)]) == 0
    teacher = load_finished(run / "teacher")
    assert_same_weights(teacher.params, tiny.dit())
    assert teacher.description.class_names == ("cat", "1", "2")
    assert export(run, "teacher", tmp_path / "out") == 0
    before, after = files(source), files(tmp_path / "out")
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed <= {"README.md", "transformer/config.json", "model_index.json"}


@pytest.mark.parametrize(
    ("changes", "model", "words"),
    [
        ({"sampler": "encode"}, {}, "encodes images"),
        ({}, {"parameterization": "x_and_eps"}, r"config\.model\.parameterization"),
        ({}, {"schedule": "cosine"}, r"config\.model\.schedule"),
        ({}, {"name": "unet"}, r"config\.model\.name"),
        ({"w_min": 0.0}, {"name": "dit"}, "which diffusers doesn't have"),
        ({"w_min": 0.0}, {}, r"config\.guidance\.w_embedding is scalar"),
    ],
)
def test_stages_without_a_place_are_refused(run, changes, model, words):
    about = load_finished(run / "teacher").description
    experiment = replace(about.experiment, guidance=Guidance(w_embedding="scalar"))
    about = replace(about, experiment=experiment)
    check_exportable(about, "S")
    experiment = replace(about.experiment, model=replace(about.model, **model))
    with pytest.raises(UserError, match=words):
        check_exportable(replace(about, experiment=experiment, **changes), "S")


def test_export_requires_one_stage_a_format_and_an_empty_folder(run, tmp_path, capsys):
    assert export(run, "teacher,teacher", tmp_path / "out") == 2
    assert "--stages" in said(capsys)
    arguments = ["export", "--workdir", str(run), "--out", str(tmp_path), "--format", "onnx"]
    assert cli.main(arguments) == 2
    assert "--format" in said(capsys)
    (tmp_path / "file").write_text("")
    assert export(run, "teacher", tmp_path) == 2
    assert "not empty" in said(capsys)


@pytest.mark.parametrize(
    ("format_", "last"),
    [("checkpoint", "own_export.read_metrics"), ("diffusers", "diffusers_export.write_card")],
)
def test_an_export_that_is_cut_leaves_nothing(run, tmp_path, monkeypatch, format_, last):
    arguments = [
        "export",
        "--workdir",
        str(run),
        "--format",
        format_,
        "--out",
        str(tmp_path / "out"),
    ]

    def cut(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"guided_distill.formats.{last}", cut)
        assert cli.main(arguments) == 130
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    assert cli.main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_is_not_written_over(run, tmp_path, capsys):
    arguments = ["export", "--workdir", str(run), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    before = files(tmp_path)
    capsys.readouterr()
    assert cli.main(arguments) == 2
    assert "out is not empty" in said(capsys)
    assert files(tmp_path) == before


def test_a_stage_is_a_name_and_a_folder_is_given(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    arguments = ["export", "--workdir", str(run), "--out"]
    stage = f"../{run.name}/teacher"
    assert cli.main([*arguments, str(tmp_path / "out" / "in"), "--stages", stage]) == 2
    assert f"--stages is '{stage}'; give the name of a stage's folder" in said(capsys)
    assert not list((tmp_path / "out").iterdir())
    assert cli.main([*arguments, ""]) == 2
    assert "--out is empty" in said(capsys)


def test_a_run_without_companions_is_refused(run, tmp_path, capsys):
    (tmp_path / "alone").mkdir()
    shutil.copy(run / "config.json", tmp_path / "alone")
    assert export(tmp_path / "alone", "teacher", tmp_path / "out") == 2
    assert "companions is missing" in said(capsys)


def pickled(folder):
    weights = folder / "unet" / f"{WEIGHTS}.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def foreign_scheduler(folder):
    tiny.write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    )


def sdxl(folder):
    config = {**tiny.UNET, "addition_embed_type": "text_time"}
    tiny.write_json(folder / "unet" / "config.json", config)


def edit(change):
    def spoil(folder):
        path = folder / "unet" / f"{WEIGHTS}.safetensors"
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path)

    return spoil


def linked(folder):
    path = folder / "vae" / "config.json"
    path.rename(folder.parent / "elsewhere.json")
    path.symlink_to(folder.parent / "elsewhere.json")


def without(*parts):
    return lambda folder: folder.joinpath(*parts).rename(folder / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without("model_index.json"), "not a diffusers model"),
        (without("unet", "config.json"), "config.json is missing"),
        (without("scheduler", "scheduler_config.json"), "scheduler_config.json is missing"),
        (without("tokenizer"), "tokenizer"),
        (without("vae", f"{WEIGHTS}.safetensors"), "has no weights"),
        (pickled, "is a pickle"),
        (foreign_scheduler, "_class_name"),
        (sdxl, "addition_embed_type"),
        (linked, "config.json is a link out of"),
        (edit(lambda tensors: tensors.pop("conv_in.weight")), "lacks conv_in.weight"),
        (edit(lambda tensors: tensors.update(more=np.ones(1))), "no place for: more"),
        (
            edit(lambda tensors: tensors.update({"conv_in.bias": np.ones(3, np.float32)})),
            "conv_in.bias (3, not 32)",
        ),
    ],
)
def test_bad_folders_are_one_sentence_and_no_run(source, tmp_path, capsys, spoil, words):
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    spoil(folder)
    arguments = ["--from", str(folder), "--workdir", str(tmp_path / "run")]
    assert cli.main(["import", *arguments]) == 2
    assert words in said(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "/nothing"], "/nothing"),
        (["--from", "hub:some/model"], "huggingface_hub"),
        (["--from", "/nothing", "--prediction_type", "epsilon"], "--prediction_type"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["import", "--workdir", str(tmp_path / "run"), *arguments]) == 2
    assert words in said(capsys)


def test_a_run_is_not_written_over(source, run, capsys):
    assert cli.main(["import", "--from", str(source), "--workdir", str(run)]) == 2
    assert "another --workdir" in said(capsys)


def test_the_hub_is_asked_for_safetensors_and_text_alone(source, tmp_path, monkeypatch):
    hub = hub_of(source, tmp_path / "0f3a")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    workdir = epath.Path(tmp_path / "run")
    assert cli.main(["import", "--from", "hub:some/model@v2", "--workdir", str(workdir)]) == 0
    (asked,) = hub.asked
    assert (asked["name"], asked["revision"]) == ("some/model", "v2")
    ends = {pattern.rpartition(".")[2] for pattern in asked["allow_patterns"]}
    assert ends == {"json", "txt", "safetensors"}
    about = load_finished(workdir / "teacher").description
    assert about.experiment.data.name == "hub:some/model@0f3a"


def hub_of(repository, snapshot):
    """huggingface_hub in the small: by its own rule, a name has to match a pattern to come along."""

    class Hub:
        def __init__(self):
            self.asked = []

        def snapshot_download(self, name, *, revision, allow_patterns, ignore_patterns):
            self.asked.append(
                {"name": name, "revision": revision, "allow_patterns": allow_patterns}
            )
            for path in files(repository):
                if any(fnmatch(path, each) for each in allow_patterns) and not any(
                    fnmatch(path, each) for each in ignore_patterns
                ):
                    (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(Path(repository) / path, snapshot / path)
            return str(snapshot)

    return Hub()


def in_halves(source, target):
    """As pipeline.to(torch.float16).save_pretrained(variant="fp16") writes it."""
    shutil.copytree(source, target)
    for path in Path(target).rglob("*.safetensors"):
        tensors = safetensors.numpy.load_file(path)
        halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
        safetensors.numpy.save_file(halves, path.with_suffix(".fp16.safetensors"))
        path.unlink()
    tiny.write_json(target / "text_encoder" / "config.json", {**tiny.TEXT, "dtype": "float16"})
    return target


def with_a_safety_checker(folder):
    index = read_json(folder / "model_index.json")
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    tiny.write_json(folder / "model_index.json", index)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"a pickle")


def test_a_repository_in_half_precision_alone(source, tmp_path, monkeypatch, caplog):
    repository = in_halves(source, tmp_path / "halves")
    with_a_safety_checker(repository)
    hub = hub_of(repository, tmp_path / "0f3a")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    run = epath.Path(tmp_path / "run")
    assert cli.main(["import", "--from", "hub:some/model", "--workdir", str(run)]) == 0
    assert [asked["revision"] for asked in hub.asked] == [None, "0f3a"]
    assert not (tmp_path / "0f3a" / "safety_checker").exists()
    assert "safety_checker is left out" in caplog.text
    assert read_json(run / "companions" / "model_index.json")["safety_checker"] == [None, None]
    assert export(run, "teacher", tmp_path / "out") == 0
    weights = {name for name in files(tmp_path / "out") if name.endswith(".safetensors")}
    assert weights == {name for name in files(source) if name.endswith(".safetensors")}
    # Or transformers would load the encoder in half precision beside a denoiser in float32.
    assert read_json(tmp_path / "out" / "text_encoder" / "config.json")["dtype"] == "float32"
