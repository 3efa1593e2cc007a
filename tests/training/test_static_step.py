"""Two consecutive steps are the same operations on the same tensors, but for one list of things (static_steps.py).

This is what a CUDA graph of a step needs: it repeats operations, addresses and numbers as they were.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import static_steps
import torch
from small_networks import SMALL
from static_steps import differences, images_of_a_fade, steady
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastgan.cli.train import parse
from fastgan.config import replace
from fastgan.config.variants import VARIANTS
from fastgan.data import Batch
from fastgan.training.distributed import process_group as processes
from fastgan.training.observability.meters import Meters
from fastgan.training.observability.stragglers import StragglerDetector
from fastgan.training.stage import ActiveStage
from fastgan.training.trainer import Trainer

EXTRA = {
    "ada": ("dcgan", "--augment ada"),
    "fp16": ("wgan-gp", "--precision fp16"),
    "bf16": ("pggan", "--precision bf16"),
    "rates that fall": ("lsgan", "--lr-decay 1"),
}
QUICK = (("pggan", 1), ("wgan-gp", 2))
CASES = [
    pytest.param(name, accumulation, marks=[] if (name, accumulation) in QUICK else pytest.mark.slow)
    for name in (*VARIANTS, *EXTRA)
    for accumulation in (1, 2)
]


def case(name: str, accumulation: int) -> dict[str, Any]:
    variant, flags = EXTRA.get(name, (name, ""))
    small = SMALL[VARIANTS[variant].config("paper").networks.model]
    words = f"--latent 8 --batch 8 {small} --accumulation {accumulation} {flags}".split()
    return {"name": f"{name}-{accumulation}", "variant": variant, "flags": words}


def trainer_of(name: str, accumulation: int, out: Path) -> Trainer:
    world = processes.ProcessGroup(0, 1, torch.device("cpu"), "torch", "test")
    trainer = ranks.make_trainer(case(name, accumulation), world, out)
    return steady(trainer, images_of_a_fade(trainer))


@pytest.mark.parametrize(("name", "accumulation"), CASES)
def test_steps_differ_in_declared_things_alone(name: str, accumulation: int, tmp_path: Path) -> None:
    assert differences(trainer_of(name, accumulation, tmp_path)) == []


class _HostTensors(TorchDispatchMode):
    """Operations of the step that have a tensor in the host's memory among their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_flatten((args, kwargs or {}))[0]
        if any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in given):
            self.found.append(f"{func} at {static_steps._where()}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*VARIANTS, "ada"])
def test_nothing_is_copied_from_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, whose tensors have no values: a value that is read, or a tensor of the host, would show."""
    request = parse(["--variant", case(name, 1)["variant"], *case(name, 2)["flags"]])
    precision = request.config.system.precision
    config = replace(request.config, system={"precision": "fp32" if precision == "auto" else precision})
    device = torch.device("meta")
    # torch has its fused optimizers for no such device; their part is in the test above.
    monkeypatch.setattr("fastgan.training.stage.optimizer_factory", lambda *_, **__: torch.optim.SGD)
    world = processes.ProcessGroup(0, 1, device, "torch", "test")
    classes = 10 if config.networks.conditional else 0
    resolution = config.schedule.resolution
    stage = ActiveStage(
        config, world, resolution, channels=1, num_classes=classes,
        stragglers=StragglerDetector(world), meters=Meters(), groups={},
    )  # fmt: skip
    stage.set_alpha(0.5)
    images = torch.empty(4, 1, resolution, resolution, device=device)
    positions = torch.empty(4, dtype=torch.int64, device=device)
    batch = Batch(images, positions if classes else None, positions)

    def step() -> None:
        stage.nonfinite.begin_step(3)
        stage.generator_step(stage.discriminator_step([batch] * 2))

    step()
    with _HostTensors() as host:
        step()
    assert host.found == []


def test_other_differences_are_seen(tmp_path: Path) -> None:
    """Each of them once, in a step that has it."""
    trainer = trainer_of("dcgan", 1, tmp_path)
    step, count = trainer.train_step, iter(range(1000))
    scale = torch.ones(3)
    extra: dict[str, Any] = {
        "needs the device's values": lambda i: float(scale[0]),
        "is made from Python's numbers": lambda i: torch.tensor([1.0, 2.0]),
        "draws from torch's own generator": lambda i: torch.rand(2),
        "other arguments of aten.mul.Tensor": lambda i: scale * (i + 0.5),
        "other operations": lambda i: scale.sin() if i % 2 else scale.cos(),
        "another storage": lambda i: scale * torch.from_numpy(scale.clone().numpy()),
    }
    for text, added in extra.items():

        def changed(added: Any = added) -> None:
            step()
            added(next(count))

        trainer.train_step = changed  # type: ignore[method-assign]
        found = differences(trainer)
        assert any(text in line for line in found), (text, found)


@pytest.mark.slow
def test_deepspeeds_engine_too(tmp_path: Path) -> None:
    cases = [case(name, accumulation) for name in VARIANTS for accumulation in (1, 2)]
    ranks.launch(Path(static_steps.__file__), cases, tmp_path, 1, engine="deepspeed")
    for it in cases:
        found = json.loads((tmp_path / f"{it['name']}.json").read_text())
        assert found == {"engine": "deepspeed", "differences": []}, it["name"]
