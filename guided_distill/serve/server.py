"""Serving the page on this machine, with nothing fetched from elsewhere."""

import socket
from pathlib import Path

import gradio as gr

from guided_distill.errors import UserError


def launch(page: gr.Blocks, *, host: str, port: int) -> str:
    """Serve a page in the background until it is closed; answers its address.

    Raises UserError as `check_free` does.
    """
    check_free(host, port)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
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
