"""ONNX files whose graphs make large tensors from a few bytes: refused before anything is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastgan
from fastgan.errors import ArgumentError
from fastgan.export.onnx_memory import GraphMemory

onnx = pytest.importorskip("onnx", reason="extra export: pip install 'fastgan[export]'")
pytest.importorskip("onnxruntime", reason="extra export: pip install 'fastgan[export]'")

NETWORKS = {"model": "dcgan", "resolution": 8, "channels": 1, "latent": 64, "num_classes": 0}
META = {"networks": {**NETWORKS, "width": 4, "max_width": 4}, "variant": "dcgan"}
BIG = 2**28
Nodes = tuple[list[Any], dict[str, np.ndarray]]


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, inputs.split(), [output], **attributes)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def doubled() -> Nodes:
    """30 steps from 4 bytes."""
    chain = [node("Concat", f"x{i} x{i}", f"x{i + 1}", axis=0) for i in range(30)]
    return [*chain, node("Identity", "x30", "big")], {"x0": np.zeros(1, np.float32)}


def many() -> Nodes:
    """Constants of 64 MB each, all of which onnxruntime would keep."""
    made = [node("ConstantOfShape", "shape", f"c{i}") for i in range(8)]
    sums = [node("Add", f"{'x' if i == 0 else f's{i - 1}'} c{i}", f"s{i}") for i in range(8)]
    start = [node("ReduceMax", "latent", "x", keepdims=0)]
    return [*made, *start, *sums, node("Identity", "s7", "big")], {"shape": ints(2**24)}


def transposed() -> Nodes:
    """64 MB of results by way of a product of 64 GB."""
    image, weight = ints(1, 1, 2**11, 2**11), ints(1, 1, 2**6, 2**6)
    made = [node("ConstantOfShape", "large", "x"), node("ConstantOfShape", "weight", "w")]
    return [*made, node("ConvTranspose", "x w", "big")], {"large": image, "weight": weight}


HOSTILE: dict[str, Callable[[], Nodes]] = {
    "constant": lambda: ([node("ConstantOfShape", "n", "big")], {"n": ints(BIG)}),
    "expand": lambda: ([node("Expand", "x n", "big")], {"x": np.zeros(1, np.float32), "n": ints(BIG)}),
    "tile": lambda: ([node("Tile", "x n", "big")], {"x": np.zeros(1, np.float32), "n": ints(BIG)}),
    "range": lambda: (
        [node("Range", "a n d", "r"), node("Cast", "r", "big", to=1)],
        {"a": np.array(0), "n": np.array(BIG), "d": np.array(1)},
    ),
    "pad": lambda: ([node("Pad", "x n", "big")], {"x": np.zeros(1, np.float32), "n": ints(0, BIG)}),
    "resize": lambda: (
        [node("Resize", "x r n", "big", mode="nearest")],
        {"x": np.zeros((1, 1, 1), np.float32), "r": np.zeros(0, np.float32), "n": np.array([1, 1, 2**29], np.float32)},
    ),
    "product": lambda: (
        [node("MatMul", "x y", "big")],
        {"x": np.zeros((2**14, 1), "f"), "y": np.zeros((1, 2**14), "f")},
    ),
    "broadcast": lambda: ([node("Add", "x y", "big")], {"x": np.zeros((2**14, 1), "f"), "y": np.zeros(2**14, "f")}),
    "doubled": doubled,
    "many": many,
    "transposed": transposed,
    "padding": lambda: ([node("Conv", "x w", "big", pads=[2**14] * 4)], {n: np.zeros((1, 1, 1, 1), "f") for n in "xw"}),
    "of values": lambda: (
        [node("Cast", "latent", "i", to=7), node("Reshape", "i f", "n"), node("ConstantOfShape", "n", "big")],
        {"f": ints(-1)},
    ),
    "overflow": lambda: (
        [node("Conv", "x w", "big", pads=[2**62] * 4)],
        {n: np.zeros((1, 1, 1, 1), "f") for n in "xw"},
    ),
}


def write(
    path: Path, nodes: list[Any], constants: dict[str, np.ndarray], claims: list[Any] | None = None, tail: bool = True
) -> Path:
    """A file that adds `m` to the latents; with `tail` it is the largest value of `big`."""
    nodes = [*nodes, node("ReduceMax", "big", "m", keepdims=0)] if tail else nodes
    nodes = [*nodes, node("Add", "latent m", "sum"), node("Reshape", "sum image", "images")]
    constants = {"image": ints(-1, 1, 8, 8), **constants}
    shapes = {"latent": ["N", 64], "images": ["N", 1, 8, 8]}
    ends = [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], weights, value_info=claims or [])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    model.metadata_props.append(onnx.StringStringEntryProto(key="fastgan", value=json.dumps(META)))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("claimed", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_graph_that_asks_for_much_memory_is_not_run(
    name: str, claimed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    nodes, constants = HOSTILE[name]()
    claims = [onnx.helper.make_tensor_value_info("big", 1, [1])] if claimed else []
    file = write(tmp_path / "x.onnx", nodes, constants, claims)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the graph was run"))
    with pytest.raises(ArgumentError, match=r"not safe: (an image takes \d+ MB|the shape of|its )") as error:
        fastgan.load(file)
    assert len(str(error.value).splitlines()) == 1 and file.stat().st_size < 200_000


def test_a_batch_that_takes_too_much_is_split(tmp_path: Path) -> None:
    """Memory that grows with the batch: 100 images take 800 MB at once, and each one 8 MB."""
    nodes = [node("Unsqueeze", "latent one", "x"), node("Resize", "x none scales", "big", mode="nearest")]
    nodes += [node("ReduceMax", "big", "m", keepdims=0, axes=[2])]
    constants = {"one": ints(1), "none": np.zeros(0, np.float32), "scales": np.array([1, 1, 2**15], np.float32)}
    file = write(tmp_path / "x.onnx", nodes, constants, tail=False)
    footprint = GraphMemory(onnx.load(file))
    assert 2**23 <= footprint.peak(1) < 2**25 and footprint.peak(100) > 7 * 2**26 and footprint.batch is None
    module, latent = fastgan.load(file).module, torch.randn(100, 64)
    assert torch.equal(module(latent).flatten(1), latent + latent.amax(1, keepdim=True))


def test_a_small_graph_is_run(tmp_path: Path) -> None:
    file = write(tmp_path / "x.onnx", [node("ConstantOfShape", "n", "big")], {"n": ints(2**10)})
    assert torch.equal(fastgan.load(file).module(torch.ones(2, 64)), torch.ones(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("latent", 65, r"its latent have shape \[1, 64\], its metadata need \[1, 65\]"),
        ("resolution", 16, r"its images have shape \[1, 1, 8, 8\], its metadata need \[1, 1, 16, 16\]"),
        ("channels", 3, "its images have shape"),
        ("num_classes", 2, "its inputs or its batch"),
        ("batch", 2, "its inputs or its batch"),
    ],
)
def test_a_graph_of_other_images_than_its_metadata_say(
    key: str, value: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first sample would stop in the middle of a command."""
    monkeypatch.setitem(META if key == "batch" else META["networks"], key, value)  # type: ignore[arg-type]
    file = write(tmp_path / "x.onnx", [node("ConstantOfShape", "n", "big")], {"n": ints(1)})
    with pytest.raises(ArgumentError, match=words):
        fastgan.load(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
@pytest.mark.parametrize("name", ["x.safetensors", "model.safetensors", "x.onnx", "x.pt2"])
def test_a_named_pipe_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ArgumentError, match="RUN") as error:
            fastgan.load(path)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_named_pipe_in_place_of_config_json(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from fastgan.export import formats

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    assert not formats.may_replace_config(tmp_path / "config.json")
    with pytest.raises(ArgumentError, match="not a regular file"):
        fastgan.load(tmp_path)
