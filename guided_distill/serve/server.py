"""Serving the page on this machine, with nothing fetched from elsewhere."""

import ipaddress
import socket
from pathlib import Path

import gradio as gr
from etils import epath
from PIL import EpsImagePlugin, Image

from guided_distill.errors import UserError

_LARGEST_UPLOAD = "20mb"
_MOST_PIXELS = 2**25
_LONGEST_QUEUE = 16


def launch(page: gr.Blocks, *, host: str, port: int, logins: list[tuple[str, str]] | None) -> str:
    """Serve a page in the background until it is closed; returns its address.

    logins: names and passwords of those who may use it; None for everybody who reaches it. Raises
    UserError as `check_free` does.
    """
    check_free(host, port)
    _limit_images()
    _, url, _ = page.queue(max_size=_LONGEST_QUEUE).launch(
        server_name=host,
        server_port=port,
        auth=logins,
        max_file_size=_LARGEST_UPLOAD,
        show_error=True,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=_theme(),
        css_paths=Path(__file__).with_name("page.css"),
    )
    return url


def read_logins(path: epath.Path) -> list[tuple[str, str]]:
    """Names and passwords from a file of lines NAME:PASSWORD. Raises UserError, naming the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--auth {path} can't be read ({error}): give a file of lines NAME:PASSWORD"
        ) from error
    logins = []
    for number, line in enumerate(lines, start=1):
        name, _, password = line.partition(":")
        if not name or not password:
            raise UserError(f"line {number} of --auth {path} isn't NAME:PASSWORD: put it right")
        logins.append((name, password))
    if not logins:
        raise UserError(f"--auth {path} is empty: give a file of lines NAME:PASSWORD")
    return logins


def check_host(host: str, logins: list[tuple[str, str]] | None) -> None:
    """Raises UserError for a host that others can reach, unless they have to log in."""
    try:
        found = {each[4][0] for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise UserError(f"--host {host} isn't known here ({error}): give an address") from error
    here = all(ipaddress.ip_address(str(each).partition("%")[0]).is_loopback for each in found)
    if not here and logins is None:
        raise UserError(
            f"--host {host} lets in everybody who reaches this machine: add --auth FILE, or leave --host "
            f"out and forward the port by ssh -L"
        )


def _limit_images() -> None:
    """Have Pillow, which opens what is uploaded, refuse huge images, and EPS, which is a program."""
    Image.MAX_IMAGE_PIXELS = _MOST_PIXELS
    EpsImagePlugin.gs_binary = False


def check_free(host: str, port: int) -> None:
    """Raises UserError if the host isn't this machine's, or the port is in use."""
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} --port {port} can't be listened on ({error}): choose another port, or a host "
            f"that is this machine's"
        ) from error


def _theme() -> gr.themes.Base:
    """Fonts of the machine that shows the page, and colours that are easy to read on each other."""
    return gr.themes.Default(
        primary_hue="indigo",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
