"""Augmentation: what it draws, its derivatives, its strength, and its place in a step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import HostReads
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from fastgan import checkpoint, data
from fastgan.cli.train import parse
from fastgan.config.augmentation import augmentation_for
from fastgan.training.augmentation import ADAPT_IMAGES, MAX_STRENGTH, Adaptive, Augmentation, Differentiable
from fastgan.training.distributed import process_group as processes
from fastgan.training.trainer import Trainer


def images(n: int, channels: int, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (2 * random - 1).to(dtype)


def augmentations(channels: int, strength: float = 0.6) -> list[Augmentation]:
    return [Adaptive(channels, 3, strength=strength), Differentiable(channels, 3)]


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_strength_0_changes_nothing(channels: int) -> None:
    x = images(5, channels)
    torch.testing.assert_close(Adaptive(channels, 0)(x, torch.arange(5), "real"), x)


def _homogeneous(matrix: list[list[float]], shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    full = torch.eye(3, dtype=torch.float64)
    full[:2, :2] = torch.tensor(matrix, dtype=torch.float64)
    full[:2, 2] = torch.tensor(shift, dtype=torch.float64)
    return full


def _rotation(angle: float) -> Tensor:
    return _homogeneous([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def test_geometry_is_the_papers_sequence() -> None:
    """Appendix B, one matrix for each transformation; the map to input coordinates applies the first one last."""
    adaptive, size = Adaptive(3, 1, strength=0.7), 16
    positions = torch.arange(40)
    theta, _ = adaptive._draw(positions, "s", 1, size, size)
    for row, found in zip(adaptive.numbers(positions, "s", 1).double().tolist(), theta[0], strict=True):
        flip, _, quarters, wx, wy, before, after, _, scale, aspect, _, _, x, y, _ = row
        whole = (round(wx * size / 2) * 2 / size, round(wy * size / 2) * 2 / size)
        expected = _homogeneous([[-1.0 if flip > 0 else 1.0, 0.0], [0.0, 1.0]])
        expected @= _rotation(math.floor(quarters) * math.pi / 2)
        expected @= _homogeneous([[1.0, 0.0], [0.0, 1.0]], whole)
        expected @= _homogeneous([[2**scale, 0.0], [0.0, 2**scale]])
        expected @= _rotation(before)
        expected @= _homogeneous([[2**aspect, 0.0], [0.0, 2**-aspect]])
        expected @= _rotation(after)
        expected @= _homogeneous([[1.0, 0.0], [0.0, 1.0]], (x, y))
        torch.testing.assert_close(found.double(), expected[:2], rtol=1e-5, atol=1e-5)


def _recolored(color: Tensor, row: list[float]) -> Tensor:
    """The color [3] after each of the paper's color transformations in turn."""
    axis = torch.full((3,), 1 / math.sqrt(3), dtype=torch.float64)
    gray = torch.outer(axis, axis)
    _, luma, *_, hue, _, _, contrast, saturation, _, _, brightness = row
    color = (color + brightness) * 2**contrast
    color = color - 2 * gray @ color * (luma > 0)
    cross = torch.linalg.cross(axis.expand(3, 3), torch.eye(3, dtype=torch.float64), dim=1).T
    turn = gray + math.cos(hue) * (torch.eye(3) - gray) + math.sin(hue) * cross  # Rodrigues
    color = turn @ color
    return (gray + 2**saturation * (torch.eye(3) - gray)) @ color


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_colors_are_the_papers_sequence(channels: int, layout: torch.memory_format) -> None:
    """With alpha, on colors that are not multiplied by it; nothing is brighter than alpha lets it be."""
    adaptive, n = Adaptive(channels, 1, strength=0.7), 30
    positions = torch.arange(n)
    colors, alpha = images(n, 3, 1).double()[:, :, 0, 0], torch.linspace(0, 1, n, dtype=torch.float64)
    x = colors
    if channels == 4:
        x = torch.cat([(colors + 1) * alpha[:, None] - 1, 2 * alpha[:, None] - 1], dim=1)
    x = x[:, :, None, None].expand(n, channels, 4, 4).float().contiguous(memory_format=layout)
    y = adaptive(x, positions, "real")
    assert y.is_contiguous(memory_format=layout)
    rows = adaptive.numbers(positions, "augmentation, real", 1).double().tolist()
    for i, row in enumerate(rows):
        expected = _recolored(colors[i], row)
        if channels == 4:
            expected = torch.cat([(expected + 1) * alpha[i] - 1, 2 * alpha[i : i + 1] - 1])
        torch.testing.assert_close(y[i, :, 0, 0].double(), expected, rtol=1e-4, atol=1e-5)


