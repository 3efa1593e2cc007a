"""benchmarks/studies/compare_variants.py: the gradient it measures and the table it makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastgan import checkpoint, models
from fastgan.cli import train
from fastgan.config import Config
from fastgan.config.files import merge, read_yaml
from fastgan.models.pggan import Progressive
from fastgan.utils import counter_rng

FILE = Path(__file__).parents[2] / "benchmarks" / "studies" / "compare_variants.py"
TINY = {
    "lsgan": "--width 8 --max-width 8",
    "pggan": "--fmap-base 32 --fmap-max 8",
}


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_variants", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_variants"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", list(TINY))
def test_the_gradient_that_reaches_an_image(compare: ModuleType, variant: str, tmp_path: Path) -> None:
    """Against differences of the loss along the gradient's own direction, image by image in one batch."""
    run = tmp_path / "run"
    flags = f"{TINY[variant]} --resolution 8 --latent 4 --batch 8 --kimg 0.08 --samples 4 --out {run}"
    assert train.main(["--variant", variant, *flags.split()]) == 0
    values = {k: v for k, v in read_yaml(run / "config.yaml", "RUN").items() if k not in ("variant", "preset")}
    config, stored = merge(Config(), values, "config.yaml"), checkpoint.read(run, "RUN")
    found = compare.gradient_norm(stored, config)

    generator, discriminator = models.build(**stored.meta["networks"])
    for module, name in ((generator, "generator"), (discriminator, "discriminator")):
        module.load_state_dict(stored.training()[name])
        module.train().double()
        if isinstance(module, Progressive):
            module.set_alpha(module.alpha.item())
    with torch.no_grad():
        images = generator(counter_rng.normal(0, "gradient", torch.arange(256), 4).double())
    images.requires_grad_()

    def total(x: torch.Tensor) -> torch.Tensor:
        score = discriminator(x)
        return (0.5 * (score - 1) ** 2 if variant == "lsgan" else -score).sum()

    (gradient,) = torch.autograd.grad(total(images), images)
    unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        slope = (total(images + 1e-5 * unit) - total(images - 1e-5 * unit)) / 2e-5 / len(images)
    assert found == pytest.approx(slope.item(), rel=1e-3) and found > 0


def test_the_table(compare: ModuleType) -> None:
    cells = compare.Cells(Path("none.json"))
    assert compare.report(cells, 9.0) == "no cell is done"
    curve = [
        {"kimg": 1, "gradient": 1.0},
        *({"kimg": at, "frechet_distance": fd} for at, fd in ((6, 150.0), (9, 90.0))),
    ]
    cell = dict.fromkeys(["precision", "recall", "density", "coverage", "kl"], 0.5)
    cell |= {"modes": 10, "generator_parameters": 1234, "curve": curve}
    cells.done["digits/wgan/seed0/9kimg"] = {**cell, "frechet_distance": 100.0}
    cells.done["digits/wgan/seed1/9kimg"] = {**cell, "frechet_distance": 80.0, "curve": curve[::2]}
    cells.done["digits/gan/seed0/9kimg"] = {**cell, "frechet_distance": 400.0, "curve": curve[:1]}
    cells.done["speed/wgan"] = {"images_per_second": {"32 px": 200.0}, "threads": 1}
    text = compare.report(cells, 9.0)
    assert "| kimg to a distance of 180 | seconds to a distance of 180 |" in text
    assert "| `wgan` | 2 | 90 (80 to 100) | 0.50 (0.50 to 0.50) |" in text
    assert "| 200 | 8 (6 to 9) | 38 (30 to 45) | 1,234 |" in text
    assert "| - | - | not reached | 1,234 |" in text and "pggan" not in text


def test_seconds_are_those_of_the_steps_of_each_stage(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """pggan with 30 kimg: 4 px to 5, 8 px fading to 15, alone to 20, 16 px fading to 30."""
    monkeypatch.setattr(compare, "settings", lambda arm: {"schedule": {"fade_kimg": 10.0, "stable_kimg": 5.0}})
    speeds = {"4 px": 1000.0, "8 px, fading": 500.0, "8 px": 100.0, "16 px, fading": 10.0, "16 px": 1.0}
    found = [compare.seconds_until("pggan", 30.0, speeds, images) for images in (2500, 10_000, 16_000, 30_000)]
    assert found == pytest.approx([2.5, 5 + 10, 5 + 20 + 10, 5 + 20 + 50 + 1000])
    assert compare.seconds_until("sagan", 30.0, {"16 px": 100.0}, 30_000) == pytest.approx(300)


def test_speed_is_of_every_kind_of_step(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "RESOLUTION", 8)
    tiny = {"networks": {"fmap_base": 16, "fmap_max": 4}, "schedule": {"resolution": 8, "batch": 4}}
    monkeypatch.setattr(compare, "settings", lambda arm: tiny)
    found = compare.speed("pggan", 20.0, 0.0)
    assert list(found["images_per_second"]) == ["4 px", "8 px, fading", "8 px"]
    assert all(1 < rate < 1e5 for rate in found["images_per_second"].values())


@pytest.mark.parametrize("arm", ["dcgan", "dcgan-r1", "pggan"])
def test_flags_say_what_is_compared(compare: ModuleType, arm: str) -> None:
    """The flags that training gets and the configuration whose steps are timed are one."""
    from fastgan.cli.train import parse

    variant, _ = compare.ARMS[arm]
    flags = [
        "--variant",
        variant,
        "--preset",
        "digits",
        *sys.modules["benchmarks.studies.result_cache"].as_flags(compare.settings(arm)),
        "--kimg",
        "50",
    ]
    asked, config = parse(flags).config, compare.configured(arm, 50.0)
    for section in ("networks", "objective", "optimizer", "schedule"):
        assert getattr(asked, section) == getattr(config, section)
    assert (config.objective.regularizer == "none") == (arm == "dcgan")
