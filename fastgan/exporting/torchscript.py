"""What a TorchScript file calls, read from its text before anything of it runs.

A TorchScript archive holds a program in a subset of Python, which `torch.jit.load` compiles and which then may call any
operator that is registered, those that read and write files among them.
"""

from __future__ import annotations

import ast
import io
import zipfile

# What traced generators are made of, and what is near to that: pure functions of tensors and numbers.
_FUNCTIONS = frozenset(
    """
    _convolution abs add adaptive_avg_pool2d amax arange avg_pool2d batch_norm bmm cat chunk clamp contiguous
    conv2d conv_transpose2d cos detach div dropout elu embedding exp expand flatten full gelu group_norm
    hardtanh instance_norm layer_norm leaky_relu lerp linear log matmul max max_pool2d mean min mul neg ones
    permute pixel_shuffle pow relu repeat repeat_interleave reshape rsqrt rsub select sigmoid silu sin size
    slice softmax softplus split sqrt square squeeze stack sub sum tanh to transpose unbind unflatten unsqueeze
    upsample_bilinear2d upsample_nearest2d view zeros
    """.split()
)
_PLAIN = {"annotate", "getattr", "int", "float", "bool", "uninitialized"}


def forbidden(content: bytes) -> str | None:
    """The first thing in the archive's code that is not a call of a pure function; None where there is none."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    for name in archive.namelist():
        if "/code/" not in name or not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(archive.read(name).decode())):
            if isinstance(node, ast.FunctionDef) and node.name != "forward":
                return f"it has a function {node.name}"
            if isinstance(node, ast.Call) and not _allowed(node.func):
                return f"it calls {ast.unparse(node.func)[:60]}"
    return None


def _allowed(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in _PLAIN
    if not isinstance(function, ast.Attribute):
        return False
    if function.attr == "forward":
        return True
    text = ast.unparse(function)
    return text == "ops.prim.NumToTensor" or (text.startswith("torch.") and text.removeprefix("torch.") in _FUNCTIONS)