def test_each_transformation_has_its_chance() -> None:
    drawn = Adaptive(3, 0, strength=0.3).numbers(torch.arange(20_000), "s", 1)
    share = (drawn != 0).float().mean(dim=0)
    rotation = 1 - math.sqrt(0.7)
    expected = torch.tensor([0.3] * 5 + [rotation] * 2 + [0.3] * 8)
    assert (share - expected).abs().max() < 0.02
    on = drawn[drawn[:, 8] != 0, 8]
    assert on.std().item() == pytest.approx(0.2, rel=0.05) and abs(on.mean().item()) < 0.01
    turned = torch.floor(drawn[drawn[:, 2] != 0, 2]).unique(return_counts=True)[1]
    assert len(turned) == 4 and (turned / turned.sum() - 0.25).abs().max() < 0.02
    assert drawn[:, 3].abs().max() <= 0.25  # an eighth of the image: its coordinates are 2 across


def test_blits_are_copies() -> None:
    """Flips, turns and whole pixels lose nothing, so that they are seen as what they are."""
    adaptive = Adaptive(1, 0, strength=1.0)
    adaptive.scale[[1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]] = 0.0  # leaves the blits
    x = images(50, 1)
    y = adaptive(x, torch.arange(50), "real")
    for before, after in zip(x, y, strict=True):
        values = before.flatten()
        nearest = (after.flatten()[:, None] - values[None]).abs().amin(dim=1)
        assert nearest.max() < 1e-5


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_diffaugment(channels: int) -> None:
    n, size = 200, 16
    x = images(n, channels, size)
    empty = -1.0 if channels == 4 else 0.0
    y = Differentiable(channels, 0)(x, torch.arange(n), "real")
    gone = (y == empty).all(dim=1)
    assert 0.2 < gone.float().mean() < 0.45  # a quarter by the cutout, less at the edges, and what is moved in
    assert (gone.flatten(1).sum(1) >= size * size // 16).all()
    if channels == 4:  # alpha is moved and cut, not colored
        moved = (y[:, 3].flatten(1)[:, :, None] - x[:, 3].flatten(1)[:, None]).abs().amin(dim=2)
        assert ((moved < 1e-5) | gone.flatten(1)).all()
    if channels == 3:
        shown = ~gone
        assert shown.any() and y.abs().max() > 1.2  # brightness and contrast reach beyond the data's range


def test_draws_belong_to_the_sample_and_its_use() -> None:
    x = images(12, 3)
    for augment in augmentations(3):
        whole = augment(x, torch.arange(12), "real")
        torch.testing.assert_close(augment(x[1::2], torch.arange(1, 12, 2), "real"), whole[1::2])
        assert not torch.isclose(augment(x, torch.arange(12), "fake"), whole).all()
        assert not torch.isclose(type(augment)(3, 4)(x, torch.arange(12), "real"), whole).all()


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_derivatives(channels: int) -> None:
    x = images(2, channels, 3, torch.float64).requires_grad_()
    for augment in augmentations(channels, strength=0.9):
        for layout in (torch.contiguous_format, torch.channels_last):

            def squared(t: Tensor, augment: Augmentation = augment, layout: Any = layout) -> Tensor:
                return augment(t.contiguous(memory_format=layout), torch.arange(2), "real").square()

            assert gradcheck(squared, x)
            assert gradgradcheck(squared, x)


def test_float32_derivatives_go_through_the_kernel() -> None:
    """Linear up to an offset: the gradient is the same at any image, and float64's."""
    for augment in augmentations(3):
        gradients = []
        for dtype in (torch.float32, torch.float64):
            x = images(6, 3, 9, dtype).requires_grad_()
            y = augment(x, torch.arange(6), "real")
            gradients.append(torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), x)[0])
        torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-4)


