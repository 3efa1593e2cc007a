"""What else lies in a folder of images: runs, a dataset.json, SVG files, loose files among classes."""

from __future__ import annotations

import errno
import json
import shutil
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import save

from fastgan.data import folder_labels, open_source, prepare
from fastgan.data.preparation.archives import ZipCollection
from fastgan.data.preparation.collection import InputImage
from fastgan.data.preparation.settings import Settings
from fastgan.data.prepared import read_manifest
from fastgan.data.prepared.manifest import is_prepared
from fastgan.errors import ArgumentError


def refusal(spec: str) -> str:
    with pytest.raises(ArgumentError) as error:
        open_source(spec, 8)
    assert "\n" not in str(error.value)
    return str(error.value)


def make_run(run: Path) -> None:
    save(run / "samples" / "kimg-000001.000.png")
    (run / "config.yaml").write_text("variant: pggan\n")


def stylegan(folder: Path, labels: object) -> list[str]:
    """Three images in the layout of StyleGAN's dataset tool, in two storage folders."""
    names = ["00000/img00000000.png", "00000/img00000999.png", "00001/img00001000.png"]
    for name in names:
        save(folder / name)
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return names


def test_a_plain_path_is_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path)
    for spec in ("photos", "./photos", Path("photos"), str(tmp_path / "photos"), "folder:photos"):
        assert len(open_source(spec, 8)) == 1
    (tmp_path / "photos.txt").write_text("")
    assert "it is a file" in refusal("photos.txt")


def test_runs_are_left_out_and_said_so(tmp_path: Path) -> None:
    """`--data .` with the default `runs/` below it trained on its own samples, and made a class of them."""
    for name in ("cat/a.png", "dog/b.png"):
        save(tmp_path / name)
    make_run(tmp_path / "runs" / "pggan-1")
    make_run(tmp_path / "cat" / "mine")
    source = open_source(str(tmp_path), 8)
    assert (len(source), source.num_classes, list(source.classes)) == (2, 2, ["cat", "dog"])
    assert dict(source.skipped) == dict.fromkeys(
        ("cat/mine/", "runs/pggan-1/"), "the folder of a run, whose pictures are no data"
    )
    assert "it is the folder of a run" in refusal(str(tmp_path / "runs" / "pggan-1"))


