"""Private names of torch are used in one file, and each has a fallback where torch no longer has it."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernelcases import random

import fastgan
from fastgan.ops.dispatch import torch_private
from fastgan.utils import torch_modes

PACKAGE = Path(fastgan.__file__).parent
FILES = [file for room in ("ops", "nn", "objectives", "models") for file in sorted((PACKAGE / room).rglob("*.py"))]


def private_names(source: str) -> list[str]:
    """Dotted names with a private part behind `torch` or `forward_ad`, and assignments to attributes of Dynamo."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            hidden = [part for part in rest if part.startswith("_") and not part.startswith("__")]
            if (first in ("torch", "forward_ad") and hidden) or "_dynamo" in name:
                found.append(name)
    return found


def test_private_names_are_found() -> None:
    source = "import torch._dynamo\nfrom torch._C import _nn\ntorch.ops.aten._x()\nforward_ad._level\nf._dynamo_y = 1"
    assert len(private_names(source)) >= 5
    assert private_names("torch.nn.Linear.__init__\nself._x\nfrom torch import nn") == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_private_names_of_torch_are_in_one_file(file: Path) -> None:
    if file.name != "torch_private.py":
        assert private_names(file.read_text()) == []


def changed(module: ModuleType, old: str, new: str) -> SimpleNamespace:
    """What `module` is with another text."""
    source = Path(str(module.__file__)).read_text()
    assert old in source
    names: dict[str, object] = {"__name__": "without"}
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def without() -> SimpleNamespace:
    """`fastgan.ops.dispatch.torch_private` for a torch that has none of the names."""
    return changed(torch_private, "import private as _private", "import private as _\n_private = lambda name: None")


@pytest.fixture(scope="module")
def without_modes() -> SimpleNamespace:
    """`fastgan.utils.torch_modes` for the same."""
    return changed(torch_modes, "    for part in name.split(", "    return None\n    for part in name.split(")


def test_every_name_exists_in_this_torch(without: SimpleNamespace, without_modes: SimpleNamespace) -> None:
    assert torch_private.will_execute_node is not None and without.will_execute_node is None
    assert without.saved_tensors_are_hooked() and not torch_private.saved_tensors_are_hooked()
    assert torch_private.current_backward is not None and torch_private.current_backward() == -1
    assert without.current_backward is None
    assert torch_modes.dispatch_modes() == 0 and without_modes.dispatch_modes() == 1
    for module, names in (
        (torch_private, ("upsample_nearest2d", "upsample_bilinear2d")),
        (torch_modes, ("peek_interpreter_stack", "is_tracing")),
    ):
        for name in names:
            assert "lambda" not in getattr(getattr(module, name), "__name__", ""), name


def test_fallbacks_compute_the_same(without: SimpleNamespace, without_modes: SimpleNamespace) -> None:
    x = random(2, 3, 4, 6)
    assert torch.equal(without.upsample_nearest2d(x, None, (2.0, 2.0)), F.interpolate(x, scale_factor=2))
    for names in (torch_private, without):
        torch.testing.assert_close(names.upsample_bilinear2d(x, None, False, (0.5, 0.5)), F.avg_pool2d(x, 2))
        tensors = [torch.tensor([-3.0, 0.5, 3.0]), torch.tensor([[2.0]])]
        names.clamp_all_(tensors, -1.0, 1.0)
        assert [t.tolist() for t in tensors] == [[-1.0, 0.5, 1.0], [[1.0]]]
        assert not names.in_forward_mode()
        with torch.autograd.forward_ad.dual_level():
            assert names.in_forward_mode()
    for names in (torch_modes, without_modes):
        assert not names.is_tracing() and names.peek_interpreter_stack() is None and not names.in_transform()
    assert without.dispatcher_has_kernel("fastgan::anything", "CPU")
