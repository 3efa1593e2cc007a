"""`benchmarks.studies.picture_sets`, with packages made here in the layout of the real ones."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from benchmarks.studies import picture_sets
from fastgan.data import open_source


def png(side: int = 8) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGBA", (side, side), (255, 0, 0, 128)).save(file, "PNG")
    return file.getvalue()


def package(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("package/assets/link.webp")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


EMOJI = [
    {"unified": "0023-FE0F-20E3", "non_qualified": "0023-20E3", "category": "Symbols"},
    {
        "unified": "1F44B", "non_qualified": None, "category": "People & Body",
        "skin_variations": {"1F3FB": {"unified": "1F44B-1F3FB", "non_qualified": None}},
    },
]  # fmt: skip
FILES = {
    "@lobehub/fluent-emoji-3d": {
        "package/assets/0023-fe0f-20e3.webp": png(),
        "package/assets/1f44b-1f3fb.webp": png(),
        "package/assets/../../outside.webp": png(),
        "package/index.js": b"process.exit(1)",
    },
    "emoji-datasource-google": {"package/emoji.json": json.dumps(EMOJI).encode()},
    "wesnoth-1.16-data": {
        "./usr/share/games/wesnoth/1.16/data/core/images/units/drakes/die/a.png": png(),
        "./usr/share/games/wesnoth/1.16/data/core/images/units/elves-wood/b.png": png(),
        "./usr/share/games/wesnoth/1.16/data/core/images/units/loose.png": png(),
        "./usr/share/games/wesnoth/1.16/data/core/images/other/c.png": png(),
    },
}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the packages that are downloaded."""
    names: list[str] = []

    def fetch(client: str, name: str, folder: Path) -> Path:
        names.append(name)
        folder.mkdir()
        return package(folder / "package.tgz", FILES[name])

    monkeypatch.setattr(picture_sets, "_fetch", fetch)
    return names


def test_emoji_have_their_categories_as_classes(
    tmp_path: Path, fetched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert picture_sets.main(["fluent-emoji", "--out", str(tmp_path)]) == 0
    assert "fluent-emoji: 2 files, sha256 " in capsys.readouterr().out
    source = open_source(tmp_path / "fluent-emoji", 8, 4)
    assert (len(source), list(source.classes), source.skipped) == (2, ["people-body", "symbols"], [])
    record = json.loads((tmp_path / "fluent-emoji.json").read_text())
    assert [one["package"] for one in record["packages"]] == ["@lobehub/fluent-emoji-3d", "emoji-datasource-google"]
    assert record["license"] == "MIT, Microsoft" and len(record["packages"][0]["sha256"]) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fluent-emoji", "fluent-emoji.json"]
    assert picture_sets.make("fluent-emoji", tmp_path, 128) == record and len(fetched) == 2


def test_sprites(tmp_path: Path, fetched: list[str]) -> None:
    first = picture_sets.make("sprites", tmp_path / "one", 128)
    assert first["files"] == 2
    assert sorted(str(path.relative_to(tmp_path / "one" / "sprites")) for path in tmp_path.rglob("*.png")) == [
        "drakes/die-a.png",
        "elves-wood/b.png",
    ]
    assert picture_sets.make("sprites", tmp_path / "two", 128)["sha256"] == first["sha256"]


def test_an_interrupted_set_leaves_nothing(tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    members = picture_sets._members

    def interrupted(archive: Path, pattern: str) -> picture_sets.Files:
        yield next(members(archive, pattern))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(picture_sets, "_members", interrupted)
        with pytest.raises(KeyboardInterrupt):
            picture_sets.make("sprites", tmp_path, 128)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "sprites").mkdir()  # a kill between the rename and the record
    assert picture_sets.make("sprites", tmp_path, 128)["files"] == 2


def test_a_changed_layout_is_reported(tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, "wesnoth-1.16-data", {"./other.png": png()})
    with pytest.raises(SystemExit, match="layout has changed"):
        picture_sets.make("sprites", tmp_path, 128)


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        picture_sets.main(["cats"])
    assert "NAME must be one of fashion-mnist, avatars" in capsys.readouterr().err
