"""The verbs that take models in and out: import, export."""

import argparse
from typing import Any

from guided_distill.errors import UserError
from guided_distill.verbs.shared import command_of_run, path, several, stage_name


def add_verbs(verbs: Any) -> None:
    """Adds them to the parser's verbs."""
    imported = command_of_run(
        verbs,
        "import",
        _import,
        "make a teacher of a published model: a diffusers folder or a single .safetensors file",
        "guided-distill import --from stable-diffusion-v1-5 --workdir runs/sd15",
    )
    imported.add_argument(
        "--from",
        dest="source",
        required=True,
        help="a diffusers folder, a .safetensors file of Stable Diffusion, or hub:ID or "
        "hub:ID@REVISION to fetch a folder",
    )
    imported.add_argument(
        "--prediction_type",
        help="epsilon or v_prediction, where a single file doesn't tell (Stable Diffusion 2)",
    )
    imported.add_argument(
        "--tokenizer",
        type=path,
        help="a tokenizer's folder, which a single file doesn't hold",
    )

    imported.add_argument(
        "--averaged",
        action="store_true",
        help="take the moving averages (model_ema.*) that a single file holds, not its weights",
    )

    export = command_of_run(
        verbs,
        "export",
        _export,
        "write a run's results to a folder of their own, to keep or to give away",
        "guided-distill export --workdir runs/digits --stages teacher,halving_ddim_4 --out digits",
    )
    export.add_argument(
        "--format",
        default="checkpoint",
        help="checkpoint, to sample and train on with this program; diffusers, one stage as a folder "
        "that its pipelines load; or stablehlo, one student as a program of its own "
        "(default: %(default)s)",
    )
    export.add_argument(
        "--stages",
        type=several(stage_name),
        help="folders of stages, separated by commas (default: all that are finished; of the other "
        "formats the last one)",
    )
    export.add_argument("--out", required=True, type=path, help="new folder to write")


# As everywhere here, each verb imports what it needs when it runs.


def _import(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.interop.import_model import SingleFile, import_model

    single = SingleFile(options.prediction_type, options.tokenizer, options.averaged)
    for each in import_model(options.source, options.workdir, single=single):
        print(each)


def _export(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.interop.diffusers_export import export_diffusers
    from guided_distill.interop.stablehlo_export import export_stablehlo
    from guided_distill.interop.weights import export_weights

    formats = {
        "checkpoint": export_weights,
        "diffusers": export_diffusers,
        "stablehlo": export_stablehlo,
    }
    if options.format not in formats:
        raise UserError(f"--format is {options.format!r}; choose one of {', '.join(formats)}")
    for each in formats[options.format](options.workdir, options.out, stages=options.stages):
        print(each)
