"""Serve the page on this machine; nothing is fetched from elsewhere."""

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
    """Serve a page in the background until it is closed; return its address.

    logins: names and passwords of the users; None if everybody who reaches the page may use it. Raises
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
    """Read names and passwords from a file of lines NAME:PASSWORD. A UserError names the bad line."""
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
            raise UserError(f"line {number} of --auth {path} isn't NAME:PASSWORD: correct it")
        logins.append((name, password))
    if not logins:
        raise UserError(f"--auth {path} is empty: give a file of lines NAME:PASSWORD")
    return logins


def check_host(host: str, logins: list[tuple[str, str]] | None) -> None:
    """Raise UserError if other machines can reach the host without a login."""
    try:
        found = {each[4][0] for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise UserError(f"--host {host} can't be resolved ({error}): give an address") from error
    here = all(ipaddress.ip_address(str(each).partition("%")[0]).is_loopback for each in found)
    if not here and logins is None:
        raise UserError(
            f"--host {host} admits everybody who can reach this machine: add --auth FILE, or leave out "
            f"--host and forward the port with ssh -L"
        )


def _limit_images() -> None:
    """Make Pillow, which opens uploads, refuse huge images and EPS files, which are programs."""
    Image.MAX_IMAGE_PIXELS = _MOST_PIXELS
    EpsImagePlugin.gs_binary = False


def check_free(host: str, port: int) -> None:
    """Raise UserError if the host isn't an address of this machine or the port is in use."""
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"can't listen on --host {host} --port {port} ({error}): choose another port, or an address "
            f"of this machine"
        ) from error


def _theme() -> gr.themes.Base:
    """Fonts of the reader's machine, and colours with enough contrast."""
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
