from __future__ import annotations

import ast
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastgan
from fastgan import checkpoint
from fastgan.errors import ArgumentError

NETWORKS = {
    "model": "pggan",
    "resolution": 8,
    "channels": 1,
    "latent": 64,
    "num_classes": 0,
    "attention_at": None,
}
FILES = ("generator.safetensors", "training.safetensors", "checkpoint.json")


def tensors(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, 2, 2, generator=generator)
    ema = {
        "weight": weight.to(memory_format=torch.channels_last),
        "tied": weight,
        "tied too": weight,
        "half": weight.bfloat16(),
        "alpha": torch.tensor(0.25),
        "count": torch.tensor(7),
        "slice": weight[:, ::2],
    }
    training = {
        "generator": {"a.weight": weight + 1, "odd: name": weight[0]},
        "optimizer_d": {"a.weight/exp_avg": weight * 2, "a.weight/step": torch.tensor(3.0)},
        "random": {"rank0": torch.arange(16, dtype=torch.uint8)},
    }
    return ema, training


def save(run: Path, images: int, seed: int = 0, keep: int = 3, **meta: Any) -> Path:
    ema, training = tensors(seed)
    return checkpoint.save(run, {"images": images, **meta}, ema, training, keep)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) for x, y in ((a[k], b[k]) for k in a)
    )


def is_good(path: Path, seed: int) -> bool:
    stored, (ema, training) = checkpoint.read(path, "RUN"), tensors(seed)
    read = stored.training()
    return same(stored.generator(), ema) and all(same(read[group], training[group]) for group in training)


def refusal(path: Path) -> str:
    with pytest.raises(ArgumentError) as error:
        checkpoint.read(path, "--resume")
    text = str(error.value)
    assert "\n" not in text and text.startswith(("--resume must be ", "--resume '"))
    return text


def leftovers(run: Path) -> list[str]:
    return [p.name for p in checkpoint.folder(run).iterdir() if p.name.startswith(".")]


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 123_456, variant="pggan", networks=NETWORKS, nested=[1, 2.5])
    assert path == tmp_path / "checkpoints" / "kimg-000123.456"
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    assert leftovers(tmp_path) == []
    stored = checkpoint.read(tmp_path, "RUN")
    assert stored.path == path
    assert is_good(tmp_path, 0) and is_good(path, 0)
    assert set(stored.training()) == {"generator", "optimizer_d", "random"}
    meta = dict(stored.meta)
    files = meta.pop("files")
    assert meta == {
        "schema": 1,
        "images": 123_456,
        "variant": "pggan",
        "networks": NETWORKS,
        "nested": [1, 2.5],
    }
    assert {name: entry["bytes"] for name, entry in files.items()} == {n: (path / n).stat().st_size for n in FILES[:2]}


def test_newest_is_read_and_only_some_are_kept(tmp_path: Path) -> None:
    for i, images in enumerate((0, 900, 1_000, 20_000, 1_000_000)):
        save(tmp_path, images, seed=i, keep=3)
    names = [p.name for p in checkpoint.existing(tmp_path)]
    assert names == ["kimg-000001.000", "kimg-000020.000", "kimg-001000.000"]
    assert sorted(p.name for p in checkpoint.folder(tmp_path).iterdir()) == names
    assert is_good(tmp_path, 4)
    save(tmp_path, 1_000_001, seed=5, keep=1)
    assert [p.name for p in checkpoint.existing(tmp_path)] == ["kimg-001000.001"]
    assert is_good(tmp_path, 5)


