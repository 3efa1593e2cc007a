"""Who of the ranks is alive: a rank or a host that fails is named by all others, and none waits for it longer than
`--timeout`, whatever its main thread is waiting for.

Each rank has a thread that holds a connection to rank 0's and says every few seconds that it is there. A connection
that closes without a goodbye is a process that died, and known at once; silence is a host or a link that did. Rank 0
tells the others its verdict; who hears nothing from rank 0 comes to one about it. The verdict is one line, and the
process ends with `FAULT`: the main thread may sit in a collective, or in a library's destructor, that never returns.
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
from typing import Any

from fastgan.errors import ArgumentError

FAULT = 75
"""Exit code of ranks that end because another rank, its host or the network failed: `sysexits.h` calls it temporary."""

_START = 30.0  # seconds by which one host may start later than another, its packages read from a cold disk
_LOST = re.compile(r"gloo|nccl|connection|timed? ?out|socket|store|broken pipe|peer|process ?group", re.IGNORECASE)


def host() -> str:
    return socket.gethostname()


def joining(timeout: float) -> float:
    """Seconds that a rank waits for the others to come, from its own start on."""
    return timeout + _START


class _Peer:
    """Rank 0's side of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.buffer = b""
        self.rank: int | None = None
        self.host = "?"
        self.heard = time.monotonic()


