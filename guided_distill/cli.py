"""The command line: guided-distill train | sample | transfer | evaluate | report | import | export."""

import argparse
import contextlib
import functools
import logging
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from guided_distill.errors import UserError

Value = TypeVar("Value", int, float, str)

DESCRIPTION = "Distill classifier-free guided diffusion models to a few sampling steps."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Answers the exit status: 0, or 2 for what the user can put right."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    _hush_threads()
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [each for each in rest if not each.startswith("--config.")]
    if unknown or (rest and options.verb != "train"):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    try:
        options.run(options, rest)
    except UserError as error:
        print(f"guided-distill: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("guided-distill: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


@functools.cache
def _hush_threads() -> None:
    """Keep background threads from printing the errors that they hand to the main thread anyway.

    When a save fails, Orbax logs each traceback on the way, and TensorStore's threads, which have no
    Python object to name, report that the event loop which they would answer is closed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not record.exc_info)
    report = sys.unraisablehook
    sys.unraisablehook = lambda error: None if error.object is None else report(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("guided-distill", description=DESCRIPTION)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")

    train = _verb(
        verbs,
        "train",
        _train,
        "train the teacher and distill it, stage by stage; run again to resume",
        "guided-distill train --config configs/digits.py --workdir runs/digits "
        "--config.teacher.steps=100",
    )
    train.add_argument(
        "--config",
        required=True,
        help="a config file, with :variant if it has any; --config.KEY=VALUE overrides a key",
    )

    sample = _verb(
        verbs,
        "sample",
        _sample,
        "draw samples: a PNG grid and an npz file",
        "guided-distill sample --workdir runs/digits --stage halving_ddim_4 --w 1 --num 40",
    )
    sample.add_argument(
        "--stage",
        help="folder of the stage in the workdir (default: the last one that is finished)",
    )
    sample.add_argument("--num", type=int, default=64, help="how many (default: %(default)s)")
    sample.add_argument(
        "--w", type=float, default=1.0, help="guidance weight (default: %(default)s)"
    )
    sample.add_argument(
        "--labels", help="class numbers, separated by commas, gone through in turn (default: all)"
    )
    sample.add_argument("--num_steps", type=int, help="sampling steps (default: as trained)")
    sample.add_argument("--sampler", help="sampler (default: as trained)")
    sample.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    sample.add_argument("--out", help="folder to write to (default: WORKDIR/samples)")
    sample.add_argument(
        "--allow_untrained",
        action="store_true",
        help="allow a w, num_steps or sampler that the student wasn't trained for",
    )

    transfer = _verb(
        verbs,
        "transfer",
        _transfer,
        "carry images from one class or run to another by way of noise: a PNG figure and an npz file",
        "guided-distill transfer --workdir runs/digits --images data --from_label 7 --to_label 5",
    )
    transfer.add_argument(
        "--to", type=epath.Path, help="run to decode by (default: WORKDIR, which encodes)"
    )
    transfer.add_argument(
        "--images",
        required=True,
        help="an image file, a folder of them, or data: test images of --from_label",
    )
    transfer.add_argument(
        "--from_label", required=True, help="class of the images, by name or number"
    )
    transfer.add_argument("--to_label", required=True, help="class to make of them")
    transfer.add_argument(
        "--encoder", help="folder of the encoder (default: the round nearest to 8 steps)"
    )
    transfer.add_argument(
        "--decoder",
        help="folder of the decoder, in both runs (default: the ddim round nearest to 8 steps)",
    )
    transfer.add_argument(
        "--w_encode", type=float, default=0.0, help="weight to encode at (default: %(default)s)"
    )
    transfer.add_argument(
        "--w", type=float, default=1.0, help="weight to decode at (default: %(default)s)"
    )
    transfer.add_argument(
        "--num", type=int, default=8, help="images at most (default: %(default)s)"
    )
    transfer.add_argument(
        "--seed", type=int, default=0, help="chooses the images of data (default: %(default)s)"
    )
    transfer.add_argument("--out", help="folder to write to (default: WORKDIR/transfers)")

    evaluate = _verb(
        verbs,
        "evaluate",
        _evaluate,
        "measure every stage: results.csv; run again to resume",
        "guided-distill evaluate --workdir runs/digits --extractor lite0 --num_samples 10000",
    )
    evaluate.add_argument(
        "--extractor",
        help="classifier (trained on the run's data), lite0, lite0:PATH or inception:PATH "
        "(default, here and below: the run's config)",
    )
    evaluate.add_argument("--num_samples", type=int, help="samples of each row")
    evaluate.add_argument("--w", help="guidance weights, separated by commas")
    evaluate.add_argument(
        "--stages", help="folders of stages in the workdir, separated by commas (default: all)"
    )
    evaluate.add_argument("--num_steps", help="sampling steps of the teacher, separated by commas")
    evaluate.add_argument(
        "--reference",
        type=epath.Path,
        help="an .npz file of statistics to measure against (default: those of the training data)",
    )
    _verb(
        verbs,
        "report",
        _report,
        "write report.html, one page that shows the run",
        "guided-distill report --workdir runs/digits",
    )

    imported = _verb(
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
        help="a diffusers folder, a .safetensors file of Stable Diffusion, or hub:ID to fetch a folder",
    )
    imported.add_argument(
        "--prediction_type",
        help="epsilon or v_prediction, where a single file doesn't tell (Stable Diffusion 2)",
    )
    imported.add_argument(
        "--tokenizer",
        type=epath.Path,
        help="a tokenizer's folder, which a single file doesn't hold",
    )

    export = _verb(
        verbs,
        "export",
        _export,
        "write a run's results to a folder of their own, to keep or to give away",
        "guided-distill export --workdir runs/digits --stages teacher,halving_ddim_4 --out digits",
    )
    export.add_argument(
        "--format",
        default="checkpoint",
        help="checkpoint, to sample and train on with this program, or diffusers, one stage as a folder "
        "that its pipelines load (default: %(default)s)",
    )
    export.add_argument(
        "--stages",
        help="folders of stages, separated by commas (default: all that are finished; for diffusers "
        "the last one)",
    )
    export.add_argument("--out", required=True, type=epath.Path, help="folder to write to")
    return parser


def _verb(
    verbs: Any, name: str, run: Callable[..., None], words: str, example: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=words, description=words, epilog=f"example: {example}")
    default = " (default: runs/ and the config's name)" if name == "train" else ""
    verb.add_argument(
        "--workdir", required=not default, type=epath.Path, help=f"the run's folder{default}"
    )
    verb.set_defaults(run=run)
    return verb


# Each verb imports what it needs when it runs, so that --help and bad arguments answer at once.


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    from guided_distill import config, pipeline

    experiment = config.parse(_read_config(options.config, overrides))
    pipeline.run(experiment, options.workdir or _default_workdir(options.config))


def _sample(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.report.samples import sample_to_files

    paths = sample_to_files(
        options.workdir,
        stage=options.stage,
        count=options.num,
        labels=_parse_list("--labels", options.labels, int),
        w=options.w,
        num_steps=options.num_steps,
        sampler=options.sampler,
        seed=options.seed,
        out=epath.Path(options.out or options.workdir / "samples"),
        allow_untrained=options.allow_untrained,
    )
    for path in paths:
        print(path)


def _transfer(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.report.transfers import transfer_to_files

    paths = transfer_to_files(
        options.workdir,
        to=options.to or options.workdir,
        images=options.images,
        from_label=options.from_label,
        to_label=options.to_label,
        encoder=options.encoder,
        decoder=options.decoder,
        w_encode=options.w_encode,
        w=options.w,
        count=options.num,
        seed=options.seed,
        out=epath.Path(options.out or options.workdir / "transfers"),
    )
    for path in paths:
        print(path)


def _evaluate(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.evaluation.evaluate import evaluate
    from guided_distill.evaluation.tasks import Request

    request = Request(
        extractor=options.extractor,
        num_samples=options.num_samples,
        weights=_parse_list("--w", options.w, float),
        stages=_parse_list("--stages", options.stages, str),
        num_steps=_parse_list("--num_steps", options.num_steps, int),
        reference=options.reference,
    )
    evaluate(options.workdir, request)
    print(options.workdir / "results.csv")


def _report(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.report.page import write_report

    print(write_report(options.workdir))


def _import(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.interop.import_model import import_model

    paths = import_model(
        options.source,
        options.workdir,
        prediction_type=options.prediction_type,
        tokenizer=options.tokenizer,
    )
    for path in paths:
        print(path)


def _export(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.interop.diffusers_export import export_diffusers
    from guided_distill.interop.weights import export_weights

    formats = {"checkpoint": export_weights, "diffusers": export_diffusers}
    if options.format not in formats:
        raise UserError(f"--format is {options.format!r}; choose one of {', '.join(formats)}")
    stages = _parse_list("--stages", options.stages, str)
    for path in formats[options.format](options.workdir, options.out, stages=stages):
        print(path)


def _parse_list(flag: str, text: str | None, kind: type[Value]) -> tuple[Value, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        example = "0.5,1,2" if kind is float else "0,3,7"
        raise UserError(f"{flag} is {text!r}; give numbers like {example}") from None


def _default_workdir(config: str) -> epath.Path:
    """runs/NAME for NAME.py, runs/NAME_VARIANT for NAME.py:VARIANT."""
    file, _, variant = config.partition(":")
    return epath.Path("runs") / "_".join([epath.Path(file).stem, *filter(None, variant.split(","))])


def _read_config(path: str, overrides: list[str]) -> ml_collections.ConfigDict:
    """The ConfigDict of FILE or FILE:VARIANT, with --config.KEY=VALUE read as ml_collections does."""
    file, _, variant = path.partition(":")
    if not epath.Path(file).is_file():
        raise UserError(f"--config names {file}, which is not a file: try configs/digits.py")
    try:
        config = runpy.run_path(file)["get_config"](variant)
    except Exception as error:  # Whatever the user's own code raises.
        raise UserError(
            f"--config {path} can't be read: {type(error).__name__}: {error}"
        ) from error
    for override in overrides:
        _check_key(config, override.removeprefix("--config.").partition("=")[0], file)
    values = flags.FlagValues()
    arguments = ["guided-distill", *overrides]
    with _command_line(arguments):
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=values)
            values(arguments)
        except (flags.Error, TypeError, ValueError) as error:
            raise UserError(f"an override doesn't fit {file}: {error}") from error
    return config


def _check_key(config: ml_collections.ConfigDict, key: str, file: str) -> None:
    section: Any = config
    for name in key.split("."):
        keys = list(section) if isinstance(section, ml_collections.ConfigDict) else []
        if name not in keys:
            raise UserError(
                f"config.{key} is not a key of {file}; in place of {name} there could be: "
                f"{', '.join(keys) or 'nothing'}"
            )
        section = section[name]


@contextlib.contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    # config_flags looks for overrides in sys.argv itself.
    saved, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = saved


if __name__ == "__main__":
    sys.exit(main())
