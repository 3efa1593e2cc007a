"""Files that a generator leaves in: what each format is, how it is written, and how it is read without trusting it.

    model.safetensors   the weights, for `fastgan.load` and `Generator.from_pretrained` (with config.json)
    model.pt2           a graph of ATen operations and its weights, for torch.export.load
    model.onnx          a graph of ONNX operations and its weights, for onnxruntime and others
    model.torchscript   a TorchScript program, for torch.jit.load and libtorch

Inputs are `latent`, float32 [N, latent], and `labels`, int64 [N], where the generator has classes; the output is
`images`, float32 [N, C, R, R], as the network gives them: -1 is black and 1 white, and pggan's may go beyond. Each file
carries what is known of the generator as JSON under the key "fastgan".
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgan import models
from fastgan.errors import ArgumentError
from fastgan.exporting import torchscript

Meta = dict[str, Any]
KEY = "fastgan"


@dataclass(frozen=True)
class Format:
    """How a generator is stored.

    Args:
        suffix: of its files.
        write: (generator in evaluation mode, meta, batch or None for any) -> the file's content.
        read: (file's content, device) -> what computes images, meta; it executes nothing that the file brings along but
            a graph of known operations.
    """

    suffix: str
    write: Callable[[nn.Module, Meta, int | None], bytes]
    read: Callable[[bytes, str], tuple[nn.Module, Meta]]


class Foreign(nn.Module):
    """A generator that is no network of ours: `run` takes and gives tensors on `device`.

    Args:
        batch: the only one that `run` takes, or None; others are cut and filled up to it.
    """

    def __init__(self, run: Callable[..., Tensor], device: str, batch: int | None) -> None:
        super().__init__()
        self.run = run
        self.device = torch.device(device)
        self.batch = batch

    def forward(self, latent: Tensor, labels: Tensor | None = None) -> Tensor:
        inputs = (latent,) if labels is None else (latent, labels)
        if self.batch is None:
            return self.run(*inputs)
        parts = []
        for i in range(0, len(latent), self.batch):
            part = [x[i : i + self.batch] for x in inputs]
            missing = self.batch - len(part[0])
            parts.append(self.run(*(torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) for x in part)))
        return torch.cat(parts)[: len(latent)]


def inputs_of(meta: Meta, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Latents, and labels where there are classes, for one call: random, for tracing and for comparing."""
    networks, random = meta["networks"], torch.Generator().manual_seed(seed)
    latent = torch.randn(batch, networks["latent"], generator=random)
    classes = networks["num_classes"]
    return (latent, torch.arange(batch) % classes) if classes else (latent,)


def plain(generator: nn.Module, meta: Meta) -> nn.Module:
    """A copy for inference alone: spectral norm is divided into the weights once, not in every call."""
    # Built anew: parametrised modules share their class with a deep copy, and removing would break the original.
    copy, _ = models.build(**meta["networks"])
    copy.load_state_dict(generator.state_dict())
    for module in list(copy.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module.eval(), "weight")
    return copy.eval().requires_grad_(False)


# --- safetensors ------------------------------------------------------------------------------------------------------


def _write_safetensors(generator: nn.Module, meta: Meta, batch: int | None) -> bytes:
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in generator.state_dict().items()}
    return save(tensors, {"format": "pt", KEY: json.dumps(meta)})


def _read_safetensors(content: bytes, device: str) -> tuple[nn.Module, Meta]:
    length = int.from_bytes(content[:8], "little")
    return _built(content, json.loads(json.loads(content[8 : 8 + length])["__metadata__"][KEY]), device)


def _built(content: bytes, meta: Meta, device: str) -> tuple[nn.Module, Meta]:
    from safetensors.torch import load

    generator, _ = models.build(**meta["networks"])
    generator.load_state_dict(load(content))
    return generator.to(device).eval().requires_grad_(False), meta


# --- torch.export -----------------------------------------------------------------------------------------------------


def _program(generator: nn.Module, meta: Meta, batch: int | None) -> torch.export.ExportedProgram:
    inputs = inputs_of(meta, batch or 2)
    sizes = None if batch else tuple({0: torch.export.Dim("N", min=1)} for _ in inputs)
    program = torch.export.export(plain(generator, meta), inputs, dynamic_shapes=sizes)
    for node in program.graph.nodes:  # paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def _write_torch_export(generator: nn.Module, meta: Meta, batch: int | None) -> bytes:
    file = io.BytesIO()
    torch.export.save(_program(generator, meta, batch), file, extra_files={KEY: json.dumps(meta)})
    return file.getvalue()


