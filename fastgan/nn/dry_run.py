"""What a gradient penalty on a model costs, layer by layer: which layers send zeros backward, and what they take."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.nn.conversion import listed, replaceable
from fastgan.ops.fallthrough import FELL_THROUGH

# Double-backward nodes of torch whose second derivative is zero -> what sends nothing instead.
_LEAN_FORMS = {
    "LeakyReluBackwardBackward": "leaky_relu",
    "ThresholdBackwardBackward": "relu",
    "HardtanhBackwardBackward": "hardtanh",
    "AbsBackwardBackward": "abs",
    "AvgPool2DBackwardBackward": "avg_pool2d",
    "AdaptiveAvgPool2DBackwardBackward": "adaptive_avg_pool2d",
    "MaxPool2DWithIndicesBackwardBackward": "max_pool2d",
    "AdaptiveMaxPool2DBackwardBackward": "adaptive_max_pool2d",
    **{f"ReflectionPad{n}DBackwardBackward": "pad" for n in (1, 2, 3)},
    **{f"ReplicationPad{n}DBackwardBackward": "pad" for n in (1, 2, 3)},
}


_LEAST_SHARE = 0.005  # of the penalty: layers that take less, and send nothing, are not printed
_FEWEST_RUNS, _MOST_RUNS, _SECONDS = 3, 15, 1.0


@dataclass
class Layer:
    """One layer of a dry run.

    Attributes:
        name: of the module, and of its class; calls in a forward are of the module that contains them.
        zeros: operations whose second derivative is zero and sends zeros backward, counted.
        curves: operations that send a second derivative which is not zero.
        seconds: of the penalty, in this layer.
        wasted: the part of `seconds` in which only zeros were computed.
        convertible: whether `convert` replaces it.
    """

    name: str
    kind: str
    zeros: Counter[str] = field(default_factory=Counter)
    curves: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    wasted: float = 0.0
    convertible: bool = False


@dataclass
class PenaltyReport:
    """Result of `report`; print it.

    Attributes:
        layers: in the order of the forward pass; those that take most are printed first.
        fell_through: what an op left to torch's own function, and why -> calls.
        seconds: of one penalty and its weight gradients, median of `runs`.
        wasted: the part in which only zeros were computed.
        replaceable: what `convert` would replace, as it counts it: class -> modules.
        runs: that were timed.
    """

    layers: list[Layer]
    fell_through: Counter[tuple[str, str]]
    seconds: float
    wasted: float
    replaceable: Counter[str] = field(default_factory=Counter)
    runs: int = 1

    def __str__(self) -> str:
        shown = [it for it in self.layers if it.zeros or it.curves or it.seconds >= _LEAST_SHARE * self.seconds]
        width = max([len(self._label(layer)) for layer in shown], default=5)
        lines = [f"{'layer':{width}}  share  zeros  in second order"]
        for layer in sorted(shown, key=lambda it: -it.seconds):
            share, wasted = (100 * t / self.seconds if self.seconds else 0.0 for t in (layer.seconds, layer.wasted))
            lines.append(f"{self._label(layer):{width}}  {share:4.0f}%  {wasted:4.0f}%  {self._verdict(layer)}")
        if len(shown) < len(self.layers):
            rest = len(self.layers) - len(shown)
            lines.append(f"and {rest} more, each below {_LEAST_SHARE:.1%}")
        share = 100 * self.wasted / self.seconds if self.seconds else 0.0
        lines.append(
            f"one penalty with its weight gradients: {1000 * self.seconds:.1f} ms (median of {self.runs} runs), "
            f"{share:.0f}% of it on zeros"
        )
        for layer in self._senders(convertible=False):
            lines.append(f"{self._label(layer)}: {_remedy(layer)}")
        for (op, reason), calls in self.fell_through.items():
            lines.append(f"{op}: {calls} calls left to torch's own function ({reason})")
        return "\n".join([*lines, *self._next()])

    def _senders(self, convertible: bool) -> list[Layer]:
        return [layer for layer in self.layers if layer.zeros and layer.convertible == convertible]

    def _next(self) -> list[str]:
        """What there is to gain, and what to do."""
        here, elsewhere = len(self._senders(convertible=True)), len(self._senders(convertible=False))
        if not here and not elsewhere:
            return ["next: nothing; no layer sends zeros"]
        lines, steps, left = [], [], self.seconds - self.wasted
        if here:
            replaced = f"{listed(self.replaceable)}: {here} that send zeros, and what computes less where none arrive"
            lines.append(f"fastgan.nn.convert(critic) replaces {replaced}")
            steps.append("fastgan.nn.convert(critic)")
        if elsewhere:
            steps.append("change the calls named above (one that is left undoes most of it)")
        gain = f"without zeros a penalty takes about {1000 * left:.1f} ms, {self.seconds / left:.2f} times as fast"
        return [*lines, f"next: {' and '.join(steps)}, then report again; {gain}"]

    @staticmethod
    def _label(layer: Layer) -> str:
        return f"{layer.name or '(model)'} {layer.kind}"

    @staticmethod
    def _verdict(layer: Layer) -> str:
        parts = []
        if layer.zeros:
            parts.append("sends zeros: " + _lean_names(layer.zeros))
        if layer.curves:
            parts.append("curves: " + _lean_names(layer.curves))
        return "; ".join(parts) or "sends nothing"


def _lean_names(nodes: Counter[str]) -> str:
    return ", ".join(f"{_LEAN_FORMS.get(name, name)} {n}" for name, n in nodes.items())


def _remedy(layer: Layer) -> str:
    known = sorted({_LEAN_FORMS[name] for name in layer.zeros if name in _LEAN_FORMS})
    unknown = sorted(name for name in layer.zeros if name not in _LEAN_FORMS)
    parts = [f"calls in forward: take {', '.join(known)} from fastgan.functional or fastgan.ops"] if known else []
    return "; ".join([*parts, *([f"no lean form of {', '.join(unknown)}"] if unknown else [])])


def report(critic: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> PenaltyReport:
    """A dry run of one penalty, mean |grad critic(x)|^2, and of its weight gradients.

    The model is left as it was: no gradient is stored, and buffers, the state of the random numbers and hooks are
    restored. It must be in the mode, training or not, that the penalty will find it in.

    Args:
        critic: returns scores [N, ...] of x.
        x: [N, ...], images such as training has.
        args: further arguments of the critic, as labels.
        kwargs: further arguments of the critic, by name.

    Returns:
        Which layers send zeros backward, which really curve, and what share of the penalty's time each takes. Times are
        medians of 3 to 15 runs, as many as fit into a second, after one to warm up.
    """
    replaced = replaceable(critic)
    with _restored(critic, x), torch.enable_grad():
        before = Counter(FELL_THROUGH)
        _Run(critic).penalty(x, args, kwargs)  # allocates memory and chooses kernels
        fell_through = Counter({key: n - before[key] for key, n in FELL_THROUGH.items() if n > before[key]})
        runs: list[_Run] = []
        end = time.perf_counter() + _SECONDS
        while len(runs) < _FEWEST_RUNS or (len(runs) < _MOST_RUNS and time.perf_counter() < end):
            runs.append(_Run(critic))
            runs[-1].penalty(x, args, kwargs)
    return _median(runs, {id(module) for module, _ in replaced}, fell_through, Counter(name for _, name in replaced))


def _median(
    runs: list[_Run], convertible: set[int], fell_through: Counter[tuple[str, str]], replaced: Counter[str]
) -> PenaltyReport:
    """One report of several runs."""
    seconds, wasted = (statistics.median(run.total(t) for run in runs) for t in ("seconds", "wasted"))
    modules = {name: module for module, name in runs[-1].names.items()}
    for name, layer in runs[-1].layers.items():
        layer.convertible = id(modules[name]) in convertible
        layer.seconds, layer.wasted = (
            statistics.median(getattr(run.layers[name], t) for run in runs if name in run.layers)
            for t in ("seconds", "wasted")
        )
    return PenaltyReport(list(runs[-1].layers.values()), fell_through, seconds, wasted, replaced, len(runs))


@contextmanager
def _restored(critic: nn.Module, x: Tensor) -> Iterator[None]:
    buffers = [(buffer, buffer.detach().clone()) for buffer in critic.buffers()]
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def _nodes(roots: list[Any], known: dict[Any, Any]) -> list[Any]:
    """Nodes of the graph behind `roots` that are not known, without those behind known ones."""
    found, stack = [], [root for root in roots if root is not None]
    seen = set()
    while stack:
        node = stack.pop()
        if node in known or node in seen:
            continue
        seen.add(node)
        found.append(node)
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found


def _grad_fns(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [value.grad_fn]
    if isinstance(value, dict):
        value = list(value.values())
    return [fn for item in value for fn in _grad_fns(item)] if isinstance(value, list | tuple) else []


class _Run:
    """One penalty, with hooks at every node of its graph."""

    def __init__(self, critic: nn.Module) -> None:
        self.critic = critic
        self.names = {module: name for name, module in critic.named_modules()}
        self.layers: dict[str, Layer] = {}
        self.forward: dict[Any, Layer] = {}  # nodes of the forward graph
        self.backward: dict[Any, Layer] = {}  # nodes of the gradient's graph
        self.behind_x: set[Any] = set()  # nodes of the forward graph that lead to x, and not to weights alone
        self.second_order = False

    def total(self, time: str) -> float:
        return float(sum(getattr(layer, time) for layer in self.layers.values()))

    def penalty(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = x.detach().requires_grad_()
        self.synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
        parameters = [p for p in self.critic.parameters() if p.requires_grad]
        scores = self._run_forward(x, args, kwargs)
        self._watch(self.forward, self._after_forward_node)
        self.behind_x = _leading_to(x, list(self.forward))
        (gradient,) = torch.autograd.grad(scores.float().sum(), x, create_graph=True)
        if not gradient.requires_grad:
            return
        self.second_order = True
        self._watch(self.backward, self._after_backward_node)
        value = gradient.float().square().sum() / max(len(x), 1)
        torch.autograd.grad(value, parameters, allow_unused=True)

    def _run_forward(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        running: list[list[Any]] = []  # of the modules that have been entered: layer, start, seconds of submodules

        def enter(module: nn.Module, inputs: Any, named: Any) -> None:
            layer = self._layer(module)
            # What has been computed since is of calls in the forward of the module around this one.
            around = running[-1][0] if running else layer
            for node in _nodes(_grad_fns([inputs, named]), self.forward):
                self.forward[node] = around
            running.append([layer, self._now(), 0.0])

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            layer, start, inside = running.pop()
            taken = self._now() - start
            layer.seconds += taken - inside
            if running:
                running[-1][2] += taken
            for node in _nodes(_grad_fns(output), self.forward):
                self.forward[node] = layer

        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        try:
            return self.critic(x, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _now(self) -> float:
        self.synchronize()
        return time.perf_counter()

    def _layer(self, module: nn.Module) -> Layer:
        name = self.names[module]
        return self.layers.setdefault(name, Layer(name, type(module).__name__))

    def _watch(self, nodes: dict[Any, Layer], after: Callable[[Any, Layer, Any], None]) -> None:
        """Add each node's time to its layer, and call `after` with what the node sends."""
        for node, layer in nodes.items():
            state: dict[str, Any] = {}

            def enter(given: Any, state: dict[str, Any] = state) -> None:
                state["zeros"] = self.second_order and not any(g is not None and bool(g.any()) for g in given)
                state["start"] = self._now()

            def leave(sent: Any, _: Any, node: Any = node, layer: Layer = layer, state: Any = state) -> None:
                taken = self._now() - state["start"]
                layer.seconds += taken
                layer.wasted += taken if state["zeros"] else 0.0
                after(node, layer, sent)

            node.register_prehook(enter)
            node.register_hook(leave)

    def _after_forward_node(self, node: Any, layer: Layer, sent: Any) -> None:
        """The nodes of the gradient's graph that a node of the forward graph has made belong to its layer."""
        if not self.second_order:
            for made in _nodes(_grad_fns(list(sent)), {**self.forward, **self.backward}):
                self.backward[made] = layer

    def _after_backward_node(self, node: Any, layer: Layer, sent: Any) -> None:
        """What a node of the gradient's graph sends to activations."""
        for gradient, (parent, _) in zip(sent, node.next_functions, strict=False):
            if gradient is not None and parent in self.behind_x:
                name = node.name().rstrip("0123456789")
                (layer.curves if bool(gradient.any()) else layer.zeros)[name] += 1


def _leading_to(x: Tensor, nodes: list[Any]) -> set[Any]:
    """Those of the nodes behind which is x."""
    children = defaultdict(list)
    for node in nodes:
        for parent, _ in node.next_functions:
            children[parent].append(node)
    stack = [parent for parent in children if getattr(parent, "variable", None) is x]
    found: set[Any] = set()
    while stack:
        for child in children[stack.pop()]:
            if child not in found:
                found.add(child)
                stack.append(child)
    return found
