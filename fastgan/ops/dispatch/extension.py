"""Finds, builds and loads the compiled libraries of csrc/.

There are two, `cpu` (C++) and `cuda` (CUDA C++), each a shared library against torch's stable ABI: one binary works
with torch 2.10 and later and with any Python. Only `compile_library` runs a compiler: setup.py calls it for a wheel (it
loads this file by its path, so nothing of fastgan or torch is imported at the top), and `cpu` and `cuda` call it on
first use, into a cache that all processes of a user share. If anything fails, one warning says why and the ops run in
plain PyTorch.

Environment variables: FASTGAN_BUILD=0 does not use the compiled libraries, FASTGAN_BUILD=force turns a failure into an
error; CXX and NVCC name other compilers, XDG_CACHE_HOME another cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARIES = {"cpu": ".cpp", "cuda": ".cu"}

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c")
# ATen compiles its kernels with these flags and chooses among them when it runs; these libraries follow its choice. The
# last is ours: with products of bfloat16, which ATen leaves to oneDNN.
# A library is compiled as a whole for one instruction set: with several in one, the linker could keep the AVX-512 copy
# of an inline function for all of them.
INSTRUCTIONS: dict[str, list[str]] = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [*_AVX512],
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
}
CUDA_ARCHITECTURES = (80, 90, 100)

# -fno-trapping-math and -fno-math-errno change no result; without them few conditionals and roots vectorize.
_COMMON = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
_CPU = ["-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno"]
_TIMEOUT = 900.0  # seconds for one compiler call: others wait for the lock meanwhile


class Unavailable(Exception):
    """There is no library here, and nothing is wrong: no GPU, or an unsupported system."""


class BuildError(RuntimeError):
    """A library could not be built. `output` is the output of the compiler."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


def source_folder() -> Path:
    """csrc/ of an installed package, or of the repository that this file is in."""
    here = Path(__file__).resolve()
    for folder in (here.parents[2] / "csrc", here.parents[3] / "csrc"):
        if (folder / "cpu" / "library.cpp").is_file():
            return folder
    raise BuildError(f"the sources are missing: no csrc/ in {here.parents[2]} or {here.parents[3]}")


def source_digest(library: str, sources: Path) -> str:
    """Digest of the names and contents of the files from which `library` is compiled, wherever they are."""
    digest = hashlib.sha256()
    for file in sorted([*sources.iterdir(), *(sources / library).iterdir()]):
        if file.suffix in (".h", LIBRARIES[library]):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(sources).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def instructions() -> list[str]:
    """Instruction sets for which a wheel for this machine's architecture has a library."""
    return list(INSTRUCTIONS) if platform.machine().lower() in ("x86_64", "amd64") else ["baseline"]


def _compiler(library: str) -> list[str]:
    """The command of an existing compiler, without flags."""
    variable, usual = ("CXX", ["g++", "c++", "clang++"]) if library == "cpu" else ("NVCC", ["nvcc"])
    requested = os.environ.get(variable, "").strip()
    if requested:
        command = shlex.split(requested)
        program = shutil.which(command[0])
        if program is None:
            raise BuildError(f"there is no compiler {command[0]!r}, which the variable {variable} names")
        return [program, *command[1:]]
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] if library == "cuda" else []
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home] + usual
    if library == "cuda":
        candidates.append("/usr/local/cuda/bin/nvcc")
    for name in candidates:
        program = shutil.which(name)
        if program is not None:
            return [program]
    raise BuildError(f"there is no compiler: {', '.join(usual)} not found, and the variable {variable} names none")


def _flags(library: str, level: str) -> list[str]:
    """Flags to compile one file, without paths and without those that depend on the compiler's version."""
    if library == "cpu":
        return [*_COMMON, *_CPU, *INSTRUCTIONS[level]]
    # nvcc links the CUDA runtime statically by default, so the library loads on machines without it.
    return [*_COMMON, "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", "--threads=2"]


def _targets(nvcc: list[str], level: str) -> list[str]:
    """Flags for machine code of each architecture in `level` ("80-90", say) that nvcc knows, and PTX for later ones."""
    known = sorted({int(number) for number in re.findall(r"compute_(\d+)\b", _run([*nvcc, "--list-gpu-arch"]))})
    requested = CUDA_ARCHITECTURES if level == "all" else tuple(int(number) for number in level.split("-"))
    chosen = [number for number in requested if number in known]
    # Before 12.8 there is no sm_100: the PTX of the newest below it runs there too.
    below = [number for number in known if number <= max(requested)]
    if not below:
        raise BuildError(f"{nvcc[0]} knows none of the architectures {', '.join(map(str, requested))}")
    return [
        *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in chosen),
        f"-gencode=arch=compute_{below[-1]},code=compute_{below[-1]}",
    ]


