"""`fastgan prepare` in this process: the written files, for every kind of input and setting."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import celeba, cifar10, contents, miss_broken, mnist, noise, save, save_broken

import fastgan.data
from fastgan.data import open_source, registry
from fastgan.data.images import area_average
from fastgan.data.preparation.collection import FolderCollection
from fastgan.data.preparation.prepare import prepare
from fastgan.data.preparation.settings import Settings
from fastgan.data.prepared.manifest import Manifest, read_manifest, tar_file
from fastgan.data.prepared.reader import Level
from fastgan.data.walk import walk
from fastgan.errors import ArgumentError


def make(src: Path | str, dst: Path, *, strict: bool = False, **settings: Any) -> Manifest:
    made = prepare(str(src), dst, Settings(**{"per_shard": 4, **settings}), strict=strict, workers=1)
    assert made == read_manifest(dst)
    assert not list(dst.rglob(".*")), "nothing unfinished is left"
    assert {str(path.relative_to(dst)) for path in dst.rglob("*") if path.is_file()} == {*made.files, "manifest.json"}
    for name, file in made.files.items():
        assert hashlib.sha256((dst / name).read_bytes()).hexdigest() == file.sha256
    return made


def refusal(src: Path | str, dst: Path, **settings: Any) -> str:
    with pytest.raises(ArgumentError) as error:
        make(src, dst, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def pixels(manifest: Manifest, resolution: int) -> np.ndarray:
    level = Level(manifest, resolution)
    return np.stack([level.pixels(i) for i in range(manifest.count)])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images of 16 x 16, so that nothing is resized, with names whose order is easy to get wrong."""
    names = (
        "b/x.png",
        "b/x-1.png",
        "b-c/y.png",
        "b.d/z.png",
        "a/9.png",
        "a/10.png",
        "a/ä.png",
        "a/deep/1.png",
        "a0/1.png",
    )
    for i, name in enumerate(names):
        save(tmp_path / "photos" / name, noise(16, 16, 3, seed=i))
    save(tmp_path / "photos" / "a" / "gray.png", noise(16, 16, seed=99))
    return tmp_path / "photos"


def agrees(manifest: Manifest, spec: str, resolution: int, exact: bool = True) -> None:
    """A prepared set has the images of its source, in the same order."""
    source = open_source(spec, resolution)
    own = open_source(str(manifest.path), resolution)
    assert (len(own), own.channels, own.num_classes) == (len(source), source.channels, source.num_classes)
    np.testing.assert_array_equal(own.labels, source.labels)
    for index in range(len(source)):
        for r in (4, resolution):
            one, other = own.read(index, r), source.read(index, r)
            if exact:
                np.testing.assert_array_equal(one, other)
            assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.8


def test_folder(photos: Path, tmp_path: Path) -> None:
    made = make(photos, tmp_path / "set")
    agrees(made, f"folder:{photos}", 16)
    assert list(made.names()) == sorted(made.names())
    assert made.classes() == ["a", "a0", "b", "b-c", "b.d"]
    assert (made.resolution, made.cached, made.channels, made.encoding) == (16, (4, 8, 16), 3, "jpeg")
    assert [shard.count for shard in made.shards] == [4, 4, 2]
    assert made.source == {"kind": "folder", "name": "photos", "digest": made.source["digest"]}
    assert b"/" not in json.dumps([made.settings, made.source]).encode()


