"""The commands `fastgan prepare`, `fastgan data info`, `verify` and `show`."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published import noise, save

import fastgan
from fastgan.cli import prepare
from fastgan.cli.main import main
from fastgan.data.images import area_average
from fastgan.data.loading.sampler import Sampler
from fastgan.data.prepared.manifest import read_manifest
from fastgan.errors import ArgumentError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in 4 shards: 4 and 8 px as arrays, 16 px as PNG."""
    folder = tmp_path_factory.mktemp("prepared") / "digits"
    flags = "--resolution 16 --cache-to 8 --per-shard 500 --workers 1 --lossless"
    assert main(["prepare", *flags.split(), "digits", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


Out = Callable[[], tuple[str, str]]


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Out:
    """Printed text since the last call: stdout, stderr."""
    return lambda: (lambda both: (both.out, both.err))(capsys.readouterr())


def test_prepare_prints_a_summary(prepared: Path, output: Out) -> None:
    assert main(["prepare", "digits", str(prepared), *"--resolution 16 --cache-to 8 --per-shard 500".split()]) == 2
    assert f"fastgan: --lossless None: {prepared} was prepared with 'png'" in output()[1]
    again = "--lossless png --resolution 16 --cache-to 8 --per-shard 500"
    assert main(["prepare", "digits", str(prepared), *again.split()]) == 0
    out, err = output()
    assert out.startswith(f"{prepared}: 1,797 images of 16 px, gray, 10 classes, ")
    assert "is already prepared" in err


def test_lossless_accepts_two_formats_or_no_value(tmp_path: Path, output: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("jpg", "PNG", "tiff"):
        assert main(["prepare", "--lossless", kind, "digits", "set"]) == 2
        assert output()[1] == f"fastgan: --lossless must be png or webp, got '{kind}'\n"
        assert main(["prepare", "digits", "set", "--lossless", kind]) == 2
        assert output()[1] == f"fastgan: --lossless must be png or webp, got '{kind}'\n"
    assert not list(tmp_path.iterdir())
    assert prepare._lossless(["--lossless", "digits", "set"]) == ["--lossless", "png", "digits", "set"]
    (tmp_path / "jpg").mkdir()  # what is there is SRC
    assert prepare._lossless(["--lossless", "jpg", "set"]) == ["--lossless", "png", "jpg", "set"]


def test_info(prepared: Path, output: Out) -> None:
    assert main(["data", "info", str(prepared)]) == 0
    lines = output()[0].splitlines()
    assert lines[0] == str(prepared)
    facts = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:] if line}
    assert facts["images"] == "1,797, gray"
    assert facts["classes"] == "10"
    assert facts["skipped"] == "0"
    assert facts["fingerprint"] == read_manifest(prepared).fingerprint
    assert facts["4"].startswith("arrays") and facts["8"].startswith("arrays") and facts["16"].startswith("png")


def test_verify_accepts_a_complete_set(prepared: Path, output: Out) -> None:
    assert main(["data", "verify", str(prepared)]) == 0
    assert f"{prepared}: all 20 files" in output()[0]


def test_verify_lists_each_wrong_file(copy: Path, output: Out) -> None:
    tar = copy / "encoded" / "0016" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1000])
    array = copy / "cache" / "0004" / "00001.npy"
    array.write_bytes(array.read_bytes()[:-1] + b"\1")
    (copy / "cache" / "0008" / "00002.npy").unlink()
    indexes = copy / "encoded" / "0016"
    shutil.copy(indexes / "00002.idx", indexes / "00001.idx")
    (copy / "cache" / "0004" / ".00001.npy.77.part").write_bytes(b"x")
    (copy / "notes.txt").write_text("x")
    (copy / ".preparing").mkdir()
    (copy / ".preparing" / "asked.json").write_text("{}")
    assert main(["data", "verify", str(copy)]) == 1
    out, err = output()
    found = {str(Path(line.split(" ")[0]).relative_to(copy)): line.split(" ", 1)[1] for line in out.splitlines()}
    assert sorted(found) == [
        ".preparing/asked.json",
        "cache/0004/.00001.npy.77.part",
        "cache/0004/00001.npy",
        "cache/0008/00002.npy",
        "encoded/0016/00000.tar",
        "encoded/0016/00001.idx",
        "notes.txt",
    ]
    assert found["encoded/0016/00000.tar"].startswith("is truncated: ")
    assert found["cache/0004/00001.npy"].startswith("has been changed: its sha256 is ")
    assert found["cache/0008/00002.npy"] == "is missing"
    assert found["notes.txt"] == "does not belong to the set"
    assert "left over from `fastgan prepare`" in found[".preparing/asked.json"]
    assert "fastgan: 7 files are wrong" in err