def _torch_folder() -> Path:
    """The folder with torch's headers and libraries; does not import torch."""
    module = sys.modules.get("torch")
    if module is not None:
        folder = Path(str(module.__file__)).parent
    else:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise BuildError("torch is not installed")
        folder = Path(spec.origin).parent
    if not (folder / "include" / "torch" / "csrc" / "stable" / "ops.h").is_file():
        raise BuildError(f"no stable ABI in torch's headers, which torch 2.10 and later have: {folder / 'include'}")
    return folder


def _run(command: Sequence[str]) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, timeout=_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}", str(error)) from error
    output = done.stdout + done.stderr
    if done.returncode != 0:
        first = next((line.strip() for line in output.splitlines() if re.search(r"\b(error|fatal)\b", line)), "")
        first = first or f"exit code {done.returncode}"
        raise BuildError(f"{os.path.basename(command[0])} failed: {first[:200]}", f"{shlex.join(command)}\n{output}")
    return output


def compile_library(library: str, target: Path, level: str, sources: Path | None = None) -> None:
    """Compile csrc/cpu or csrc/cuda into one shared library.

    Args:
        library: "cpu" or "cuda".
        target: the file to write, atomically.
        level: for "cpu" a key of INSTRUCTIONS; for "cuda" the architectures, such as "80-90", or "all" of
            CUDA_ARCHITECTURES.
        sources: the folder csrc/; default the package's own.

    Raises:
        BuildError: no compiler, no torch, or the compiler failed.
    """
    sources = sources or source_folder()
    compiler = _compiler(library)
    flags = _flags(library, level) + (_targets(compiler, level) if library == "cuda" else [])
    torch_folder = _torch_folder()
    # The messages of failed checks contain __FILE__: keep paths of the building machine out of the library.
    host = "-Xcompiler=" if library == "cuda" else ""
    prefixes = [f"{host}-ffile-prefix-map={sources}=csrc", f"{host}-ffile-prefix-map={torch_folder}=torch"]
    include = [f"-I{sources}", f"-I{torch_folder / 'include'}"]
    files = sorted((sources / library).glob(f"*{LIBRARIES[library]}"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        objects = [os.path.join(folder, f"{file.stem}.o") for file in files]
        commands = [
            [*compiler, *flags, *prefixes, *include, "-c", str(file), "-o", made]
            for file, made in zip(files, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(_run, commands))
        linked = os.path.join(folder, "linked.so")
        _run([*compiler, "-shared", *objects, "-o", linked, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"])
        os.replace(linked, target)


def prebuilt_name(library: str, level: str, sources: Path) -> str:
    """File name of a wheel's library; it depends on the sources, so that an old library is not used."""
    return f"{library}-{level}-{source_digest(library, sources)}.so"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgan" / "extension"


def _key(library: str, level: str, sources: Path) -> str:
    import torch

    compiler = _compiler(library)
    program = os.path.realpath(compiler[0])
    status = os.stat(program)  # in place of the compiler's version: starting it would delay every process
    parts = [
        *(source_digest(library, sources), platform.system(), platform.machine(), torch.__version__),
        *(*compiler, program, str(status.st_size), str(status.st_mtime_ns)),
        *(*_flags(library, level), *map(str, CUDA_ARCHITECTURES)),
    ]
    return f"{library}-{level}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lock for one process at a time. On file systems without locks every process builds, with the same result."""
    import fcntl

    with open(file, "a") as handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _cached(folder: Path, key: str) -> Path | None:
    """The library, if its content has the digest in its name: loading a truncated one would end in SIGBUS."""
    for file in sorted(folder.glob(f"{key}-*.so")):
        with contextlib.suppress(OSError):
            if file.stem.rpartition("-")[2] == _content(file):
                return file
    return None


def cached_library(library: str, level: str, sources: Path | None = None, folder: Path | None = None) -> Path:
    """The library for this machine, compiled if the cache has none.

    Of processes that start together one compiles; the others wait and share its library or its failure.

    Raises:
        BuildError: as `compile_library`; the message names the log with the compiler's output.
    """
    sources, folder = sources or source_folder(), folder or cache_folder()
    key = _key(library, level, sources)
    cached = _cached(folder, key)
    if cached is not None:
        return cached
    log = folder / f"{key}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        started = time.time()
        with _locked(folder / f"{key}.lock"):
            cached = _cached(folder, key)
            if cached is not None:
                return cached
            if log.exists() and log.stat().st_mtime >= started:
                raise BuildError(log.read_text().split("\n", 1)[0])
            for broken in folder.glob(f"{key}-*.so"):
                broken.unlink()
            if sys.stderr.isatty():
                print(f"fastgan: compiling its {library} kernels; this happens once", file=sys.stderr)
            built = folder / f"{key}.{os.getpid()}.tmp"
            try:
                compile_library(library, built, level, sources)
            except BuildError as error:
                message = f"{error}; compiler output: {log}"
                log.write_text(f"{message}\n{error.output}\n")
                raise BuildError(message, error.output) from error
            log.unlink(missing_ok=True)
            cached = folder / f"{key}-{_content(built)}.so"
            os.replace(built, cached)
            return cached
    except OSError as error:
        raise BuildError(
            f"the cache folder {folder} cannot be used ({error}); set XDG_CACHE_HOME to another"
        ) from error


_reasons: dict[str, str | None] = {}  # library -> why it is not loaded; None when it is
_files: dict[str, Path] = {}  # library -> where it was loaded from
_lock = threading.RLock()


def _build_mode() -> str:
    mode = os.environ.get("FASTGAN_BUILD", "").strip().lower()
    if mode not in ("", "0", "1", "force"):
        raise ValueError(f"FASTGAN_BUILD must be 0, 1 or force, got {mode!r}")
    return mode


def level() -> str:
    """The instruction set that torch uses here; the variable ATEN_CPU_CAPABILITY changes it."""
    import torch

    from fastgan.utils.system import cpu_flags

    capability = torch.backends.cpu.get_cpu_capability().lower()
    if len(instructions()) == 1 or not capability.startswith(("avx512", "avx2")):
        return "baseline"
    if capability.startswith("avx2"):
        return "avx2"
    return "avx512_bf16" if "avx512_bf16" in cpu_flags() else "avx512"


def architectures() -> str:
    """The architectures of the GPUs here: on first use the CUDA library is compiled for them alone, which is faster."""
    import torch

    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return "-".join(f"{major}{minor}" for major, minor in sorted(capabilities))


def _open(file: Path) -> None:
    import torch

    torch.ops.load_library(str(file))


def _load(library: str) -> Path:
    if os.name == "nt":
        raise Unavailable("the compiled libraries are not built on Windows")
    sources = source_folder()
    kind = level() if library == "cpu" else architectures()
    prebuilt = Path(__file__).resolve().parents[1] / "lib" / prebuilt_name(library, kind, sources)
    if prebuilt.is_file():
        with contextlib.suppress(OSError):  # built for another C library, for example: compile it here
            _open(prebuilt)
            return prebuilt
    file = cached_library(library, kind, sources)
    try:
        _open(file)
    except OSError as error:
        raise BuildError(f"{file} does not load: {error}") from error
    return file


def _load_cuda() -> Path:
    import torch

    if not torch.cuda.is_available():
        raise Unavailable("there is no GPU that this torch can use")
    if torch.version.hip is not None:
        raise Unavailable("this torch is built for ROCm, and the kernels are CUDA")
    reason = cpu()  # the CPU library defines the ops for which the CUDA library registers kernels
    if reason is not None:
        raise Unavailable(f"the CUDA library needs the CPU library: {reason}")
    try:
        _compiler("cuda")
    except BuildError as error:
        # Most machines with a GPU have no CUDA toolkit, and Triton needs none: no warning.
        if _build_mode() != "force":
            raise Unavailable(str(error)) from error
        raise
    file = _load("cuda")
    refusal: str = torch.ops.fastgan.cuda_refusal()
    if refusal:
        raise Unavailable(refusal)
    return file


def _state(library: str, load: Callable[[], Path]) -> str | None:
    if library in _reasons:
        return _reasons[library]
    with _lock:
        if library in _reasons:
            return _reasons[library]
        mode = _build_mode()
        try:
            if mode == "0":
                raise Unavailable("switched off by FASTGAN_BUILD=0")
            _files[library] = load()
            _reasons[library] = None
        except Unavailable as reason:
            _reasons[library] = str(reason)
        except Exception as error:  # plain PyTorch can run in any case
            if mode == "force":
                raise RuntimeError(f"FASTGAN_BUILD=force, but the {library} library cannot be used: {error}") from error
            _reasons[library] = str(error)
            warnings.warn(
                f"fastgan's compiled {library} kernels cannot be used, plain PyTorch runs instead: {error} "
                "(FASTGAN_BUILD=0 silences this)",
                RuntimeWarning,
                stacklevel=3,
            )
        return _reasons[library]


def cpu() -> str | None:
    """Load the CPU library: its ops are then torch.ops.fastgan.*.

    The first call finds the library, or compiles it in some seconds; later calls return the same answer.

    Returns:
        None when it is loaded, else the reason why not.

    Raises:
        RuntimeError: the library cannot be built, under FASTGAN_BUILD=force.
        ValueError: FASTGAN_BUILD has another value than 0, 1 or force.
    """
    return _state("cpu", lambda: _load("cpu"))


def cuda() -> str | None:
    """As `cpu`, for the CUDA library. There is no warning without a GPU, nvcc or a suitable driver."""
    return _state("cuda", _load_cuda)


def file(library: str) -> Path | None:
    """The file from which a library was loaded, if it was."""
    return _files.get(library)