def test_what_is_dropped_looks_like_no_checkpoint_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill halfway through the removal leaves nothing that would be read."""
    removed: list[Path] = []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: removed.append(path))
    for images in (1000, 2000):
        save(tmp_path, images, keep=1)
    assert [path.name for path in removed] == [".dropped-kimg-000001.000"]
    assert [path.name for path in checkpoint.existing(tmp_path)] == ["kimg-000002.000"]


def test_the_newest_is_read_where_training_drops_the_one_that_is_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1000, seed=1)
    real = checkpoint._hash

    def hash_(file: Path) -> str:
        found = real(file)
        if file.parent.name == "kimg-000001.000":
            monkeypatch.setattr(checkpoint, "_hash", real)
            save(tmp_path, 2000, seed=2, keep=1)
        return found

    monkeypatch.setattr(checkpoint, "_hash", hash_)
    assert is_good(tmp_path, 2)


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_what_was_just_written_is_kept(tmp_path: Path, keep: int) -> None:
    """Also below another run's checkpoints, or one's own from before the growth was moved."""
    for images in (5000, 6000, 7000):
        save(tmp_path, images)
    assert is_good(save(tmp_path, 1000, seed=1, keep=keep), 1)
    assert len(checkpoint.existing(tmp_path)) == min(keep, 4)


def test_same_moment_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 1000, seed=1)
    save(tmp_path, 2000, seed=2)
    path = save(tmp_path, 2000, seed=3)
    assert len(checkpoint.existing(tmp_path)) == 2 and is_good(path, 3)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert "must be a run with a checkpoint" in refusal(path)
    checkpoint.folder(tmp_path).mkdir()
    (checkpoint.folder(tmp_path) / "kimg-000001.000").mkdir()  # without its checkpoint.json it is none
    assert "must be a run with a checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("damage", ["truncated", "one byte", "missing", "empty", "longer"])
def test_damage_names_the_file_and_the_older_checkpoint(tmp_path: Path, name: str, damage: str) -> None:
    older, newest = save(tmp_path, 1000, seed=1), save(tmp_path, 2000, seed=2)
    file = newest / name
    content = file.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(
            {"truncated": content[:-1], "one byte": bytes(changed), "empty": b"", "longer": content + b"\0"}[damage]
        )
    for path in (tmp_path, newest):
        text = refusal(path)
        assert name in text and str(newest) in text and f"the checkpoint before it is {older}" in text
        assert ("has changed" in text) == (damage == "one byte")
    assert is_good(older, 1)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"files": {}}', b'{"schema": 1}', b"\xff\xfe"])
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    older, newest = save(tmp_path, 1000), save(tmp_path, 2000)
    (newest / "checkpoint.json").write_bytes(content)
    text = refusal(tmp_path)
    assert "checkpoint.json is damaged" in text and f"the checkpoint before it is {older}" in text


def test_one_changed_bit_in_the_json_is_noticed(tmp_path: Path) -> None:
    """The numbers of the record are as much the state of a run as its tensors."""
    save(tmp_path, 1000, seed=1)
    newest = save(tmp_path, 2000, seed=2, networks={**NETWORKS, "fmap_base": 256})
    file, meta = newest / "checkpoint.json", checkpoint.read(newest, "RUN").meta
    content = file.read_bytes()
    for i in range(0, len(content), 2):
        changed = bytearray(content)
        changed[i] ^= 1 << (i // 2 % 8)
        file.write_bytes(changed)
        try:
            stored = checkpoint.read(newest, "--resume")
        except ArgumentError as error:
            assert str(newest) in str(error)
        else:
            assert stored.meta == meta, f"byte {i}: {bytes(changed[max(0, i - 20) : i + 20])!r}"  # white space


def test_the_only_checkpoint_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 1000)
    (path / FILES[1]).write_bytes(b"")
    assert "there is no older one" in refusal(tmp_path)


def test_another_schema(tmp_path: Path) -> None:
    path = save(tmp_path, 1000)
    file = path / "checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 2}))
    assert "its schema is 2; this version reads 1" in refusal(tmp_path)


class Crash(OSError):
    pass


def _nth(function: Any, n: int, error: BaseException) -> Any:
    """`function`, whose n-th call (from 0) raises in its place."""
    calls = iter(range(1000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == n:
            raise error
        return function(*args, **kwargs)

    return wrapped


CRASHES: dict[str, tuple[Any, str, Any, int]] = {
    "first file": (checkpoint, "save_file", save_file, 0),
    "second file": (checkpoint, "save_file", save_file, 1),
    "flush of the first": (os, "fsync", os.fsync, 0),
    "flush of the second": (os, "fsync", os.fsync, 1),
    "flush of the record": (os, "fsync", os.fsync, 2),
    "flush of the folder": (os, "fsync", os.fsync, 3),
    "record": (Path, "write_text", Path.write_text, 0),
    "rename": (Path, "rename", Path.rename, 0),
    "folder": (Path, "mkdir", Path.mkdir, 0),
}


@pytest.mark.parametrize("where", CRASHES)
@pytest.mark.parametrize("error", [Crash(28, "No space left on device"), KeyboardInterrupt()])
def test_a_crash_while_writing_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    older = save(tmp_path, 1000, seed=1, keep=1)
    owner, name, function, n = CRASHES[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _nth(function, n, error))
        with pytest.raises(type(error)):
            save(tmp_path, 2000, seed=2, keep=1)
    assert sorted(p.name for p in checkpoint.folder(tmp_path).iterdir()) == [older.name]
    assert is_good(tmp_path, 1)
    assert is_good(save(tmp_path, 2000, seed=2, keep=1), 2)  # and the next one can be written


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("error", [Crash(5, "Input/output error"), KeyboardInterrupt()])
def test_a_crash_while_the_only_one_is_replaced_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, error: BaseException
) -> None:
    path = save(tmp_path, 1000, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", _nth(Path.rename, n, error))
        with pytest.raises(type(error)):
            save(tmp_path, 1000, seed=2)
    assert [p.name for p in checkpoint.folder(tmp_path).iterdir()] == [path.name]
    assert is_good(tmp_path, 1)


def test_a_kill_while_the_only_one_is_replaced_keeps_it(tmp_path: Path) -> None:
    path = save(tmp_path, 1000, seed=1)
    path.rename(path.with_name(f".replaced-{path.name}"))
    later = save(tmp_path, 2000, seed=2)
    assert checkpoint.existing(tmp_path) == [path, later] and is_good(path, 1)
    path.rename(path.with_name(f".replaced-{path.name}"))
    save(tmp_path, 1000, seed=3)  # and where the other one was complete, what it replaced goes
    path.rename(path.with_name(f".replaced-{path.name}"))
    checkpoint.recover(tmp_path)
    assert is_good(path, 3) and leftovers(tmp_path) == []


def test_half_a_file_from_a_failing_write_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1000, seed=1)

    def half(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"\0" * 100)
        raise Crash(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", half)
        with pytest.raises(Crash):
            save(tmp_path, 2000, seed=2)
    assert leftovers(tmp_path) == [] and is_good(tmp_path, 1)


def test_a_write_that_the_system_refuses_is_an_oserror(tmp_path: Path) -> None:
    """safetensors has an exception of its own for a full disk; a limit on file size makes it raise it."""
    save(tmp_path, 1000, seed=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(OSError):
            save(tmp_path, 2000, seed=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == [] and is_good(tmp_path, 1)


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 1000, seed=1)
    partial = path.with_name(".writing-kimg-000002.000")
    partial.mkdir()
    for name in FILES:
        (partial / name).write_bytes((path / name).read_bytes()[:50])
    assert checkpoint.existing(tmp_path) == [path]
    assert is_good(save(tmp_path, 2000, seed=2), 2)
    assert leftovers(tmp_path) == []


def test_nothing_final_before_everything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each flush to disk, no folder carries the new checkpoint's name; it gets it in one rename."""
    seen = []

    def fsync(descriptor: int) -> None:
        seen.append((tmp_path / "checkpoints" / "kimg-000001.000").exists())

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path, 1000)
    assert seen == [False, False, False, False, True]  # two files, the record, the folder; then the renamed entry