class Heartbeat:
    """The watch of one rank over the others; made before they join in anything else, closed by each when it is done.

    Args:
        rank, size, local_rank: this process among all, and on its host.
        address: of rank 0's host.
        timeout: seconds; a rank that is silent for three quarters of it is given up.
        broadcast: gives every rank the first one's value; used once, here.
        expected: the host of each rank, where it is known before the rank has come.

    Attributes:
        run: the run directory, for the command to go on with; last_good: the last checkpoint.
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
        self._beat = min(max(timeout / 20, 0.25), 10.0)
        self._silence = 0.75 * timeout
        self._leaving = threading.Event()
        self._failed: dict[int, tuple[str, int]] = {}
        self._lost: dict[int, str] = {}
        self._decide: float | None = None
        self._together = 0.0
        self._hosts, self._expected = {0: address}, dict(enumerate(expected))
        listener = socket.create_server(("", 0), backlog=max(size, 16)) if rank == 0 else None
        told = (listener.getsockname()[1], secrets.token_hex(16), host()) if listener else None
        port, self._token, self._hosts[0] = broadcast(told)
        if listener is not None:
            target: Callable[..., None] = self._serve
            argument = listener
        else:
            target, argument = self._follow, socket.create_connection((address, port), timeout=joining(timeout))
        self._thread = threading.Thread(target=target, args=(argument,), name="fastgan-heartbeat", daemon=True)
        self._thread.start()

    # --- what the main thread says ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Around a rank's work: its failure becomes known to the others, and that of another ends it with one line."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise  # the connection closes with the process
        except ArgumentError as error:
            self.fail(str(error), code=2)
            raise
        except RuntimeError as error:
            if _LOST.search(str(error)):
                self._wait_for_verdict(str(error).splitlines()[0])
            self.fail(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            raise
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error}")
            raise

    def fail(self, what: str, code: int = FAULT) -> None:
        """Tell the others that this rank ends, why, and with which code they may; they end too, if they go on."""
        self._failed[self.rank] = (what, code)
        self._leaving.set()
        self._thread.join(timeout=5)

    def together(self) -> None:
        """All ranks have just met in a collective, so that silence before now was the watch's own connections: after a
        break TCP may wait twice as long as the break was before it tries again."""
        self._together = time.monotonic()

    def close(self) -> None:
        """The work is done: what happens to the others is no longer this rank's concern."""
        self._leaving.set()
        self._thread.join(timeout=5)

    def _wait_for_verdict(self, error: str) -> None:
        """A collective broke, and the thread finds out why: it ends the process. Returns if it finds nothing."""
        self._lost[self.rank] = error
        self._decide = self._decide or time.monotonic() + 3
        time.sleep(self.timeout + 3 * self._beat)

    # --- rank 0 -----------------------------------------------------------------------------------------------------

    def _serve(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        chosen = selectors.DefaultSelector()
        chosen.register(listener, selectors.EVENT_READ, None)
        peers: list[_Peer] = []
        gone: set[int] = set()  # said goodbye
        began = beaten = time.monotonic()
        while True:
            for key, _ in chosen.select(timeout=min(self._beat, 0.25)):
                if key.data is None:
                    with contextlib.suppress(OSError):
                        connection, _ = listener.accept()
                        connection.setblocking(False)
                        peer = _Peer(connection)
                        peers.append(peer)
                        chosen.register(connection, selectors.EVENT_READ, peer)
                elif not self._hear(key.data, gone):
                    chosen.unregister(key.data.socket)
                    peers.remove(key.data)
                    rank = key.data.rank
                    if rank is not None and rank not in gone:
                        if rank not in self._failed:
                            self._verdict(peers, rank, "its connection closed: the process died", FAULT)
                        gone.add(rank)
            now = time.monotonic()
            if self._leaving.is_set():
                if self.rank in self._failed:
                    self._announce(peers, self.rank, *self._failed[self.rank])
                else:
                    self._tell(peers, b'{"bye": true}\n')
                return
            if now - beaten >= self._beat:
                beaten = now
                self._tell(peers, b".\n")
            for peer in peers:
                silent = now - max(peer.heard, self._together)
                if peer.rank is not None and peer.rank not in gone and silent > self._silence:
                    self._verdict(peers, peer.rank, f"no sign of life for {silent:.0f} s", FAULT)
            known = {peer.rank for peer in peers} | gone | {0}
            missing = [rank for rank in range(self.size) if rank not in known]
            if missing and now - began > joining(self.timeout):
                self._verdict(peers, missing[0], f"it did not come within {now - began:.0f} s", FAULT)
            if self._decide is not None and now > self._decide:
                self._settle(peers, gone, now)

    def _hear(self, peer: _Peer, gone: set[int]) -> bool:
        """Read what a rank says; False when its connection is at its end."""
        try:
            data = peer.socket.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        peer.heard = time.monotonic()
        *lines, peer.buffer = (peer.buffer + data).split(b"\n")
        for line in lines:
            if line in (b".", b""):
                continue
            try:
                said = json.loads(line)
                if peer.rank is None:
                    if not secrets.compare_digest(said["token"], self._token):
                        return False
                    peer.rank, peer.host = int(said["rank"]), str(said["host"])
                    self._hosts[peer.rank] = peer.host
                elif "bye" in said:
                    gone.add(peer.rank)
                elif "failed" in said:
                    self._failed[peer.rank] = (str(said["failed"]), int(said["code"]))
                elif "lost" in said:
                    self._lost[peer.rank] = str(said["lost"])
                # A moment, in which others may say more, or this rank's main thread end for the same reason.
                if self._decide is None and ("failed" in said or "lost" in said):
                    self._decide = time.monotonic() + 3
            except (ValueError, KeyError, TypeError):
                return False  # none of ours
        return len(peer.buffer) < 65536

    def _settle(self, peers: list[_Peer], gone: set[int], now: float) -> None:
        """Something broke some moments ago: say what is behind it."""
        self._decide = None
        if self._failed:
            rank = min(self._failed)
            self._verdict(peers, rank, *self._failed[rank])
            return
        quiet = [p for p in peers if p.rank is not None and p.rank not in gone and now - p.heard > 2.5 * self._beat]
        if quiet:
            worst = max(quiet, key=lambda p: now - p.heard)
            assert worst.rank is not None
            self._verdict(peers, worst.rank, f"no sign of life for {now - worst.heard:.0f} s", FAULT)
        elsewhere = [rank for rank in self._hosts if rank not in self._lost and rank not in gone]
        if elsewhere:
            what = f"alive, but not where the others waited for it ({next(iter(self._lost.values()))})"
            self._verdict(peers, min(elsewhere), what, FAULT)
        rank, error = next(iter(self._lost.items()))
        self._verdict(peers, rank, f"all ranks are alive, but what they exchange is lost ({error})", FAULT)

    def _tell(self, peers: list[_Peer], line: bytes) -> None:
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.socket.send(line)

    def _verdict(self, peers: list[_Peer], rank: int, what: str, code: int) -> None:
        self._end(self._announce(peers, rank, what, code))

    def _announce(self, peers: list[_Peer], rank: int, what: str, code: int) -> dict[str, Any]:
        on = self._hosts.get(rank) or self._expected.get(rank, "a host not known")
        verdict = {"failed": rank, "host": on, "what": what, "code": code}
        self._tell(peers, json.dumps(verdict).encode() + b"\n")
        # A process that ends with something unread resets its connections, and what it said last may be dropped.
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            for peer in peers:
                with contextlib.suppress(OSError):
                    peer.socket.recv(65536)
            time.sleep(0.05)
        return verdict

    # --- the other ranks --------------------------------------------------------------------------------------------

    def _follow(self, connection: socket.socket) -> None:
        connection.settimeout(min(self._beat, 0.25))
        hello = {"token": self._token, "rank": self.rank, "host": host()}
        buffer, heard, beaten, lost = b"", time.monotonic(), 0.0, False

        def say(line: bytes) -> None:
            with contextlib.suppress(OSError):  # silence is noticed below
                connection.sendall(line)

        say(json.dumps(hello).encode() + b"\n")
        while True:
            if self._leaving.is_set():
                if self.rank in self._failed:
                    what, code = self._failed[self.rank]
                    say(json.dumps({"failed": what, "code": code}).encode() + b"\n")
                else:
                    say(b'{"bye": true}\n')
                connection.close()
                return
            now = time.monotonic()
            if now - beaten >= self._beat:
                beaten = now
                say(b".\n")
            if self._lost and not lost:
                lost = True
                say(json.dumps({"lost": self._lost[self.rank]}).encode() + b"\n")
            closed = False
            try:
                data = connection.recv(65536)
                closed = not data
                heard = time.monotonic() if data else heard
                *lines, buffer = (buffer + data).split(b"\n")
            except TimeoutError:
                lines = []
            except OSError:
                lines, closed = [], True
            for line in lines:
                if line != b".":
                    said = json.loads(line)
                    if "bye" in said:
                        return
                    self._end(said)
            silent = time.monotonic() - max(heard, self._together)
            if not self._leaving.is_set() and (closed or silent > self._silence):
                what = "its connection closed: the process died" if closed else f"no sign of life for {silent:.0f} s"
                self._end({"failed": 0, "host": self._hosts[0], "what": what, "code": FAULT})

    # --- the end ----------------------------------------------------------------------------------------------------

    def _end(self, verdict: dict[str, Any]) -> None:
        """Say it, once on each host, and leave without waiting for anything."""
        rank = verdict["failed"]
        beside = self.local_rank == 1 and rank == self.rank - 1  # the first of this host is the one that is gone
        if (self.local_rank == 0 or beside) and rank != self.rank:
            good = f"the last checkpoint is {self.last_good}" if self.last_good else "there is no checkpoint yet"
            on = f"; go on with --resume {shlex.quote(str(self.run))}" if self.run else ""
            line = f"fastgan: rank {rank} on {verdict['host']}: {verdict['what']}; {good}{on}\n"
            # A launcher behind a dead link reads nothing, and its pipe is full: that must not hold this process up.
            saying = threading.Thread(target=self._say, args=(line,), daemon=True)
            saying.start()
            saying.join(timeout=2)
        os._exit(verdict["code"])

    @staticmethod
    def _say(line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
