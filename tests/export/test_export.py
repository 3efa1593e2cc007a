"""Export: every format gives the generator's images, and nothing in a file is executed."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import build, make_run
from torch import nn

import fastgan
from fastgan import checkpoint, models
from fastgan.cli import export, main, sample
from fastgan.errors import ArgumentError
from fastgan.export import formats, model_card
from fastgan.generator import TrainedGenerator, great_circle

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="extra export: pip install 'fastgan[export]'")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def exported(run: Path) -> dict[str, Path]:
    for name in formats.FORMATS:
        assert export.main([str(run), "--format", name, "--license", "cc0-1.0"]) == 0
    return {name: run / "export" / f"model{format.suffix}" for name, format in formats.FORMATS.items()}


def opened(file: Path) -> TrainedGenerator:
    """An export that this test has written, in any format; `fastgan.load` refuses those that hold a program."""
    format = next(format for format in formats.FORMATS.values() if format.suffix == file.suffix)
    if format.loadable:
        return fastgan.load(file)
    content = file.read_bytes()
    return TrainedGenerator(format.open(content, "cpu"), format.meta(content))


def content(path: Path) -> list[Path]:
    return sorted(path.rglob("*"))


# Cases that add little to the others run with the slow tests.
SLOW = [
    pytest.param(case, marks=pytest.mark.slow)
    for case in ("mlp", "sagan", "pggan-4", "pggan", "dcgan-no-norm", "r3gan")
]


@pytest.mark.parametrize(
    "case", ["dcgan", pytest.param("sagan-classes", marks=pytest.mark.slow), "pggan-fading", *SLOW]
)
def test_every_format_gives_the_images_of_every_model(case: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", case)
    generator, networks = build(case)
    expected = fastgan.load(run).sample(7, seed=5)
    for name, format in formats.FORMATS.items():
        file = tmp_path / f"x{format.suffix}"
        assert export.main([str(run), "--format", name, "--out", str(file)]) == 0
        trained = opened(file)
        assert trained.num_classes == networks["num_classes"] and trained.meta["variant"] == networks["model"]
        images = trained.sample(7, seed=5)
        assert images.shape == expected.shape and (images - expected).abs().max() <= 1e-4, name
        for batch in (1, 3):
            inputs = formats.example_inputs(trained.meta, batch, seed=batch)
            torch.testing.assert_close(trained.module(*inputs), generator(*inputs), atol=1e-4, rtol=1e-4)
        assert str(tmp_path).encode() not in file.read_bytes(), f"{name}: a path of this machine"
        assert str(Path(fastgan.__file__).parent).encode() not in file.read_bytes(), f"{name}: a path of this machine"
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # and they are not all the same


def test_load_and_commands_accept_runs_folders_and_files(exported: dict[str, Path], run: Path, tmp_path: Path) -> None:
    expected = fastgan.load(run).sample(3, seed=2)
    assert sorted(p.name for p in (run / "export").iterdir()) == sorted(
        ["README.md", "config.json", *(p.name for p in exported.values())]
    )
    loaded = [exported[name] for name, format in formats.FORMATS.items() if format.loadable]
    assert [file.suffix for file in loaded] == [".safetensors", ".onnx"]
    for path in (run / "export", *loaded, checkpoint.existing(run)[0]):
        torch.testing.assert_close(fastgan.load(path).sample(3, seed=2), expected, atol=1e-4, rtol=0)
        walk = fastgan.load(path).interpolate(1, 3, seed=2)
        torch.testing.assert_close(walk[[0, 2]], expected[:2], atol=1e-4, rtol=0)
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(exported["onnx"], folder / "digits.onnx")
    torch.testing.assert_close(fastgan.load(folder).sample(3, seed=2), expected, atol=1e-4, rtol=0)
    assert sample.main([str(folder / "digits.onnx"), "--n", "4", "--truncation", "0.5"]) == 0
    assert (folder / "sample-seed0.png").is_file()
    again = tmp_path / "again.torchscript"
    assert export.main([str(exported["safetensors"]), "--format", "torchscript", "--out", str(again)]) == 0
    torch.testing.assert_close(opened(again).sample(3, seed=2), expected, atol=1e-4, rtol=0)


def test_files_open_with_other_tools(exported: dict[str, Path], run: Path) -> None:
    import onnxruntime

    latent = torch.randn(4, 6)
    expected = fastgan.load(run).module(latent)
    session = onnxruntime.InferenceSession(exported["onnx"], providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("latent", [6])]
    results = [torch.from_numpy(session.run(["images"], {"latent": latent.numpy()})[0])]
    results.append(torch.export.load(exported["torch-export"]).module()(latent))
    results.append(torch.jit.load(exported["torchscript"])(latent))
    for images in results:
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["torch-export", "onnx", "torchscript"])
def test_a_fixed_batch(name: str, run: Path, tmp_path: Path) -> None:
    file = tmp_path / f"x{formats.FORMATS[name].suffix}"
    assert export.main([str(run), "--format", name, "--batch", "4", "--out", str(file)]) == 0
    expected = fastgan.load(run).sample(6)
    torch.testing.assert_close(opened(file).sample(6), expected, atol=1e-4, rtol=0)
    if name == "onnx":
        import onnx

        shape = onnx.load(file).graph.input[0].type.tensor_type.shape
        assert [d.dim_value for d in shape.dim] == [4, 6]


def test_truncation_reduces_variation(run: Path, tmp_path: Path) -> None:
    trained = fastgan.load(run)
    spread = [trained.sample(32, truncation=t).std(dim=0).mean() for t in (1.0, 0.5, 0.1)]
    assert spread[0] > spread[1] > spread[2]
    with pytest.raises(ValueError, match=r"truncation must be above 0 and at most 1, got 1\.5"):
        trained.sample(1, truncation=1.5)
    growing = make_run(tmp_path / "pggan", "pggan-4")
    with pytest.raises(ValueError, match=r"truncation must be 1 for pggan, which normalizes its latents, got 0\.5"):
        fastgan.load(growing).sample(1, truncation=0.5)


def test_great_circle() -> None:
    start, end, t = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0], [0.5], [1.0]])
    torch.testing.assert_close(
        great_circle(start, end, t), torch.tensor([[3.0, 0.0], [4.5**0.5, 4.5**0.5], [0.0, 3.0]])
    )
    # Of one number, or the same: a line.
    torch.testing.assert_close(great_circle(start[:, :1], start[:, :1] - 4, t), torch.tensor([[3.0], [1.0], [-1.0]]))
    torch.testing.assert_close(great_circle(start, start, t), start.expand(3, 2))


def test_model_card(exported: dict[str, Path], run: Path, tmp_path: Path) -> None:
    text = (run / "export" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc0-1.0" and front["library_name"] == "fastgan" and "dcgan" in front["tags"]
    for words in ("12 kimg", "folder:photos", "Not measured", "cc0-1.0", *(p.name for p in exported.values())):
        assert words in text
    assert "/home/me" not in text
    other = {"data": "folder", "fingerprint": "another"}
    rows = [
        {"kimg": 12.0, "metrics": {"fd": 1.5, "recall": 0.7}, "features": "digits", "images": {"generated": 1000}},
        {"kimg": 9.0, "metrics": {"fd": 99.0}, "features": "digits", "images": {"generated": 1000}},
        {"kimg": 12.0, "metrics": "none", "images": {"generated": 1000}},
        {"kimg": 12.0, "metrics": {"fd": 7.5}, "features": "digits", "images": {"generated": 1000}, **other},
        {"kimg": 12.0, "metrics": {"fd": 98.0}, "images": 12_000},
    ]
    measured = make_run(tmp_path / "run", data="/home/me/SET", ema=0.0)
    (measured / "evaluation.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"images": 12')
    assert export.main([str(measured)]) == 0
    text = (measured / "export" / "README.md").read_text()
    assert (
        "| fd | 1.5 | digits | 1000 |" in text
        and "99" not in text
        and "98" not in text
        and "kept no moving average" in text
    )
    assert "| fd against folder, not the training data | 7.5 |" in text
    assert "| Trained on | SET |" in text and "/home/me" not in text
    hub = pytest.importorskip("huggingface_hub", reason="extra export: pip install 'fastgan[export]'")
    card = hub.ModelCard.load(measured / "export" / "README.md")
    measures = {(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert measures == {("SET", "fd", 1.5), ("SET", "recall", 0.7), ("folder", "fd", 7.5)}
    (measured / "export" / "README.md").write_text("mine")
    assert export.main([str(measured)]) == 0
    assert (measured / "export" / "README.md").read_text() == "mine"


def test_a_file_that_differs_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(generator: nn.Module, meta: dict[str, Any], batch: int | None) -> bytes:
        other = models.build(**meta["networks"])[0]
        return formats.FORMATS["safetensors"].write(other, meta, batch)

    safe = formats.FORMATS["safetensors"]
    bad = dataclasses.replace(formats.FORMATS["onnx"], write=wrong, open=safe.open, meta=safe.meta)
    monkeypatch.setitem(formats.FORMATS, "onnx", bad)
    assert export.main([str(run), "--format", "onnx", "--out", str(tmp_path / "new" / "x.onnx")]) == 1
    assert "the images of the exported file differ by" in capsys.readouterr().err
    assert content(tmp_path) == []


@pytest.mark.parametrize(("function", "call"), [("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1)])
def test_a_full_disk_leaves_nothing(
    function: str, call: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the three files does not fit."""
    calls, real = [], getattr(os, function)

    def full(*args: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(os, function, full)
    assert export.main([str(run), "--out", str(tmp_path / "a" / "b")]) == 2
    assert len(calls) == call and content(tmp_path) == []


def test_refused(run: Path, tmp_path: Path, exported: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.onnx").write_text("mine")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty").mkdir()
    without = make_run(tmp_path / "without")
    (checkpoint.existing(without)[0] / "generator.safetensors").unlink()
    before = content(tmp_path)
    for argv, words in (
        ([str(tmp_path / "nowhere")], ("RUN", "nowhere", "checkpoint")),
        ([str(tmp_path / "empty")], ("RUN", "empty", "checkpoint")),
        ([str(tmp_path / "notes.txt")], ("RUN", ".onnx", ".safetensors")),
        ([str(without)], ("RUN", "generator.safetensors is missing")),
        ([str(exported["onnx"])], ("RUN", "model.onnx", ".safetensors")),
        ([str(run), "--format", "onnx", "--out", str(tmp_path / "x.pt2")], ("--out", "x.pt2", ".onnx")),
        ([str(run), "--format", "onnx", "--out", str(tmp_path / "mine.onnx")], ("--out", "is no export of fastgan")),
        ([str(run), "--format", "onnx", "--batch", "0"], ("--batch", "0", "at least 1")),
        ([str(run), "--batch", "2"], ("--batch", "is not needed with --format safetensors")),
        ([str(run), "--license", "mine\n| yours"], ("--license", "one line")),
        ([str(run), "--out", str(tmp_path / "notes.txt" / "sub")], ("--out", "notes.txt")),
        ([str(checkpoint.existing(run)[0] / "generator.safetensors")], ("RUN", "must be the checkpoint")),
    ):
        capsys.readouterr()
        assert export.main(argv) == 2, argv
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and all(word in error for word in words), error
        assert content(tmp_path) == before


def test_a_config_of_another_tool_is_not_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    for text in ('{"model": "bert", "resolution": 8, "latent": 6}', "[1]", "{", '{"model": "dcgan"}'):
        config.write_text(text)
        capsys.readouterr()
        assert export.main([str(run), "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert f"--out '{tmp_path}': {config} was not written by fastgan" in error and len(error.splitlines()) == 1
        assert content(tmp_path) == [config] and config.read_text() == text
    assert export.main([str(run), "--out", str(tmp_path / "weights.safetensors")]) == 0  # which has no config.json
    config.unlink()
    assert export.main([str(run), "--out", str(tmp_path)]) == 0
    assert export.main([str(run), "--out", str(tmp_path)]) == 0  # its own is
    assert json.loads(config.read_text())["model"] == "dcgan"


def test_a_new_folder_may_have_a_dot_in_its_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(run), "--out", f"{tmp_path / 'my.run'}"]) == 2
    assert "with / at its end" in capsys.readouterr().err and not (tmp_path / "my.run").exists()
    assert export.main([str(run), "--out", f"{tmp_path / 'my.run'}/"]) == 0
    assert (tmp_path / "my.run" / "model.safetensors").is_file()


def test_an_empty_section_in_config_yaml(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "run"))
    settings = yaml.safe_load((broken / "config.yaml").read_text())
    (broken / "config.yaml").write_text(yaml.safe_dump({**settings, "data": None}))
    assert export.main([str(broken), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == f"fastgan: {broken / 'config.yaml'}: data must be a mapping of keys to values, got None\n"


def test_a_checkpoint_that_training_removes_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    (old,) = checkpoint.existing(run)
    newer = shutil.copytree(old, tmp_path / "newer")
    stored = checkpoint.Checkpoint.generator

    def dropped(stored_checkpoint: checkpoint.Checkpoint) -> dict[str, torch.Tensor]:
        if newer.exists():
            newer.rename(old.with_name("kimg-000013.000"))
            shutil.rmtree(old)
        return stored(stored_checkpoint)

    monkeypatch.setattr(checkpoint.Checkpoint, "generator", dropped)
    assert fastgan.load(run).sample(1).shape == (1, 2, 8, 8)


def test_a_run_without_permission_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(file: Path) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "is_file", refuse)
    for command in ("sample", "export", "explore"):
        assert main.main([command, str(tmp_path)]) == 2
        assert f"RUN must be readable (Permission denied), got '{tmp_path}'" in capsys.readouterr().err


def test_errors_in_python_name_the_argument(run: Path) -> None:
    trained = fastgan.load(run)
    for rows, columns, name, got in ((0, 3, "rows", 0), (2, 0, "columns", 0), (-1, 3, "rows", -1)):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {got}"):
            trained.interpolate(rows, columns)
    with pytest.raises(ArgumentError, match="device must be cpu, cuda, cuda:N or mps, got 'foo'"):
        fastgan.load(run, device="foo")
    with pytest.raises(ArgumentError, match=r"device must be .*cpu.*, got 'cuda:99'"):
        fastgan.load(run, device="cuda:99")


@pytest.mark.parametrize("name", [name for name, format in formats.FORMATS.items() if not format.loadable])
def test_a_file_that_holds_a_program_is_never_opened(
    name: str,
    exported: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torch compiles, imports or unpickles what such a file names, so no part of it may reach torch."""
    file = Path(shutil.copy(exported[name], tmp_path / f"model{exported[name].suffix}"))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a program was opened")

    for module, function in ((torch.jit, "load"), (torch.export, "load"), (torch, "load"), (zipfile, "ZipFile")):
        monkeypatch.setattr(module, function, never)
    for path in (file, tmp_path):
        with pytest.raises(ArgumentError, match="holds a program, which fastgan does not run") as error:
            fastgan.load(path)
        assert f"torch.{'jit' if name == 'torchscript' else 'export'}.load('{file.name}')" in str(error.value)
        with pytest.raises(ArgumentError, match="holds a program"):
            torch.hub.load(str(Path(fastgan.__file__).parents[1]), "generator", source="local", path=str(path))
        for command in ("sample", "explore"):
            assert main.main([command, str(path)]) == 2
            assert "holds a program" in capsys.readouterr().err


def _external(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    tensor.external_data.add(key="location", value="secret")


def _other_domain(model: Any) -> None:
    model.graph.node[0].domain = "com.example"


def _unknown_operation(model: Any) -> None:
    model.graph.node[0].op_type = "Scan"


def _function(model: Any) -> None:
    model.functions.add(name="Conv", domain="local")


def _subgraph(model: Any) -> None:
    attribute = model.graph.node[0].attribute.add(name="body", type=5)
    attribute.g.name = "inner"


def _external_in_an_attribute(model: Any) -> None:
    attribute = model.graph.node[0].attribute.add(name="value", type=4)
    attribute.t.data_location = 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_external, "it reads weights from another file"),
        (_external_in_an_attribute, "it reads weights from another file"),
        (_other_domain, "it calls com.example:"),
        (_unknown_operation, "it calls Scan"),
        (_function, "it has a FunctionProto"),
        (_subgraph, "its attribute 'body' holds a graph"),
    ],
)
def test_an_onnx_graph_with_more_than_known_operations_is_refused(
    change: Any, reason: str, exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx
    import onnxruntime

    model = onnx.load(exported["onnx"])
    change(model)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "secret").write_bytes(bytes(2**20))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the graph was run"))
    with pytest.raises(ArgumentError, match=f"because it is not safe: {reason}"):
        fastgan.load("x.onnx")


def test_shapes_are_compared_before_a_network_is_built(exported: dict[str, Path], tmp_path: Path) -> None:
    """A small file that describes a network of terabytes is refused before memory is allocated."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(exported["safetensors"], "pt") as file:
        meta = json.loads(file.metadata()["fastgan"])
    weights = load_file(exported["safetensors"])
    path = tmp_path / "x.safetensors"
    misfit = r"weight .* has shape \[.*\], its network needs \[1048576"
    for latent, words in ((2**20, misfit), (2**40, r"networks\.latent")):
        meta["networks"]["latent"] = latent
        save_file(weights, path, {"fastgan": json.dumps(meta)})
        with pytest.raises(ArgumentError, match=words):
            fastgan.load(path)
    meta["networks"]["latent"] = 6
    for name in (weights, {**weights, "more": torch.zeros(1)}, {}):
        save_file(dict(name), path, {"fastgan": json.dumps(meta)})
        if len(name) == len(weights):
            assert fastgan.load(path).sample(1).isfinite().all()
        else:
            with pytest.raises(ArgumentError, match=r"weight .* has shape"):
                fastgan.load(path)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_damaged_files(name: str, exported: dict[str, Path], tmp_path: Path) -> None:
    whole = exported[name].read_bytes()
    for number, data in enumerate([whole[: len(whole) // 2], b"", b"\x80\x02" + pickle.dumps({"a": 1}), whole[:20]]):
        file = tmp_path / f"{number}{exported[name].suffix}"
        file.write_bytes(data)
        with pytest.raises(ArgumentError, match=f"RUN must be a {name} file .*{file.name}") as error:
            (formats.read if formats.FORMATS[name].loadable else formats.read_meta)(file)
        assert len(str(error.value).splitlines()) == 1


def test_a_card_shows_the_text_of_others_as_text() -> None:
    """Names in metadata and evaluations add no rows, columns, tags or links, and no control characters."""
    hostile = "x\x1b[31m | y\n# title\n<script>alert(1)</script> [link](http://evil.example) `code`"
    meta = {"networks": {"model": "dcgan", "resolution": 8, "channels": 1, "latent": 4, "num_classes": 0}}
    row = {"metrics": {hostile: 1.0}, "features": hostile, "n": hostile, "other": hostile}
    card = model_card.render({**meta, "variant": hostile, "data": hostile, "license": hostile}, ["model.onnx"], [row])
    table = card.partition("---\n\n")[2]
    assert not re.search(r"(?<!\\)(<script|\[link|`code)", table) and "\x1b" not in card
    assert not [line for line in table.splitlines() if line.startswith("# title")]
    widths = {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("| x")}
    assert widths == {5}
