"""MNIST and Fashion-MNIST as their authors, torchvision and Debian lay them."""

from __future__ import annotations

import errno
import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from published import mnist

from fastgan.data import open_source, prepare
from fastgan.data.preparation.settings import Settings
from fastgan.data.prepared import read_manifest
from fastgan.data.registry import folder_kind
from fastgan.data.sources import idx
from fastgan.errors import ArgumentError


def refusal(spec: str) -> str:
    with pytest.raises(ArgumentError) as error:
        open_source(spec, 16)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("inner", ["MNIST/raw", "."])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", ["-", "."])
def test_layouts(tmp_path: Path, inner: str, packed: bool, mark: str) -> None:
    images, labels = mnist(tmp_path / inner, packed=packed, mark=mark)
    source = open_source(f"mnist:{tmp_path}", 32)
    assert (len(source), source.channels, source.num_classes, source.name) == (6, 1, 10, "mnist")
    np.testing.assert_array_equal(source.labels, labels)
    enlarged = Image.fromarray(images[2]).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(source.read(2, 32)[0], np.asarray(enlarged))
    assert folder_kind(tmp_path) == "mnist"
    assert open_source(str(tmp_path), 32).fingerprint == source.fingerprint


def test_no_pickle_of_an_old_torchvision_is_read(tmp_path: Path) -> None:
    mnist(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        (tmp_path / "MNIST" / "processed" / name).write_bytes(b"not to be read")
    assert len(open_source(f"mnist:{tmp_path}", 32)) == 6


def test_split(tmp_path: Path) -> None:
    mnist(tmp_path, count=6, packed=True)
    mnist(tmp_path, count=3, packed=True, split="t10k", seed=1)
    train, test = (open_source(f"mnist:{tmp_path}{option}", 16) for option in ("", "?split=test"))
    assert (len(train), len(test)) == (6, 3)
    assert train.fingerprint != test.fingerprint
    assert open_source(f"mnist:{tmp_path}?split=train", 16).fingerprint == train.fingerprint
    assert "its split must be train or test, got 'val'" in refusal(f"mnist:{tmp_path}?split=val")
    assert "its options must be split, got splt" in refusal(f"mnist:{tmp_path}?splt=test")


def test_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "DEBIAN_FASHION", tmp_path / "fashion-mnist")
    assert "apt install dataset-fashion-mnist" in refusal("fashion-mnist")
    mnist(tmp_path / "fashion-mnist", packed=True)
    mnist(tmp_path / "fashion-mnist", packed=True, split="t10k", count=2)
    for spec in ("fashion-mnist", f"fashion-mnist:{tmp_path / 'fashion-mnist'}", str(tmp_path / "fashion-mnist")):
        source = open_source(spec, 32)
        assert (source.name, len(source), source.classes[9]) == ("fashion-mnist", 6, "Ankle boot")
    assert len(open_source("fashion-mnist?split=test", 32)) == 2


def test_prepare_keeps_the_names_of_classes(tmp_path: Path) -> None:
    mnist(tmp_path / "fashion", packed=True)
    prepare(str(tmp_path / "fashion"), str(tmp_path / "set"), Settings(resolution=8), workers=1)
    manifest = read_manifest(tmp_path / "set")
    assert manifest.source["kind"] == "fashion-mnist"
    assert manifest.classes() == list(idx.FASHION_CLASSES)
    assert list(open_source(str(tmp_path / "set"), 8).classes) == list(idx.FASHION_CLASSES)


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert "train-images-idx3-ubyte, as it is or as .gz" in refusal(f"mnist:{tmp_path}")
    mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert "train-labels-idx1-ubyte" in refusal(f"mnist:{tmp_path}")


IMAGES = struct.pack(">4i", 0x803, 6, 28, 28)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (IMAGES + bytes(9), "fewer values"),
        (IMAGES + bytes(6 * 784 + 1), "more values"),
        (IMAGES[:11], "truncated"),
        (struct.pack(">4i", 0xD03, 6, 28, 28), "no idx file of bytes with 3 dimensions"),
        (struct.pack(">4I", 0x803, 2**31, 2**31, 28), "announces"),
        (struct.pack(">4I", 0x803, 350_000, 28, 28), "above 268,435,456"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged(tmp_path: Path, content: bytes, problem: str, packed: bool) -> None:
    mnist(tmp_path, packed=packed)
    file = next(tmp_path.glob("train-images*"))
    file.write_bytes(gzip.compress(content) if packed else content)
    text = refusal(f"mnist:{tmp_path}")
    assert problem in text and file.name in text


def test_damaged_gz(tmp_path: Path) -> None:
    mnist(tmp_path, packed=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"no gz", whole[:20] + b"\xff" * 20 + whole[40:]):
        file.write_bytes(content)
        assert file.name in refusal(f"mnist:{tmp_path}")


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_cannot_be_read_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    mnist(tmp_path, packed=packed)

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(idx, "read_idx", failing)
    assert "cannot be read now (Input/output error)" in refusal(f"mnist:{tmp_path}")


def test_unpacked_values_are_held_once(tmp_path: Path) -> None:
    file = tmp_path / "a.gz"
    file.write_bytes(gzip.compress(struct.pack(">2I", 0x801, 10**7) + bytes(10**7)))
    tracemalloc.start()
    assert len(idx.read_idx(file, 1)) == 10**7
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5e7


def test_labels_must_match(tmp_path: Path) -> None:
    mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 1) + b"\0")
    assert "6 images and 1 labels" in refusal(f"mnist:{tmp_path}")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 6) + b"\x0a" * 6)
    assert "labels, from 0 to 9" in refusal(f"mnist:{tmp_path}")