_WORD = re.compile(r"[\w.+\-]*")
_SIZE = re.compile(r"(Symbol\('\w+'(, \w+=True)*\)|Integer\(-?\d+\)|Mul\(|Add\(|, |\))*")
_TREE = re.compile(r'[\w\[\]{}":, .]*')


def _safe_graph(value: Any, key: str = "") -> Any:
    """A copy of a serialised graph with names alone for strings, so that nothing in it can be evaluated to a call.

    torch.export.load evaluates sizes and guards as expressions and generates code with the names that stand in it.
    """
    if isinstance(value, dict):
        return {k: _safe_graph(v, k) for k, v in value.items() if _safe_graph(k) is not None}
    if isinstance(value, list):
        return [_safe_graph(v, key) for v in value]
    if isinstance(value, str):
        if key == "target" and not value.startswith("torch.ops.aten.") and value != "_operator.getitem":
            raise Unsafe(f"it calls {value[:60]}, which is no operation of ATen")
        if key == "target" and value.split(".")[3:4] in (["from_file"], ["save"]):
            raise Unsafe(f"it calls {value}, which touches files")
        kind = {"in_spec": _TREE, "out_spec": _TREE, "expr_str": _SIZE}.get(key, _WORD)
        if not kind.fullmatch(value):
            raise Unsafe(f"its graph has the text {value[:60]!r}, where a name is expected")
    return value


class Unsafe(Exception):
    """A file that would have to be trusted to be loaded."""


def _read_torch_export(content: bytes, device: str) -> tuple[nn.Module, Meta]:
    """torch.export.load unpickles what an archive says is pickled, so it gets a copy that has nothing of that kind."""
    source = zipfile.ZipFile(io.BytesIO(content))
    checked = io.BytesIO()
    meta = None
    with zipfile.ZipFile(checked, "w") as target:
        for name in source.namelist():
            member, kind = source.read(name), name.partition("/")[2]
            if kind == f"extra/{KEY}":
                meta = json.loads(member)
                continue
            if kind.startswith("models/") and kind.endswith(".json"):
                program = json.loads(member)
                graph = program["graph_module"]
                for node in graph["graph"]["nodes"]:
                    node["metadata"] = {}  # where it came from: text of any kind
                program["guards_code"] = []  # they would be evaluated; the shapes are checked here
                member = json.dumps(_safe_graph(program)).encode()
            elif kind.endswith("_config.json"):
                config = json.loads(member)
                for entry in config["config"].values():
                    if entry["use_pickle"]:
                        raise Unsafe("it has pickled weights")
            elif kind.startswith("data/sample_inputs/"):
                # Tried with weights_only, which if it fails torch tries again without.
                torch.load(io.BytesIO(member), weights_only=True)
            elif not re.fullmatch(r"data/(weights|constants)/\w+|archive_\w+|byteorder|version|\.data/\w+", kind):
                raise Unsafe(f"it has the unknown part {kind[:60]!r}")
            target.writestr(zipfile.ZipInfo(name), member)
    if meta is None:
        raise KeyError(KEY)
    checked.seek(0)
    program = torch.export.load(checked)
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return Foreign(program.module(check_guards=False), device, meta.get("batch")), meta


# --- ONNX -------------------------------------------------------------------------------------------------------------


def _write_onnx(generator: nn.Module, meta: Meta, batch: int | None) -> bytes:
    import onnx
    import onnxscript  # noqa: F401  (its absence is named here, and not inside torch)

    # torch and onnxscript announce what they deprecate among themselves.
    with _silent():
        program = torch.onnx.export(
            _program(generator, meta, batch),
            dynamo=True,
            input_names=["latent", "labels"][: len(inputs_of(meta, 1))],
            output_names=["images"],
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    # Without them the file has the source's text and paths of this machine in it.
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    proto.metadata_props.append(onnx.StringStringEntryProto(key=KEY, value=json.dumps(meta)))
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _read_onnx(content: bytes, device: str) -> tuple[nn.Module, Meta]:
    """A graph without code; given as bytes it can name no other file."""
    import onnxruntime

    if device != "cpu":
        raise ArgumentError("--device", device, "it may be cpu for an ONNX file; other formats run on a GPU")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    meta = json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(["images"], given)[0])

    return Foreign(run, device, meta.get("batch")), meta