def test_one_wrong_file_is_counted_in_the_singular(copy: Path, output: Out) -> None:
    (copy / "cache" / "0008" / "00002.npy").unlink()
    assert main(["data", "verify", str(copy)]) == 1
    assert "fastgan: 1 file is wrong; " in output()[1]


def test_show_names_a_damaged_image(copy: Path, output: Out) -> None:
    tar = copy / "encoded" / "0016" / "00000.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    show = ["data", "show", str(copy), "--seed", "None", "--resolution", "16", "--out", str(copy / "x.png")]
    assert main(show) == 2
    named = f"DATA '{tar}, member 000000000.png': the image cannot be decoded (no image in a format that is read); "
    assert named in output()[1]
    assert not (copy / "x.png").exists()


@pytest.mark.parametrize("what", ["header", "archive"])
def test_a_damaged_array_is_named(copy: Path, output: Out, what: str) -> None:
    """With the size in the manifest: a damaged header, and a file that NumPy takes for a .npz."""
    file = copy / "cache" / "0008" / "00000.npy"
    content = file.read_bytes()
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros(1))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = bytes(len(content) - len(buffer.getvalue()))
    file.write_bytes(content[:10] + b"{'((" + content[14:] if what == "header" else buffer.getvalue())
    assert file.stat().st_size == len(content)
    assert main(["data", "show", str(copy), "--resolution", "8", "--out", str(copy / "x.png")]) == 2
    error = output()[1]
    assert f"DATA '{file}': it is not a whole .npy file (" in error and len(error.splitlines()) == 1
    with pytest.raises(ArgumentError, match=r"--data .*00000\.npy': it is not a whole \.npy file"):
        fastgan.data.open_source(str(copy), 8).arrays(8)


@pytest.mark.parametrize("name", ["classes.json", "names.jsonl", "labels.npy"])
def test_a_damaged_list_is_named(tmp_path: Path, output: Out, name: str) -> None:
    """If it is truncated, a set prepared from this one would lack images or classes."""
    copy = tmp_path / "copy"
    for i in range(4):
        save(tmp_path / "photos" / f"class {i}" / "a.png", noise(8, 8))
    assert main(["prepare", str(tmp_path / "photos"), str(copy), "--workers", "1"]) == 0
    file = copy / name
    content = file.read_bytes()
    output()
    for damage in (content[: len(content) // 2], b"\xff" * len(content), None):
        if damage is None:
            file.unlink()
        else:
            file.write_bytes(damage)
        if name == "classes.json":
            assert main(["data", "info", str(copy)]) == 2
            assert f"DST '{copy}': {name} is " in output()[1]
        assert main(["prepare", str(copy), str(copy.parent / "again"), "--workers", "1"]) == 2
        error = output()[1]
        assert "SRC '" in error and name in error and len(error.splitlines()) == 1
    assert not (copy.parent / "again").exists()


def test_names_that_are_not_utf8_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9")
    save(source / source.name / "a.png", noise(8, 8))
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")  # strict, as in most people's locales
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["prepare", str(source), str(tmp_path / "set"), "--workers", "1"]) == 0
    assert main(["data", "info", str(tmp_path / "set")]) == 0
    assert "1: caf\\udce9\n" in out.buffer.getvalue().decode()


def test_verify_detects_a_changed_manifest(copy: Path, output: Out) -> None:
    file = copy / "manifest.json"
    file.write_text(file.read_text().replace('"cache_to": 8', '"cache_to": 4'))
    assert main(["data", "verify", str(copy)]) == 1
    assert output()[0].startswith(f"{file} has been changed: its fingerprint")
    file.write_text(file.read_text()[:-100])
    assert main(["data", "verify", str(copy)]) == 2
    assert f"{file} is damaged" in output()[1]


def test_show(prepared: Path, tmp_path: Path, output: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "show", str(prepared), "--n", "5", "--start", "3", "--seed", "None"]) == 0
    assert output()[0] == "5 of 1,797 images, 16 px: digits-16px.png\n"
    labeled = np.asarray(Image.open("digits-16px.png"))
    assert labeled.shape == (2 * (64 + 14), 3 * 64)
    sheet = labeled.reshape(2, 64 + 14, 3 * 64)[:, :64].reshape(2 * 64, 3 * 64)
    source = fastgan.data.open_source("digits", 16)
    tiles = sheet[::4, ::4].reshape(2, 16, 3, 16).transpose(0, 2, 1, 3).reshape(6, 16, 16)
    assert not tiles[5].any()
    for i in range(5):
        np.testing.assert_array_equal(tiles[i], source.read(3 + i, 16)[0])
    assert main(["data", "show", str(prepared), "--n", "1", "--seed", "4", "--resolution", "8", "--out", "x.png"]) == 0
    first = int(Sampler(1797, 4).order(0)[0])
    shown = np.asarray(Image.open("x.png"))[:64:8, ::8]
    np.testing.assert_array_equal(shown, area_average(source.read(first, 16), 8)[0])