def test_saved_tensors_are_copies_and_inputs_stay_as_they_were(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    checkpoint.save(tmp_path, {"images": 1}, {"w": weight}, {"generator": {"w": weight}}, 1)
    assert weight.requires_grad and torch.equal(checkpoint.read(tmp_path, "RUN").generator()["w"], torch.ones(2, 2))


PICKLERS = ("pickle", "_pickle", "dill", "joblib", "shelve", "cloudpickle")


def _pickling(tree: ast.AST) -> list[str]:
    """What in a file could unpickle or pickle."""
    found = []
    safe = [  # torch.load(..., weights_only=True) reads tensors and plain values alone
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and "weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords]
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{a.name}" for a in node.names}
            found += [n for n in names if n.split(".")[0] in PICKLERS]
            found += [n for n in names if n in ("torch.load", "torch.save", "torch.serialization.load", "yaml.load")]
        elif isinstance(node, ast.Attribute) and node not in safe:
            name = ast.unparse(node)
            if name in (
                "torch.load",
                "torch.hub.load",
                "torch.hub.load_state_dict_from_url",
                "marshal.loads",
            ) or name in ("yaml.load", "yaml.unsafe_load"):
                found.append(name)
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
    return found


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    package = Path(fastgan.__file__).parent
    files = sorted(package.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        assert _pickling(ast.parse(file.read_text())) == [], file
    for text in (
        "import pickle",
        "from torch import load",
        "torch.load(f)",
        "torch.hub.load(f)",
        "np.load(f, allow_pickle=True)",
    ):
        assert _pickling(ast.parse(text)), text  # the scan does see them
    assert _pickling(ast.parse("torch.load(f, weights_only=False)"))
    save(tmp_path, 1000)
    written = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {".safetensors", ".json"}
