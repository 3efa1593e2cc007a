"""Detects ranks that fail: all other ranks name the failed rank and end within `--timeout`, whatever they wait for.

Every rank other than 0 has a thread with a TCP connection to rank 0, and both sides send a heartbeat every few seconds:

- A connection that closes without a "bye" is a process that died. It is noticed at once.
- No heartbeat for three quarters of the timeout is a host or a link that failed.
- A rank that fails with an exception reports it before it ends.
- A rank whose collective breaks reports that; rank 0 then collects reports for 3 seconds and decides who is the cause.

Rank 0 sends its verdict to all ranks. A rank that loses rank 0 reaches its own. A verdict is one line on each host, and
the process ends with `EXIT_RANK_FAULT` by `os._exit`: its main thread may be in a collective that never returns.

Messages are lines: "." is a heartbeat, anything else is JSON: {"token", "rank", "host"} first, then {"broken": error},
{"failed": error, "code": exit code} or {"bye": true} to rank 0, and the verdict {"failed": rank, "host", "what",
"code"} or {"bye": true} from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import selectors
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastgan.errors import ArgumentError
from fastgan.utils.stored_values import MALFORMED

EXIT_RANK_FAULT = 75
"""Exit code of ranks that end because another rank, its host or the network failed; EX_TEMPFAIL in `sysexits.h`."""

_DIED = "its connection closed: the process died"
_HEARTBEAT, _BYE = b".\n", b'{"bye": true}\n'
_START = 30.0  # seconds by which one host may start later than another, which reads its packages from a cold disk
_SPEAK = 0.5  # seconds that a silent rank leaves to the one that prints: a launcher may kill all when the first ends
_COLLECT = 3.0  # seconds in which ranks report after the first report of a fault
_COMMUNICATION_ERROR = re.compile(
    r"gloo|nccl|connection|timed? ?out|socket|store|broken pipe|peer|process ?group", re.IGNORECASE
)


def join_timeout(timeout: float) -> float:
    """Seconds from its own start that a rank waits for the others to connect."""
    return timeout + _START


def _silent(seconds: float) -> str:
    return f"no heartbeat for {seconds:.0f} s"


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


class _Peer:
    """Rank 0's side of a connection; `rank` is None until the other side has introduced itself."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.buffer = b""
        self.rank: int | None = None
        self.last_heard = time.monotonic()


