"""float16: an update that overflowed changes nothing, is counted, and halves the scale; all without host reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from host_reads import HostReads
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgan import checkpoint, data
from fastgan.cli import train
from fastgan.config import Config, replace, validate
from fastgan.errors import ArgumentError
from fastgan.training import loss_scale
from fastgan.training.distributed.process_group import ProcessGroup
from fastgan.training.from_config import optimizer_factory
from fastgan.training.loss_scale import LossScale, LossScales
from fastgan.training.trainer import NonFiniteError, Trainer

OPTIMIZERS = {
    "adam": {"optimizer": "adam"},
    "rmsprop": {"optimizer": "rmsprop"},
    "sgd": {"optimizer": "sgd", "beta1": 0.9},
}
CPU = torch.device("cpu")
TINY = "--width 8 --max-width 8 --resolution 8 --latent 4 --batch 8 --samples 4 --precision fp16".split()


def trained(config: Config, gradients: list[float], scaled: bool) -> tuple[dict[str, Tensor], LossScale]:
    """Weights and optimizer state after one update for each of `gradients`."""
    scale = LossScale(CPU)
    weight, bias = nn.Parameter(torch.linspace(-1, 1, 5)), nn.Parameter(torch.ones(2))
    optimizer = optimizer_factory(config, discriminator=True, scale=scale if scaled else None)([weight, bias])
    for gradient in gradients:
        factor = scale.value if scaled else torch.ones(())
        weight.grad, bias.grad = torch.linspace(1, 2, 5) * gradient * factor, torch.ones(2) * factor
        optimizer.step()
    state = {
        f"{i}/{k}": v for i, p in enumerate((weight, bias)) for k, v in optimizer.state[p].items() if v is not None
    }
    return {"weight": weight.detach(), "bias": bias.detach(), **state}, scale


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("clipping", [False, True])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", [0, 1, 3])
def test_an_overflow_changes_nothing(name: str, clipping: bool, bad: float, where: int) -> None:
    """To the bit what the same updates without it and without a scale give."""
    regularizer = "weight-clipping" if clipping else "none"
    config = replace(Config(), optimizer=OPTIMIZERS[name], objective={"regularizer": regularizer, "clip": 0.9})
    good = [0.3, -0.2, 1.0, 0.1]
    expected, _ = trained(config, good, scaled=False)
    found, scale = trained(config, [*good[:where], bad, bad, *good[where:]], scaled=True)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if name == "rmsprop" and key.endswith("/step"):  # on the host, counted and never read
            continue
        assert torch.equal(found[key], value), key
    assert scale.skipped == 2 and scale.value == 2.0**11 and scale.failure == 0


def test_the_scale_doubles_after_good_updates_and_stays_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "_GOOD_UPDATES", 3)
    of = {}
    for count in (2, 3, 5, 6, 33, 40):
        of[count] = trained(Config(), [0.1] * count, scaled=True)[1].value.item() / 2.0**13
    assert of == {2: 1, 3: 2, 5: 2, 6: 4, 33: 2.0**11, 40: 2.0**11}
    scale = trained(Config(), [0.1, 0.1, torch.inf, 0.1, 0.1], scaled=True)[1]
    assert scale.value == 2.0**12 and scale.good == 2


def test_an_overflow_at_the_smallest_scale_is_a_failure() -> None:
    assert trained(Config(), [torch.inf] * 13, scaled=True)[1].failure == 0
    scale = trained(Config(), [*[torch.inf] * 14, 0.1], scaled=True)[1]
    assert scale.failure == torch.inf and scale.value == 1 and scale.skipped == 14


def make(run: Path, variant: str = "wgan-gp", *flags: str) -> Trainer:
    request = train.parse(["--variant", variant, *TINY, *flags])
    run.mkdir(exist_ok=True)
    source = data.open_source("digits", 8)
    return Trainer(request.config, variant, ProcessGroup(0, 1, CPU, "torch", "test"), source, run)


@pytest.mark.parametrize("variant", ["wgan-gp", "dcgan"])
def test_steps_read_nothing_and_count_what_overflows(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, variant)
    assert trainer.scales is not None
    trainer.scales.discriminator.value.fill_(2.0**24)  # too large: the first updates overflow
    with HostReads(monkeypatch) as reads:
        for _ in range(20):
            trainer.train_step()
    assert not reads.seen
    trainer.raise_if_nonfinite()
    row = trainer.scales.row()
    assert row["skipped_d"] > 0 and row["loss_scale_d"] == 2.0 ** (24 - row["skipped_d"])
    for module in trainer.stage.modules:
        assert all(torch.isfinite(t).all() for t in module.state_dict().values() if t.is_floating_point())


def test_the_log_has_every_skip_and_finite_values(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = make(run, "wgan-gp", "--kimg", "0.16", "--log-kimg", "0.04")
    assert trainer.scales is not None
    trainer.scales.discriminator.value.fill_(2.0**24)
    trainer.run()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_d"] for row in rows] == sorted(row["skipped_d"] for row in rows)
    assert rows[-1]["skipped_d"] == trainer.scales.discriminator.skipped.item() > 0
    assert all(abs(row[name]) < 1e6 for row in rows for name in ("loss_d", "penalty", "score_real"))


def test_a_network_that_overflows_by_itself_stops_the_run(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", "wgan-gp", "--kimg", "0.4", "--log-kimg", "0.2")
    with torch.no_grad():
        trainer.stage.step.discriminator.layers[-1].weight.fill_(torch.nan)  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteError, match="loss of the discriminator was not finite"):
        trainer.run()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resume_equals_an_undisturbed_run(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; in float16 with overflows before and after the checkpoint."""
    monkeypatch.setattr(loss_scale, "_INITIAL", 2.0**23)
    monkeypatch.setattr(loss_scale, "_GOOD_UPDATES", 2)

    def run(name: str, *flags: str) -> dict[str, dict[str, Tensor]]:
        assert train.main([*flags, "--out", str(tmp_path / name)]) == 0
        return checkpoint.read(tmp_path / name, "RUN").training()

    start = ["--variant", "wgan-gp", *TINY[:-1], precision, "--deterministic", "--log-kimg", "0.04", "--lr-g", "1e-3"]
    whole = run("whole", *start, "--kimg", "0.16")
    run("parts", *start, "--kimg", "0.08")
    parts = run("parts", "--resume", str(tmp_path / "parts"), "--kimg", "0.16")
    if precision == "fp16":
        skipped = [
            checkpoint.read(path, "RUN").training()["loss_scale"] for path in checkpoint.existing(tmp_path / "parts")
        ]
        assert 0 < skipped[0]["discriminator/skipped"] < skipped[-1]["discriminator/skipped"]
    for group, tensors in whole.items():
        for name, tensor in tensors.items():
            assert torch.equal(parts[group][name], tensor), f"{group} {name}"


