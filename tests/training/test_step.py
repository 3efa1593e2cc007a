"""A step reads nothing back from its device, and notices what is not finite."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import checkpoint, data
from fastgan.train import parse
from fastgan.training import world as processes
from fastgan.training.trainer import NonFiniteError, Trainer

SMALL = {
    "gan": "--width 16 --resolution 8",
    "dcgan": "--width 8 --max-width 8 --resolution 8",
    "wgan-gp": "--width 8 --max-width 8 --resolution 8 --n-critic 2",
    "sagan": "--width 8 --max-width 8 --resolution 8 --conditional",
    "pggan": "--fmap-base 32 --fmap-max 8 --resolution 8 --kimg 0.8",
}


def make(variant: str, run: Path, *flags: str) -> Trainer:
    request = parse(["--variant", variant, "--latent", "8", "--batch", "8", *SMALL[variant].split(), *flags])
    world = processes.World(0, 1, torch.device("cpu"), "torch", "test")
    source = data.open_source("digits", request.config.schedule.resolution)
    run.mkdir(exist_ok=True)
    return Trainer(request.config, variant, world, source, run)


class HostReads(TorchDispatchMode):
    """Counts what would make a device wait: scalars read by any route, and copies to the host."""

    READS = ("tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__", "__index__", "nonzero")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        for name in self.READS:
            monkeypatch.setattr(torch.Tensor, name, self._counting(name, getattr(torch.Tensor, name)))

    def _counting(self, name: str, original: Any) -> Any:
        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen[name] += 1
            return original(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", list(SMALL))
def test_twenty_steps_read_nothing(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--optimiser", "adam") if variant == "gan" else ()
    trainer = make(variant, tmp_path, *flags)
    if variant == "pggan":
        while trainer.resolution < 8:  # a growth may read; the steps of a stage, fading or not, may not
            trainer.train_step()
    with HostReads(monkeypatch) as reads:
        for _ in range(20):
            trainer.train_step()
    assert not reads.seen
    with HostReads(monkeypatch) as reads:
        trainer._read_finite()
    assert reads.seen  # the counter sees a read where there is one


def test_a_rank_that_waits_draws_what_is_faded_in_so_far(tmp_path: Path) -> None:
    """It gets the first rank's weights for an evaluation, and must blend as far as that does."""
    trainer = make("pggan", tmp_path)
    while trainer.resolution < 8:
        trainer.train_step()
    trainer.idle = True
    trainer.train_step()
    average = trainer.ema.module
    assert average.fade and 0 < average.alpha.item() < 1  # type: ignore[operator,union-attr]


def test_ranks_draw_for_an_evaluation_with_the_statistics_that_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make("dcgan", tmp_path)
    trainer.world, shared, drawn = dataclasses.replace(trainer.world, size=2), [], []
    monkeypatch.setattr("fastgan.training.trainer.spread", shared.extend)

    def evaluator(generator: torch.nn.Module, meta: dict[str, Any]) -> None:
        drawn.append([b is s for b, s in zip(generator.buffers(), shared, strict=True)])

    trainer._evaluate(None, evaluator)  # type: ignore[arg-type]
    assert drawn and len(drawn[0]) > 0 and all(drawn[0])


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    yield make("wgan-gp", tmp_path, "--kimg", "1", "--log-kimg", "0.2", "--checkpoint-kimg", "0.05")


def test_loss_not_finite_stops_before_the_next_save(trainer: Trainer, tmp_path: Path) -> None:
    original = trainer.step.discriminator_loss

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        loss, seen = original(*args, **kwargs)
        return (loss * torch.nan if trainer.steps == 5 else loss), seen

    trainer.step.discriminator_loss = poisoned  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"step 5: loss of the discriminator .*last good checkpoint is .*kimg-"):
        trainer.run()
    saved = [checkpoint.read(path, "path").meta["steps"] for path in checkpoint.existing(tmp_path)]
    assert saved and max(saved) <= 5


def test_gradient_not_finite_is_named(trainer: Trainer) -> None:
    layer = trainer.step.generator.layers[0].weight  # type: ignore[index,union-attr]
    layer.register_hook(lambda gradient: gradient * torch.inf if trainer.steps == 3 else None)
    # The hooks that watch were registered first, so the infinity shows one step later, in the discriminator's input.
    with pytest.raises(NonFiniteError, match="step 4: loss of the"):
        trainer.run()


def test_bad_gradient_of_a_leaf(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.step.discriminator.layers[-1].weight[0, 0, 0, 0] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteError, match=r"step 0: loss of the discriminator .*there is no checkpoint yet"):
        trainer.run()


def test_zero_centered_penalty_is_part_of_the_loss(tmp_path: Path) -> None:
    """`--penalty-weight` times mean |grad D(x)|^2 on real images, added to the loss once."""
    flags = ("--regulariser", "zero-centered", "--norm-d", "none", "--penalty-weight")
    steps = [make("dcgan", tmp_path / weight, *flags, weight).step for weight in ("0", "3")]
    real = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (without, _), (with_it, seen) = (step.discriminator_loss(real, torch.arange(8)) for step in steps)
    x = real.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(steps[1].discriminator(x).sum(), x)
    expected = gradient.square().sum(dim=(1, 2, 3)).mean()
    assert expected > 0
    torch.testing.assert_close(seen["penalty"], expected)
    torch.testing.assert_close(with_it - without, 3 * expected)
