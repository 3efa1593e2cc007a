"""Explore a trained generator on a local page: `fastgan explore RUN`."""

from __future__ import annotations

import contextlib
import signal
import socket
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import tyro

from fastgan.cli.main import check_device, command
from fastgan.cli.output import say
from fastgan.errors import ArgumentError


@dataclass(frozen=True)
class Explore:
    """Serve a local page with sliders for seed, interpolation, truncation and class."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory, one checkpoint in it, an exported file, or a name: avatars, fashion-mnist (they come with
    fastgan)."""
    port: int | None = None
    """Port of the page; None: the first free one from 7860."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    open: bool = False
    """Open the page in the default browser."""


def _free_port(requested: int | None) -> int:
    """The requested port, or the first free one from 7860."""
    for port in (requested,) if requested is not None else range(7860, 7960):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ArgumentError("--port", requested, "must be a free port; it is in use")


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless `nohup` ignores it, end the command as Ctrl-C does: its pictures are removed."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no HUP
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@command
def main(argv: list[str]) -> int:
    args = tyro.cli(Explore, args=argv, prog="fastgan explore")
    if args.port is not None and not 1 <= args.port <= 65535:
        raise ArgumentError("--port", args.port, "must be 1 to 65535")
    check_device(args.device)
    with _interrupted_by_signals():
        from fastgan.explorer.page import Server
        from fastgan.generator import load

        trained = load(args.run, args.device)
        server = Server(trained, _free_port(args.port))
        say(f"{trained}: {server.url} (stop with Ctrl-C)")
        if args.open:
            webbrowser.open(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()
        server.close()
    return 0
