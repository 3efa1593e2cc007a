"""What ranks send in a step, when they wait for each other, and how a straggler is reported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import collectives
import pytest
import ranks
import torch
from torch import nn

from fastgan.training.distributed import gradient_reducer
from fastgan.training.observability.stragglers import RankStepTimes

SCRIPT = Path(collectives.__file__)
SMALL = "--width 8 --max-width 16 --latent 8 --batch 8 --resolution 16 --n-critic 2".split()
CASES = [(zero, accumulation) for zero in (0, 1, 2) for accumulation in (1, 2)]
STEPS = 3


def _case(zero: int, accumulation: int) -> dict[str, Any]:
    flags = [*SMALL, "--zero", str(zero), "--accumulation", str(accumulation)]
    return {"name": f"{zero}-{accumulation}", "variant": "wgan-gp", "flags": flags, "steps": STEPS}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collectives")
    slow = {"name": "slow", "variant": "pggan", "slow": 0.3, "steps": 0}
    slow["flags"] = [*ranks.FLAGS["pggan"].split(), *"--kimg 0.16 --stable-kimg 0.08 --log-kimg 0.032".split()]
    ranks.launch(SCRIPT, [*(_case(*case) for case in CASES), slow], folder, 2)
    return folder


@pytest.mark.parametrize(("zero", "accumulation"), CASES)
def test_bytes_of_collectives_in_a_step(out: Path, zero: int, accumulation: int) -> None:
    counts = [json.loads((out / f"counts-{rank}.json").read_text())[f"{zero}-{accumulation}"] for rank in (0, 1)]
    trained, sent = counts[0]["trained"], counts[0]["sent"]
    # Two steps of D and one of G. G's step sends no gradients of D; no step sends the moving average or metrics.
    nbytes = STEPS * (2 * trained["d"] + trained["g"])
    if zero == 0:
        assert sent == {"all_reduce": nbytes}
        return
    # ZeRO 2 keeps no gradient between micro-batches, and so reduces each. Partitions are padded to 16 bytes.
    reductions = accumulation if zero == 2 else 1
    small = sent.pop("all_reduce", 0)
    assert small <= 3 * STEPS * 64  # an overflow flag or a norm
    # Each of two ranks hands over both halves of the gradients, and receives its own half.
    assert sum(part["sent"]["reduce"] for part in counts) / 2 == pytest.approx(reductions * nbytes, rel=0.02)
    assert sum(part["sent"]["all_gather_into_tensor"] for part in counts) / 2 == pytest.approx(nbytes, rel=0.02)
    assert set(sent) == {"reduce", "all_gather_into_tensor"}


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_memory_format_of_weights(out: Path, zero: int) -> None:
    """Contiguous under ZeRO 1 and 2, which flatten the weights."""
    for rank in (0, 1):
        assert json.loads((out / f"counts-{rank}.json").read_text())[f"{zero}-1"]["channels_last"] is (zero == 0)


def test_updates_are_deferred_until_the_weights_are_used(out: Path) -> None:
    """Each network's reduction overlaps with the first use of the other network. wgan-gp, n_critic 2."""
    scored = ["uses d"] * 3  # real, fake and interpolated images
    for rank in (0, 1):
        order = json.loads((out / f"counts-{rank}.json").read_text())["0-1"]["order"]
        assert order == [
            *("uses d", "updates g", "uses g", "uses d", "uses d", "sends d"),
            *("uses g", "updates d", *scored, "sends d"),
            *("uses g", "updates d", "uses d", "sends g"),
        ]


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_steps_of_two_ranks_do_not_synchronize_with_the_host(out: Path, zero: int) -> None:
    for rank in (0, 1):
        counts = json.loads((out / f"counts-{rank}.json").read_text())
        assert counts[f"{zero}-1"]["reads"] == counts[f"{zero}-2"]["reads"] == {}


