"""Spectral norm of a converted model: torch's numbers, buffers and state, with few calls for all layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fastgan.nn
from fastgan import ops
from fastgan.nn import power_iteration
from fastgan.nn.power_iteration import Ahead, by_torch

STYLES: dict[str, Callable[..., nn.Module]] = {
    "parametrization": parametrizations.spectral_norm,
    "hook": nn.utils.spectral_norm,
}


def critic(style: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    norm = STYLES[style]
    shared = norm(nn.Conv2d(4, 4, 3, padding=1), **options)
    layers = [norm(nn.Conv2d(3, 4, 3, padding=1, bias=False)), nn.LeakyReLU(0.2), shared, nn.LeakyReLU(0.2), shared]
    layers += [norm(nn.ConvTranspose2d(4, 5, 3), dim=1), nn.ReLU(), nn.Flatten(), norm(nn.Linear(180, 1))]
    return nn.Sequential(*layers).to(dtype)


def pair(style: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same critic, plain and converted."""
    plain = critic(style, dtype, **options)
    lean = critic(style, dtype, **options)
    done = fastgan.nn.convert(lean)
    assert done.replaced["SpectralNorm"] == 4
    return plain, lean


def images(dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Scores, a penalty, and its gradient for every weight."""
    scores = model(x)
    value = ops.zero_centered_penalty(model, x) + scores.mean()
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [scores, value, *(g if g is not None else torch.zeros(()) for g in found if g is None or g.ndim > 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"n_power_iterations": 3, "eps": 1e-3}], ids=["default", "three steps"])
@pytest.mark.parametrize("style", STYLES)
def test_equals_torch(style: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """In training and in evaluation: values, second order, buffers; a layer that is called twice makes two steps."""
    plain, lean = pair(style, dtype, **options)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for training in (True, False, True):
        plain.train(training), lean.train(training)
        torch.testing.assert_close(gradients(lean, images(dtype)), gradients(plain, images(dtype)), **tolerance)
        assert list(lean.state_dict()) == list(plain.state_dict())
        torch.testing.assert_close(lean.state_dict(), plain.state_dict(), **tolerance)


@pytest.mark.parametrize("style", STYLES)
def test_third_order(style: str) -> None:
    def third(model: nn.Module) -> Tensor:
        weight = next(p for name, p in model.named_parameters() if name.startswith("0."))
        value = model.eval()(images()).square().sum()
        for _ in range(2):
            (g,) = torch.autograd.grad(value, weight, create_graph=True)
            value = g.square().sum()
        return torch.autograd.grad(value, weight)[0]

    plain, lean = pair(style)
    torch.testing.assert_close(third(lean), third(plain))


def products(model: nn.Module) -> int:
    """Operations on the CPU of one forward."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(images(torch.float32))
    return sum(event.count for event in profiled.key_averages())


@pytest.mark.parametrize("style", STYLES)
def test_all_layers_take_one_call(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, lean = pair(style, torch.float32)
    sizes: list[int] = []
    iterate = power_iteration.iterate
    monkeypatch.setattr(power_iteration, "iterate", lambda calls: sizes.append(len(calls)) or iterate(calls))
    lean(images(torch.float32))
    assert sizes == [4, 1]  # the shared layer's second call
    assert products(lean) < products(plain)


@pytest.mark.parametrize("style", STYLES)
def test_a_layer_that_is_not_called_keeps_its_vectors(style: str) -> None:
    plain, lean = pair(style)
    for model in (plain, lean):
        model[8] = nn.Sequential(model[8])
        model[8].forward = lambda x: x.sum(1, keepdim=True)  # type: ignore[method-assign]
    torch.testing.assert_close(lean(images()), plain(images()), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lean.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-12)
    with torch.no_grad():  # nothing of before is left
        for model in (plain, lean):
            for p in model.parameters():
                p.mul_(2)
    torch.testing.assert_close(lean[0](images()), plain[0](images()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("style", STYLES)
def test_weights_that_change_between_the_hook_and_the_layer(style: str) -> None:
    plain, lean = pair(style)
    for model in (plain, lean):
        weight = next(p for name, p in model.named_parameters() if name.startswith("8."))

        def change(*_: Any, weight: Tensor = weight) -> None:
            with torch.no_grad():
                weight.add_(0.5)

        model[0].register_forward_hook(change)
    torch.testing.assert_close(lean(images()), plain(images()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_checkpoint(style: str, whole: bool, reentrant: bool) -> None:
    """The recomputation makes a step of its own, as torch's does."""

    def run(model: nn.Module) -> list[Tensor]:
        x = images().requires_grad_()
        part = model if whole else nn.Sequential(*list(model)[:3])
        y = checkpoint(part, x, use_reentrant=reentrant)
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for p in part.parameters())]  # type: ignore[list-item]

    plain, lean = pair(style)
    torch.testing.assert_close(run(lean), run(plain), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lean.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("style", STYLES)
def test_transforms_and_autocast_are_torchs(style: str) -> None:
    plain, lean = pair(style)
    plain.eval(), lean.eval()
    grad = torch.func.grad(lambda m, x: m(x).sum(), argnums=1)
    torch.testing.assert_close(grad(lean, images()), grad(plain, images()))
    tangent = images(seed=2)
    found, expected = (torch.func.jvp(model, (images(),), (tangent,)) for model in (lean, plain))
    torch.testing.assert_close(found, expected)
    plain, lean = pair(style, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lean(images(torch.float32)), plain(images(torch.float32)))


@pytest.mark.parametrize("style", STYLES)
def test_convert_twice_revert_and_copies(style: str) -> None:
    plain, lean = pair(style)
    fastgan.nn.convert(lean)
    assert sum(isinstance(hook, Ahead) for hook in lean._forward_pre_hooks.values()) == 1
    twin = copy.deepcopy(lean)
    torch.testing.assert_close(gradients(twin, images()), gradients(plain, images()))
    assert not torch.equal(next(iter(twin.buffers())), next(iter(lean.buffers())))  # it has norms of its own
    fastgan.nn.revert(lean)
    assert not lean._forward_pre_hooks and not lean._forward_hooks
    assert [type(m).__mro__[1:] for m in lean.modules()] == [type(m).__mro__[1:] for m in plain.modules()]
    hooks = [type(h) for m in lean.modules() for h in m._forward_pre_hooks.values()]
    assert hooks == [type(h) for m in plain.modules() for h in m._forward_pre_hooks.values()]


def test_a_second_parametrization_and_removal() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*(parametrizations.spectral_norm(nn.Linear(3, 3)) for _ in range(3))).double()
    lean = copy.deepcopy(plain)
    fastgan.nn.convert(lean)

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

        def right_inverse(self, weight: Tensor) -> Tensor:
            return weight

    for model in (plain, lean):
        parametrize.register_parametrization(model[0], "weight", Doubled(), unsafe=True)
        parametrize.remove_parametrizations(model[1], "weight")
    x = torch.randn(2, 3, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(lean(x), plain(x))


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("u_first", [False, True])
def test_the_kernel_equals_plain_pytorch(u_first: bool, iterations: int) -> None:
    if power_iteration._no_cpp() is not None:
        pytest.skip("the C++ kernels cannot run here")
    made = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (3, 700), (70, 5), (128, 1152), (2, 3)]
    ws = [torch.randn(size, generator=made) for size in sizes]
    ws[-1].zero_()  # nothing to normalize: eps
    us, vs = ([torch.randn(size[i], generator=made) for size in sizes] for i in (0, 1))
    found = power_iteration._by_cpp(ws, us, vs, iterations, u_first, 1e-12)
    exact = by_torch(*([t.double() for t in ts] for ts in (ws, us, vs)), iterations, u_first, 1e-12)
    for ours, right in zip(found, exact, strict=True):
        torch.testing.assert_close([t.double() for t in ours], list(right), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_compiled_as_torchs(style: str) -> None:
    """In training too: the hooks compute nothing there, and the layers run torch's own forward."""
    plain, lean = pair(style)
    torch.compiler.reset()
    compiled = torch.compile(lean, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), plain(images()))
    torch.testing.assert_close(lean.state_dict(), plain.state_dict())