def test_prepare_leaves_runs_out(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    make_run(tmp_path / "in" / "runs" / "x")
    manifest = prepare(str(tmp_path / "in"), str(tmp_path / "set"), Settings(resolution=8), workers=1)
    assert (manifest.count, manifest.skipped) == (1, 1)
    assert "runs/x/\tthe folder of a run" in (tmp_path / "set" / "skipped.txt").read_text()


def test_labels_of_dataset_json(tmp_path: Path) -> None:
    names = stylegan(tmp_path, None)
    assert open_source(str(tmp_path), 8).labels is None
    stylegan(tmp_path, [[name, label] for name, label in zip(names, (2, 0, 4), strict=True)])
    source = open_source(str(tmp_path), 8)
    np.testing.assert_array_equal(source.labels, [2, 0, 4])
    assert (source.num_classes, source.skipped) == (5, [])


def test_storage_folders_are_no_classes(tmp_path: Path) -> None:
    stylegan(tmp_path, None)
    (tmp_path / "dataset.json").unlink()
    assert open_source(str(tmp_path), 8).labels is None


@pytest.mark.parametrize("wrapper", ["", "set/"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("labels", [(2, 0, 4), None])
def test_prepare_reads_dataset_json(tmp_path: Path, zipped: bool, wrapper: str, labels: tuple[int, ...] | None) -> None:
    folder = tmp_path / "in" / wrapper
    names = stylegan(folder, labels and [])
    if labels:
        stylegan(folder, [[name, label] for name, label in zip(names, labels, strict=True)])
    if zipped:
        with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
            for file in sorted((tmp_path / "in").rglob("*.*")):
                archive.write(file, file.relative_to(tmp_path / "in"))
    src = tmp_path / "in.zip" if zipped else folder
    manifest = prepare(str(src), str(tmp_path / "set"), Settings(resolution=8), workers=1)
    found = manifest.labels()
    assert (found is None) if labels is None else found is not None and found.tolist() == list(labels)
    assert (manifest.count, manifest.skipped) == (3, 0)


def test_prepare_knows_storage_folders(tmp_path: Path) -> None:
    stylegan(tmp_path / "in", None)
    (tmp_path / "in" / "dataset.json").unlink()
    assert prepare(str(tmp_path / "in"), str(tmp_path / "set"), Settings(resolution=8), workers=1).num_classes == 0


@pytest.mark.parametrize("beside", [(), ("README.txt", "NOTES")])
@pytest.mark.parametrize("wrapper", ["", "set/"])
@pytest.mark.parametrize("content", ["classes", "storage", "labels"])
@pytest.mark.parametrize("kind", ["folder", "prepare", "zip", "tar"])
def test_other_files_change_no_label(
    tmp_path: Path, kind: str, content: str, wrapper: str, beside: tuple[str, ...]
) -> None:
    """Folders of classes, StyleGAN's storage folders, and its labels; in an archive also within one folder."""
    folder = tmp_path / "in" / wrapper
    if content == "classes":
        for name in ("a/0.png", "b/1.png", "b/2.png"):
            save(folder / name)
    else:
        names = stylegan(folder, [])
        (folder / "dataset.json").unlink()
        if content == "labels":
            stylegan(folder, [[name, label] for name, label in zip(names, (2, 0, 4), strict=True)])
    for name in beside:  # beside the folder that holds everything
        (tmp_path / "in" / name).write_text("x")
    if kind == "folder":
        source = open_source(str(folder), 8)
        found, classes = source.labels, list(source.classes)
    else:
        root = tmp_path / "in"
        src = str(folder) if kind == "prepare" else shutil.make_archive(str(tmp_path / "packed"), kind, root)
        manifest = prepare(src, str(tmp_path / "set"), Settings(resolution=8), workers=1)
        found, classes = manifest.labels(), manifest.classes() or []
    expected = {"classes": [0, 1, 1], "storage": None, "labels": [2, 0, 4]}[content]
    assert (None if found is None else found.tolist()) == expected
    assert classes == (["a", "b"] if content == "classes" else [])


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_single_class_is_told(tmp_path: Path, kind: str) -> None:
    """A damaged image beside the folder that holds everything makes that folder a class."""
    for name in ("set/a/0.png", "set/b/1.png"):
        save(tmp_path / "in" / name)
    (tmp_path / "in" / "damaged.png").write_bytes(b"x")
    if kind == "folder":
        assert open_source(str(tmp_path / "in"), 8).notes == ["1 class: every image is in the folder set"]
    src = str(tmp_path / "in") if kind == "folder" else shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path / "in")
    told: list[str] = []
    prepare(src, str(tmp_path / "set"), Settings(resolution=8), workers=1, report=told.append)
    assert "1 class: every image has the label set" in told


def test_a_zipped_dataset_json_takes_no_more_memory_than_labels_do(tmp_path: Path) -> None:
    """15 MB of empty lists, 15 kB in the zip, were 400 MB as Python's values."""
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset.json", '{"labels": [' + "[]," * 5_000_000 + "[]]}")
        archive.write(save(tmp_path / "a.png"), "a.png")
    tracemalloc.start()
    with pytest.raises(ArgumentError, match=r"dataset\.json'"):
        list(ZipCollection(tmp_path / "in.zip").images())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_a_dataset_json_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stylegan(tmp_path, [[f"{i}.png", 0] for i in range(10)])
    monkeypatch.setattr(folder_labels, "MAX_LABELS", 9)
    assert "must have at most 9 labels" in refusal(str(tmp_path))
    monkeypatch.setattr(folder_labels, "MAX_BYTES", 20)
    assert "must have at most 20" in refusal(str(tmp_path))
    for kind in ("zip", "tar"):
        src = shutil.make_archive(str(tmp_path.with_name("packed")), kind, tmp_path)
        with pytest.raises(ArgumentError, match=r"SRC must have at most 20 .*, got '.*/dataset\.json'"):
            prepare(src, str(tmp_path.with_name("set")), Settings(resolution=8), workers=1)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ('{"labels": [["a\\"b.png", 1], [".\\\\x\\u00e9.png",2]]}', {'a"b.png': 1, "xé.png": 2}),
        ('\ufeff[\n ["a.png", 3]\n,["a.png"\t,4]] ', {"a.png": 4}),
        ('{"labels": [ ] }', {}),
        ('{ "labels" : null }', None),
        ('{"labels": [["a.png", 1]]', ""),
        ('{"labels": [["a.png", 1]]} x', ""),
        ('{"labels": [["a.png", 1],]}', ""),
        ('{"labels": [["a.png" 1]]}', ""),
        ('{"labels": [["\\x", 1]]}', ""),
        ("null", ""),
    ],
)
def test_dataset_json_as_text(text: str, labels: dict[str, int] | str | None) -> None:
    if labels == "":
        with pytest.raises(ArgumentError, match="must hold"):
            folder_labels.parse_dataset_json(text.encode(), "--data", "x")
    else:
        assert folder_labels.parse_dataset_json(text.encode(), "--data", "x") == labels


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([["00000/img00000000.png", 1]], "it has no label for 00000/img00000999.png"),
        ([["a.png", 0.5]], "the label of a.png must be a whole number"),
        ([["a.png", [0, 1]]], "the label of a.png must be a whole number"),
        ([["a.png", True]], "the label of a.png must be a whole number"),
        ([["a.png", -1]], "the label of a.png must be a whole number"),
        ([["a.png", 2**20]], "the label of a.png must be a whole number"),
        ([[1, 2]], "must hold"),
        ("abc", "must hold"),
        (7, "must hold"),
    ],
)
def test_wrong_dataset_json(tmp_path: Path, labels: object, problem: str) -> None:
    stylegan(tmp_path, labels)
    text = refusal(str(tmp_path))
    assert problem in text and "dataset.json" in text


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"labels": ', b"\xff\xfe", b"{}"])
def test_damaged_dataset_json(tmp_path: Path, content: bytes) -> None:
    stylegan(tmp_path, None)
    (tmp_path / "dataset.json").write_bytes(content)
    assert "dataset.json" in refusal(str(tmp_path))


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_a_dataset_json_that_cannot_be_read_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    stylegan(tmp_path / "in", None)
    real = Path.open

    def failing(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "dataset.json":
            raise fault
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    for read in (open_source, lambda src, side: prepare(src, tmp_path / "set", Settings(resolution=side), workers=1)):
        with pytest.raises(ArgumentError, match=r"dataset\.json.* cannot be read now"):
            read(str(tmp_path / "in"), 8)
    assert not is_prepared(tmp_path / "set")


def test_a_zipped_dataset_json_that_cannot_be_read_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stylegan(tmp_path / "in", None)
    src = shutil.make_archive(str(tmp_path / "in"), "zip", tmp_path / "in")

    def failing(self: ZipCollection, image: InputImage) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ZipCollection, "open", failing)
    with pytest.raises(ArgumentError, match=r"dataset\.json.* cannot be read now"):
        prepare(src, tmp_path / "set", Settings(resolution=8), workers=1)


