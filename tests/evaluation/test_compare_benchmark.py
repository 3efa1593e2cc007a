"""benchmarks/compare_variants.py: the gradient it measures and the table it makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastgan import checkpoint, models, noise, train
from fastgan.config import Config, merge, read_yaml
from fastgan.models.pggan import Progressive

FILE = Path(__file__).parents[2] / "benchmarks" / "compare_variants.py"
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
        images = generator(noise.normal(0, "gradient", torch.arange(256), 4).double())
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
    curve = [{"kimg": 1, "seconds": 5.0, "gradient": 1.0}, {"kimg": 9, "seconds": 40.0, "frechet_distance": 150.0}]
    cell = dict.fromkeys(["precision", "recall", "density", "coverage", "kl"], 0.5)
    cell |= {"modes": 10, "images_per_second": 100.0, "generator_parameters": 1234, "curve": curve}
    cells.done["digits/wgan/seed0/9kimg"] = {**cell, "frechet_distance": 100.0}
    cells.done["digits/wgan/seed1/9kimg"] = {**cell, "frechet_distance": 80.0}
    cells.done["digits/gan/seed0/9kimg"] = {**cell, "frechet_distance": 400.0, "curve": curve[:1]}
    text = compare.report(cells, 9.0)
    assert "seconds to a distance of 180" in text
    assert "| `wgan` | 2 | 90 (80 to 100) | 0.50 (0.50 to 0.50) |" in text and "| 40 (40 to 40) | 1,234 |" in text
    assert "| 0 of 1 reach it | 1,234 |" in text and "| `pggan` | 0 | - |" in text


def test_seconds_leave_out_what_is_no_training(compare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"images": 100, "images_per_second": 50}\n{"images": 100, "features": "digits"}\n'
        '{"images": 400, "images_per_second": 100}\n'
    )
    assert compare.seconds_at(tmp_path) == [(100, 2.0), (400, 5.0)]
