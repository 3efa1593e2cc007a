"""`convert` and `revert`: only classes change, and everything that is done with a model works as before."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fastgan.nn
from fastgan import ops
from fastgan.nn.lean import LEAN
from fastgan.ops import norms


class Block(nn.Module):
    """A residual block as the public WGAN-GP critics have it."""

    def __init__(self, inputs: int, outputs: int, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first = norm(nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect"))
        self.second = norm(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = norm(nn.Conv2d(inputs, outputs, 1))
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.act(self.first(self.act(x.clone()))))
        return self.pool(y) + self.pool(self.shortcut(x))


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda m: m,
    "spectral": parametrizations.spectral_norm,
    "spectral, old style": nn.utils.spectral_norm,
    "spectral of this package": fastgan.nn.spectral_norm,
}


def critic(norm: str = "none") -> nn.Module:
    torch.manual_seed(0)
    n = NORMS[norm]
    layers = [n(nn.Conv2d(3, 4, 3, padding=1)), Block(4, 6, n), nn.LeakyReLU(0.2, True), nn.ReflectionPad2d(1)]
    layers += [nn.MaxPool2d(2), nn.AdaptiveAvgPool2d((2, 3)), nn.PReLU(6), nn.Flatten(), n(nn.Linear(36, 1))]
    return nn.Sequential(*layers).double()


def penalty(model: Callable[..., Any], x: Tensor) -> Tensor:
    return ops.zero_centered_penalty(model, x) + model(x).mean()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(penalty(model, x), parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("norm", NORMS)
def test_a_converted_model_computes_and_looks_the_same(norm: str) -> None:
    plain, lean = critic(norm).eval(), critic(norm).eval()
    shown, state, hooks = repr(plain), plain.state_dict(), []
    handle = lean[1].register_forward_hook(lambda *_: hooks.append(1))
    parameters = list(lean.parameters())
    done = fastgan.nn.convert(lean)
    assert repr(lean) == shown and list(lean.state_dict()) == list(state)
    assert all(a is b for a, b in zip(parameters, lean.parameters(), strict=True))
    torch.testing.assert_close(gradients(lean, X), gradients(plain, X), rtol=1e-10, atol=1e-12)
    assert hooks
    handle.remove()
    counted = {name.removesuffix("(inplace)").removeprefix("Parametrized"): n for name, n in done.replaced.items()}
    assert counted["Conv2d"] == 4 and counted["ReLU"] == 1 and counted["Linear"] == 1
    assert done.left == {"Flatten": 1}
    assert "ReLU(inplace) 1" in str(done) and "left as they are: Flatten" in str(done)
    lean.load_state_dict(state)
    assert not fastgan.nn.convert(lean).replaced  # a second time there is nothing to do


@pytest.mark.parametrize("norm", NORMS)
def test_revert_gives_the_original_classes_back(norm: str) -> None:
    model = critic(norm)
    kinds = [type(m) for m in model.modules()]
    fastgan.nn.convert(model, zeros=True)
    assert [type(m) for m in model.modules()] != kinds
    fastgan.nn.revert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs


def test_a_model_that_was_parametrized_after_it_was_converted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    fastgan.nn.convert(model)
    parametrizations.spectral_norm(model[0])
    assert isinstance(model[0], fastgan.nn.Conv2d)
    fastgan.nn.revert(model)
    assert not isinstance(model[0], fastgan.nn.Conv2d) and isinstance(model[0], nn.Conv2d)
    model(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("norm", ["none", "spectral of this package"])
def test_pickle_and_deepcopy(norm: str) -> None:
    model = critic(norm).eval()
    fastgan.nn.convert(model, zeros=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(gradients(other, X), gradients(model, X))
        assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in model.modules()]
        fastgan.nn.revert(other)
        assert not isinstance(other[0], fastgan.nn.Conv2d)
        torch.testing.assert_close(other(X), model(X))


def test_deepcopy_of_parametrized_layers() -> None:
    model = critic("spectral").eval()
    fastgan.nn.convert(model)
    torch.testing.assert_close(gradients(copy.deepcopy(model), X), gradients(model, X))


def test_shared_layers_and_weights() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    twin = nn.Conv2d(3, 3, 3, padding=1)
    twin.weight = layer.weight
    act = nn.ReLU(True)
    model = nn.Sequential(layer, act, layer, act, twin)
    done = fastgan.nn.convert(model)
    assert done.replaced == {"Conv2d": 2, "ReLU(inplace)": 1}
    assert model[0] is model[2] and model[4].weight is model[0].weight


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_what_is_left() -> None:
    model = nn.Sequential(Scaled(3, 3, 1), nn.Fold((2, 2), 1), nn.BatchNorm2d(3), nn.Sequential(nn.GELU()))
    done = fastgan.nn.convert(model)
    assert not done.replaced
    assert done.left == {"Scaled": 1, "Fold": 1, "BatchNorm2d": 1, "GELU": 1}
    assert str(done).startswith("replaced nothing; left as they are: Scaled 1, Fold 1, BatchNorm2d 1, GELU 1;")


# A layer of every class, and the shape of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, 2, 1, padding_mode="replicate"), (2, 3, 6, 6)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 3, 2, 1), (2, 3, 6, 6)),
    "Linear": (lambda: nn.Linear(6, 4), (2, 6)),
    "ReLU": (nn.ReLU, (2, 3, 6, 6)),
    "LeakyReLU": (nn.LeakyReLU, (2, 3)),
    "Hardtanh": (nn.Hardtanh, (2, 3)),
    "ReLU6": (nn.ReLU6, (2, 3)),
    "Threshold": (lambda: nn.Threshold(0.1, 0.3), (2, 3)),
    "PReLU": (nn.PReLU, (2, 3)),
    "AvgPool2d": (lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False), (2, 3, 6, 6)),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), (2, 3, 6, 6)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((None, 2)), (2, 3, 6, 6)),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), (2, 3, 6, 6)),
    "ReflectionPad1d": (lambda: nn.ReflectionPad1d(2), (2, 3, 6)),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d((1, 2, 0, 1)), (2, 3, 6, 6)),
    "ReflectionPad3d": (lambda: nn.ReflectionPad3d(1), (2, 3, 4, 4, 4)),
    "ReplicationPad1d": (lambda: nn.ReplicationPad1d(2), (2, 3, 6)),
    "ReplicationPad2d": (lambda: nn.ReplicationPad2d(2), (2, 3, 6, 6)),
    "ReplicationPad3d": (lambda: nn.ReplicationPad3d(1), (2, 3, 4, 4, 4)),
    "Upsample": (lambda: nn.Upsample(scale_factor=0.5, mode="area"), (2, 3, 6, 6)),
    "LayerNorm": (lambda: nn.LayerNorm((3, 6)), (2, 5, 3, 6)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 3)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, affine=True), (2, 3, 6)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3), (2, 3, 4, 4)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(3, track_running_stats=True), (2, 3, 4, 4, 4)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), (2, 5, 6)),
}


def call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x, need_weights=False)[0] if isinstance(module, nn.MultiheadAttention) else module(x)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_of_the_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "SMALL_NUMEL", 0)
    assert set(LAYERS) == {kind.__name__ for kind in LEAN}
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = make().double()
    lean = copy.deepcopy(plain)
    assert fastgan.nn.convert(lean).replaced == {name: 1} and type(lean) is LEAN[type(plain)]
    assert repr(lean) == repr(plain)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = gradients(nn.Sequential(_Call(plain)), x)
    torch.testing.assert_close(gradients(nn.Sequential(_Call(lean)), x), expected)
    torch.testing.assert_close(call(lean, x), call(plain, x))


class _Call(nn.Module):
    """One score for each sample, linear behind the layer, of an input that has passed a weight."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.scale = nn.Parameter(torch.full((), 1.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return call(self.module, x * self.scale).flatten(1).sum(1)


