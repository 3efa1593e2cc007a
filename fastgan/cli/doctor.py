"""What is here and what is not: `fastgan doctor`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

from fastgan import __version__
from fastgan.cli.main import command

# distribution -> (what it is for, the command that installs it)
_PACKAGES = {
    "torch": ("everything", "pip install torch"),
    "triton": ("GPU kernels", "pip install triton"),
    "numpy": ("everything", "pip install numpy"),
    "deepspeed": ("training with a launcher, many processes, ZeRO", "pip install 'fastgan[train]'"),
    "torchvision": ("--data mnist and celeba", "pip install 'fastgan[train]'"),
    "scikit-learn": ("--data digits", "pip install 'fastgan[train]'"),
    "pillow": ("image files", "pip install 'fastgan[train]'"),
    "safetensors": ("checkpoints", "pip install 'fastgan[train]'"),
    "pydantic": ("configuration", "pip install 'fastgan[train]'"),
    "pyyaml": ("configuration", "pip install 'fastgan[train]'"),
    "tqdm": ("the progress bar", "pip install 'fastgan[train]'"),
    "tyro": ("the command line", "pip install 'fastgan[train]'"),
    "tensorboard": ("TensorBoard events", "pip install 'fastgan[train]'"),
    "torch-fidelity": ("evaluate: features of images, kid, prdc", "pip install 'fastgan[eval]'"),
    "torchmetrics": ("evaluate: msssim", "pip install 'fastgan[eval]'"),
    "timm": ("evaluate: --features dinov2", "pip install 'fastgan[eval]'"),
    "onnx": ("export --format onnx", "pip install 'fastgan[export]'"),
    "onnxruntime": ("export --format onnx", "pip install 'fastgan[export]'"),
    "onnxscript": ("export --format onnx", "pip install 'fastgan[export]'"),
    "huggingface-hub": ("from_pretrained, push_to_hub", "pip install 'fastgan[export]'"),
    "gradio": ("explore", "pip install 'fastgan[explore]'"),
}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torchvision_fault() -> str | None:
    """A torchvision built for another torch installs but does not import."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        return str(error).splitlines()[0]
    return None


@command
def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="fastgan doctor", description=__doc__).parse_args(argv)
    print(f"fastgan {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    missing = []
    for name, (purpose, install) in _PACKAGES.items():
        version = _version(name)
        print(f"  {name:15} {version or 'missing':14} {purpose}")
        if version is None and not (name == "triton" and platform.system() != "Linux"):
            missing.append(f"{name} ({purpose}): {install}")
    import torch

    fault = _torchvision_fault() if _version("torchvision") else None
    if fault:
        missing.append(
            f"torchvision is installed but does not import ({fault}): pip install --force-reinstall torchvision"
        )
    from fastgan.data.loading import dali

    no_dali = dali.missing()
    if no_dali and platform.system() == "Linux":
        missing.append(f"DALI (--pipeline dali, image files decoded faster): {no_dali}")
    print("data pipelines")
    print("  cache, torch: everywhere")
    print(f"  dali: {no_dali or f'DALI {dali.version()}'}")
    print("devices")
    print(f"  cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            print(
                f"  cuda:{i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"sm_{properties.major}{properties.minor}"
            )
    else:
        built = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch has no CUDA"
        print(f"  no GPU: {built}, and finds no device")
    from fastgan import ops
    from fastgan.ops import extension

    print("compiled kernels")
    for library, state in (("cpu", extension.cpu()), ("cuda", extension.cuda())):
        print(f"  {library}: {state or extension.file(library)}")
    print("ops")
    from fastgan.ops.backend import OPS

    for op in OPS:
        name, reason = next(iter(ops.backends(op).items()))
        print(f"  {op:29} {name}: {reason}")
    print("missing" if missing else "nothing is missing")
    for line in missing:
        print(f"  {line}")
    return 0
