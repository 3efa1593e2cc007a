"""Which requests the page of `fastgan explore` answers: an allow-list in front of the library that serves it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from fastgan.errors import ArgumentError
from fastgan.utils.stored_values import MALFORMED

Scope = MutableMapping[str, Any]
Channel = Callable[..., Awaitable[Any]]

MAX_BODY = 2**14  # bytes; a call of a function takes some hundred
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_API = "/gradio_api"
# What a browser loads of the page, and what it and gradio_client read to call its functions and to fetch results.
_READ = re.compile(
    r"/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/pwa_icon(/\d+)?|/(assets|static|svelte)/[\w./-]+"
    rf"|{_API}/(info|app_id|startup-events|theme\.css|queue/data|heartbeat/[\w-]+|call/\w+/[\w-]+)",
    re.ASCII,
)
_PICTURE = f"{_API}/file="
_CALL = re.compile(rf"{_API}/(?:queue/join|call/(\w+))", re.ASCII)
_QUERY = ("session_hash", "all_endpoints", "serialize")
_HEADERS = frozenset(
    b"host origin user-agent accept accept-encoding accept-language connection if-none-match if-modified-since".split()
)
_SESSION = re.compile(r"[\w-]{1,64}", re.ASCII)


class Argument(NamedTuple):
    """A number that a function of the page takes.

    Attributes:
        name: as on the page, for messages.
        least, most: its range.
        whole: whether it has no fraction.
    """

    name: str
    least: float
    most: float
    whole: bool


class _Refusal(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class LocalOnly:
    """ASGI middleware that answers a request itself unless it is one that the page makes.

    A page of another site can make the user's browser send requests to this machine: then Origin names that site, or,
    after DNS rebinding, Host does. Other users of this machine can send any request. The library behind the page copies
    and serves files, and fetches addresses, that a request names: so it sees no request but those for the page itself,
    for pictures that it made, and calls of the page's functions, of which only numbers in range are passed on.

    Args:
        app: the application.
        port: of the server.
        pictures: the folder of its pictures.
        functions: arguments of each function of the page, by its name and by its number there.
    """

    def __init__(
        self,
        app: Callable[[Scope, Channel, Channel], Awaitable[None]],
        port: int,
        pictures: Path,
        functions: Mapping[str | int, Sequence[Argument]],
    ) -> None:
        self.app = app
        self.hosts = {f"{name}:{port}" for name in _LOCAL_NAMES} | (set(_LOCAL_NAMES) if port == 80 else set())
        self.pictures = pictures
        self.functions = functions

    async def __call__(self, scope: Scope, receive: Channel, send: Channel) -> None:
        if scope["type"] == "websocket":  # the page has none
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            try:
                scope, receive = await self._understood(scope, receive)
            except _Refusal as refusal:
                headers = [(b"content-type", b"text/plain; charset=utf-8")]
                await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
                await send({"type": "http.response.body", "body": f"{refusal}\n".encode()})
                return
        await self.app(scope, receive, send)

    async def _understood(self, scope: Scope, receive: Channel) -> tuple[Scope, Channel]:
        """The request, made anew from what is known of it.

        Raises:
            _Refusal: it is not one that the page makes.
        """
        self._require_local(scope)
        query = [(key, value) for key, value in parse_qsl(scope["query_string"].decode("latin-1")) if key in _QUERY]
        headers = [(name, value) for name, value in scope["headers"] if name in _HEADERS]
        scope = {**scope, "query_string": urlencode(query).encode(), "headers": headers}
        path, call = scope["path"], _CALL.fullmatch(scope["path"])
        if scope["method"] in ("GET", "HEAD") and (_READ.fullmatch(path) or self._is_picture(path)):
            return scope, receive
        if scope["method"] != "POST" or call is None:
            raise _Refusal(403, "the page has no such address; files and uploads are refused")
        body = self._call(await _body_of(receive), call[1])
        about = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        return {**scope, "headers": headers + about}, _replayed(body, receive)

    def _require_local(self, scope: Scope) -> None:
        hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        origins = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"origin"]
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            raise _Refusal(403, "the Host header must name this machine and this port")
        if not {origin.removeprefix("http://") for origin in origins} <= self.hosts:
            raise _Refusal(403, "requests of other sites are refused")

    def _is_picture(self, path: str) -> bool:
        """Whether `path` names a file among the pictures. No file is looked at."""
        file = Path(os.path.abspath(path.removeprefix(_PICTURE).replace("\0", "")))
        return path.startswith(_PICTURE) and file.suffix == ".png" and file.is_relative_to(self.pictures)

    def _call(self, body: bytes, name: str | None) -> bytes:
        """The body of a call of the function `name`, or of the one that the body names by its number."""
        try:
            values = json.loads(body)
            data, session = values["data"], values.get("session_hash")
            number = values.get("fn_index")
        except MALFORMED:
            raise _Refusal(422, "a call of a function must be a JSON object with its numbers under data") from None
        function = number if name is None and isinstance(number, int) and not isinstance(number, bool) else name
        arguments = None if function is None else self.functions.get(function)
        if arguments is None:
            raise _Refusal(404, "the page has no such function")
        if not (session is None and name) and not (isinstance(session, str) and _SESSION.fullmatch(session)):
            raise _Refusal(422, "session_hash must be 1 to 64 letters, digits, - and _")
        if not isinstance(data, list) or len(data) != len(arguments):
            raise _Refusal(422, f"data must be a list of {len(arguments)} numbers")
        try:
            numbers = [_number(value, argument) for value, argument in zip(data, arguments, strict=True)]
        except ArgumentError as error:
            raise _Refusal(422, str(error)) from None
        made: dict[str, Any] = {"data": numbers, "session_hash": session}
        return json.dumps(made if name else {**made, "fn_index": function}).encode()


def _number(value: object, argument: Argument) -> float:
    """`value`, if it is a number in the range of `argument`."""
    kind = "a whole number" if argument.whole else "a number"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not argument.least <= value <= argument.most or (argument.whole and value % 1):  # type: ignore[operator]
        raise ArgumentError(argument.name, value, f"must be {kind} from {argument.least:g} to {argument.most:g}")
    return value  # type: ignore[return-value]


async def _body_of(receive: Channel) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            raise _Refusal(413, f"a request has at most {MAX_BODY} bytes")
    return body


def _replayed(body: bytes, receive: Channel) -> Channel:
    """A channel that gives `body` first, then what `receive` gives."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Any:
        return pending.pop() if pending else await receive()

    return receive_again