@pytest.mark.parametrize("mask", ["none", "padding", "causal"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights: bool, mask: str) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    lean = copy.deepcopy(plain)
    fastgan.nn.convert(lean)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    how: dict[str, Any] = {"need_weights": need_weights}
    if mask == "padding":
        how["key_padding_mask"] = torch.arange(5) >= torch.tensor([[3], [5]])
    elif mask == "causal":
        how |= {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype), "is_causal": True}

    def values(module: nn.Module) -> list[Tensor]:
        x_ = x.clone().requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y, weights = module(x_, x_, x_, **how)
            (g,) = torch.autograd.grad(y.square().sum(), x_, create_graph=True)
            second = torch.autograd.grad(g.square().sum(), module.in_proj_weight)
        return [y, g, *second, *([weights] if need_weights else [])]

    torch.testing.assert_close(values(lean), values(plain))
    with torch.no_grad():
        torch.testing.assert_close(lean.eval()(x, x, x, **how)[0], plain.eval()(x, x, x, **how)[0])


def test_a_transformer_layer_can_be_penalized() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, dtype=torch.float64)
    plain = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 1, dtype=torch.float64))
    lean = copy.deepcopy(plain)
    done = fastgan.nn.convert(lean)
    assert done.replaced == {"TransformerEncoderLayer": 1, "MultiheadAttention": 1, "Linear": 3, "LayerNorm": 2}
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = gradients(plain, x)
    torch.testing.assert_close(gradients(lean, x), expected)
    fastgan.nn.revert(lean)
    assert lean[0].activation is F.relu and type(lean[0].self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("zeros", [False, True])
def test_ten_adam_steps_are_those_of_the_plain_model(zeros: bool) -> None:
    plain, lean = critic("spectral, old style"), critic("spectral, old style")
    fastgan.nn.convert(lean, zeros=zeros)
    for model in (plain, lean):
        adam = torch.optim.Adam(model.parameters(), 1e-2)
        torch.manual_seed(0)
        for _ in range(10):
            adam.zero_grad()
            penalty(model, torch.randn(4, 3, 8, 8, dtype=torch.float64)).backward()
            adam.step()
    torch.testing.assert_close(lean.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-10)


def test_zeros_make_a_penalty_alone_step_as_in_plain_pytorch() -> None:
    states = []
    for convert, zeros in ((False, False), (True, True), (True, False)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1, False)).double()
        model.load_state_dict(states[0][0] if states else model.state_dict())
        start = copy.deepcopy(model.state_dict())
        if convert:
            fastgan.nn.convert(model, zeros=zeros)
        adam = torch.optim.Adam(model.parameters(), 1e-2)
        for loss in (lambda m: m(X).sum(), lambda m: ops.zero_centered_penalty(m, X)):
            adam.zero_grad()
            loss(model).backward()
            adam.step()
        states.append((start, model.state_dict()))
        bias = model[0].bias.grad
        assert bias is None if convert and not zeros else bias is not None and not bias.any()
    torch.testing.assert_close(states[0][1], states[1][1], rtol=1e-10, atol=1e-12)
    assert not torch.equal(states[0][1]["0.bias"], states[2][1]["0.bias"])