class Heartbeat:
    """One rank's watch over the others. Created before the ranks join any process group, closed when the work is done.

    Args:
        rank: number of this process.
        size: number of ranks.
        local_rank: number of this process on its host.
        address: address of rank 0's host.
        timeout: seconds; a rank without a heartbeat for three quarters of it has failed.
        broadcast: gives every rank the value of rank 0; called once.
        expected: host of each rank, if known; names a rank that never connects.

    Attributes:
        run: the run directory, for the --resume flag in a verdict's line; None: there is nothing to resume.
        last_good: the last checkpoint, for a verdict's line.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        local_rank: int,
        address: str,
        timeout: float,
        broadcast: Callable[[Any], Any],
        expected: Sequence[str] = (),
    ) -> None:
        self.rank, self.size, self.local_rank, self.timeout = rank, size, local_rank, timeout
        self.run: Path | None = None
        self.last_good: Path | None = None
        self._interval = min(max(timeout / 20, 0.25), 10.0)
        self._max_silence = 0.75 * timeout
        self._leaving = threading.Event()
        self._failures: dict[int, tuple[str, int]] = {}  # by rank: error and exit code
        self._broken: dict[int, str] = {}  # by rank: error of its collective
        self._decide_at: float | None = None
        self._last_collective = 0.0
        # Rank 0's connections, and the ranks that have left or died.
        self._peers: list[_Peer] = []
        self._gone: set[int] = set()
        self._hosts, self._expected = {0: address}, dict(enumerate(expected))
        listener = socket.create_server(("", 0), backlog=max(size, 16)) if rank == 0 else None
        own = (listener.getsockname()[1], secrets.token_hex(16), socket.gethostname()) if listener else None
        port, self._token, self._hosts[0] = broadcast(own)
        if listener is not None:
            target: Callable[..., None] = self._serve
            argument = listener
        else:
            target = self._follow
            argument = socket.create_connection((address, port), timeout=join_timeout(timeout))
        self._thread = threading.Thread(target=target, args=(argument,), name="fastgan-heartbeat", daemon=True)
        self._thread.start()

    # --- called by the main thread ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Context of a rank's work: reports an exception to the other ranks.

        If a collective broke because another rank failed, the process ends here with the verdict's line instead.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise  # the connection closes with the process
        except ArgumentError as error:
            self.fail(str(error), code=2)
            raise
        except RuntimeError as error:
            if _COMMUNICATION_ERROR.search(str(error)):
                self._wait_for_verdict(str(error).splitlines()[0])
            self.fail(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            raise
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error}")
            raise

    def fail(self, error: str, code: int = EXIT_RANK_FAULT) -> None:
        """Report that this rank ends with `error`; the other ranks then end with exit code `code`."""
        self._failures[self.rank] = (error, code)
        self._leaving.set()
        self._thread.join(timeout=5)

    def note_collective(self) -> None:
        """Note that all ranks have just met in a collective, and so are alive.

        After a break of the link TCP may wait twice as long as the break before it sends again, so that heartbeats can
        be late although collectives already work.
        """
        self._last_collective = time.monotonic()

    def close(self) -> None:
        """End the watch: this rank's work is done, and later faults of other ranks do not concern it."""
        self._leaving.set()
        self._thread.join(timeout=5)

    def _wait_for_verdict(self, error: str) -> None:
        """Report a broken collective and wait for the thread to end the process; returns if there is no verdict."""
        self._broken[self.rank] = error
        self._decide_at = self._decide_at or time.monotonic() + _COLLECT
        time.sleep(self.timeout + 3 * self._interval)

    # --- the thread of rank 0 ---------------------------------------------------------------------------------------

    def _serve(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ, None)
        started = last_sent = time.monotonic()
        while True:
            for key, _ in selector.select(timeout=min(self._interval, 0.25)):
                if key.data is None:
                    self._accept(listener, selector)
                elif not self._receive(key.data):
                    selector.unregister(key.data.socket)
                    self._disconnected(key.data)
            now = time.monotonic()
            if self._leaving.is_set():
                if self.rank in self._failures:
                    self._announce(self._verdict(self.rank, *self._failures[self.rank]))
                else:
                    self._send_all(_BYE)
                return
            if now - last_sent >= self._interval:
                last_sent = now
                self._send_all(_HEARTBEAT)
            for peer in self._peers:
                silence = now - max(peer.last_heard, self._last_collective)
                if peer.rank is not None and peer.rank not in self._gone and silence > self._max_silence:
                    self._end_all(peer.rank, _silent(silence))
            known = {peer.rank for peer in self._peers} | self._gone | {0}
            missing = [rank for rank in range(self.size) if rank not in known]
            if missing and now - started > join_timeout(self.timeout):
                self._end_all(missing[0], f"it did not connect within {now - started:.0f} s")
            if self._decide_at is not None and now > self._decide_at:
                self._decide(now)

    def _accept(self, listener: socket.socket, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            connection.setblocking(False)
            peer = _Peer(connection)
            self._peers.append(peer)
            selector.register(connection, selectors.EVENT_READ, peer)

    def _disconnected(self, peer: _Peer) -> None:
        peer.socket.close()
        self._peers.remove(peer)
        if peer.rank is not None and peer.rank not in self._gone:
            if peer.rank not in self._failures:
                self._end_all(peer.rank, _DIED)
            self._gone.add(peer.rank)

    def _receive(self, peer: _Peer) -> bool:
        """Read a rank's messages; False if its connection has closed or is not one of this run's."""
        try:
            data = peer.socket.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        peer.last_heard = time.monotonic()
        *lines, peer.buffer = (peer.buffer + data).split(b"\n")
        try:
            if not all(self._handle(peer, json.loads(line)) for line in lines if line not in (b".", b"")):
                return False
        except MALFORMED:
            return False
        return len(peer.buffer) < 65536

    def _handle(self, peer: _Peer, message: dict[str, Any]) -> bool:
        """Take one message of a rank; False if its token is wrong."""
        if peer.rank is None:
            if not secrets.compare_digest(message["token"], self._token):
                return False
            peer.rank = int(message["rank"])
            self._hosts[peer.rank] = str(message["host"])
        elif "bye" in message:
            self._gone.add(peer.rank)
        elif "failed" in message:
            self._failures[peer.rank] = (str(message["failed"]), int(message["code"]))
        elif "broken" in message:
            self._broken[peer.rank] = str(message["broken"])
        # Other ranks may report too, or this rank's main thread may fail for the same reason.
        if self._decide_at is None and ("failed" in message or "broken" in message):
            self._decide_at = time.monotonic() + _COLLECT
        return True

    def _decide(self, now: float) -> None:
        """Reach the verdict on a reported fault: an exception, else a silent rank, else one that did not take part."""
        self._decide_at = None
        if self._failures:
            rank = min(self._failures)
            self._end_all(rank, *self._failures[rank])
        silence = {
            peer.rank: now - peer.last_heard
            for peer in self._peers
            if peer.rank is not None and peer.rank not in self._gone and now - peer.last_heard > 2.5 * self._interval
        }
        if silence:
            rank = max(silence, key=silence.__getitem__)
            self._end_all(rank, _silent(silence[rank]))
        rank, error = next(iter(self._broken.items()))
        absent = [rank for rank in self._hosts if rank not in self._broken and rank not in self._gone]
        if absent:
            self._end_all(min(absent), f"alive, but not in the collective that the others waited in ({error})")
        self._end_all(rank, f"all ranks are alive, but their collective failed ({error})")

    def _send_all(self, line: bytes) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.socket.send(line)

    def _end_all(self, rank: int, what: str, code: int = EXIT_RANK_FAULT) -> NoReturn:
        verdict = self._verdict(rank, what, code)
        # Printed before the others hear of it: they end at once, and a launcher such as torchrun then kills this rank.
        self._print_verdict(verdict)
        self._announce(verdict)
        os._exit(code)

    def _verdict(self, rank: int, what: str, code: int) -> dict[str, Any]:
        host = self._hosts.get(rank) or self._expected.get(rank, "an unknown host")
        return {"failed": rank, "host": host, "what": what, "code": code}

    def _announce(self, verdict: dict[str, Any]) -> None:
        """Send the verdict to all ranks."""
        self._send_all(_encode(verdict))
        # A process that ends with unread data resets its connections, which may drop what it sent last.
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            for peer in self._peers:
                with contextlib.suppress(OSError):
                    peer.socket.recv(65536)
            time.sleep(0.05)

    # --- the thread of every other rank -----------------------------------------------------------------------------

    def _follow(self, connection: socket.socket) -> None:
        connection.settimeout(min(self._interval, 0.25))
        buffer, last_heard, last_sent, reported = b"", time.monotonic(), 0.0, False

        def send(line: bytes) -> None:
            with contextlib.suppress(OSError):  # a lost connection is noticed below, as silence
                connection.sendall(line)

        send(_encode({"token": self._token, "rank": self.rank, "host": socket.gethostname()}))
        while True:
            if self._leaving.is_set():
                if self.rank in self._failures:
                    error, code = self._failures[self.rank]
                    send(_encode({"failed": error, "code": code}))
                else:
                    send(_BYE)
                connection.close()
                return
            now = time.monotonic()
            if now - last_sent >= self._interval:
                last_sent = now
                send(_HEARTBEAT)
            if self._broken and not reported:
                reported = True
                send(_encode({"broken": self._broken[self.rank]}))
            lines: list[bytes] = []
            closed = False
            try:
                data = connection.recv(65536)
                closed = not data
                last_heard = time.monotonic() if data else last_heard
                *lines, buffer = (buffer + data).split(b"\n")
            except TimeoutError:
                pass
            except OSError:
                closed = True
            for line in lines:
                if line != b".":
                    message = json.loads(line)
                    if "bye" in message:
                        return
                    self._end(message)
            silence = time.monotonic() - max(last_heard, self._last_collective)
            if not self._leaving.is_set() and (closed or silence > self._max_silence):
                what = _DIED if closed else _silent(silence)
                self._end({"failed": 0, "host": self._hosts[0], "what": what, "code": EXIT_RANK_FAULT})

    # --- the end of this process ------------------------------------------------------------------------------------

    def _end(self, verdict: dict[str, Any]) -> NoReturn:
        """Print the verdict, once on each host, and exit without waiting for anything."""
        if not self._print_verdict(verdict):
            time.sleep(_SPEAK)
        os._exit(verdict["code"])

    def _print_verdict(self, verdict: dict[str, Any]) -> bool:
        """Print the verdict if that is this rank's part; returns whether it is."""
        rank = verdict["failed"]
        # Local rank 0 prints; if it is the failed rank, the next one on its host does.
        prints = self.local_rank == 0 or (self.local_rank == 1 and rank == self.rank - 1)
        if prints and rank != self.rank:
            good = f"the last checkpoint is {self.last_good}" if self.last_good else "there is no checkpoint yet"
            resume = f"; resume with --resume {shlex.quote(str(self.run))}" if self.run else ""
            line = f"fastgan: rank {rank} on {verdict['host']}: {verdict['what']}; {good}{resume}\n"
            # In a thread: writing blocks if a launcher behind a dead link no longer empties its pipe.
            printing = threading.Thread(target=self._print, args=(line,), daemon=True)
            printing.start()
            printing.join(timeout=2)
            return True
        return False

    @staticmethod
    def _print(line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
