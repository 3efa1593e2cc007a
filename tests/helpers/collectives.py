"""One rank of the communication tests: counts the collectives of training steps, and runs with a straggler.

    python collectives.py CASES.json OUT

Each case is {"name", "variant", "flags", "steps"}. Rank r writes to OUT/counts-r.json, by case, what it counts in the
steps after the first: "sent" {collective: bytes of tensors}, "wire" bytes sent by eth0, "reads" of the device by the
host, and "channels_last", whether weights, moving average and optimizer state are. "order" lists the events of another
step: a network is used, its gradients have been sent, its weights are updated.
A case with "slow" is run to its end in OUT/NAME; the last rank sleeps so many seconds in each step.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from host_reads import HostReads
from ranks import make_trainer

from fastgan.training.distributed import rendezvous
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.step import Step
from fastgan.training.trainer import Trainer

_TENSORS = (
    "all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor"
)  # fmt: skip


class Sent:
    """Counts the bytes of the tensors that this process passes to collectives."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.active = False
        for name in _TENSORS:
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, original: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.active:
                first = args[0] if args else next(iter(kwargs.values()))
                parts = first if isinstance(first, list) else [first]
                self.bytes[name] += sum(t.numel() * t.element_size() for t in parts)
            return original(*args, **kwargs)

        return counted


def wire() -> int:
    """Bytes sent by this host's eth0, with all headers; 0 without an eth0."""
    lines = [line.split(":") for line in Path("/proc/net/dev").read_text().splitlines() if ":" in line]
    return next((int(counts.split()[8]) for name, counts in lines if name.strip() == "eth0"), 0)


def channels_last(trainer: Trainer) -> bool:
    tensors = [p.detach() for module in trainer.stage.modules for p in module.parameters()]
    for engine in trainer.stage.engines:
        tensors += [value for state in engine._optimizer.state.values() for value in state.values()]  # type: ignore[attr-defined]
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors if t.dim() == 4)


def count(case: dict[str, Any], world: ProcessGroup, out: Path, sent: Sent) -> dict[str, Any]:
    trainer = make_trainer(case, world, out)
    trainer.train_step()
    trainer.stage.wait()
    sent.bytes.clear()
    with pytest.MonkeyPatch.context() as patch, HostReads(patch) as reads:
        dist.barrier()
        before = wire()
        sent.active = True
        for _ in range(case["steps"]):
            trainer.train_step()
        sent.active = False
        dist.barrier()
        left = wire() - before
    buckets = [len(e._reducer._buckets) for e in trainer.stage.engines if getattr(e, "_reducer", None)]
    trained = {
        name: sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        for name, module in (("g", trainer.stage.step.generator), ("d", trainer.stage.step.discriminator))
    }
    counts = {"sent": dict(sent.bytes), "reads": dict(reads.seen), "trained": trained, "buckets": buckets, "wire": left}
    counts["channels_last"] = channels_last(trainer)
    if all(getattr(e, "_reducer", None) for e in trainer.stage.engines):
        counts["order"] = order_of_events(trainer)
    trainer.stage.close()
    return counts


def order_of_events(trainer: Trainer) -> list[str]:
    """Events of one step under ZeRO 0."""
    events: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, engine in zip("gd", trainer.stage.engines, strict=True):
            reducer, optimizer = engine._reducer, engine._optimizer  # type: ignore[attr-defined]

            def recording(event: str, original: Any) -> Any:
                def recorded(*args: Any) -> Any:
                    events.append(event)
                    return original(*args)

                return recorded

            patch.setattr(reducer, "flush", recording(f"sends {name}", reducer.flush))
            patch.setattr(optimizer, "step", recording(f"updates {name}", optimizer.step))
            engine.module.register_forward_pre_hook(recording(f"uses {name}", lambda *_: None))
        trainer.train_step()
    return events


def run_slowly(case: dict[str, Any], world: ProcessGroup, out: Path) -> None:
    original = Step.discriminator_loss

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(case["slow"] if world.rank == world.size - 1 else 0.0)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "discriminator_loss", slow)
        make_trainer(case, world, out).run()


def main() -> None:
    cases, out = json.loads(Path(sys.argv[-2]).read_text()), Path(sys.argv[-1])
    torch.set_num_threads(1)
    sent = Sent()
    world = rendezvous.start("auto", "cpu")
    counts = {}
    for case in cases:
        if "slow" in case:
            run_slowly(case, world, out)
        else:
            counts[case["name"]] = count(case, world, out, sent)
    (out / f"counts-{world.rank}.json").write_text(json.dumps(counts))
    world.done()
    rendezvous.stop()


if __name__ == "__main__":
    main()
