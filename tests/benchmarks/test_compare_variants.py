"""benchmarks/studies/compare_variants.py: gradient norms, the table, speeds and flags."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.studies import compare_variants as compare
from benchmarks.studies.result_cache import as_flags
from fastgan import checkpoint, models
from fastgan.cli import train
from fastgan.config import Config, merge, read_yaml
from fastgan.models.pggan import Progressive
from fastgan.utils import counter_rng

TINY = {
    "lsgan": "--width 8 --max-width 8",
    "pggan": "--fmap-base 32 --fmap-max 8",
}


@pytest.mark.parametrize("variant", list(TINY))
def test_gradient_norm(variant: str, tmp_path: Path) -> None:
    """Against finite differences of the loss along the direction of the gradient, for each image."""
    run = tmp_path / "run"
    flags = f"{TINY[variant]} --resolution 8 --latent 4 --batch 8 --kimg 0.08 --samples 4 --out {run}"
    assert train.main(["--variant", variant, *flags.split()]) == 0
    values = {k: v for k, v in read_yaml(run / "config.yaml", "RUN").items() if k not in ("variant", "preset")}
    config, stored = merge(Config(), values, "config.yaml"), checkpoint.read(run, "RUN")
    norm = compare.gradient_norm(stored, config)

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
    assert norm == pytest.approx(slope.item(), rel=1e-3) and norm > 0


def test_table() -> None:
    cache = compare.ResultCache(Path("none.json"))
    assert compare.report(cache, 9.0) == "no finished results"
    curve = [
        {"kimg": 1, "gradient": 1.0},
        *({"kimg": at, "frechet_distance": fd} for at, fd in ((6, 150.0), (9, 90.0))),
    ]
    result = dict.fromkeys(["precision", "recall", "density", "coverage", "kl"], 0.5)
    result |= {"modes": 10, "generator_parameters": 1234, "curve": curve}
    cache.results["digits/wgan/seed0/9kimg"] = {**result, "frechet_distance": 100.0}
    cache.results["digits/wgan/seed1/9kimg"] = {**result, "frechet_distance": 80.0, "curve": curve[::2]}
    cache.results["digits/gan/seed0/9kimg"] = {**result, "frechet_distance": 400.0, "curve": curve[:1]}
    cache.results["speed/wgan"] = {"images_per_second": {"32 px": 200.0}, "threads": 1}
    text = compare.report(cache, 9.0)
    assert "| kimg to a distance of 180 | seconds to a distance of 180 |" in text
    assert "| `wgan` | 2 | 90 (80 to 100) | 0.50 (0.50 to 0.50) |" in text
    assert "| 200 | 8 (6 to 9) | 38 (30 to 45) | 1,234 |" in text
    assert "| - | - | not reached | 1,234 |" in text and "pggan" not in text


def test_seconds_add_up_the_steps_of_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """pggan with 30 kimg: 4 px until 5, 8 px fading in until 15 and stable until 20, 16 px fading in until 30."""
    monkeypatch.setattr(compare, "settings", lambda arm: {"schedule": {"fade_kimg": 10.0, "stable_kimg": 5.0}})
    speeds = {"4 px": 1000.0, "8 px, fading": 500.0, "8 px": 100.0, "16 px, fading": 10.0, "16 px": 1.0}
    seconds = [compare.seconds_until("pggan", 30.0, speeds, images) for images in (2500, 10_000, 16_000, 30_000)]
    assert seconds == pytest.approx([2.5, 5 + 10, 5 + 20 + 10, 5 + 20 + 50 + 1000])
    assert compare.seconds_until("sagan", 30.0, {"16 px": 100.0}, 30_000) == pytest.approx(300)


def test_speed_times_every_kind_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "RESOLUTION", 8)
    tiny = {"networks": {"fmap_base": 16, "fmap_max": 4}, "schedule": {"resolution": 8, "batch": 4}}
    monkeypatch.setattr(compare, "settings", lambda arm: tiny)
    speeds = compare.speed("pggan", 20.0, 0.0)["images_per_second"]
    assert list(speeds) == ["4 px", "8 px, fading", "8 px"]
    assert all(1 < rate < 1e5 for rate in speeds.values())


@pytest.mark.parametrize("arm", ["dcgan", "dcgan-r1", "pggan"])
def test_training_flags_match_the_timed_configuration(arm: str) -> None:
    from fastgan.cli.train import Train, parse

    variant, _ = compare.ARMS[arm]
    changes = as_flags(compare.settings(arm))
    flags = ["--variant", variant, "--preset", "digits", *changes, "--kimg", "50"]
    trained, config = parse(flags, Train, "fastgan train").config, compare.configured(arm, 50.0)
    for section in ("networks", "objective", "optimizer", "schedule"):
        assert getattr(trained, section) == getattr(config, section)
    assert (config.objective.regularizer == "none") == (arm == "dcgan")