def test_show_names_the_first_files_that_are_no_images(tmp_path: Path, output: Out) -> None:
    save(tmp_path / "photos" / "image.png", np.zeros((8, 8, 3), np.uint8))
    for i in range(12):
        (tmp_path / "photos" / f"note\n{i:02}.txt").write_text("no image")
    assert main(["data", "show", str(tmp_path / "photos"), "--out", str(tmp_path / "x.png")]) == 0
    told = [line for line in output()[1].splitlines() if line.startswith("skipped ")]
    assert len(told) == 11 and told[9].startswith("skipped note\\x0a09.txt: ")
    assert told[10] == "skipped 12 files or folders; 1 images remain"


def test_show_draws_a_fair_sheet_of_any_data(tmp_path: Path, output: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes in the order of folders would fill a sheet with the first one."""
    monkeypatch.chdir(tmp_path)
    for i in range(40):
        save(tmp_path / "photos" / f"{'ab'[i // 20]}" / f"{i:02}.png", np.full((8, 8, 3), 100 + 3 * i, np.uint8))
    assert main(["data", "show", "photos", "--n", "16"]) == 0
    assert output()[0] == "16 of 40 images, 64 px: photos-64px.png\n"
    cells = np.asarray(Image.open("photos-64px.png"))[32 :: 64 + 14, 32::64, 0].flatten()
    assert 4 <= (cells < 160).sum() <= 12 and len(set(cells.tolist())) == 16
    assert main(["data", "show", "digits", "--resolution", "8", "--out", "d.png"]) == 0
    assert main(["data", "show", "photos", "--channels", "4", "--out", "rgba.png", "--fit", "pad"]) == 0
    assert "0 of 40 images have alpha" in output()[1]
    assert Image.open("rgba.png").mode == "RGBA"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--n 0", "--n must be at least 1, got 0"),
        ("--start 1797", "--start must be 0 to 1796, got 1797"),
        ("--resolution 32", "--resolution must be at most 16, got 32"),
        ("--resolution 0", "--resolution must be a power of two from 4, got 0"),
        ("--out x.jpg", "--out must be a file that ends in .png, got 'x.jpg'"),
        ("--out nowhere/x.png", "got 'nowhere/x.png'; No such file or directory"),
        ("--out folder.png", "--out must be a file that can be written, got 'folder.png'; Is a directory"),
    ],
)
def test_show_refuses(
    prepared: Path, tmp_path: Path, output: Out, monkeypatch: pytest.MonkeyPatch, flags: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert main(["data", "show", str(prepared), *flags.split()]) == 2
    assert words in output()[1]
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


def test_no_prepared_set(tmp_path: Path, output: Out) -> None:
    for what, words in (
        ("info", "manifest.json is missing"),
        ("verify", "manifest.json is missing"),
        ("show", "DATA must be"),
    ):
        assert main(["data", what, str(tmp_path / "nowhere")]) == 2
        out, err = output()
        assert not out and words in err and err.count("\n") == 1


def test_an_unfinished_set_is_refused(copy: Path, output: Out) -> None:
    """The state after a kill."""
    (copy / "manifest.json").unlink()
    (copy / ".preparing").mkdir()
    for what in ("info", "verify", "show"):
        assert main(["data", what, str(copy)]) == 2
        assert "not finished; run the same `fastgan prepare` command again" in output()[1]
    for spec in (str(copy), f"prepared:{copy}"):
        with pytest.raises(ArgumentError, match=r"--data .*not finished"):
            fastgan.data.open_source(spec, 16)


@pytest.mark.parametrize("words", ["prepare --help", "data show --help"])
def test_help_comes_without_torch(words: str) -> None:
    """A prepare with many workers starts many processes; importing torch takes seconds and most of the memory."""
    code = (
        "import sys; from fastgan.cli.main import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
    assert "usage: fastgan" in done.stdout and done.stdout.endswith("False\n")


def test_a_pipe_that_is_closed_is_no_error(prepared: Path) -> None:
    words = f"{sys.executable} -m fastgan data info {prepared} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_paths_reach_the_terminal_without_control_characters(prepared: Path, output: Out, tmp_path: Path) -> None:
    copy = tmp_path / "\x1b[31mset\x07"
    shutil.copytree(prepared, copy)
    for flags in (["info", str(copy)], ["verify", str(copy)], ["show", str(copy), "--out", str(tmp_path / "\x1b.png")]):
        assert main(["data", *flags]) == 0
        said = "".join(output())
        assert "\\x1b" in said and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said), said