# What users do with a model; each gives tensors that must not depend on its being converted.
TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "functional_call": lambda m: torch.func.functional_call(m, dict(m.named_parameters()), (X,)),
    "grad of grad": lambda m: torch.func.grad(lambda x: torch.func.grad(lambda t: m(t).sum())(x).square().sum())(X),
    "vjp": lambda m: torch.func.vjp(m, X)[1](torch.ones(2, 1, dtype=X.dtype))[0],
    "jvp": lambda m: torch.func.jvp(m, (X,), (X.cos(),))[1],
    "jacrev": lambda m: torch.func.jacrev(m)(X),
    "hessian": lambda m: torch.func.hessian(lambda x: m(x[None]).sum())(X[0, :, :4, :4]),
    "vmap": lambda m: torch.vmap(lambda x: m(x[None]))(X),
    "per-sample gradients": lambda m: torch.vmap(torch.func.grad(lambda x: m(x[None]).sum()))(X),
    "checkpoint": lambda m: _through_checkpoint(m, False),
    "reentrant checkpoint": lambda m: _through_checkpoint(m, True),
    "autocast": lambda m: _under_autocast(m),
    "inference_mode": lambda m: _inference(m),
    "make_fx": lambda m: torch.fx.experimental.proxy_tensor.make_fx(lambda x: m(x).sum())(X)(X),
    "jit.trace": lambda m: torch.jit.trace(m, (X,), check_trace=False)(X + 1),
    "fx": lambda m: fx.symbolic_trace(m)(X),
    "export": lambda m: torch.export.export(m, (X,)).module()(X + 1),
    "compile": lambda m: _compiled(m),
}


def _through_checkpoint(model: nn.Module, reentrant: bool) -> Any:
    x = X.clone().requires_grad_()
    score = checkpoint(model, x, use_reentrant=reentrant).sum()
    first = torch.autograd.grad(score, [x, *model.parameters()]) if not reentrant else ()
    if reentrant:
        score.backward()
        return x.grad
    y = checkpoint(lambda t: penalty(model, t)[None], X.clone().requires_grad_(), use_reentrant=False)
    return [*first, y]


def _under_autocast(model: nn.Module) -> Any:
    single = copy.deepcopy(model).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = single(X.float())
    assert y.dtype == torch.bfloat16
    return [y, *torch.autograd.grad(y.sum(), single.parameters())]


def _inference(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(X).clone()


def _compiled(model: nn.Module) -> Any:
    torch.compiler.reset()
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(X)
    return [y, *torch.autograd.grad(y.sum(), list(model.parameters()))]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str, zeros: bool) -> None:
    if name == "fx" and zeros:
        pytest.skip("a symbolic trace drops hooks, those of PyTorch's own modules too")
    plain, lean = critic().eval(), critic().eval()
    fastgan.nn.convert(lean, zeros=zeros)
    tolerance = {"rtol": 0.05, "atol": 0.05} if name == "autocast" else {}
    torch.testing.assert_close(TRANSFORMS[name](lean), TRANSFORMS[name](plain), **tolerance)


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("when", ["before", "after"])
def test_ddp(when: str) -> None:
    """A penalty with a backward pass of its own, which leaves parameters unused but for `zeros`."""
    model = critic()
    if when == "before":
        fastgan.nn.convert(model, zeros=True)
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        wrapped = DistributedDataParallel(model)
        fastgan.nn.convert(wrapped, zeros=True)
    adam = torch.optim.Adam(wrapped.parameters(), 1e-2)
    for _ in range(2):
        adam.zero_grad()
        wrapped(X).mean().backward()
        adam.step()
        adam.zero_grad()
        ops.zero_centered_penalty(wrapped, X).backward()
        assert all(p.grad is not None for p in wrapped.parameters())
        adam.step()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("when", ["before", "after"])
def test_fully_shard(when: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    plain, model = critic(), critic()
    if when == "before":
        fastgan.nn.convert(model)
    for layer in (model[0], model[1], model):
        fully_shard(layer, mesh=mesh)
    if when == "after":
        assert fastgan.nn.convert(model).replaced["FSDPConv2d"] == 1
    torch.testing.assert_close(model(X), plain(X))
    model(X).sum().backward()
    plain(X).sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad)
    fastgan.nn.revert(model)
    torch.testing.assert_close(model(X), plain(X))
