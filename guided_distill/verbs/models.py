"""The verbs that import and export models."""

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

from etils import epath

from guided_distill.errors import UserError
from guided_distill.verbs.shared import RUN_OR_FILE, command_of_run, path, several, stage_folder


def add_verbs(verbs: Any) -> None:
    """Add these verbs to the parser."""
    imported = command_of_run(
        verbs,
        "import",
        _import,
        "turn a published model (a diffusers folder or a single .safetensors file) into a teacher",
        "guided-distill import --from stable-diffusion-v1-5 --workdir runs/sd15",
    )
    imported.add_argument(
        "--from",
        dest="source",
        required=True,
        help="a diffusers folder, a .safetensors file of Stable Diffusion, or hub:ID or "
        "hub:ID@REVISION to download a folder",
    )
    imported.add_argument(
        "--prediction_type",
        help="epsilon or v_prediction, for a single file that doesn't say (Stable Diffusion 2)",
    )
    imported.add_argument(
        "--tokenizer",
        type=path,
        help="folder of the tokenizer, which a single file doesn't contain",
    )

    imported.add_argument(
        "--averaged",
        action="store_true",
        help="import the EMA weights (model_ema.*) of a single file instead of the others",
    )

    export = command_of_run(
        verbs,
        "export",
        _export,
        "export stages of a run to a new folder or file",
        "guided-distill export --workdir runs/digits --stages teacher,halving_ddim_4 --out digits",
        what=RUN_OR_FILE,
    )
    export.add_argument(
        "--format",
        default="checkpoint",
        help="checkpoint: a run to sample from or continue with this package; safetensors: one stage in "
        "a single file, for the same uses; diffusers: one stage as a folder that diffusers pipelines "
        "load; stablehlo: one student as a standalone program (default: %(default)s)",
    )
    export.add_argument(
        "--stages",
        type=several(stage_folder),
        help="folders of stages, separated by commas (default: all finished ones; for the other "
        "formats, the last one)",
    )
    export.add_argument(
        "--dtype", help="with safetensors, float32 or float16 (default: float32, which is exact)"
    )
    place = export.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--out", type=path, help="new folder to write to; with safetensors, a new file"
    )
    place.add_argument(
        "--push",
        metavar="USER/NAME",
        help="repository on the Hugging Face Hub to upload to, with a model card; a new one is private. "
        "Without a token, prints what would be uploaded",
    )
    export.add_argument(
        "--public", action="store_true", help="with --push, make a new repository public"
    )


# As in verbs/runs.py, each verb imports what it needs when it runs.


def _import(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.formats.import_model import SingleFile, import_model

    single = SingleFile(options.prediction_type, options.tokenizer, options.averaged)
    for each in import_model(options.source, options.workdir, single=single):
        print(each)


def _export(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.formats.diffusers_export import export_diffusers
    from guided_distill.formats.own_export import export_safetensors, export_weights
    from guided_distill.formats.stablehlo_export import export_stablehlo

    formats: dict[str, Callable[..., list[epath.Path]]] = {
        "checkpoint": export_weights,
        "safetensors": export_safetensors,
        "diffusers": export_diffusers,
        "stablehlo": export_stablehlo,
    }
    if options.format not in formats:
        raise UserError(f"--format is {options.format!r}; choose one of {', '.join(formats)}")
    more = {"stages": options.stages}
    if options.dtype is not None:
        if options.format != "safetensors":
            raise UserError("--dtype is for --format safetensors: leave it out")
        more["dtype"] = options.dtype
    export = formats[options.format]
    if options.push is not None:
        _push(options, export, **more)
        return
    if options.public:
        raise UserError("--public is for --push: leave it out")
    for each in export(options.workdir, options.out, **more):
        print(each)


def _push(options: argparse.Namespace, export: Callable[..., Any], **more: Any) -> None:
    """Export to a temporary folder, print its files with their sizes, and upload it."""
    from guided_distill.formats.hub import check_repository, files_to_upload, upload

    check_repository(options.push)
    with tempfile.TemporaryDirectory() as scratch:
        folder = epath.Path(scratch) / "export"
        out = folder / "model.safetensors" if options.format == "safetensors" else folder
        export(options.workdir, out, repository=options.push, **more)
        for name, size in files_to_upload(folder):
            print(f"{size:>14,}  {name}")
        print(upload(folder, options.push, public=options.public))