# --- strength --------------------------------------------------------------------------------------------------------


def test_strength_follows_the_signs() -> None:
    adaptive = Adaptive(1, 0, target=0.6, kimg=1.0, strength=0.5)
    sure, unsure = torch.tensor([2.0, 3.0, 1.0, 1.0]), torch.tensor([2.0, -1.0, 1.0, 1.0])  # r_t of 1 and 0.5
    seen = adaptive.observe(sure)
    assert (seen["augment_strength"].item(), seen["overfitting"].item()) == (0.5, 1.0)
    adaptive.adapt()
    assert adaptive.strength.item() == pytest.approx(0.504)
    assert adaptive.observe(unsure)["overfitting"].item() == 0.5
    adaptive.adapt()
    assert adaptive.strength.item() == pytest.approx(0.5)
    adaptive.observe(sure)
    adaptive.observe(-sure)
    adaptive.adapt()
    assert adaptive.strength.item() == pytest.approx(0.492)
    assert adaptive.signs.item() == adaptive.seen.item() == 0
    for margins, limit in ((sure, MAX_STRENGTH), (unsure, 0.0)):
        for _ in range(300):
            adaptive.observe(margins)
            adaptive.adapt()
        assert adaptive.strength.item() == pytest.approx(limit)


def test_auto_is_ada_for_few_pictures() -> None:
    assert [augmentation_for(n) for n in (1, 300, 19_999, 20_000, 70_000)] == ["ada"] * 3 + ["none"] * 2


# --- in a run --------------------------------------------------------------------------------------------------------

SMALL = {
    "gan": "--width 16 --optimizer adam",
    "dcgan": "--width 8 --max-width 8",
    "lsgan": "--width 8 --max-width 8",
    "wgan": "--width 8 --max-width 8 --n-critic 2",
    "wgan-gp": "--width 8 --max-width 8 --n-critic 2",
    "wgan-div": "--width 8 --max-width 8 --accumulation 2",
    "sagan": "--width 8 --max-width 8 --conditional",
    "pggan": "--fmap-base 32 --fmap-max 8 --kimg 3",
    "r3gan": "--width 8 --max-width 8",
}


def trainer(variant: str, run: Path, augment: str, *flags: str, resume: bool = False) -> Trainer:
    command = f"--variant {variant} --latent 8 --batch 32 --resolution 8 --augment {augment} {SMALL[variant]}"
    if augment == "ada":
        command += " --augment-kimg 10"
    request = parse([*command.split(), *flags])
    world = processes.ProcessGroup(0, 1, torch.device("cpu"), "torch", "test")
    source = data.open_source("digits", 8)
    run.mkdir(exist_ok=True)
    stored = checkpoint.read(run, "--resume") if resume else None
    made = Trainer(request.config, variant, world, source, run, stored)
    if augment == "ada" and not resume:
        adaptive_of(made).strength.fill_(0.4)  # these runs are too short for it to rise
    return made


def adaptive_of(run: Trainer) -> Adaptive:
    augmentation = run.stage.step.augmentation
    assert isinstance(augmentation, Adaptive)
    return augmentation


