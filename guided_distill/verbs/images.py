"""The verbs that make images: sample, transfer, generate, edit, inpaint."""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from guided_distill import kinds
from guided_distill.verbs.shared import (
    RUN_OR_FILE,
    add_process_arguments,
    add_sampling_arguments,
    check_same_options,
    command_of_run,
    label,
    number,
    path,
    several,
    stage_folder,
)


def add_verbs(verbs: Any) -> None:
    """Add these verbs to the parser."""
    sample = command_of_run(
        verbs,
        "sample",
        _sample,
        "draw samples, and write them as a PNG grid and an npz file",
        "guided-distill sample --workdir runs/digits --stage halving_ddim_4 --w 1 --num 40",
        what=RUN_OR_FILE,
    )
    sample.add_argument(
        "--num",
        type=number(kinds.Count),
        default=64,
        help="number of samples (default: %(default)s)",
    )
    sample.add_argument(
        "--labels",
        type=several(label),
        help="classes by number (from 0) or by name, separated by commas; samples cycle through them "
        "(default: all)",
    )
    add_sampling_arguments(sample)
    add_process_arguments(sample)

    transfer = command_of_run(
        verbs,
        "transfer",
        _transfer,
        "transfer images from one class or run to another through noise; write a PNG figure and an npz "
        "file",
        "guided-distill transfer --workdir runs/digits --images data --from_label 7 --to_label 5",
    )
    transfer.add_argument(
        "--to", type=path, help="the run that decodes (default: WORKDIR, the run that encodes)"
    )
    transfer.add_argument(
        "--images",
        required=True,
        help="an image file, a folder of image files, or the word data for test images of --from_label",
    )
    transfer.add_argument(
        "--from_label", required=True, type=label, help="class of the images, by number or name"
    )
    transfer.add_argument(
        "--to_label", required=True, type=label, help="class to transfer them to, by number or name"
    )
    transfer.add_argument(
        "--encoder",
        type=stage_folder,
        help="the encoder's folder (default: that of the encoder student nearest to 8 steps)",
    )
    transfer.add_argument(
        "--decoder",
        type=stage_folder,
        help="the decoder's folder, in both runs (default: that of the ddim student nearest to 8 steps)",
    )
    transfer.add_argument(
        "--w_encode",
        type=number(kinds.Weight),
        help="guidance weight for encoding (default: 0, or the nearest trained w)",
    )
    transfer.add_argument(
        "--w",
        type=number(kinds.Weight),
        help="guidance weight for decoding (default: 1, or the nearest trained w)",
    )
    transfer.add_argument(
        "--num",
        type=number(kinds.Count),
        default=8,
        help="maximum number of images (default: %(default)s)",
    )
    transfer.add_argument(
        "--seed",
        type=number(kinds.Seed),
        default=0,
        help="with --images data, seed that selects the test images (default: %(default)s)",
    )
    transfer.add_argument(
        "--out", type=path, help="folder to write to (default: WORKDIR/transfers)"
    )

    generate = command_of_run(
        verbs,
        "generate",
        _generate,
        "generate images from prompts; write a PNG file for each and a sheet of all",
        "guided-distill generate --workdir runs/emoji --prompt 'red apple, 3D Fluent style' --num 4",
        what=RUN_OR_FILE,
    )
    edit = command_of_run(
        verbs,
        "edit",
        _edit,
        "change an image to fit a prompt: add noise to it, and sample from there",
        "guided-distill edit --workdir runs/emoji --image apple.png --prompt 'green apple' "
        "--strength 0.5",
        what=RUN_OR_FILE,
    )
    edit.add_argument("--image", required=True, type=path, help="an image file")
    edit.add_argument(
        "--strength",
        type=number(kinds.Strength),
        default=0.5,
        help="how much noise to add, above 0 and at most 1, rounded down to whole steps "
        "(default: %(default)s)",
    )
    inpaint = command_of_run(
        verbs,
        "inpaint",
        _inpaint,
        "paint part of an image to fit a prompt, and keep the rest exactly as it is",
        "guided-distill inpaint --workdir runs/emoji --image apple.png --mask mask.png "
        "--prompt 'green apple'",
        what=RUN_OR_FILE,
    )
    inpaint.add_argument("--image", required=True, type=path, help="an image file")
    inpaint.add_argument(
        "--mask",
        required=True,
        type=path,
        help="an image of the same size, white in the region to paint",
    )
    for verb in (generate, edit, inpaint):
        verb.add_argument("--prompt", action="append", help="a prompt; repeat the flag for more")
        verb.add_argument("--prompts", type=path, help="a file of prompts, one per line")
        verb.add_argument(
            "--num",
            type=number(kinds.Count),
            default=1,
            help="images per prompt (default: %(default)s)",
        )
        add_sampling_arguments(verb)


# As in verbs/runs.py, each verb imports what it needs when it runs.


def _sample(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.report.samples import sample_to_files
    from guided_distill.runs.folder import folder_of
    from guided_distill.training.preemption import stopping_at_once
    from guided_distill.training.processes import connected, is_first

    with connected(timeout=options.start_timeout), stopping_at_once():
        check_same_options(options)
        paths = sample_to_files(
            options.workdir,
            stage=options.stage,
            count=options.num,
            labels=options.labels,
            options=_sampling(options),
            out=options.out or folder_of(options.workdir) / "samples",
        )
        if is_first():
            for each in paths:
                print(each)


def _transfer(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.report.transfers import TransferRequest, transfer_to_files

    request = TransferRequest(
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
    )
    out = options.out or options.workdir / "transfers"
    _print_all(lambda: transfer_to_files(options.workdir, request, out=out))


def _generate(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.report.prompted import generate_to_files

    _print_all(lambda: generate_to_files(**_prompted(options)))


def _edit(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.report.prompted import edit_to_files

    _print_all(
        lambda: edit_to_files(**_prompted(options), image=options.image, strength=options.strength)
    )


def _inpaint(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.report.prompted import inpaint_to_files

    _print_all(
        lambda: inpaint_to_files(**_prompted(options), image=options.image, mask=options.mask)
    )


def _prompted(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that generate, edit and inpaint share."""
    from guided_distill.report.prompted import PromptRequest, read_prompts
    from guided_distill.runs.folder import folder_of

    prompts = read_prompts(options.prompt, options.prompts, num=options.num)
    request = PromptRequest(prompts, _sampling(options))
    out = options.out or folder_of(options.workdir) / "samples"
    return {"workdir": options.workdir, "stage": options.stage, "request": request, "out": out}


def _sampling(options: argparse.Namespace) -> Any:
    """The `Options` of a verb that samples, from its flags."""
    from guided_distill.sampling.request import Options

    return Options(
        w=options.w,
        num_steps=options.num_steps,
        sampler=options.sampler,
        seed=options.seed,
        allow_untrained=options.allow_untrained,
    )


def _print_all(make: Callable[[], Iterable[epath.Path]]) -> None:
    """Make files and print their paths; a signal stops this at once."""
    from guided_distill.training.preemption import stopping_at_once

    with stopping_at_once():
        for each in make():
            print(each)
