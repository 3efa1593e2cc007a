"""Engines: accumulation, optimizer state by name, DeepSpeed's configuration, and the choice of the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastgan.config import Config, replace
from fastgan.errors import ArgumentError
from fastgan.training.distributed import rendezvous
from fastgan.training.distributed.deepspeed_engine import deepspeed_config, uses_own_reducer
from fastgan.training.distributed.engine import Fragment, collect_optimizer_state, restore_optimizer_state
from fastgan.training.distributed.torch_engine import TorchEngine
from fastgan.training.from_config import rates

ROOT = Path(__file__).resolve().parents[3]
SIZES = {"micro_batch": 4, "accumulation": 2, "world": 2}


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1, fused=True)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def test_accumulated_micro_batches_equal_the_batch() -> None:
    """With SGD, whose step is proportional to the gradient: Adam would hide a sum in place of a mean."""

    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    x, plain = torch.randn(8, 3), network()
    whole, parts = TorchEngine(network(), sgd, 1), TorchEngine(network(), sgd, 2)
    optimizer = sgd(list(plain.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        plain(x).square().mean().backward()
        optimizer.step()
        whole.backward(whole.module(x).square().mean())
        whole.step()
        for half in x.split(4):
            parts.backward(parts.module(half).square().mean())
            parts.step()
    for engine in (whole, parts):
        for a, b in zip(engine.module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_learning_rate_applies_from_the_next_step() -> None:
    engine = TorchEngine(network(), lambda parameters: torch.optim.SGD(parameters, lr=0.1), 1)
    for rate in (0.25, 0.0):
        before = [p.detach().clone() for p in engine.module.parameters()]
        engine.backward(engine.module(torch.ones(1, 3)).sum())
        gradients = [p.grad.clone() for p in engine.module.parameters()]
        engine.set_rate(rate)
        engine.step()
        for p, old, gradient in zip(engine.module.parameters(), before, gradients, strict=True):
            torch.testing.assert_close(p.detach(), old - rate * gradient)


def test_learning_rates_decay_at_the_end_of_a_run() -> None:
    config = replace(Config(), optimizer={"lr_g": 1.0, "lr_d": 0.5, "lr_decay": 0.25}, schedule={"kimg": 8.0})
    assert [rates(config, n, 64) for n in (0, 6000, 7000, 7900)] == [
        (1.0, 0.5),
        (1.0, 0.5),
        (0.5, 0.25),
        pytest.approx((0.05, 0.025)),
    ]
    constant = replace(config, optimizer={"lr_decay": 0.0})
    assert rates(constant, 7999, 64) == (1.0, 0.5)
    grown = replace(constant, optimizer={"lr_factor_at": {32: 2.0, 64: 3.0}})
    assert [rates(grown, 0, at) for at in (16, 32, 64, 128)] == [(1.0, 0.5), (2.0, 1.0), (3.0, 1.5), (3.0, 1.5)]


def test_another_engine_restores_the_state() -> None:
    x = torch.randn(8, 3)

    def steps(engine: TorchEngine, n: int) -> None:
        for _ in range(n):
            engine.backward(engine.module(x).square().mean())
            engine.step()

    straight = TorchEngine(network(), adam, 1)
    steps(straight, 5)
    first = TorchEngine(network(), adam, 1)
    steps(first, 2)
    state = first.state()
    assert set(state) == {
        f"{name}/{key}" for name, _ in network().named_parameters() for key in ("exp_avg", "exp_avg_sq", "step")
    }
    second = TorchEngine(first.module, adam, 1)
    second.load_state(state)
    steps(second, 3)
    for a, b in zip(straight.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(value == 2 for key, value in state.items() if key.endswith("/step"))  # load_state copies it


def test_partitioned_optimizer_state() -> None:
    """As under ZeRO: the optimizer updates one flat tensor of parts of parameters; other ranks have the rest."""
    module = nn.ParameterDict({"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(2)})
    holder = torch.zeros(9)
    fragments = [Fragment("a", module["a"], holder, 3, 1, 5), Fragment("b", module["b"], holder, 0, 2, 2)]
    whole = {
        "a/exp_avg": torch.arange(1.0, 7.0).view(2, 3),
        "b/exp_avg": torch.tensor([7.0, 8.0, 9.0, 10.0]),
        "a/step": torch.tensor(4.0),
        "b/step": torch.tensor(4.0),
    }
    optimizer = torch.optim.Adam([holder])
    restore_optimizer_state(fragments, optimizer, whole)
    assert optimizer.state[holder]["exp_avg"].tolist() == [9, 10, 0, 2, 3, 4, 5, 6, 0]
    assert optimizer.state[holder]["step"] == 4
    collected = collect_optimizer_state(module, fragments, optimizer, partitioned=False)
    assert {key: value.tolist() for key, value in collected.items()} == {
        "a/exp_avg": [[0, 2, 3], [4, 5, 6]],
        "b/exp_avg": [0, 0, 9, 10],
        "a/step": 4,
        "b/step": 4,
    }


def test_weights_are_updated_once_for_a_batch() -> None:
    updates: list[Tensor] = []
    module = network()
    parts = TorchEngine(module, adam, 2, on_update=lambda: updates.append(module[0].bias.detach().clone()))
    before = module[0].bias.detach().clone()
    for _ in range(4):
        parts.backward(parts.module(torch.ones(4, 3)).square().mean())
        parts.step()
    assert len(updates) == 2 and not updates[0].equal(before) and updates[1].equal(module[0].bias)


def test_parameters_without_gradient_count_as_zero() -> None:
    module = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    engine = TorchEngine(module, adam, 1)
    before = module["idle"].weight.detach().clone()
    engine.backward(module["used"](torch.ones(1, 2)).sum())
    engine.step()
    assert torch.equal(module["idle"].weight, before)
    assert engine.state()["idle.weight/step"] == 1


def test_built_configuration() -> None:
    config = deepspeed_config(None, zero=1, **SIZES)
    assert config["zero_optimization"]["stage"] == 1
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (16, 4)
    assert config["gradient_clipping"] == 0.0  # DeepSpeed's own default clips, plain torch does not
    assert config["zero_optimization"]["overlap_comm"] is False
    assert deepspeed_config(None, zero=1, overlap=True, **SIZES)["zero_optimization"]["overlap_comm"] is True


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        ({}, True),
        ({"zero_optimization": {"stage": 0}, "gradient_clipping": 0.5}, True),
        ({"zero_optimization": {"stage": 1}}, False),
        *[({key: value}, False) for key, value in (("communication_data_type", "fp16"), ("prescale_gradients", True))],
        *[({key: value}, False) for key, value in (("gradient_predivide_factor", 2), ("sparse_gradients", True))],
    ],
)
def test_who_averages_gradients(config: dict[str, object], ours: bool) -> None:
    """DeepSpeed if the user's file configures the reduction, or under ZeRO 1 and 2; else this package."""
    assert uses_own_reducer(config) is ours