@pytest.mark.parametrize("variant", SMALL)
def test_a_step_reads_nothing(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for augment in ("ada", "diffaugment"):
        run = trainer(variant, tmp_path / augment, augment)
        while run.stage.resolution < 8:
            run.train_step()
        with HostReads(monkeypatch) as reads:
            for _ in range(8):
                run.train_step()
        assert not reads.seen
        names = run.stage.step.metrics
        values = run.meters.totals(names, torch.device("cpu"))
        assert values.isfinite().all() and (values[1] > 0).all(), names
        if augment == "ada":
            assert run.images >= ADAPT_IMAGES and adaptive_of(run).seen == run.images % ADAPT_IMAGES


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    """Also between two changes of the strength, whose statistics are part of the checkpoint."""
    whole = trainer("wgan-gp", tmp_path / "whole", "ada", "--batch", "24")
    for _ in range(23):
        whole.train_step()
    first = trainer("wgan-gp", tmp_path / "run", "ada", "--batch", "24")
    for _ in range(13):
        first.train_step()
    assert adaptive_of(first).seen > 0 and 0 < adaptive_of(first).strength != torch.tensor(0.4)
    first.save()
    second = trainer("wgan-gp", tmp_path / "run", "ada", "--batch", "24", resume=True)
    for _ in range(10):
        second.train_step()
    for expected, found in zip(whole.stage.modules, second.stage.modules, strict=True):
        state = expected.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    ours, theirs = adaptive_of(second).state_dict(), adaptive_of(whole).state_dict()
    assert ours == theirs and set(ours) == {"strength", "signs", "seen"}


def test_a_run_without_augmentation_can_be_resumed_with_it(tmp_path: Path) -> None:
    run = trainer("dcgan", tmp_path, "none")
    run.train_step()
    run.save()
    assert "augmentation" not in checkpoint.read(tmp_path, "--resume").training()
    run = trainer("dcgan", tmp_path, "ada", resume=True)
    assert run.steps == 1 and adaptive_of(run).strength == 0
    run.train_step()
    run.save()
    trainer("dcgan", tmp_path, "diffaugment", resume=True).train_step()


def test_a_growth_keeps_the_strength(tmp_path: Path) -> None:
    run = trainer("pggan", tmp_path, "ada")
    run.train_step()
    adaptive_of(run).strength.fill_(0.375)
    before = adaptive_of(run)
    run.grow()
    assert adaptive_of(run) is not before
    assert (adaptive_of(run).strength.item(), adaptive_of(run).seen.item()) == (0.375, 32.0)


@pytest.mark.parametrize("variant", ["wgan-gp", "r3gan"])
@pytest.mark.parametrize("augment", ["ada", "diffaugment"])
def test_all_that_the_discriminator_sees_is_augmented(
    augment: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With draws of their own for real and generated images, the penalty, and the generator's step."""
    step = trainer(variant, tmp_path, augment).stage.step
    assert step.augmentation is not None
    seen: list[Tensor] = []
    original = step.augmentation.augment

    def augmented(x: Tensor, drawn: list[Tensor]) -> Tensor:
        seen.append(torch.cat([t.flatten() for t in drawn]))
        return original(x, drawn)

    monkeypatch.setattr(step.augmentation, "augment", augmented)
    real = images(4, 1)
    step.discriminator_loss(real, torch.arange(4))
    step.generator_loss(torch.arange(4), real)
    paired = variant == "r3gan"
    assert len(seen) == (6 if paired else 4)  # R1 and R2 of the same draws, and real images in the generator's step
    different = 5 if paired else 4
    assert len({tuple(drawn.tolist()) for drawn in seen}) == different


@pytest.mark.parametrize("augment", ["ada", "diffaugment"])
def test_losses_can_be_traced(augment: str, tmp_path: Path) -> None:
    """A compiled step records the operations on real tensors and replays them on other data and at other strengths."""
    step = trainer("dcgan", tmp_path, augment).stage.step
    real = images(8, 1)

    def gradients(real: Tensor, positions: Tensor) -> list[Tensor]:
        loss, _ = step.discriminator_loss(real, positions)
        return list(torch.autograd.grad(loss, list(step.discriminator.parameters())))

    traced = make_fx(gradients)(real, torch.arange(8))
    if augment == "ada":
        assert isinstance(step.augmentation, Adaptive)
        step.augmentation.strength.fill_(0.7)
    expected = gradients(real.flip(0), torch.arange(100, 108))
    for found, value in zip(traced(real.flip(0), torch.arange(100, 108)), expected, strict=True):
        assert torch.equal(found, value)


def test_bf16_augments_in_float32(tmp_path: Path) -> None:
    run = trainer("dcgan", tmp_path, "ada", "--precision", "bf16")
    adaptive_of(run).strength.fill_(0.5)
    run.train_step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adaptive_of(run)(images(2, 1).bfloat16(), torch.arange(2), "fake")
    assert y.dtype == torch.float32


def test_meaningless_flags_are_named() -> None:
    request = parse("--variant dcgan --augment diffaugment --augment-kimg 5".split())
    assert "--augment-kimg has no effect with --augment diffaugment, only with ada" in "\n".join(request.notes)
