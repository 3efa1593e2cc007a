"""The page of `fastgan explore`: over HTTP, and in a real browser where there is one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import make_run

import fastgan
from fastgan.cli import explore

pytest.importorskip("gradio", reason="extra explore: pip install 'fastgan[explore]'")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("explore") / "run", "sagan-classes")


@pytest.fixture(scope="module")
def page(run: Path) -> Iterator[Any]:
    blocks = explore.launch(fastgan.load(run), explore._free_port(None))
    yield blocks
    blocks.close()


def test_the_page_over_http(page: Any, run: Path) -> None:
    from gradio_client import Client

    def ask(*values: float) -> np.ndarray:
        with Image.open(client.predict(*values, api_name="/picture")) as image:
            return np.asarray(image.convert("L"))

    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    client = Client(page.local_url, verbose=False, analytics_enabled=False)
    first = ask(2, 5, 6, 0, 1, -1)
    # 2 x 2 images of 8 px, enlarged 32 times; the first channel, since two make no color.
    expected = ((fastgan.load(run).sample(4, seed=5)[:, 0] + 1) * 127.5).round().numpy()
    assert np.array_equal(first[::32, ::32], np.block([[expected[0], expected[1]], [expected[2], expected[3]]]))
    for changed in ((2, 5, 6, 1, 1, -1), (2, 6, 5, 0, 1, -1), (2, 5, 6, 0.5, 1, -1), (2, 5, 6, 0, 0.1, -1)):
        assert not np.array_equal(ask(*changed), first), changed
    assert not np.array_equal(ask(2, 5, 6, 0, 1, 2), first)
    assert np.array_equal(ask(2, 5, 6, 1, 1, -1), ask(2, 6, 5, 0, 1, -1))
    assert first.shape == (512, 512) and np.array_equal(ask(2, 5, 6, 0, 1, -1), first)


def test_the_page_is_local_and_the_port_is_checked(page: Any, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert page.local_url.startswith("http://127.0.0.1:")
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    for argv, word in (
        ([str(run), "--port", "0"], "--port"),
        ([str(run), "--port", str(taken.getsockname()[1])], "taken"),
        ([str(run), "--device", "tpu"], "--device"),
        ([str(run / "samples")], "RUN"),
    ):
        assert explore.main(argv) == 2
        error = capsys.readouterr().err
        assert word in error and len(error.splitlines()) == 1
    taken.close()


def test_truncation_is_off_where_it_would_do_nothing(tmp_path: Path) -> None:
    trained = fastgan.load(make_run(tmp_path / "run", "pggan-4"))
    sliders = {block.label: block for block in explore.page(trained).blocks.values() if getattr(block, "label", None)}
    assert sliders["truncation"].interactive is False and "normalizes" in sliders["truncation"].info
    assert sliders["class (-1: all)"].visible is False


@pytest.mark.slow
def test_the_page_in_a_browser(page: Any, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt install chromium")
    flags = f"--headless --no-sandbox --disable-gpu --user-data-dir={tmp_path} --virtual-time-budget=20000".split()
    done = subprocess.run([chromium, *flags, "--dump-dom", page.local_url], capture_output=True, text=True, timeout=120)
    for words in ("sagan at 12 kimg", "interpolation towards the second seed", "truncation", "second seed", "<img"):
        assert words in done.stdout, done.stderr[-500:]
    shot = tmp_path / "page.png"
    window = "--window-size=1200,900"
    subprocess.run([chromium, *flags, window, f"--screenshot={shot}", page.local_url], timeout=120, check=True)
    with Image.open(shot) as image:
        assert image.size == (1200, 900) and len(image.convert("L").getcolors() or []) > 20
