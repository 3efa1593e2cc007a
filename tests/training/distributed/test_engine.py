"""Engines: accumulation, state by name, DeepSpeed's configuration, and who may use which."""

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
from fastgan.training.distributed import process_group as processes
from fastgan.training.distributed.engine import (
    Fragment,
    TorchEngine,
    _collect,
    _restore,
    deepspeed_config,
    uses_own_reducer,
)
from fastgan.training.factory import rates

ROOT = Path(__file__).resolve().parents[3]
SIZES = {"micro_batch": 4, "accumulation": 2, "world": 2}


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1, fused=True)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def test_accumulated_micro_batches_equal_the_batch() -> None:
    """By SGD, whose step is as large as the gradient: Adam's would hide a sum in place of a mean."""

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


def test_a_rate_is_that_of_the_next_step() -> None:
    engine = TorchEngine(network(), lambda parameters: torch.optim.SGD(parameters, lr=0.1), 1)
    for rate in (0.25, 0.0):
        before = [p.detach().clone() for p in engine.module.parameters()]
        engine.backward(engine.module(torch.ones(1, 3)).sum())
        gradients = [p.grad.clone() for p in engine.module.parameters()]
        engine.set_rate(rate)
        engine.step()
        for p, old, gradient in zip(engine.module.parameters(), before, gradients, strict=True):
            torch.testing.assert_close(p.detach(), old - rate * gradient)


def test_rates_fall_over_the_end_of_a_run() -> None:
    config = replace(Config(), optimizer={"lr_g": 1.0, "lr_d": 0.5, "lr_decay": 0.25}, schedule={"kimg": 8.0})
    assert [rates(config, n) for n in (0, 6000, 7000, 7900)] == [
        (1.0, 0.5),
        (1.0, 0.5),
        (0.5, 0.25),
        pytest.approx((0.05, 0.025)),
    ]
    constant = replace(config, optimizer={"lr_decay": 0.0})
    assert rates(constant, 7999) == (1.0, 0.5)


def test_state_goes_on_in_another_engine() -> None:
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
    assert all(value == 2 for key, value in state.items() if key.endswith("/step"))  # it is the caller's still


def test_state_of_a_rank_that_holds_pieces() -> None:
    """As under ZeRO: the optimizer knows one flat tensor, of parts of parameters; what others hold is theirs to add."""
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
    _restore(fragments, optimizer, whole)
    assert optimizer.state[holder]["exp_avg"].tolist() == [9, 10, 0, 2, 3, 4, 5, 6, 0]
    assert optimizer.state[holder]["step"] == 4
    found = _collect(module, fragments, optimizer, shared=False)
    assert {key: value.tolist() for key, value in found.items()} == {
        "a/exp_avg": [[0, 2, 3], [4, 5, 6]],
        "b/exp_avg": [0, 0, 9, 10],
        "a/step": 4,
        "b/step": 4,
    }


def test_weights_have_moved_once_for_a_batch() -> None:
    moved: list[Tensor] = []
    module = network()
    parts = TorchEngine(module, adam, 2, moved=lambda: moved.append(module[0].bias.detach().clone()))
    before = module[0].bias.detach().clone()
    for _ in range(4):
        parts.backward(parts.module(torch.ones(4, 3)).square().mean())
        parts.step()
    assert len(moved) == 2 and not moved[0].equal(before) and moved[1].equal(module[0].bias)


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
    """DeepSpeed where a user's file says how, or under ZeRO 1 and 2; else this package."""
    assert uses_own_reducer(config) is ours


@pytest.mark.parametrize(
    ("content", "zero", "words"),
    [
        ({"optimizer": {"type": "Adam"}}, 0, "--optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, 0, "--lr-decay"),
        *[({key: {"enabled": True}}, 0, "--precision") for key in ("fp16", "bf16", "torch_autocast")],
        ({"train_batch_size": 7}, 0, "train_batch_size"),
        ({"zero_optimization": {"stage": 2}}, 1, "--zero"),
        ({"zero_optimization": {"stage": 3}}, 0, "stage may be 0, 1 or 2"),
        ([], 0, "JSON object"),
        ("not json", 0, "readable JSON"),
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


def test_file_given_to_the_command(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    flags = "--variant wgan-gp --width 8 --max-width 8 --latent 4 --batch 8 --resolution 8 --kimg 0.064 --samples 4"
    line = [sys.executable, str(ROOT / "fastgan" / "train.py"), *flags.split(), "--deepspeed_config", str(file)]
    result = subprocess.run([*line, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "engine deepspeed (--deepspeed-config)" in result.stdout


def test_torch_engine_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError, match=r"--engine.*2 processes"):
        processes.start("torch", "cpu")


def test_missing_deepspeed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "deepspeed_missing", lambda: "deepspeed is not installed")
    with pytest.raises(ArgumentError, match="deepspeed is not installed"):
        processes.start("deepspeed", "cpu")
    assert processes.start("auto", "cpu").engine == "torch"
