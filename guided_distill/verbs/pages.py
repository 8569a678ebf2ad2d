"""The verb that serves a page: serve."""

import argparse
import importlib.util
import os
from typing import Any

from guided_distill import kinds
from guided_distill.errors import UserError
from guided_distill.verbs.shared import (
    CACHE,
    command_of_run,
    keep_compiled_programs,
    number,
    path,
    stage_folder,
)


def add_verbs(verbs: Any) -> None:
    """Add this verb to the parser."""
    serve = command_of_run(
        verbs,
        "serve",
        _serve,
        "serve a local web page that samples from a run, until Ctrl-C",
        "guided-distill serve --workdir runs/digits --stage halving_ddim_4",
    )
    serve.add_argument(
        "--stage",
        type=stage_folder,
        help="stage that the page opens with (default: the last finished one)",
    )
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 also serves other machines, and needs --auth "
        "(default: %(default)s)",
    )
    serve.add_argument(
        "--auth",
        type=path,
        metavar="FILE",
        help="file with a line NAME:PASSWORD for each user of the page (default: no login)",
    )
    serve.add_argument(
        "--port", type=number(kinds.Port), default=7860, help="port (default: %(default)s)"
    )
    serve.add_argument("--cache", **CACHE)


def _serve(options: argparse.Namespace, _: list[str]) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UserError(
            "serve needs Gradio, which isn't installed: pip install gradio (the extra `serve`)"
        )
    # Gradio reads this variable when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from guided_distill.serve.page import build_page
    from guided_distill.serve.server import check_free, check_host, launch, read_logins

    logins = read_logins(options.auth) if options.auth else None
    check_host(options.host, logins)
    check_free(options.host, options.port)
    keep_compiled_programs(options.cache)
    page = build_page(options.workdir, stage=options.stage)
    print(launch(page, host=options.host, port=options.port, logins=logins), flush=True)
    page.block_thread()