# --- TorchScript ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _write_torchscript(generator: nn.Module, meta: Meta, batch: int | None) -> bytes:
    file = io.BytesIO()
    with _silent(), torch.no_grad():  # torch deprecates TorchScript; the format is for those who still need it
        script = torch.jit.trace(plain(generator, meta), inputs_of(meta, batch or 2), check_trace=False)
        torch.jit.save(torch.jit.freeze(script.eval()), file, _extra_files={KEY: json.dumps(meta)})
    return file.getvalue()


def _read_torchscript(content: bytes, device: str) -> tuple[nn.Module, Meta]:
    """torch.jit.load builds only tensors and lists from its pickles, but compiles a program: its calls are checked."""
    wrong = torchscript.forbidden(content)
    if wrong is not None:
        raise Unsafe(wrong)
    extra = {KEY: ""}
    with _silent():
        script = torch.jit.load(io.BytesIO(content), map_location=device, _extra_files=extra)
    meta = json.loads(extra[KEY])
    return Foreign(script, device, meta.get("batch")), meta


FORMATS = {
    "safetensors": Format(".safetensors", _write_safetensors, _read_safetensors),
    "torch-export": Format(".pt2", _write_torch_export, _read_torch_export),
    "onnx": Format(".onnx", _write_onnx, _read_onnx),
    "torchscript": Format(".torchscript", _write_torchscript, _read_torchscript),
}


def find(path: Path) -> Path | None:
    """The exported file that `path` is or holds; None where it is no such thing: a run, a checkpoint, nothing.

    Raises:
        ArgumentError: a file of another kind, a folder with several, or what may not be read.
    """
    suffixes = [it.suffix for it in FORMATS.values()]
    try:
        return _find(path, suffixes)
    except PermissionError as error:
        raise ArgumentError("RUN", str(path), f"it may be one that can be read ({error.strerror})") from None


def _find(path: Path, suffixes: list[str]) -> Path | None:
    if path.is_file():
        if path.suffix not in suffixes:
            raise ArgumentError("RUN", str(path), f"it may be a run, or a file that ends in {', '.join(suffixes)}")
        return path
    if not path.is_dir() or (path / "checkpoint.json").is_file() or (path / "checkpoints").is_dir():
        return None
    for suffix in suffixes:
        if (path / f"model{suffix}").is_file():  # of several formats in one folder any does
            return path / f"model{suffix}"
    found = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.name[0] != ".")
    if len(found) > 1:
        raise ArgumentError("RUN", str(path), f"it may be one of its files: {', '.join(file.name for file in found)}")
    return found[0] if found else None


def read(file: Path, device: str = "cpu") -> tuple[nn.Module, Meta]:
    """What computes images (see `Foreign`), and what is said of it; nothing is unpickled.

    Raises:
        ArgumentError: the file is damaged, was not written by fastgan, or would have to execute what it brings along.
    """
    name, it = next((name, it) for name, it in FORMATS.items() if it.suffix == file.suffix)
    try:
        content = file.read_bytes()
        config = file.with_name("config.json")
        if name == "safetensors" and KEY.encode() not in content[: 8 + int.from_bytes(content[:8], "little")]:
            if config.is_file():  # written by save_pretrained
                return _built(content, _meta_of(json.loads(config.read_text())), device)
            if file.with_name("checkpoint.json").is_file():
                raise ArgumentError("RUN", str(file), f"it may be the checkpoint it belongs to, {file.parent}")
        return it.read(content, device)
    except (ArgumentError, ModuleNotFoundError):
        raise
    except Unsafe as error:
        raise ArgumentError("RUN", str(file), f"it is not loaded, since it may not be trusted: {error}") from None
    except Exception as error:  # each format's library has exceptions of its own for what is no file of it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArgumentError("RUN", str(file), f"it may be a {name} file from fastgan export ({reason[:150]})") from None


def is_config(file: Path) -> bool:
    """Whether `file`, a config.json, is missing or a generator's, as `fastgan export` and `save_pretrained` write."""
    if not file.exists():
        return True
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict) or not {"resolution", "latent"} <= config.keys():
        return False
    return config.get("model") in list(models.MODELS)  # others' files have a "model" too


def _meta_of(config: dict[str, Any]) -> Meta:
    """What a config.json of `save_pretrained` says."""
    return {"networks": {"num_classes": 0, **config, "norm_g": config.get("norm", "batch")}}