def test_a_straggler_is_named(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "slow" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) >= 3
    for row in rows:
        assert row["slowest_rank"] == 1 and row["slowest_step_seconds"] > 0.3
        # The other rank's step time excludes its waiting for the slow one.
        assert row["step_seconds"] < 0.5 * row["slowest_step_seconds"]
        assert [(s["rank"], bool(s["host"])) for s in row["stragglers"]] == [(1, True)]
    logs = [(out / "slow" / "logs" / f"rank-000{rank}.log").read_text() for rank in (0, 1)]
    for rank, text in enumerate(logs):
        lines = text.splitlines()
        assert re.search(
            rf"INFO rank {rank} of 2 on \S+, process \d+, cpu .*torch {re.escape(torch.__version__)}", lines[0]
        )
        assert any("INFO 8 px from 0.08 kimg" in line for line in lines)
        assert re.search(r"WARNING straggler: rank 1 on \S+ takes \d+ ms .* [\d.]+ times the median", text)
        assert lines[-1].endswith("INFO done at 0.16 kimg")
    assert logs[0].count("straggler") == 1 and logs[1].count("straggler") == len(rows)


def test_stragglers_of_step_times() -> None:
    even = RankStepTimes([1.0, 1.9, 1.2, 1.1], ["a", "a", "b", "b"])
    assert (even.slowest, even.median, even.stragglers) == (1, 1.1, [])
    assert "stragglers" not in even.row()
    one = RankStepTimes([1.0, 1.0, 2.5, 1.0], ["a", "a", "b", "b"])
    assert one.stragglers == [2]
    assert one.row()["stragglers"] == [{"rank": 2, "host": "b", "step_seconds": 2.5}]
    assert "rank 2 on b takes 2500 ms" in one.describe(2) and "2.5 times" in one.describe(2)
    assert RankStepTimes([1.0, 2.1], ["a", "b"]).stragglers == [1]


class _Work:
    def wait(self) -> None: ...


def test_buckets_are_sent_as_soon_as_they_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step shows the order; later ones send the last layer's gradients before the first layer's exist."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)), nn.Linear(4, 4, bias=False))
    module[1].weight = nn.Parameter(torch.randn(4, 4).t())
    module[4].weight.requires_grad_(False)
    idle = nn.Parameter(torch.ones(3))
    module.register_parameter("idle", idle)
    sent: list[tuple[int, int]] = []
    done: list[int] = []
    monkeypatch.setattr(gradient_reducer.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(gradient_reducer.dist, "broadcast", lambda tensor, src, group: None)

    def all_reduce(tensor: torch.Tensor, group: None, async_op: bool) -> _Work:
        sent.append((tensor.numel(), len(done)))
        tensor.mul_(2)  # another rank with the same gradients
        return _Work()

    monkeypatch.setattr(gradient_reducer.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(gradient_reducer, "pack", lambda sizes: [[2 * i, 2 * i + 1] for i in range(2)] + [[4]])
    reducer = gradient_reducer.GradientReducer(module, gradient_reducer.Stopwatch(torch.device("cpu")))
    for p in module.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _: done.append(1))
    x = torch.randn(2, 4)

    def gradients(expecting: bool) -> list[torch.Tensor]:
        sent.clear()
        done.clear()
        for p in module.parameters():
            p.grad = None
        if expecting:
            reducer.expect()
        module(x).square().sum().backward()
        if expecting:
            reducer.flush()
            reducer.finish()
        return [p.grad.clone() for p in module[:4].parameters() if p.grad is not None]

    plain = gradients(expecting=False)
    assert sent == []
    for step in range(3):
        for a, b in zip(plain, gradients(expecting=True), strict=True):
            torch.testing.assert_close(a, b)
        assert idle.grad is not None and not idle.grad.any()
        # Two layers, two layers, and the parameter without a gradient. The first step sends all at its end.
        if step == 0:
            assert [numel for numel, _ in sent] == [16 + 3, 32, 16] and {n for _, n in sent} == {4}
        else:
            assert all(p.grad is not None and p.grad.stride() == p.stride() for p in module[:4].parameters())
            assert [numel for numel, _ in sent] == [32, 32, 3]
            assert sent[0][1] < 2 and sent[1][1] < 4 and sent[2][1] == 4
    reducer.close()
    gradients(expecting=False)
    assert sent == []
