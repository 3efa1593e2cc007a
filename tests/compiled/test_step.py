"""`fastgan.compile_step` on critics that are not this package's: equal to eager, and never silently stale."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, spectral_norm

import fastgan
from fastgan.compiled import program
from fastgan.compiled.recording import NotRecordable
from fastgan.utils import counter_rng


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "cache_folder", lambda name: tmp_path / name)


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv, self.gain = nn.Conv2d(channels, 3 * channels, 1), nn.Parameter(torch.full((), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1)
        return x + self.gain * (weights @ v).transpose(1, 2).unflatten(2, x.shape[2:])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.attend, self.mlp, self.score = Attention(16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(self.embed(x)).flatten(2).transpose(1, 2)
        return self.score(F.gelu(self.mlp(self.norm(x))).mean(1))


def head(channels: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(channels * 16, 1)]


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 4, 2, 1), nn.Tanh(), *head(8)
    ),
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 8, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(8, 8, 4, 2, 1)),
        nn.Softplus(),
        *head(8),
    ),
    "attention": lambda: nn.Sequential(nn.Conv2d(3, 8, 4, 4, 0), nn.SiLU(), Attention(8), *head(8)),
    "grouped convolution": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 4, 2, 1, groups=4), nn.GroupNorm(2, 8), *head(8)
    ),
    "transformer": Transformer,
    "in-place relu": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 4, 2, 1), nn.ReLU(inplace=True), *head(8)
    ),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return CRITICS[kind]()


def wgan_gp(critic: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
        x = torch.lerp(real, fake, weight).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        return critic(fake).mean() - critic(real).mean() + 10 * penalty

    return loss


def r1(critic: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
        real = real.clone().requires_grad_()
        score = critic(real)
        (gradient,) = torch.autograd.grad(score.sum(), real, create_graph=True)
        return F.softplus(critic(fake)).mean() + F.softplus(-score).mean() + gradient.square().sum() / len(real)

    return loss


def batch(step: int, size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = (torch.randn(size, 3, 16, 16, generator=generator) for _ in range(2))
    return (*images, torch.rand(size, 1, 1, 1, generator=generator))


def train(critic: nn.Module, step: Callable[..., tuple[Tensor, list[Tensor | None]]], steps: int) -> list[float]:
    parameters = list(critic.parameters())
    optimizer = torch.optim.Adam(parameters, 1e-3)
    losses = []
    for i in range(steps):
        loss, gradients = step(*batch(i))
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def eager(critic: nn.Module, loss_of: Callable[[nn.Module], Callable[..., Tensor]]):
    def step(*inputs: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        loss = loss_of(critic)(*inputs)
        return loss, list(torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True))

    return step


def run_both(kind: str, loss_of, *, compile: bool, steps: int = 20):
    ours, theirs = build(kind), build(kind)
    step = fastgan.compile_step(loss_of(ours), ours.parameters(), compile=compile)
    losses = train(ours, step, steps), train(theirs, eager(theirs, loss_of), steps)
    assert not step.notes
    return ours.state_dict(), theirs.state_dict(), losses


@pytest.mark.parametrize("loss_of", [wgan_gp, r1])
@pytest.mark.parametrize("kind", CRITICS)
def test_recorded_operations_are_eager_to_the_bit_over_twenty_adam_steps(kind, loss_of):
    ours, theirs, losses = run_both(kind, loss_of, compile=False)
    assert losses[0] == losses[1]
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def require_compiled_equals_eager(kind, loss_of):
    ours, theirs, losses = run_both(kind, loss_of, compile=True)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-3)
    # A bias before a batch norm has a gradient of rounding noise, of which Adam makes whole steps.
    names = [name for name in theirs if not (kind == "batch norm" and name == "0.bias")]
    assert program.difference_of([ours[n].float() for n in names], [theirs[n].float() for n in names]) < 1e-3


@pytest.mark.slow
def test_compiled_equals_eager_over_twenty_adam_steps():
    require_compiled_equals_eager("batch norm", wgan_gp)


@pytest.mark.slow
@pytest.mark.parametrize("loss_of", [wgan_gp, r1])
@pytest.mark.parametrize("kind", [kind for kind in CRITICS if kind != "batch norm"])
def test_every_critic_compiled_equals_eager_over_twenty_adam_steps(kind, loss_of):
    require_compiled_equals_eager(kind, loss_of)


def linear_step(**options):
    critic = nn.Linear(3, 1)
    return critic, fastgan.compile_step(lambda x: critic(x).square().mean(), critic.parameters(), **options)


def test_another_shape_dtype_mode_or_trained_set_is_recorded_anew():
    critic = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    step = fastgan.compile_step(lambda x: critic(x).square().mean(), critic.parameters(), compile=False)

    def same(x: Tensor) -> None:
        before = {name: value.clone() for name, value in critic.state_dict().items()}
        loss, gradients = step(x)
        after = {name: value.clone() for name, value in critic.state_dict().items()}
        critic.load_state_dict(before)
        expected = critic(x).square().mean()
        trained = [p for p in critic.parameters() if p.requires_grad]
        derived = iter(torch.autograd.grad(expected, trained))
        assert torch.equal(loss, expected)
        for p, gradient in zip(critic.parameters(), gradients, strict=True):
            assert torch.equal(gradient, next(derived)) if p.requires_grad else gradient is None
        for name, value in critic.state_dict().items():
            assert torch.equal(value, after[name]), name

    for _ in range(2):
        same(torch.randn(4, 3))
    same(torch.randn(6, 3))
    critic.eval()
    for _ in range(2):
        same(torch.randn(4, 3))
    critic.train()
    critic[0].requires_grad_(False)
    same(torch.randn(4, 3))
    critic[0].requires_grad_(True)
    same(torch.randn(4, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(torch.randn(4, 3))
    same(torch.randn(3, 4).t())


def test_a_parameter_or_buffer_that_was_assigned_anew_is_read():
    critic, step = linear_step(compile=False)
    x = torch.randn(4, 3)
    step(x)
    critic.weight = nn.Parameter(torch.full((1, 3), 2.0))
    loss, _ = step(x)
    assert torch.equal(loss, critic(x).square().mean())


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_have_the_strides_that_fused_optimizers_assume(compile):
    def build_critic() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 1)).to(memory_format=torch.channels_last)

    ours, theirs = build_critic(), build_critic()
    optimizers = [torch.optim.Adam(critic.parameters(), 0.1, fused=True) for critic in (ours, theirs)]
    x = torch.randn(2, 3, 4, 4)
    step = fastgan.compile_step(lambda x: ours(x).square().mean(), ours.parameters(), compile=compile)
    for _ in range(3):
        _, gradients = step(x)
        for p, gradient in zip(ours.parameters(), gradients, strict=True):
            p.grad = gradient
        optimizers[1].zero_grad()
        theirs(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_other_arguments_are_part_of_the_signature_and_aux_is_returned():
    critic = nn.Linear(3, 1)

    def loss(x: Tensor, power: int) -> tuple[Tensor, dict[str, Tensor]]:
        score = critic(x)
        return score.pow(power).mean(), {"score": score.mean()}

    step = fastgan.compile_step(loss, critic.parameters(), has_aux=True, compile=False)
    x = torch.randn(4, 3)
    for power in (2, 4, 2):
        (found, aux), _ = step(x, power)
        assert torch.equal(found, critic(x).pow(power).mean())
        assert torch.equal(aux["score"], critic(x).mean())


class Reads(nn.Module):
    def __init__(self, what: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(3, 1), what

    def forward(self, x: Tensor) -> Tensor:
        self.what(x)
        return self.linear(x)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: float(x.sum()), "reads a value"),
        (lambda x: F.dropout(x, 0.5), "random numbers"),
        (lambda x: torch.rand_like(x), "random numbers"),
        (lambda x: x[x > 0], "depends on values"),
    ],
)
def test_what_a_program_cannot_repeat_is_refused(what, message):
    critic = Reads(what)
    step = fastgan.compile_step(lambda x: critic(x).mean(), critic.parameters(), compile=False)
    with pytest.raises(NotRecordable, match=message):
        step(torch.randn(4, 3))


def test_what_is_computed_behind_the_dispatcher_is_refused():
    """As a kernel that is launched by pointers: the graph would have the memory, and not what is written into it."""

    def behind(x: Tensor) -> None:
        x.numpy()[:] = 3.0

    critic = Reads(lambda x: behind(x.mul_(1.0)))
    step = fastgan.compile_step(lambda x: critic(x * 1.0).square().mean(), critic.parameters(), compile=False)
    with pytest.raises(NotRecordable, match="outside of PyTorch's operations"):
        step(torch.randn(4, 3))


def test_arguments_that_are_equal_and_of_another_type_are_told_apart():
    critic = nn.Linear(3, 1)
    step = fastgan.compile_step(
        lambda x, n: (critic(x) * (n / 2 if type(n) is int else n)).sum(), critic.parameters(), compile=False
    )
    x = torch.randn(4, 3)
    assert torch.equal(step(x, 1)[0], critic(x).mul(0.5).sum())
    assert torch.equal(step(x, 1.0)[0], critic(x).mul(1.0).sum())


def test_hooks_and_wrappers_are_refused_by_name():
    x = torch.randn(4, 3)

    def watch_scores(*_: object) -> None: ...

    critic, step = linear_step(compile=False)
    critic.register_forward_hook(watch_scores)
    with pytest.raises(NotRecordable, match=r"Linear has a forward hook .*watch_scores"):
        step(x)
    critic, step = linear_step(compile=False)
    critic.register_full_backward_hook(watch_scores)
    with pytest.raises(NotRecordable, match="backward hook"):
        step(x)
    critic = nn.Linear(3, 1)
    critic.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(NotRecordable, match="gradient hook"):
        fastgan.compile_step(lambda x: critic(x).mean(), critic.parameters())
    wrapped = nn.DataParallel(nn.Linear(3, 1))
    with pytest.raises(NotRecordable, match="DataParallel communicates"):
        fastgan.compile_step(lambda x: wrapped(x).mean(), wrapped.parameters(), compile=False)(x)


def test_without_a_compiler_the_recorded_operations_run_and_a_line_says_so(monkeypatch):
    monkeypatch.setattr(program, "key_of", lambda facts: "x")

    def fail(*_: object) -> None:
        raise program.CompileError("no C++ compiler")

    monkeypatch.setattr("fastgan.compiled.step.compile_graph", fail)
    critic, step = linear_step()
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match="one by one: no C\\+\\+ compiler"):
        step(x)
    loss, _ = step(x)
    assert torch.equal(loss, critic(x).square().mean())
    assert len(step.notes) == 1


def test_a_wrong_program_is_never_used(monkeypatch):
    class Wrong(program.Program):
        def __call__(self, tensors):
            return [x * 1.01 for x in super().__call__(tensors)]

    monkeypatch.setattr("fastgan.compiled.step.Program", Wrong)
    critic, step = linear_step()
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match="differs from the recorded operations"):
        step(x)
    loss, _ = step(x)
    assert torch.equal(loss, critic(x).square().mean())


def test_a_layout_has_the_strides_that_address_nothing():
    """Images of one channel are contiguous and channels_last at once, and a convolution looks at the strides."""
    x = torch.randn(4, 1, 8, 8)
    other = x.as_strided(x.shape, (64, 1, 8, 1))
    assert program.layout(x) != program.layout(other)
    again = program.placed(other, program.layout(x))
    assert again.stride() == x.stride() and torch.equal(again, x)


@pytest.mark.slow
def test_strides_that_address_nothing_do_not_change_the_result():
    critic = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 1))
    critic.to(memory_format=torch.channels_last)
    step = fastgan.compile_step(lambda x: critic(x).square().mean(), critic.parameters())
    x = torch.randn(4, 1, 8, 8)
    for images in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1)):
        loss, gradients = step(images)
        expected = critic(images).square().mean()
        torch.testing.assert_close(loss, expected.detach())
        for gradient, reference in zip(gradients, torch.autograd.grad(expected, critic.parameters()), strict=True):
            torch.testing.assert_close(gradient, reference)
        assert [g.stride() for g in gradients] == [p.stride() for p in critic.parameters()]
    assert not step.notes


def test_a_program_is_compiled_once_and_then_found_in_the_cache(monkeypatch):
    torch.manual_seed(0)
    _, step = linear_step()
    x = torch.randn(4, 3)
    step(x)

    def fail(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr("fastgan.compiled.step.compile_graph", fail)
    critic, step = linear_step()
    step(x)
    loss, gradients = step(x)
    expected = critic(x).square().mean()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradients[0], torch.autograd.grad(expected, critic.weight)[0])


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 21])
def test_random_numbers_of_positions_are_compiled_right(tmp_path, size):
    """Inductor takes a counter times a 64-bit constant for an index: at size 21 it gave other numbers."""

    def draw(index):
        return [counter_rng.uniform(3, "a", index, size) + torch.tensor([0.5])]

    index = torch.arange(1000, 1016)
    program.compile_graph(make_fx(draw)(index), [index], tmp_path / "draw.pt2")
    (found,) = program.Program.load(tmp_path / "draw.pt2", [program.layout(index)])([index])
    assert torch.equal(found, draw(index)[0])
