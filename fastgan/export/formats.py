"""Files that a generator leaves in: what each format is, how it is written, and how it is read without trusting it.

    model.safetensors   the weights, for `fastgan.load` and `Generator.from_pretrained` (with config.json)
    model.pt2           a graph of ATen operations and its weights, for torch.export.load
    model.onnx          a graph of ONNX operations and its weights, for onnxruntime and others
    model.torchscript   a TorchScript program, for torch.jit.load and libtorch

fastgan itself loads safetensors and ONNX. The other two hold programs, and torch's loaders of them trust the file: they
compile, import or unpickle what it names. So `fastgan.load` refuses them, whoever wrote them, and names torch's loader.

Inputs are `latent`, float32 [N, latent], and `labels`, int64 [N], where the generator has classes; the output is
`images`, float32 [N, C, R, R], as the network gives them: -1 is black and 1 white, and pggan's may go beyond. Each file
carries what is known of the generator as JSON under the key "fastgan".
"""

from __future__ import annotations

import contextlib
import io
import json
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
from fastgan.utils.old_names import current_names

Meta = dict[str, Any]
KEY = "fastgan"
_META_BYTES = 2**20  # of a description: it has a few hundred
# What torch.onnx.export makes of our networks, and operations near to that: functions of their inputs alone.
_ONNX_OPERATIONS = frozenset(
    """
    Add AveragePool BatchNormalization Cast Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Div Einsum Elu
    Equal Erf Exp Expand Flatten Gather Gelu Gemm GlobalAveragePool GroupNormalization Identity InstanceNormalization
    LayerNormalization LeakyRelu Less Log MatMul Max MaxPool Min Mul Neg Not Pad Pow PRelu Range Reciprocal ReduceMax
    ReduceMean ReduceSum ReduceSumSquare ReduceL2 Relu Reshape Resize Shape Sigmoid Sin Slice Softmax Softplus Split
    Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where
    """.split()
)


@dataclass(frozen=True)
class Format:
    """How a generator is stored.

    Args:
        suffix: of its files.
        write: (generator in evaluation mode, meta, batch or None for any) -> the file's content.
        open: (file's content, device) -> the module that computes images. Where `loads` is False the library behind it
            trusts the content: only content that this process has just written may be passed.
        meta: file's content -> what it says of its generator; nothing but JSON is parsed.
        loads: whether `read` loads files of this format.
        opened_with: the expression that opens `{file!r}` in Python.
    """

    suffix: str
    write: Callable[[nn.Module, Meta, int | None], bytes]
    open: Callable[[bytes, str], nn.Module]
    meta: Callable[[bytes], Meta]
    loads: bool
    opened_with: str


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
    # Built anew: parametrized modules share their class with a deep copy, and removing would break the original.
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


def _safetensors_meta(content: bytes) -> Meta:
    length = int.from_bytes(content[:8], "little")
    return current_names(json.loads(json.loads(content[8 : 8 + length])["__metadata__"][KEY]))


def _open_safetensors(content: bytes, device: str) -> nn.Module:
    return _built(content, _safetensors_meta(content), device)


def _built(content: bytes, meta: Meta, device: str) -> nn.Module:
    """The network that `meta` describes, with the weights in `content`.

    Raises:
        Unsafe: shapes of the weights are not the network's. They are compared before any memory is taken for it.
    """
    from safetensors.torch import load

    weights = load(content)
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in models.build(**meta["networks"])[0].state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        found, shape = (
            list(x[name]) if name in x else None for x in ({k: w.shape for k, w in weights.items()}, expected)
        )
        if found != shape:
            raise Unsafe(f"its weight {name[:60]!r} has shape {found}, the network that it describes {shape}")
    generator, _ = models.build(**meta["networks"])
    generator.load_state_dict(weights)
    return generator.to(device).eval().requires_grad_(False)


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


class Unsafe(Exception):
    """A file that would have to be trusted to be loaded."""


def _open_torch_export(content: bytes, device: str) -> nn.Module:
    program = torch.export.load(io.BytesIO(content))
    return Foreign(program.module(check_guards=False), device, _archive_meta(content).get("batch"))


def _archive_meta(content: bytes) -> Meta:
    """What torch.export and TorchScript archives say of themselves, in the member NAME/extra/fastgan."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (member,) = [it for it in archive.infolist() if it.filename.partition("/")[2] == f"extra/{KEY}"]
        if member.file_size > _META_BYTES:
            raise Unsafe(f"its description has {member.file_size} bytes, at most {_META_BYTES} are read")
        return current_names(json.loads(archive.read(member)))


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


def _onnx_meta(content: bytes) -> Meta:
    return current_names(json.loads({it.key: it.value for it in _onnx_model(content).metadata_props}[KEY]))


def _onnx_model(content: bytes) -> Any:
    import onnx

    return onnx.load_model_from_string(content)  # protobuf alone: files that it names are not opened


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages in it, at any depth."""
    pending = [message]
    while pending:
        it = pending.pop()
        yield it
        for field, value in it.ListFields():
            if field.message_type is not None:
                pending.extend([value] if hasattr(value, "ListFields") else value)


