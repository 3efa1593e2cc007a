"""File formats of an exported generator: how each is written, and how it is read without trusting the file.

    model.safetensors   weights, for `fastgan.load` and `Generator.from_pretrained` (with config.json)
    model.pt2           a graph of ATen operations and its weights, for torch.export.load
    model.onnx          a graph of ONNX operations and its weights, for onnxruntime and others
    model.torchscript   a TorchScript program, for torch.jit.load and libtorch

fastgan itself loads safetensors and ONNX. The other two hold programs, and torch's loaders trust such a file: they
compile, import or unpickle what it names. `fastgan.load` therefore refuses them, whoever wrote them, and names torch's
loader.

Inputs are `latent`, float32 [N, latent], and for a conditional generator `labels`, int64 [N]. The output is `images`,
float32 [N, C, R, R], as the network gives them: -1 is black, 1 is white, and pggan's values may lie beyond. Each file
stores the generator's metadata as JSON under the key "fastgan".
"""

from __future__ import annotations

import contextlib
import io
import json
import os
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
from fastgan.export.onnx_memory import GraphMemory, UnboundedGraph
from fastgan.utils.files import read_regular
from fastgan.utils.old_names import current_names
from fastgan.utils.stored_values import MALFORMED, export_problem
from fastgan.utils.text import first_line

Meta = dict[str, Any]
KEY = "fastgan"
_MAX_META_BYTES = 2**20  # the metadata take a few hundred
_ONNX_BYTES, _ONNX_RATIO = 2**28, 16  # memory that a graph may take, and how much more for each byte of its file
# Operations that torch.onnx.export emits for our networks, and similar ones: all depend on their inputs only.
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

    Attributes:
        suffix: suffix of the files.
        write: (generator in evaluation mode, meta, batch or None for any) -> content of the file.
        open: (content of a file, device) -> module that computes images. If `loadable` is False, the library behind it
            trusts the content: pass only content that this process has just written.
        meta: content of a file -> metadata; parses nothing but JSON.
        loadable: whether `read` loads files of this format.
        opened_with: Python expression that opens `{file!r}`.
    """

    suffix: str
    write: Callable[[nn.Module, Meta, int | None], bytes]
    open: Callable[[bytes, str], nn.Module]
    meta: Callable[[bytes], Meta]
    loadable: bool
    opened_with: str


class ExportedModule(nn.Module):
    """A generator that another library runs.

    Args:
        run: latents (and labels) on `device` -> images on `device`.
        batch: the only batch size that `run` takes, or None for any; other batches are split and padded.
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


