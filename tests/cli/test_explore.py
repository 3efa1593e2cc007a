"""The page of `fastgan explore`: over HTTP, whom it refuses, and in a browser if there is one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import make_run

import fastgan
from fastgan.cli import explore
from fastgan.explorer import page as explorer
from fastgan.explorer import requests as page_requests

pytest.importorskip("gradio", reason="extra explore: pip install 'fastgan[explore]'")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("explore") / "run", "sagan-classes")


@pytest.fixture(scope="module")
def page(run: Path) -> Iterator[explorer.Server]:
    server = explorer.Server(fastgan.load(run), explore._free_port(None))
    yield server
    server.close()


def test_the_page_over_http(page: explorer.Server, run: Path) -> None:
    from gradio_client import Client

    def ask(*values: float) -> np.ndarray:
        with Image.open(client.predict(*values, api_name="/picture")) as image:
            return np.asarray(image.convert("L"))

    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    client = Client(page.url, verbose=False, analytics_enabled=False)
    first = ask(2, 5, 6, 0, 1, -1)
    # 2 x 2 images of 8 px, enlarged 32 times; the first channel, since two make no color.
    expected = ((fastgan.load(run).sample(4, seed=5)[:, 0] + 1) * 127.5).round().numpy()
    assert np.array_equal(first[::32, ::32], np.block([[expected[0], expected[1]], [expected[2], expected[3]]]))
    for changed in ((2, 5, 6, 1, 1, -1), (2, 6, 5, 0, 1, -1), (2, 5, 6, 0.5, 1, -1), (2, 5, 6, 0, 0.1, -1)):
        assert not np.array_equal(ask(*changed), first), changed
    assert not np.array_equal(ask(2, 5, 6, 0, 1, 2), first)
    assert np.array_equal(ask(2, 5, 6, 1, 1, -1), ask(2, 6, 5, 0, 1, -1))
    assert first.shape == (512, 512) and np.array_equal(ask(2, 5, 6, 0, 1, -1), first)


def test_neighbors_and_a_walk(page: explorer.Server, run: Path) -> None:
    from gradio_client import Client

    trained = fastgan.load(run)

    def cells(grid: np.ndarray) -> np.ndarray:
        """[9, 8, 8] of a grid of 3 x 3 images of 8 px, enlarged 21 times."""
        return grid[::21, ::21][:24, :24].reshape(3, 8, 3, 8).swapaxes(1, 2).reshape(9, 8, 8).astype(float)

    sample = ((trained.sample(6, seed=7)[:, 0] + 1) * 127.5).round().numpy()
    near, far = (cells(explorer.neighbors(trained, 3, 7, 4, share, 1.0, -1)) for share in (0.1, 0.6))
    assert np.array_equal(near[0], sample[4]) and np.array_equal(far[0], sample[4])
    differences = [np.abs(grid[1:] - grid[0]).mean() for grid in (near, far)]
    assert 0 < differences[0] < differences[1]
    path = cells(explorer.walk(trained, 3, 7, 3, 1.0, 1))
    of_class = cells(explorer.picture(trained, 3, 7, 7, 0.0, 1.0, 1))
    assert np.array_equal(path[::3], of_class[3:6])  # a row starts at each of three samples
    client = Client(page.url, verbose=False, analytics_enabled=False)
    for name, values in {"/neighbors": (3, 7, 4, 0.1, 1, -1), "/walk": (3, 7, 3, 1, 1)}.items():
        with Image.open(client.predict(*values, api_name=name)) as image:
            assert image.size == (504, 504), name


def test_the_page_is_local_and_arguments_are_checked(
    page: explorer.Server, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert page.url.startswith("http://127.0.0.1:")
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    for argv, word in (
        ([str(run), "--port", "0"], "--port"),
        ([str(run), "--port", str(taken.getsockname()[1])], "in use"),
        ([str(run), "--device", "tpu"], "--device"),
        ([str(run / "samples")], "RUN"),
    ):
        assert explore.main(argv) == 2
        error = capsys.readouterr().err
        assert word in error and len(error.splitlines()) == 1
    taken.close()


PORT = 7861


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[Any]:
    from starlette.testclient import TestClient

    with TestClient(explorer.application(fastgan.load(run), PORT), base_url=f"http://127.0.0.1:{PORT}") as client:
        yield client


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LocalHost"])
def test_requests_of_this_machine_are_answered(host: str, client: Any) -> None:
    address = f"{host}:{PORT}"
    for headers in ({"Host": address}, {"Host": address, "Origin": f"http://{address}"}):
        for path in ("/", "/config", "/gradio_api/info", "/theme.css"):
            assert client.get(path, headers=headers).status_code == 200, (path, headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": f"attacker.example:{PORT}"},  # as after DNS rebinding
        {"Host": f"localhost.attacker.example:{PORT}"},
        {"Host": f"127.0.0.1.attacker.example:{PORT}"},
        {"Host": f"user@localhost:{PORT}"},
        {"Host": f"0.0.0.0:{PORT}"},
        {"Host": "localhost"},
        {"Host": f"localhost:{PORT + 1}"},
        {"Host": ""},
        {"Origin": "http://attacker.example"},
        {"Origin": f"http://attacker.example:{PORT}"},
        {"Origin": f"http://localhost:{PORT + 1}"},
        {"Origin": f"https://localhost:{PORT}"},
        {"Origin": "http://localhost"},
        {"Origin": "null"},
        {"Origin": ""},
    ],
    ids=str,
)
def test_requests_of_other_sites_are_refused(headers: dict[str, str], client: Any) -> None:
    for method, path in (("GET", "/"), ("GET", "/config"), ("HEAD", "/"), ("POST", "/gradio_api/queue/join")):
        assert client.request(method, path, headers=headers).status_code == 403, (method, path)
    preflight = {**headers, "Access-Control-Request-Method": "POST"}
    answer = client.options("/gradio_api/queue/join", headers=preflight)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert client.get("/no/such/path", headers=headers).status_code == 403


def test_two_host_headers_are_refused(client: Any) -> None:
    hosts = [("Host", f"localhost:{PORT}"), ("Host", f"attacker.example:{PORT}")]
    for headers in (hosts, hosts[::-1]):
        assert client.get("/", headers=headers).status_code == 403


def saved() -> list[Path]:
    return sorted(Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*"))


@pytest.mark.parametrize("path", ["/upload", "/upload/", "/gradio_api/upload", "/gradio_api/upload?upload_id=x"])
def test_uploads_are_refused(path: str, client: Any) -> None:
    before = saved()
    answer = client.post(path, files={"files": ("x.png", b"content")})
    assert answer.status_code == 403 and "uploads are refused" in answer.text
    assert client.get(path).status_code == 403
    assert saved() == before
    assert client.post("/gradio_api/process_recording", files={"file": b"content"}).status_code == 403


CALLS = {"picture": [2, 0, 1, 0.5, 1.0, -1], "neighbors": [2, 0, 0, 0.1, 1.0, -1], "walk": [2, 0, 0, 1.0, -1]}


def call(client: Any, name: str, body: object) -> Any:
    return client.post(f"/gradio_api/call/{name}", json=body)


@pytest.mark.parametrize("key", ["path", "url"])
@pytest.mark.parametrize("name", CALLS)
def test_no_file_is_copied_and_no_address_fetched(name: str, key: str, client: Any, tmp_path: Path) -> None:
    """gradio copies the file that such a value names into its folder, and serves it from there."""
    secret = tmp_path / "secret.txt"
    secret.write_text("my secret")
    before = saved()
    file = {"path": str(secret), key: str(secret), "meta": {"_type": "gradio.FileData"}}
    for position in range(len(CALLS[name])):
        for value in (file, [file], {"x": file}):
            data = [*CALLS[name][:position], value, *CALLS[name][position + 1 :]]
            answer = call(client, name, {"data": data})
            assert answer.status_code == 422 and len(answer.text.splitlines()) == 1, answer.text
            joined = {"data": data, "fn_index": list(CALLS).index(name), "session_hash": "x", "event_data": file}
            assert client.post("/gradio_api/queue/join", json=joined).status_code == 422
    assert call(client, name, {"data": CALLS[name], "event_data": file}).status_code == 200  # not passed on
    assert not [one for one in saved() if one.is_file() and one.name == secret.name] and set(before) <= set(saved())


@pytest.mark.parametrize("path", ["/etc/hostname", "{folder}/../x.png", "{folder}/x.txt", "http://127.0.0.1/x.png", ""])
def test_only_pictures_of_the_page_are_served(path: str, client: Any) -> None:
    path = path.format(folder=os.environ["GRADIO_TEMP_DIR"])
    assert client.get(f"/gradio_api/file={path}").status_code == 403
    (picture, *_) = [one for one in saved() if one.suffix == ".png"]
    assert client.get(f"/gradio_api/file={picture}", headers={"Range": "bytes=1-2"}).content == picture.read_bytes()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((value, "must be a whole number from 0 to 9999") for value in (-1, 10_000, 10**30, 0.5, True, None, "1", [])),
        *((value, "must be a whole number from 0 to 9999") for value in (1e308, float("nan"), float("inf"))),
        *(("\x1b[31m\ud800", words) for words in ("\\x1b", "\\ud800")),
    ],
    ids=repr,
)
def test_numbers_out_of_range_are_refused_in_one_line(
    value: object, words: str, client: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    body = json.dumps({"data": [2, value, 1, 0.5, 1.0, -1]})
    answer = client.post("/gradio_api/call/picture", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and answer.text.startswith("seed must be a whole number") and words in answer.text
    assert answer.text.strip().isprintable() and not capfd.readouterr().err


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("call/picture", b"", 422),
        ("call/picture", b"[" * 5000, 422),
        ("call/picture", b"[]", 422),
        ("call/picture", b"\xff", 422),
        ("call/picture", b'{"data": 1}', 422),
        ("call/picture", b'{"data": [1]}', 422),
        ("call/picture", b'{"data": [2, 0, 1, 0.5, 1.0, -1], "session_hash": "../x"}', 422),
        ("call/other", b'{"data": []}', 404),
        ("queue/join", b'{"data": [2, 0, 1, 0.5, 1.0, -1], "fn_index": 0}', 422),
        ("queue/join", b'{"data": [], "fn_index": "picture", "session_hash": "x"}', 404),
        ("queue/join", b'{"data": [], "fn_index": [], "session_hash": "x"}', 404),
        ("queue/join", b'{"data": [], "fn_index": true, "session_hash": "x"}', 404),
        ("queue/join", b'{"data": [], "session_hash": "x"}', 404),
        ("call/picture", b" " * 20_000, 413),
        ("call/v2/picture", b'{"data": {}}', 403),
        ("run/picture", b'{"data": []}', 403),
        ("api/picture", b'{"data": []}', 403),
        ("cancel", b"{}", 403),
        ("component_server", b"{}", 403),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_requests_that_the_page_does_not_make(path: str, content: bytes, status: int, client: Any) -> None:
    answer = client.post(f"/gradio_api/{path}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and len(answer.text.splitlines()) == 1


def test_the_library_sees_of_a_request_what_is_known_of_it() -> None:
    """No query, header or key beyond those, and a body made anew."""
    seen: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, (await receive())["body"]))

    body = b'{"data": [1], "data": [2], "event_data": {"path": "/x"}, "trigger_id": 3, "session_hash": "s"}'

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(_: object) -> None:
        raise AssertionError

    headers = [(b"host", b"localhost:7861"), (b"x-forwarded-host", b"other"), (b"content-encoding", b"gzip")]
    path = "/gradio_api/call/f"
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"deep_link=x&session_hash=y"}
    functions = {"f": [page_requests.Argument("n", 0, 9, True)]}
    layer = page_requests.LocalOnly(inner, PORT, Path("/none"), functions)
    asyncio.run(layer({**scope, "headers": headers}, receive, send))
    ((scope, body),) = seen
    assert json.loads(body) == {"data": [2], "session_hash": "s"} and scope["query_string"] == b"session_hash=y"
    assert scope["headers"] == [
        *headers[:1],
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]


def test_refused_requests_do_not_reach_the_application() -> None:
    """Neither HTTP requests nor any websocket. Lifespan messages, from the server, do."""
    seen: list[str] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    def sent(**scope: Any) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: dict[str, Any]) -> None:
            messages.append(message)

        scope = {"headers": [], "path": "/", "method": "GET", "query_string": b"", **scope}
        asyncio.run(page_requests.LocalOnly(inner, PORT, Path("/none"), {})(scope, receive, send))
        return messages

    for headers in ([(b"host", b"attacker.example")], [(b"host", b"localhost:7861")]):
        assert sent(type="websocket", headers=headers) == [{"type": "websocket.close", "code": 1008}]
    assert sent(type="http")[0]["status"] == 403 and not seen
    for kind in ("lifespan", "http"):
        assert not sent(type=kind, headers=[(b"host", b"localhost:7861")])
    assert seen == ["lifespan", "http"]
    port_80 = page_requests.LocalOnly(inner, 80, Path("/none"), {})
    assert "localhost" in port_80.hosts and "localhost:80" in port_80.hosts


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_signal_at_any_time_ends_the_command_as_ctrl_c_does(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the page is made too, and `nohup` is respected: an interrupted process removes its folder of pictures."""
    number = getattr(signal, name)
    monkeypatch.setattr("fastgan.explorer.page.application", lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    assert explore.main([str(run)]) == 130 and signal.getsignal(number) == before
    assert capsys.readouterr().err == "fastgan: interrupted\n"
    ignored = signal.signal(number, signal.SIG_IGN)
    try:
        with explore._interrupted_by_signals():
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, ignored)