def test_scales_are_restored() -> None:
    before, after = LossScales(CPU), LossScales(CPU)
    before.generator.value.fill_(64.0)
    before.discriminator.skipped.fill_(7)
    after.load_state({name: tensor.clone() for name, tensor in before.state().items()})
    assert after.row() == before.row() and after.row()["skipped_d"] == 7
    after.load_state({})  # of a run that began in another precision
    assert after.row() == before.row()


def test_zero_is_refused() -> None:
    for zero in (1, 2):
        with pytest.raises(ArgumentError, match="--zero must be 0 with --precision fp16"):
            validate(replace(Config(), system={"precision": "fp16", "zero": zero}))
    validate(replace(Config(), system={"precision": "fp16"}))


@pytest.mark.slow
def test_engines_and_ranks_scale_alike(tmp_path: Path) -> None:
    """Two ranks under both engines: the same updates skipped, and the same weights."""
    case: Callable[[str], dict[str, Any]] = lambda name: ranks.case(name, "wgan-gp", 0, 1)  # noqa: E731
    for engine in ("torch", "deepspeed"):
        of_engine = case(engine)
        of_engine["flags"] += ["--precision", "fp16"]
        ranks.launch(Path(ranks.__file__), [of_engine], tmp_path, 2, engine)
    torch_engine, deepspeed = (load_file(tmp_path / f"{name}.safetensors") for name in ("torch", "deepspeed"))
    assert torch_engine.keys() == deepspeed.keys()
    for name, tensor in torch_engine.items():
        torch.testing.assert_close(deepspeed[name], tensor, rtol=1e-5, atol=1e-6)