def _check_onnx(model: Any) -> None:
    """Refuse what a graph written by `fastgan export` does not have.

    Raises:
        Unsafe: tensors in other files, operations of other domains, functions, training, control flow.
    """
    for message in _messages(model):
        kind = message.DESCRIPTOR.name
        if kind in ("FunctionProto", "TrainingInfoProto", "SparseTensorProto", "StringStringEntryProto"):
            if kind == "StringStringEntryProto" and message.key == KEY:
                continue
            raise Unsafe(f"it has a {kind}, which no file of fastgan export has")
        if kind == "TensorProto" and message.data_location:
            raise Unsafe("it names another file, external_data, to read weights from")
        if kind == "AttributeProto" and (message.HasField("g") or message.graphs):
            raise Unsafe(f"its attribute {message.name[:60]!r} holds a graph")
        if kind == "NodeProto" and (message.domain or message.op_type not in _ONNX_OPERATIONS):
            raise Unsafe(f"it calls {message.domain[:30]}{':' * bool(message.domain)}{message.op_type[:60]}")


def _open_onnx(content: bytes, device: str) -> nn.Module:
    import onnxruntime

    if device != "cpu":
        raise ArgumentError("--device", device, "must be cpu for an ONNX file; other formats run on a GPU")
    _check_onnx(_onnx_model(content))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(["images"], given)[0])

    return Foreign(run, device, _onnx_meta(content).get("batch"))


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


def _open_torchscript(content: bytes, device: str) -> nn.Module:
    with _silent():
        script = torch.jit.load(io.BytesIO(content), map_location=device)
    return Foreign(script, device, _archive_meta(content).get("batch"))


FORMATS = {
    "safetensors": Format(
        ".safetensors", _write_safetensors, _open_safetensors, _safetensors_meta, True, "fastgan.load({file!r})"
    ),
    "torch-export": Format(
        ".pt2", _write_torch_export, _open_torch_export, _archive_meta, False, "torch.export.load({file!r}).module()"
    ),
    "onnx": Format(".onnx", _write_onnx, _open_onnx, _onnx_meta, True, "onnxruntime.InferenceSession({file!r})"),
    "torchscript": Format(
        ".torchscript", _write_torchscript, _open_torchscript, _archive_meta, False, "torch.jit.load({file!r})"
    ),
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
        raise ArgumentError("RUN", str(path), f"must be one that can be read ({error.strerror})") from None


def _find(path: Path, suffixes: list[str]) -> Path | None:
    if path.is_file():
        if path.suffix not in suffixes:
            raise ArgumentError("RUN", str(path), f"must be a run, or a file that ends in {', '.join(suffixes)}")
        return path
    if not path.is_dir() or (path / "checkpoint.json").is_file() or (path / "checkpoints").is_dir():
        return None
    loaded = [it.suffix for it in FORMATS.values() if it.loads]
    for suffix in loaded:
        if (path / f"model{suffix}").is_file():  # of several formats in one folder any does
            return path / f"model{suffix}"
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.name[0] != ".")
    found = [file for file in files if file.suffix in loaded] or files
    if len(found) > 1:
        raise ArgumentError("RUN", str(path), f"must be one of its files; {', '.join(file.name for file in found)}")
    return found[0] if found else None


def read(file: Path, device: str = "cpu") -> tuple[nn.Module, Meta]:
    """The module that computes images (see `Foreign`), and what the file says of it. Nothing in the file is executed.

    Raises:
        ArgumentError: the file is damaged, was not written by fastgan, holds a program, or holds more than weights and
            a graph of known operations.
    """
    it = _format_of(file)
    if not it.loads:
        loads = ", ".join(other.suffix for other in FORMATS.values() if other.loads)
        use = it.opened_with.format(file=file.name)
        why = f"a {it.suffix} file holds a program, which fastgan does not run. It may be a run, or a {loads} file"
        raise ArgumentError("RUN", str(file), f"{why}; {use} opens this one, if you trust who made it")
    with _described_errors(file):
        content = file.read_bytes()
        config = file.with_name("config.json")
        if it.suffix == ".safetensors" and KEY.encode() not in content[: 8 + int.from_bytes(content[:8], "little")]:
            if config.is_file():  # written by save_pretrained
                meta = _meta_of(json.loads(config.read_text()))
                return _built(content, meta, device), meta
            if file.with_name("checkpoint.json").is_file():
                raise ArgumentError("RUN", str(file), f"must be the checkpoint it belongs to, {file.parent}")
        return it.open(content, device), it.meta(content)


def read_meta(file: Path) -> Meta:
    """What an exported file of any format says of its generator; nothing but that description is parsed.

    Raises:
        ArgumentError: the file is damaged or was not written by fastgan.
    """
    with _described_errors(file):
        return _format_of(file).meta(file.read_bytes())


def reopen(file: Path) -> tuple[nn.Module, Meta]:
    """A file that this process has just written, opened by the library that its users open it with.

    Raises:
        ArgumentError: that library cannot.
    """
    it = _format_of(file)
    with _described_errors(file):
        content = file.read_bytes()
        return it.open(content, "cpu"), it.meta(content)


def _format_of(file: Path) -> Format:
    return next(it for it in FORMATS.values() if it.suffix == file.suffix)


@contextlib.contextmanager
def _described_errors(file: Path) -> Iterator[None]:
    """Errors of a format's library as one line that names the file."""
    name = next(name for name, it in FORMATS.items() if it.suffix == file.suffix)
    try:
        yield
    except (ArgumentError, ModuleNotFoundError):
        raise
    except Unsafe as error:
        raise ArgumentError("RUN", str(file), f"it is not loaded, since it may not be trusted: {error}") from None
    except Exception as error:  # each format's library has exceptions of its own for what is no file of it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArgumentError("RUN", str(file), f"must be a {name} file from fastgan export ({reason[:150]})") from None


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