def test_folder_with_larger_images_is_area_averaged(tmp_path: Path) -> None:
    image = noise(64, 96, 3)
    save(tmp_path / "src" / "a.png", image)
    made = make(tmp_path / "src", tmp_path / "set", resolution=16)
    crop = image[:, 16:80].transpose(2, 0, 1).astype(float)
    mean = crop.reshape(3, 16, 4, 16, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(pixels(made, 16)[0], mean, atol=1)
    np.testing.assert_array_equal(pixels(made, 4)[0], area_average(pixels(made, 16)[0], 4))
    agrees(made, f"folder:{tmp_path / 'src'}", 16, exact=False)


def test_encoded_resolutions(photos: Path, tmp_path: Path) -> None:
    exact = make(photos, tmp_path / "png", cache_to=4, lossless="png")
    agrees(exact, f"folder:{photos}", 16)
    np.testing.assert_array_equal(pixels(exact, 8), area_average(pixels(exact, 16), 8))
    webp = make(photos, tmp_path / "webp", cache_to=0, lossless="webp")
    np.testing.assert_array_equal(pixels(webp, 16), pixels(exact, 16))
    assert webp.cached == ()
    low, high = (make(photos, tmp_path / f"q{q}", cache_to=4, quality=q) for q in (20, 95))
    error = [np.abs(pixels(one, 16).astype(int) - pixels(exact, 16)).mean() for one in (low, high)]
    assert 0 < error[1] < error[0]
    assert low.files["encoded/0016/00000.tar"].bytes < high.files["encoded/0016/00000.tar"].bytes


def test_channels_and_fit(photos: Path, tmp_path: Path) -> None:
    gray = make(photos, tmp_path / "gray", channels=1)
    agreed = open_source(f"folder:{photos}", 16, channels=1)
    np.testing.assert_array_equal(pixels(gray, 16), np.stack([agreed.read(i, 16) for i in range(10)]))
    wide = noise(8, 32, 3)
    save(tmp_path / "wide" / "a.png", wide)
    fitted = pixels(make(tmp_path / "wide", tmp_path / "fit", fit=True, cache_to=32), 32)[0]
    assert not fitted[:, :12].any() and not fitted[:, 20:].any()
    np.testing.assert_array_equal(fitted[:, 12:20], wide.transpose(2, 0, 1))


def test_gray_folder_has_one_channel(tmp_path: Path) -> None:
    save(tmp_path / "src" / "a.png", noise(8, 8))
    assert make(tmp_path / "src", tmp_path / "set").channels == 1


def test_default_resolution_is_one_that_95_percent_of_the_images_have(tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / "src" / f"{i:02}.png", noise(40, 70, 3, seed=i) if i else noise(17, 90, 3))
    made = make(tmp_path / "src", tmp_path / "set")
    assert (made.resolution, made.count, made.skipped) == (32, 19, 1)
    assert (tmp_path / "set" / "skipped.txt").read_text() == "00.png\ttoo small: 90 x 17, smaller than 32 px\n"
    assert next(made.names()) == "01.png"
    assert make(tmp_path / "src", tmp_path / "all", min_size=1, resolution=32).count == 20


def test_zip_and_tar_are_read_as_the_folder_they_hold(photos: Path, tmp_path: Path) -> None:
    plain = make(photos, tmp_path / "plain", cache_to=8, lossless="png")
    (photos / ".DS_Store").write_bytes(b"x")
    shutil.make_archive(str(tmp_path / "inner"), "zip", photos)
    shutil.make_archive(str(tmp_path / "outer"), "zip", photos.parent, "photos")
    with tarfile.open(tmp_path / "sorted.tar", "w") as archive:
        for name in plain.names():
            archive.add(photos / name, f"./{name}")
    for archive_file in ("inner.zip", "outer.zip", "sorted.tar"):
        made = make(tmp_path / archive_file, tmp_path / archive_file.replace(".", "-"), cache_to=8, lossless="png")
        assert (made.count, made.num_classes, made.classes()) == (10, 5, plain.classes())
        np.testing.assert_array_equal(made.labels(), plain.labels())
        for name in plain.files:
            if name.startswith(("cache", "encoded")):
                assert made.files[name] == plain.files[name]
        assert [name.removeprefix("photos/") for name in made.names()] == list(plain.names())


def webdataset(file: Path, first: int, count: int, label: Callable[[int], tuple[str, bytes] | None]) -> None:
    """Write a tar like webdataset: an image, a caption and optionally a label for each key."""
    scratch = file.parent / "scratch"
    with tarfile.open(file, "w") as archive:
        for i in range(first, first + count):
            save(scratch / "image.png", noise(16, 16, 3, seed=i))
            (scratch / "text").write_text("a caption")
            archive.add(scratch / "text", f"{i:04}.txt")
            archive.add(scratch / "image.png", f"{i:04}.rgb.png")
            found = label(i)
            if found:
                (scratch / "label").write_bytes(found[1])
                archive.add(scratch / "label", f"{i:04}.{found[0]}")


def test_links_in_a_tar_are_skipped_and_listed(photos: Path, tmp_path: Path) -> None:
    """An image that is stored once under two names is a hard link the second time."""
    (photos / "a" / "hard.png").hardlink_to(photos / "a" / "9.png")
    (photos / "a" / "soft.png").symlink_to("9.png")
    (photos / "a" / "soft.cls").symlink_to("9.png")
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        archive.add(photos, "photos")
    made = make(tmp_path / "p.tar", tmp_path / "set")
    assert (made.count, made.num_classes, made.skipped) == (10, 5, 2)
    skipped = (tmp_path / "set" / "skipped.txt").read_text()
    assert skipped.count("a link, which is not followed in an archive") == 2 and "photos/a/soft.png" in skipped


@pytest.mark.parametrize(
    ("label", "labels", "classes"),
    [
        (lambda i: ("cls", b"%d\n" % (i % 3)), [0, 1, 2, 0, 1, 2, 0, 1, 2], None),
        (lambda i: ("json", b'{"x": 1, "label": %d}' % (i % 2)), [0, 1] * 4 + [0], None),
        (lambda i: ("json", b'{"class": "%s"}' % [b"cat", b"ant"][i % 2]), [1, 0] * 4 + [1], ["ant", "cat"]),
        (lambda i: ("cls", b"5") if i else None, None, None),
        (lambda i: None, None, None),
    ],
)
def test_tar_shards(
    tmp_path: Path,
    label: Callable[[int], tuple[str, bytes] | None],
    labels: list[int] | None,
    classes: list[str] | None,
) -> None:
    (tmp_path / "src").mkdir()
    webdataset(tmp_path / "src" / "x-000.tar", 0, 5, label)
    webdataset(tmp_path / "src" / "x-001.tar", 5, 4, label)
    shutil.rmtree(tmp_path / "src" / "scratch")
    made = make(tmp_path / "src", tmp_path / "set")
    assert (made.count, made.skipped, made.classes()) == (9, 0, classes)
    assert made.num_classes == (max(labels) + 1 if labels else 0)
    np.testing.assert_array_equal(made.labels(), labels)
    assert list(made.names())[5] == "x-001.tar/0005.rgb.png"
    for i, image in enumerate(pixels(made, 16)):
        np.testing.assert_array_equal(image, noise(16, 16, 3, seed=i).transpose(2, 0, 1))
    for i, pattern in enumerate(("x-{000..001}.tar", "x-*.tar")):
        again = make(f"tar:{tmp_path / 'src' / pattern}", tmp_path / f"again{i}")
        assert again.files == made.files


def test_published_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CelebA

    monkeypatch.setattr(CelebA, "_check_integrity", lambda self: True)  # the published md5 sums
    cifar10(tmp_path / "cifar" / "cifar-10-batches-bin")
    mnist(tmp_path / "idx" / "MNIST" / "raw")
    celeba(tmp_path / "faces" / "celeba")
    sides = {"cifar10": 32, "mnist": 32, "celeba": 128}
    for kind, root in (("cifar10", "cifar"), ("mnist", "idx"), ("celeba", "faces")):
        made = make(tmp_path / root, tmp_path / kind)
        assert (made.source["kind"], made.resolution) == (kind, sides[kind])
        agrees(made, f"{kind}:{tmp_path / root}", sides[kind], exact=kind != "celeba")
        with pytest.raises(ArgumentError, match="--channels"):
            make(tmp_path / root, tmp_path / "x", channels=4 - made.channels)


def test_prepare_is_part_of_the_package() -> None:
    assert fastgan.data.prepare is prepare and "prepare" in fastgan.data.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastgan.data.nothing  # noqa: B018


def test_digits(tmp_path: Path) -> None:
    made = make("digits", tmp_path / "set", resolution=8, per_shard=1024)
    agrees(made, "digits", 8)
    assert made.count == 1797


def test_another_prepared_set(photos: Path, tmp_path: Path) -> None:
    first = make(photos, tmp_path / "first", cache_to=8, lossless="png")
    second = make(tmp_path / "first", tmp_path / "second", resolution=8, per_shard=3)
    np.testing.assert_array_equal(pixels(second, 8), pixels(first, 8))
    np.testing.assert_array_equal(second.labels(), first.labels())
    assert (second.classes(), list(second.names())) == (first.classes(), list(first.names()))
    assert make(tmp_path / "first", tmp_path / "gray", channels=1).channels == 1
    assert "--resolution" in refusal(tmp_path / "first", tmp_path / "third", resolution=32)


@pytest.fixture
def mixed(photos: Path) -> Path:
    """The photos, and unusable files."""
    (photos / "a" / "notes.txt").write_text("no image")
    data = save(photos / "a" / "cut.jpg", noise(32, 32, 3)).read_bytes()
    (photos / "a" / "cut.jpg").write_bytes(data[: len(data) // 2])
    save(photos / "a" / "tiny.png", noise(15, 40, 3))
    save_broken(photos / "a" / "2.broken.png", 32)
    return photos


@pytest.mark.parametrize("late", [False, True])
def test_unusable_files_are_skipped_and_listed(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Whether they are found by the inspection, or only when they are encoded."""
    if late:
        miss_broken(monkeypatch)
    made = make(mixed, tmp_path / "set", resolution=16, cache_to=8, lossless="png")
    skipped = dict(line.split("\t") for line in (tmp_path / "set" / "skipped.txt").read_text().splitlines())
    assert list(skipped) == ["a/2.broken.png", "a/cut.jpg", "a/notes.txt", "a/tiny.png"]
    assert skipped["a/tiny.png"] == "too small: 40 x 15, smaller than 16 px"
    assert made.skipped == 4
    # Without the broken files everything but the list of skipped ones and the shards' limits is the same.
    for name in skipped:
        (mixed / name).unlink()
    clean = make(mixed, tmp_path / "clean", resolution=16, cache_to=8, lossless="png")
    assert list(made.names()) == list(clean.names())
    np.testing.assert_array_equal(made.labels(), clean.labels())
    for r in (4, 8, 16):
        np.testing.assert_array_equal(pixels(made, r), pixels(clean, r))
    members = []
    for shard in range(len(made.shards)):
        with tarfile.open(tmp_path / "set" / tar_file(16, shard)) as archive:
            members += [one.name for one in archive.getmembers() if one.name.endswith("png")]
    assert members == [f"{i:09}.png" for i in range(10)]


def test_a_link_to_itself_is_skipped_and_no_other_file(photos: Path, tmp_path: Path) -> None:
    for folder in (photos, photos / "a"):
        (folder / "0.png").symlink_to("0.png")
    made = make(photos, tmp_path / "set")
    lines = [f"{name}\ta link that leads nowhere" for name in ("0.png", "a/0.png")]
    assert (made.count, (tmp_path / "set" / "skipped.txt").read_text().splitlines()) == (10, lines)


def test_a_file_without_permission_is_skipped(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user who runs the tests may have all permissions: reading is refused by a patch."""

    def refuse(file: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    with monkeypatch.context() as patched:
        patched.setattr(registry, "exists", refuse)
        assert "cannot be read" in (text := refusal(photos, tmp_path / "set")) and "Permission denied" in text
    real = FolderCollection.open
    monkeypatch.setattr(
        FolderCollection, "open", lambda self, item: refuse(self.path) if item.name == "a/9.png" else real(self, item)
    )
    assert make(photos, tmp_path / "set").count == 9
    assert (tmp_path / "set" / "skipped.txt").read_text() == "a/9.png\tPermission denied\n"


def test_strict(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal(mixed, tmp_path / "set", strict=True, resolution=16)
    assert "--strict: 4 of its files" in text and "a/2.broken.png" in text
    assert not (tmp_path / "set").exists()
    for name in ("cut.jpg", "notes.txt", "tiny.png"):
        (mixed / "a" / name).unlink()
    miss_broken(monkeypatch)
    assert "--strict: 1 of its files cannot be decoded" in refusal(mixed, tmp_path / "set", strict=True)
    with pytest.raises(ArgumentError, match="the prepared set is not finished"):
        read_manifest(tmp_path / "set")


def test_nothing_to_prepare(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    assert "it is empty" in refusal(tmp_path / "src", tmp_path / "set")
    (tmp_path / "src" / "a.txt").write_text("x")
    assert "none of its files is an image (first: a.txt" in refusal(tmp_path / "src", tmp_path / "set")
    (tmp_path / "src" / "a.txt").rename(tmp_path / "src" / "c.txt")
    save(tmp_path / "src" / "b.png", noise(8, 8))
    text = refusal(tmp_path / "src", tmp_path / "set", resolution=16)
    assert "b.png: too small: 8 x 8" in text and "--min-size" in text
    assert not (tmp_path / "set").exists()
    assert "is missing" in refusal(tmp_path / "nowhere", tmp_path / "set")
    assert "nothing matches" in refusal(str(tmp_path / "x-*.tar"), tmp_path / "set")
    assert "x-001.tar is missing" in refusal(f"tar:{tmp_path}/x-{{001..003}}.tar", tmp_path / "set")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("resolution", 24),
        ("resolution", 2),
        ("channels", 4),
        ("cache_to", 5),
        ("quality", 0),
        ("quality", 101),
        ("lossless", "gif"),
        ("min_size", 0),
        ("per_shard", 0),
    ],
)
def test_settings_out_of_range(tmp_path: Path, flag: str, value: Any) -> None:
    text = refusal("digits", tmp_path / "set", **{flag: value})
    assert text.startswith(f"--{flag.replace('_', '-')} must be ") and f", got {value!r}" in text
    assert not (tmp_path / "set").exists()


def test_same_images_and_settings_give_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "one", cache_to=8)
    shutil.copytree(photos, tmp_path / "elsewhere" / "photos", copy_function=shutil.copyfile)
    make(tmp_path / "elsewhere" / "photos", tmp_path / "two", cache_to=8)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    other = make(photos, tmp_path / "three", cache_to=8, quality=90)
    assert other.fingerprint != read_manifest(tmp_path / "one").fingerprint


def test_names_with_any_character(tmp_path: Path) -> None:
    for name in ("tab\there.png", "line\nbreak.png", b"\xff\xfe.png".decode(errors="surrogateescape")):
        save(tmp_path / "src" / name, noise(8, 8))
        (tmp_path / "src" / f"{name}.txt").write_text("no image")
    made = make(tmp_path / "src", tmp_path / "set")
    assert list(made.names()) == sorted(["tab\there.png", "line\nbreak.png", "\udcff\udcfe.png"])
    lines = (tmp_path / "set" / "skipped.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        "line\\x0abreak.png.txt",
        "tab\\x09here.png.txt",
        "\\udcff\\udcfe.png.txt",
    ]


def test_a_finished_set_is_not_changed(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "set")
    before = contents(tmp_path / "set")
    make(photos, tmp_path / "set")
    (tmp_path / "set" / ".preparing").mkdir()  # killed after the manifest was written
    make(photos, tmp_path / "set")
    assert contents(tmp_path / "set") == before
    text = refusal(photos, tmp_path / "set", quality=90)
    assert "--quality 90: " in text and "was prepared with 95" in text
    save(photos / "new.png")
    assert "SRC 'folder photos': it has changed since" in refusal(photos, tmp_path / "set")


def test_source_and_target_are_apart(photos: Path) -> None:
    for dst in (photos, photos / "set", photos.parent):
        assert "DST" in refusal(photos, dst)


def test_a_target_with_other_content(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "precious").write_text("x")
    assert "it holds precious" in refusal(photos, tmp_path / "set")
    (tmp_path / "file").write_text("x")
    assert "it is a file" in refusal(photos, tmp_path / "file")
    assert "cannot be written to" in refusal(photos, tmp_path / "file" / "set")
    (tmp_path / "cache" / "cache").mkdir(parents=True)
    assert "it holds cache" in refusal(photos, tmp_path / "cache")


def test_damaged_archives(photos: Path, tmp_path: Path) -> None:
    zipped = Path(shutil.make_archive(str(tmp_path / "a"), "zip", photos))
    whole = zipped.read_bytes()
    zipped.write_bytes(whole[: len(whole) // 2])
    text = refusal(zipped, tmp_path / "set")
    assert str(zipped) in text and "must be a whole zip file" in text and "File is not a zip file" in text
    # One byte of a file in it: the others are used.
    at = whole.index(b"IDAT")
    zipped.write_bytes(whole[: at + 20] + bytes([whole[at + 20] ^ 1]) + whole[at + 21 :])
    made = make(zipped, tmp_path / "most")
    assert (made.count, made.skipped) == (9, 1)
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(photos, "photos")
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    text = refusal(tar, tmp_path / "set")
    assert str(tar) in text and "unexpected end of data" in text
    header = whole.index(b"photos/b/x.png")
    tar.write_bytes(whole[:header] + b"\xff" * 512 + whole[header + 512 :])
    assert "after photos/" in refusal(tar, tmp_path / "set")
    packed = Path(shutil.make_archive(str(tmp_path / "b"), "gztar", photos))
    assert "decompress it first" in refusal(packed, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_compression_methods_and_encryption_of_zips(photos: Path, tmp_path: Path) -> None:
    import zipfile

    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / f"{method}.zip", "w", method) as archive:
            for file in sorted(photos.rglob("*.png")):
                archive.write(file, file.relative_to(photos))
        # In front, as in an archive that unpacks itself.
        content = (tmp_path / f"{method}.zip").read_bytes()
        (tmp_path / f"{method}.zip").write_bytes(b"#!/bin/sh\n" + content)
        assert make(f"zip:{tmp_path / f'{method}.zip'}", tmp_path / f"set{method}").count == 10
    locked = bytearray(content)
    at = locked.index(b"PK\1\2")
    locked[at + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    made = make(tmp_path / "locked.zip", tmp_path / "locked")
    assert (made.count, made.skipped) == (9, 1)
    assert "encrypted" in (tmp_path / "locked" / "skipped.txt").read_text()


def test_an_invalid_label_is_refused(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for label in ("-1", "1" + 18 * "0", f'"{5000 * "9"}"'):
        webdataset(tmp_path / "src" / "x.tar", 0, 1, lambda i, it=label: ("json", b'{"label": %s}' % it.encode()))
        words = f"0000.json holds {label[:20]}".replace('"', "'")
        assert words in refusal(tmp_path / "src" / "x.tar", tmp_path / "set")


def test_dali_reads_the_tars_by_their_index(photos: Path, tmp_path: Path) -> None:
    """DALI's webdataset reader, over all shards, accepts the layout of the index."""
    fn = pytest.importorskip("nvidia.dali.fn", reason="DALI is for Linux only")
    from nvidia.dali import pipeline_def

    made = make(photos, tmp_path / "set", cache_to=8)
    tars = [str(tmp_path / "set" / tar_file(16, shard)) for shard in range(3)]

    @pipeline_def(batch_size=10, num_threads=1, device_id=None)
    def pipeline() -> Any:
        return tuple(
            fn.readers.webdataset(paths=tars, index_paths=[tar[:-3] + "idx" for tar in tars], ext=["jpg", "cls"])
        )

    built = pipeline()
    built.build()
    images, labels = built.run()
    level = Level(made, 16)
    assert [bytes(images.at(i)) for i in range(10)] == [level.encoded(i) for i in range(10)]
    np.testing.assert_array_equal([int(bytes(labels.at(i))) for i in range(10)], made.labels())


def test_disk_that_is_too_small(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    usage = shutil.disk_usage(tmp_path)
    reported: list[str] = []
    prepare(str(photos), tmp_path / "fits", Settings(cache_to=8), workers=1, report=reported.append)
    estimate = float(next(line for line in reported if "about" in line).split("about ")[1].split(" kB")[0]) * 1000
    size = sum(len(content) for name, content in contents(tmp_path / "fits").items() if name != "manifest.json")
    assert 0.8 * size < estimate < 1.3 * size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(estimate) - 2000))
    assert "the disk has" in refusal(photos, tmp_path / "set", cache_to=8)
    assert not list((tmp_path / "set").glob("cache/**/*.npy"))
    # Nothing is written yet: other settings are accepted, and other images too.
    monkeypatch.undo()
    save(photos / "a" / "more.png", noise(16, 16, 3))
    assert make(photos, tmp_path / "set", quality=50, per_shard=5, resolution=8).count == 11
    clean = make(photos, tmp_path / "clean", quality=50, per_shard=5, resolution=8)
    assert contents(tmp_path / "set") == contents(tmp_path / "clean") and clean.count == 11


def test_files_are_walked_in_the_order_of_their_whole_names(tmp_path: Path) -> None:
    """Not in that of the parts: "a-b" and "a.png" come before "a/"."""
    names = ["a/x.png", "a/b/y.png", "a-b/z.png", "a.png", "a0/1.png", b"a/\xff.png".decode(errors="surrogateescape")]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(walk(tmp_path)) == [(name, "") for name in sorted(names)]


def test_the_example_in_the_documentation_reads_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        save(tmp_path / "photos" / f"{i}.png", np.full((128, 128, 3), 40 * i, np.uint8))
    make(tmp_path / "photos", tmp_path / "SET", cache_to=64)
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    (example,) = [one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "manifest.json" in one]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["small"].shape == (2, 3, 64, 64) and (names["small"][-1] == 200).all()
    assert names["large"].shape == (128, 128, 3) and (names["large"] == 200).all()