def test_a_dataset_json_of_a_zip_from_windows(tmp_path: Path) -> None:
    names = stylegan(tmp_path / "in", None)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "in" / name, name)
            archive.infolist()[-1].filename = name.replace("/", "\\")
        archive.writestr("dataset.json", json.dumps({"labels": [[name.replace("/", "\\"), 1] for name in names]}))
    labels = prepare(str(tmp_path / "in.zip"), tmp_path / "set", Settings(resolution=8), workers=1).labels()
    assert labels is not None and labels.tolist() == [1, 1, 1]


@pytest.mark.parametrize("spec", ["~nobody-of-this-name/photos", "x" * 5000, "", "folder:" + "x" * 5000, "?split=test"])
def test_a_name_that_no_folder_can_have(spec: str) -> None:
    assert refusal(spec).startswith("--data")


def test_a_loose_file_that_costs_the_labels_is_named(tmp_path: Path) -> None:
    for name in ("cat/a.png", "dog/b.png", "stray.png"):
        save(tmp_path / name)
    source = open_source(str(tmp_path), 8)
    assert source.labels is None
    assert source.notes == ["no labels: stray.png is in no subfolder; without loose images, the subfolders are classes"]


def test_svg_files_are_counted_with_the_remedy(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for name in ("b.svg", "c.SVG"):
        (tmp_path / name).write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (note,) = open_source(str(tmp_path), 8).notes
    assert note.startswith("2 SVG files are not read; render them to PNG first, with `resvg")
    (tmp_path / "a.png").unlink()
    assert "render them to PNG first" in refusal(str(tmp_path))


def test_class_names_of_a_prepared_folder(tmp_path: Path) -> None:
    for name in ("cat/a.png", "dog/b.png"):
        save(tmp_path / "in" / name)
    prepare(str(tmp_path / "in"), str(tmp_path / "set"), Settings(resolution=8), workers=1)
    assert read_manifest(tmp_path / "set").classes() == ["cat", "dog"]
    size = (tmp_path / "set" / "classes.json").stat().st_size
    (tmp_path / "set" / "classes.json").write_bytes(b'{"cat": 1}'.ljust(size))
    assert "classes.json is damaged (it is no list of names)" in refusal(str(tmp_path / "set"))


def test_class_names_nested_without_end_are_refused(tmp_path: Path) -> None:
    """A file of the listed size, so that it is parsed."""
    for name in range(20):
        save(tmp_path / "in" / (f"{name:02}" + "x" * 240) / "a.png")
    prepare(str(tmp_path / "in"), str(tmp_path / "set"), Settings(resolution=8), workers=1)
    file = tmp_path / "set" / "classes.json"
    file.write_bytes(b"[" * file.stat().st_size)
    assert "classes.json is damaged (maximum recursion depth" in refusal(str(tmp_path / "set"))