@pytest.mark.parametrize(
    ("content", "zero", "words"),
    [
        ({"optimizer": {"type": "Adam"}}, 0, "--optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, 0, "--lr-decay"),
        *[({key: {"enabled": True}}, 0, "--precision") for key in ("fp16", "bf16", "torch_autocast")],
        ({"train_batch_size": 7}, 0, "train_batch_size"),
        ({"zero_optimization": {"stage": 2}}, 1, "--zero"),
        ({"zero_optimization": {"stage": 3}}, 0, "stage must be 0, 1 or 2"),
        ([], 0, "JSON object"),
        ("not json", 0, "readable JSON"),
        ("[" * 100_000, 0, "readable JSON"),
    ],
)
def test_file_that_contradicts_the_run(tmp_path: Path, content: object, zero: int, words: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ArgumentError, match=words):
        deepspeed_config(str(file), zero=zero, **SIZES)


def test_file_is_honored(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    content = {"gradient_clipping": 0.5, "zero_optimization": {"stage": 2}, "train_batch_size": "auto"}
    file.write_text(json.dumps({**content, "bf16": {"enabled": False}}))
    config = deepspeed_config(str(file), zero=0, **SIZES)
    assert config["gradient_clipping"] == 0.5 and config["zero_optimization"]["stage"] == 2
    assert config["train_batch_size"] == 16


def test_zero_stage_of_the_flag_completes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}}))
    assert deepspeed_config(str(file), zero=1, **SIZES)["zero_optimization"] == {"overlap_comm": True, "stage": 1}


@pytest.mark.slow
def test_file_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    flags = "--variant wgan-gp --width 8 --max-width 8 --latent 4 --batch 8 --resolution 8 --kimg 0.064 --samples 4"
    line = [sys.executable, str(ROOT / "fastgan" / "train.py"), *flags.split(), "--deepspeed_config", str(file)]
    result = subprocess.run([*line, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "engine deepspeed (--deepspeed-config)" in result.stdout


@pytest.mark.parametrize(
    ("preference", "needs", "launched", "missing", "chosen"),
    [
        ("auto", None, False, None, ("torch", "one process without a launcher")),
        ("auto", None, True, None, ("deepspeed", "started by a launcher")),
        ("auto", None, True, "no deepspeed here", ("torch", "no deepspeed here")),
        ("auto", "--zero", False, None, ("deepspeed", "--zero")),
        ("auto", "--zero", True, "no deepspeed here", "--engine 'auto': --zero needs DeepSpeed, and no deepspeed here"),
        ("torch", None, True, None, ("torch", "--engine")),
        ("torch", None, False, "no deepspeed here", ("torch", "--engine")),
        ("deepspeed", None, False, None, ("deepspeed", "--engine")),
        ("deepspeed", None, True, "no deepspeed here", "--engine must be torch, got 'deepspeed'; no deepspeed here"),
    ],
)
def test_choice_of_the_engine(
    monkeypatch: pytest.MonkeyPatch,
    preference: str,
    needs: str | None,
    launched: bool,
    missing: str | None,
    chosen: tuple[str, str] | str,
) -> None:
    """`chosen`: the engine and the reason, or the error."""
    monkeypatch.setattr(rendezvous, "launched", lambda: launched)
    monkeypatch.setattr(rendezvous, "deepspeed_missing", lambda: missing)
    if isinstance(chosen, tuple):
        assert rendezvous._choose_engine(preference, needs) == chosen
    else:
        with pytest.raises(ArgumentError) as refused:
            rendezvous._choose_engine(preference, needs)
        assert str(refused.value) == chosen


def test_deepspeed_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert "deepspeed is not installed" in str(rendezvous.deepspeed_missing())
    assert rendezvous.start("auto", "cpu").engine == "torch"