def example_inputs(meta: Meta, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random latents (and labels of a conditional generator) for one call, to trace and to compare with."""
    networks, random = meta["networks"], torch.Generator().manual_seed(seed)
    latent = torch.randn(batch, networks["latent"], generator=random)
    classes = networks["num_classes"]
    return (latent, torch.arange(batch) % classes) if classes else (latent,)


def inference_copy(generator: nn.Module, meta: Meta) -> nn.Module:
    """A copy for inference: spectral norm is divided into the weights once instead of in every call."""
    # Not deepcopy: a parametrized module shares its class with its copy, and removal would break the original.
    copy = models.build_one(False, **meta["networks"])
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
    return _build_network(content, _safetensors_meta(content), device)


def _build_network(content: bytes, meta: Meta, device: str) -> nn.Module:
    """The network that `meta` describes, with the weights in `content`.

    Raises:
        UntrustedFile: shapes of the weights are not the network's. They are compared before memory is allocated.
    """
    from safetensors.torch import load

    try:
        generator = models.load_generator(meta["networks"], load(content))
    except ValueError as error:
        raise UntrustedFile(str(error)) from None
    return generator.to(device).eval().requires_grad_(False)


# --- torch.export -----------------------------------------------------------------------------------------------------


def _program(generator: nn.Module, meta: Meta, batch: int | None) -> torch.export.ExportedProgram:
    inputs = example_inputs(meta, batch or 2)
    sizes = None if batch else tuple({0: torch.export.Dim("N", min=1)} for _ in inputs)
    program = torch.export.export(inference_copy(generator, meta), inputs, dynamic_shapes=sizes)
    for node in program.graph.nodes:  # has paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def _write_torch_export(generator: nn.Module, meta: Meta, batch: int | None) -> bytes:
    file = io.BytesIO()
    torch.export.save(_program(generator, meta, batch), file, extra_files={KEY: json.dumps(meta)})
    return file.getvalue()


class UntrustedFile(Exception):
    """A file that cannot be loaded without trusting it."""


def _open_torch_export(content: bytes, device: str) -> nn.Module:
    program = torch.export.load(io.BytesIO(content))
    return ExportedModule(program.module(check_guards=False), device, _archive_meta(content).get("batch"))


def _archive_meta(content: bytes) -> Meta:
    """Metadata of a torch.export or TorchScript archive, in its member NAME/extra/fastgan."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (member,) = [info for info in archive.infolist() if info.filename.partition("/")[2] == f"extra/{KEY}"]
        if member.file_size > _MAX_META_BYTES:
            raise UntrustedFile(f"its metadata have {member.file_size} bytes; at most {_MAX_META_BYTES} are read")
        return current_names(json.loads(archive.read(member)))


# --- ONNX -------------------------------------------------------------------------------------------------------------


def _write_onnx(generator: nn.Module, meta: Meta, batch: int | None) -> bytes:
    import onnx
    import onnxscript  # noqa: F401  (if it is missing, the error must name it; torch's would not)

    with _no_warnings():  # of deprecations inside torch and onnxscript
        program = torch.onnx.export(
            _program(generator, meta, batch),
            dynamo=True,
            input_names=["latent", "labels"][: len(example_inputs(meta, 1))],
            output_names=["images"],
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    # These have source code and paths of this machine in them.
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

    return onnx.load_model_from_string(content)  # parses protobuf only: does not open files that it names


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages in it, at any depth."""
    pending = [message]
    while pending:
        current = pending.pop()
        yield current
        for field, value in current.ListFields():
            if field.message_type is not None:
                pending.extend([value] if hasattr(value, "ListFields") else value)


def _require_known_onnx(model: Any) -> None:
    """Refuse a graph with anything that `fastgan export` does not write.

    Raises:
        UntrustedFile: the graph has tensors in other files, unknown operations, functions, training or control flow.
    """
    for message in _messages(model):
        kind = message.DESCRIPTOR.name
        if kind in ("FunctionProto", "TrainingInfoProto", "SparseTensorProto", "StringStringEntryProto"):
            if kind == "StringStringEntryProto" and message.key == KEY:
                continue
            raise UntrustedFile(f"it has a {kind}, which no file of fastgan export has")
        if kind == "TensorProto" and message.data_location:
            raise UntrustedFile("it reads weights from another file (external_data)")
        if kind == "AttributeProto" and (message.HasField("g") or message.graphs):
            raise UntrustedFile(f"its attribute {message.name[:60]!r} holds a graph")
        if kind == "NodeProto" and (message.domain or message.op_type not in _ONNX_OPERATIONS):
            raise UntrustedFile(f"it calls {message.domain[:30]}{':' * bool(message.domain)}{message.op_type[:60]}")


def _open_onnx(content: bytes, device: str) -> nn.Module:
    import onnxruntime

    if device != "cpu":
        raise ArgumentError("--device", device, "must be cpu for an ONNX file; other formats run on a GPU")
    model = _onnx_model(content)
    _require_known_onnx(model)
    most = _ONNX_BYTES + _ONNX_RATIO * len(content)
    with _as_untrusted():
        footprint = GraphMemory(model)
        one = footprint.peak(footprint.batch or 1)
    if one > most:
        words = f"a batch of {footprint.batch}" if footprint.batch else "an image"
        raise UntrustedFile(f"{words} takes {one // 2**20} MB; a file of its size may take {most // 2**20} MB")
    meta = _onnx_meta(content)
    _require_images(footprint, meta)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        count = len(inputs[0])
        if count > 1 and footprint.batch is None and not footprint.fits(count, most):
            return torch.cat([run(*(x[: count // 2] for x in inputs)), run(*(x[count // 2 :] for x in inputs))])
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(["images"], given)[0])

    return ExportedModule(run, device, footprint.batch)


def _require_images(footprint: GraphMemory, meta: Meta) -> None:
    """Refuse a graph whose inputs and images have other shapes than its metadata say."""
    networks, batch = meta["networks"], footprint.batch or 1
    inputs = {"latent": [batch, networks["latent"]]} | ({"labels": [batch]} if networks["num_classes"] else {})
    if footprint.inputs != list(inputs) or footprint.batch != meta.get("batch"):
        raise UntrustedFile("its inputs or its batch are not those of its metadata")
    size = networks["resolution"]
    for name, expected in {**inputs, "images": [batch, networks["channels"], size, size]}.items():
        shape = footprint.shape(name, batch)
        if shape != expected:
            raise UntrustedFile(f"its {name} have shape {shape}, its metadata need {expected}")


@contextlib.contextmanager
def _as_untrusted() -> Iterator[None]:
    try:
        yield
    except UnboundedGraph as error:
        raise UntrustedFile(str(error)) from None


# --- TorchScript ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _write_torchscript(generator: nn.Module, meta: Meta, batch: int | None) -> bytes:
    file = io.BytesIO()
    with _no_warnings(), torch.no_grad():  # TorchScript is deprecated
        script = torch.jit.trace(inference_copy(generator, meta), example_inputs(meta, batch or 2), check_trace=False)
        torch.jit.save(torch.jit.freeze(script.eval()), file, _extra_files={KEY: json.dumps(meta)})
    return file.getvalue()


def _open_torchscript(content: bytes, device: str) -> nn.Module:
    with _no_warnings():
        script = torch.jit.load(io.BytesIO(content), map_location=device)
    return ExportedModule(script, device, _archive_meta(content).get("batch"))


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


def find_export(path: Path) -> Path | None:
    """The exported file that `path` is or holds; None if it is anything else: a run, a checkpoint, nothing.

    Raises:
        ArgumentError: `path` is a file of another kind, a folder with several exports, or not readable.
    """
    try:
        return _find_export(path)
    except PermissionError as error:
        raise ArgumentError("RUN", str(path), f"must be readable ({error.strerror})") from None


def _find_export(path: Path) -> Path | None:
    suffixes = [format.suffix for format in FORMATS.values()]
    if path.is_file():
        if path.suffix not in suffixes:
            raise ArgumentError("RUN", str(path), f"must be a run, or a file that ends in {', '.join(suffixes)}")
        return path
    if not path.is_dir() or (path / "checkpoint.json").is_file() or (path / "checkpoints").is_dir():
        return None
    loadable = [format.suffix for format in FORMATS.values() if format.loadable]
    for suffix in loadable:
        if (path / f"model{suffix}").is_file():  # the formats in one folder have the same generator
            return path / f"model{suffix}"
    exports = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.name[0] != ".")
    candidates = [file for file in exports if file.suffix in loadable] or exports
    if len(candidates) > 1:
        names = ", ".join(file.name for file in candidates)
        raise ArgumentError("RUN", str(path), f"must be one file; this folder has several ({names})")
    return candidates[0] if candidates else None


def read(file: Path, device: str = "cpu") -> tuple[nn.Module, Meta]:
    """The module that computes images (`ExportedModule` or the network), and the metadata. No code is executed.

    Raises:
        ArgumentError: the file is damaged, was not written by fastgan, holds a program, or holds more than weights and
            a graph of known operations.
    """
    format = _format_of(file)
    if not format.loadable:
        loadable = ", ".join(other.suffix for other in FORMATS.values() if other.loadable)
        expression = format.opened_with.format(file=file.name)
        problem = (
            f"a {format.suffix} file holds a program, which fastgan does not run; use a run or a {loadable} file, or "
            f"open this one with {expression} if you trust who made it"
        )
        raise ArgumentError("RUN", str(file), problem)
    with _described_errors(file):
        content = read_regular(file)
        config = file.with_name("config.json")
        if format.suffix == ".safetensors" and KEY.encode() not in content[: 8 + int.from_bytes(content[:8], "little")]:
            if os.path.lexists(config):  # written by save_pretrained
                meta = _checked(_meta_of_config(json.loads(read_regular(config))))
                return _build_network(content, meta, device), meta
            if file.with_name("checkpoint.json").is_file():
                raise ArgumentError("RUN", str(file), f"must be the checkpoint, {file.parent}, not a file in it")
        meta = _checked(format.meta(content))
        return format.open(content, device), meta


def read_weights(file: Path) -> dict[str, Tensor]:
    """The weights of a .safetensors export, on the CPU and as they are stored; their shapes are not checked.

    Raises:
        ArgumentError: the file is damaged, or a weight is not finite.
    """
    from safetensors.torch import load

    with _described_errors(file):
        weights = load(read_regular(file))
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UntrustedFile(f"{name[:80]} is not finite")
    return weights


def read_meta(file: Path) -> Meta:
    """The metadata of an exported file of any format; parses nothing else.

    Raises:
        ArgumentError: the file is damaged or was not written by fastgan.
    """
    with _described_errors(file):
        return _checked(_format_of(file).meta(read_regular(file)))


def _checked(meta: Meta) -> Meta:
    """`meta`, if its values are of the right type and in range.

    Raises:
        UntrustedFile: one is not; the message names it.
    """
    problem = export_problem(meta)
    if problem:
        raise UntrustedFile(f"its metadata: {problem}")
    return meta


def _format_of(file: Path) -> Format:
    return next(format for format in FORMATS.values() if format.suffix == file.suffix)


@contextlib.contextmanager
def _described_errors(file: Path) -> Iterator[None]:
    """Turn errors of a format's library into one line that names the file."""
    name = next(name for name, format in FORMATS.items() if format.suffix == file.suffix)
    try:
        yield
    except (ArgumentError, ModuleNotFoundError):
        raise
    except UntrustedFile as error:
        raise ArgumentError("RUN", str(file), f"the file is not loaded, because it is not safe: {error}") from None
    except Exception as error:  # each library has its own exceptions for a damaged file
        problem = f"must be a {name} file from fastgan export ({first_line(error)})"
        raise ArgumentError("RUN", str(file), problem) from None


def may_replace_config(file: Path) -> bool:
    """Whether config.json `file` is missing, or describes a generator as `fastgan export` and `save_pretrained` do."""
    if not os.path.lexists(file):
        return True
    try:
        config = json.loads(read_regular(file))
    except (OSError, *MALFORMED):
        return False
    if not isinstance(config, dict) or not {"resolution", "latent"} <= config.keys():
        return False
    return config.get("model") in list(models.MODELS)  # other tools' files have a "model" too


def _meta_of_config(config: dict[str, Any]) -> Meta:
    """Metadata from a config.json that `save_pretrained` wrote."""
    return {"networks": {"num_classes": 0, **config, "norm_g": config.get("norm", "batch")}}
