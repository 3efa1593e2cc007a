"""What differs between two consecutive steps of a trainer: nothing but what is declared may.

    python static_steps.py --engine=ENGINE CASES.json OUT

compares two steps of each case {"name", "variant", "flags", "images"} in this process and writes OUT/NAME.json: a list
of lines, one for each difference that is not declared.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ranks import make_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fastgan.config.growth import stages_of
from fastgan.training.distributed import rendezvous
from fastgan.training.trainer import Trainer

DECLARED = (
    "images", "positions", "labels",  # of the batch
    "alpha",  # of a fade, written in place
    "step",  # its number, which the non-finite check keeps
    "rate",  # of the optimizers
)  # fmt: skip
_ATEN = torch.ops.aten
# What a CUDA graph cannot hold, or would repeat with the value that it had: reads of the device, shapes by values.
_READS = (_ATEN._local_scalar_dense.default, _ATEN.is_nonzero.default, _ATEN.equal.default)


_PLAIN = (int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


def _where() -> str:
    for frame in reversed(traceback.extract_stack(limit=40)):
        if "/fastgan/" in frame.filename and "site-packages" not in frame.filename:
            return f"{frame.filename.rpartition('/fastgan/')[2]}:{frame.lineno}"
    return "?"


class Trace(TorchDispatchMode):
    """The operations of a step: arguments as layouts and numbers, and storages that come from outside of it."""

    def __init__(self, declared: dict[int, str]) -> None:
        super().__init__()
        self.declared = declared
        self.operations: list[tuple[str, Any, str]] = []
        self.made: set[int] = set()
        self.outside: dict[int, str] = {}
        self.faults: list[str] = []
        self.paused = False
        self._kept: list[Any] = []  # a storage that is freed would give its address to another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if not self.paused:
            self._see(func, given, args, kwargs)
        result = func(*args, **kwargs)
        for x in tree_flatten(result)[0]:
            if isinstance(x, Tensor):
                self._kept.append(x.untyped_storage())
                key = x.untyped_storage()._cdata
                if key not in self.outside:
                    self.made.add(key)
        return result

    def _see(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> None:
        where = _where()
        if func in _READS or torch.Tag.dynamic_output_shape in func.tags:
            self.faults.append(f"{func} at {where} needs the device's values")
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.faults.append(f"{func} at {where} draws from torch's own generator")
        if func is _ATEN.lift_fresh.default:
            self.faults.append(f"a tensor is made from Python's numbers at {where}")
        for x in given:
            key = x.untyped_storage()._cdata
            if key not in self.made:
                self._kept.append(x.untyped_storage())
                self.outside.setdefault(key, f"{func} {tuple(x.shape)} {x.dtype} at {where}")
        layouts = tree_map(_layout, (list(args), kwargs))
        if func is _ATEN.fill_.Scalar:
            name = self.declared.get(given[0].untyped_storage()._cdata)
            layouts = layouts if name is None else (layouts[0][0], name)
        self.operations.append((str(func), layouts, where))


def _layout(x: Any) -> Any:
    if isinstance(x, Tensor):
        return tuple(x.shape), x.stride(), x.dtype, x.storage_offset()
    return x if isinstance(x, _PLAIN) else type(x).__name__  # a process group, which cannot be compared


def _declared(trainer: Trainer) -> dict[int, str]:
    """Storages that may be written with other numbers."""
    stage = trainer.stage
    found = {stage.nonfinite._step.untyped_storage()._cdata: "step"}
    for module in stage.modules:
        alpha = getattr(module, "alpha", None)
        if isinstance(alpha, Tensor):
            found[alpha.untyped_storage()._cdata] = "alpha"
    return found


@contextlib.contextmanager
def _traced(trainer: Trainer) -> Iterator[Trace]:
    """A trace without the loading of batches, whose storages are those of images, positions and labels."""
    trace, micro_batches = Trace(_declared(trainer)), trainer.feed.micro_batches

    def paused(*args: Any, **kwargs: Any) -> Any:
        batches = iter(micro_batches(*args, **kwargs))
        while True:
            trace.paused = True
            batch = next(batches, None)
            trace.paused = False
            if batch is None:
                return
            trace.made |= {x.untyped_storage()._cdata for x in batch if x is not None}
            trace._kept += [x.untyped_storage() for x in batch if x is not None]
            yield batch

    trainer.feed.micro_batches = paused  # type: ignore[method-assign]
    try:
        with trace:
            yield trace
    finally:
        trainer.feed.micro_batches = micro_batches  # type: ignore[method-assign]


def _only_rates_differ(trainer: Trainer, a: Any, b: Any) -> bool:
    falls = bool(trainer.config.optimizer.lr_decay)
    return falls and a[0] == b[0] and "lr" in a[1] and {**a[1], "lr": None} == {**b[1], "lr": None}


def differences(trainer: Trainer) -> list[str]:
    """What differs between the trainer's next two steps and is not declared, and what no graph could hold."""
    traces = []
    for _ in range(2):
        with _traced(trainer) as trace:
            trainer.train_step()
        traces.append(trace)
    first, second = traces
    found = [*first.faults, *second.faults]
    names = [[name for name, *_ in trace.operations] for trace in traces]
    if names[0] != names[1]:
        i = next((i for i, (a, b) in enumerate(zip(*names, strict=False)) if a != b), min(map(len, names)))
        at = [trace.operations[i][::2] if i < len(trace.operations) else "the end" for trace in traces]
        return [*found, f"other operations: {at[0]}, then {at[1]}"]
    for (name, a, where), (_, b, _) in zip(first.operations, second.operations, strict=True):
        if a != b and not _only_rates_differ(trainer, a, b):
            found.append(f"other arguments of {name} at {where}: {str(a)[:200]}, then {str(b)[:200]}")
    known = set(first.outside)
    new = [text for key, text in second.outside.items() if key not in known]
    return [*found, *(f"another storage: {text}" for text in new)]


def steady(trainer: Trainer, images: int) -> Trainer:
    """The trainer after `images` images or more and two steps of a stage, which make what is made once."""
    while trainer.images < images:
        trainer.train_step()
    for _ in range(2):
        trainer.train_step()
    return trainer


def images_of_a_fade(trainer: Trainer) -> int:
    """Images at which a progressive network has begun to fade in its second level; 0 for others."""
    stages = stages_of(trainer.config)
    return stages[1].start if len(stages) > 1 else 0


def main() -> None:
    cases, out = json.loads(Path(sys.argv[-2]).read_text()), Path(sys.argv[-1])
    torch.set_num_threads(1)
    engine = next(flag.partition("=")[2] for flag in sys.argv if flag.startswith("--engine="))
    world = rendezvous.start(engine, "cpu")
    for case in cases:
        trainer = make_trainer(case, world, out)
        found = differences(steady(trainer, images_of_a_fade(trainer)))
        (out / f"{case['name']}.json").write_text(json.dumps({"engine": world.engine, "differences": found}))
        trainer.stage.close()
    world.done()
    rendezvous.stop()


if __name__ == "__main__":
    main()