def test_temporary_pictures_are_private_and_removed_at_exit(run: Path, client: Any) -> None:
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and list(folder.rglob("*.png"))
    code = f"""
import os
import fastgan
from fastgan.explorer import page as explorer
explorer.page(fastgan.load({str(run)!r}))
folder = os.environ["GRADIO_TEMP_DIR"]
assert [name for _, _, files in os.walk(folder) for name in files]
print(folder)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(fastgan.__file__).parents[1]
    )
    other = Path(done.stdout.split()[-1])
    assert other.name.startswith("fastgan-explore-") and other != folder and not other.exists()


def test_truncation_is_disabled_if_it_has_no_effect(tmp_path: Path) -> None:
    trained = fastgan.load(make_run(tmp_path / "run", "pggan-4"))
    sliders = {block.label: block for block in explorer.page(trained).blocks.values() if getattr(block, "label", None)}
    assert sliders["truncation"].interactive is False and "normalizes" in sliders["truncation"].info
    assert sliders["class (-1: all)"].visible is False


@pytest.mark.slow
def test_the_page_in_a_browser(page: explorer.Server, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt install chromium")
    flags = f"--headless --no-sandbox --disable-gpu --user-data-dir={tmp_path} --virtual-time-budget=20000".split()
    done = subprocess.run([chromium, *flags, "--dump-dom", page.url], capture_output=True, text=True, timeout=120)
    for words in ("sagan at 12 kimg", "interpolation towards the second seed", "truncation", "second seed", "<img"):
        assert words in done.stdout, done.stderr[-500:]
    shot = tmp_path / "page.png"
    window = "--window-size=1200,900"
    subprocess.run([chromium, *flags, window, f"--screenshot={shot}", page.url], timeout=120, check=True)
    with Image.open(shot) as image:
        assert image.size == (1200, 900) and len(image.convert("L").getcolors() or []) > 20
