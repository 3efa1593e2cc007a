"""Records a call of a Python function as one graph of ATen operations, with the backward passes that run inside it.

Once recorded there is no autograd left: an inner gradient, and the gradient of a loss of that gradient, are ordinary
operations of the graph. `torch.compile` refuses such functions; a compiler that is given the graph does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.ops.dispatch.backend import recorded_forms

Outputs = list["Tensor | None"]


class NotRecordable(RuntimeError):
    """The function does something that a recorded graph would silently do otherwise; the message names it."""


def with_strides_of(gradient: Tensor, parameter: Tensor) -> Tensor:
    """`gradient` in the memory format of its parameter, which torch's fused optimizers assume without looking."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)


@dataclass(frozen=True)
class Holder:
    """Where a tensor that the function reads, but is not given, is found: an entry of a module, or the tensor itself.

    A module's entry is looked up again in every call, so that a tensor that was assigned anew is seen.
    """

    entries: dict[str, Any] | None
    name: str
    tensor: Tensor

    def fetch(self) -> Tensor:
        return self.tensor if self.entries is None else self.entries[self.name]


@dataclass(frozen=True)
class Recording:
    """A graph, and the tensors that it reads besides its inputs.

    Attributes:
        graph: takes the inputs, then the state; returns the tensors of `outputs` that are not None.
        state: parameters, buffers and other tensors that the function reads. The graph writes the new values of those
            that the function writes.
        present: for each output of the function, whether it is a tensor and not None.
        modules: modules that were called, with the value of `training` that they had.
    """

    graph: fx.GraphModule
    state: tuple[Holder, ...]
    present: tuple[bool, ...]
    modules: tuple[tuple[nn.Module, bool], ...]

    def restore(self, found: Sequence[Tensor]) -> Outputs:
        """The outputs of the function from those of the graph."""
        values = iter(found)
        return [next(values) if there else None for there in self.present]

    def state_tensors(self) -> list[Tensor]:
        return [holder.fetch().detach() for holder in self.state]

    def replay(self, *inputs: Tensor) -> Outputs:
        """The same operations in the same order, one by one: the values of an eager call, to the bit."""
        with torch.no_grad():
            return self.restore(self.graph(*inputs, *self.state_tensors()))


class _Guard(TorchDispatchMode):
    """Refuses what a graph cannot repeat: values read back to Python, and random numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise NotRecordable("it reads a value of a tensor (.item(), float(), if), which would become a constant")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotRecordable(
                f"it draws random numbers ({func}): draw them before the call and pass them as an input"
            )
        if torch.Tag.dynamic_output_shape in func.tags:
            raise NotRecordable(f"the shape of a result depends on values ({func})")
        return func(*args, **(kwargs or {}))


# Hooks of these classes compute a parameter, and are recorded like anything that a module computes.
_COMPUTED_PARAMETERS = ("torch.nn.utils.spectral_norm", "torch.nn.utils.weight_norm")
_COMMUNICATES = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")


def _require_no_hooks(module: nn.Module) -> None:
    if type(module).__name__ in _COMMUNICATES:
        raise NotRecordable(
            f"{type(module).__name__} communicates between ranks: pass the module inside it, and average the gradients "
            "that the step returns"
        )
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for kind in kinds:
        for hook in getattr(module, kind).values():
            if type(hook).__module__ not in _COMPUTED_PARAMETERS:
                name = getattr(hook, "__qualname__", type(hook).__qualname__)
                what = kind.strip("_").removesuffix("s").replace("_", " ")
                raise NotRecordable(f"{type(module).__name__} has a {what} ({name}), which would run once: remove it")


@contextlib.contextmanager
def _called_modules() -> Iterator[dict[nn.Module, bool]]:
    """Modules that are called in the block, with their value of `training`; refuses those with hooks."""
    called: dict[nn.Module, bool] = {}

    def see(module: nn.Module, _: Any) -> None:
        if module not in called:
            _require_no_hooks(module)
            called[module] = module.training

    handle = register_module_forward_pre_hook(see)
    try:
        yield called
    finally:
        handle.remove()


def _holders(tensors: Sequence[Tensor], modules: Sequence[nn.Module]) -> tuple[Holder, ...]:
    places: dict[int, tuple[dict[str, Any], str]] = {}
    for module in modules:
        for entries in (module._parameters, module._buffers):
            for name, tensor in entries.items():
                if tensor is not None:
                    places.setdefault(id(tensor), (entries, name))
    found = [places.get(id(tensor), (None, "")) for tensor in tensors]
    return tuple(Holder(entries, name, tensor) for (entries, name), tensor in zip(found, tensors, strict=True))


def _lift(traced: fx.GraphModule, lifted: Callable[[Tensor], bool]) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph with its attributes as further inputs, and their tensors; those not `lifted` stay in the graph."""
    graph, constants = fx.Graph(), nn.Module()
    tensors: dict[int, Tensor] = {}
    placeholders: dict[int, fx.Node] = {}
    values: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.placeholder(node.name)
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            tensor = getattr(traced, node.target)
            if not lifted(tensor):
                continue
            if id(tensor) not in placeholders:
                tensors[id(tensor)] = tensor
                placeholders[id(tensor)] = graph.placeholder(f"state_{len(placeholders)}")
            values[node] = placeholders[id(tensor)]
    for node in traced.graph.nodes:
        if node.op == "output":
            graph.output([values[x] for x in node.args[0]])
        elif node not in values:
            values[node] = graph.node_copy(node, lambda x: values[x])
            if node.op == "get_attr":
                constants.register_buffer(node.target, getattr(traced, node.target))
    graph.lint()
    return fx.GraphModule(constants, graph), list(tensors.values())


def record(
    function: Callable[..., Outputs], inputs: Sequence[Tensor], lifted: Callable[[Tensor], bool] = lambda _: True
) -> tuple[Recording, Outputs]:
    """Call `function(*inputs)` once, for real, and record what it does.

    Args:
        function: returns tensors, or None for those that it has not. Parameters, buffers and other tensors that it
            reads may be its own; those that it writes in place are written, in this call and in later ones.
        inputs: what changes from call to call. Everything else that is not a tensor is a constant of the graph.
        lifted: which tensors of its own become state; others are constants of the graph too.

    Returns:
        The recording, and what this call returned.

    Raises:
        NotRecordable: a hook, a random number, or a value that is read back.
    """
    outputs: Outputs = []

    def run(*tensors: Tensor) -> list[Tensor]:
        with _Guard():
            outputs.extend(function(*tensors))
        return [x for x in outputs if x is not None]

    # A Triton kernel is started behind the dispatcher's back, and would leave nothing in the graph.
    with _called_modules() as modules, recorded_forms():
        traced = make_fx(run)(*inputs)
    graph, tensors = _lift(traced, lifted)
    present = tuple(x is not None for x in outputs)
    recording = Recording(graph, _holders(tensors, list(modules)), present, tuple(modules.items()))
    return recording, [None if x is None else x.detach() for x in outputs]
