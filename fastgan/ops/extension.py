"""The compiled libraries of csrc/: found, else built on first use, and loaded; or the reason why not.

There are two, `cpu` (C++) and `cuda` (CUDA C++), each one shared library against torch's stable ABI, so that one binary
serves torch 2.10 and later, any Python and none. `compile_library` is the one place where a compiler runs: setup.py
calls it for the wheel (it loads this file by its path, so nothing of fastgan or torch is imported up here), and `cpu`
and `cuda` call it on first use, into a cache shared by all processes of a user. Whatever goes wrong there, ops run in
plain PyTorch: one warning says why.

FASTGAN_BUILD=0 leaves the compiled libraries alone, FASTGAN_BUILD=force turns a failure into an error; CXX and NVCC
name other compilers, XDG_CACHE_HOME another cache.
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

# The flags of ATen's own kernels, and ATen chooses among them too: what torch runs here, these libraries run.
# A library is compiled as a whole for one instruction set. Mixing them in one would let the linker keep an inline
# function's AVX-512 copy for everyone.
INSTRUCTIONS: dict[str, list[str]] = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
CUDA_ARCHITECTURES = (80, 90, 100)

# -fno-trapping-math and -fno-math-errno change no result; without them few conditionals and roots vectorize.
_COMMON = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
_CPU = ["-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno"]
_TIMEOUT = 900.0  # seconds for one compiler call: a hang must not hold every process that waits for the lock


class Unavailable(Exception):
    """There is no library here, and nothing is wrong: no GPU, another system."""


class BuildError(RuntimeError):
    """A library could not be built. `output` is what the compiler said."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


def source_folder() -> Path:
    """csrc/ of an installed package, or of the repository this file is in."""
    here = Path(__file__).resolve()
    for folder in (here.parents[1] / "csrc", here.parents[2] / "csrc"):
        if (folder / "cpu" / "bindings.cpp").is_file():
            return folder
    raise BuildError(f"the sources are missing: no csrc/ in {here.parents[1]} or {here.parents[2]}")


def source_digest(library: str, sources: Path) -> str:
    """Changes with any file that `library` is compiled from, by name and content, not by place."""
    digest = hashlib.sha256()
    for file in sorted([*sources.iterdir(), *(sources / library).iterdir()]):
        if file.suffix in (".h", LIBRARIES[library]):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(sources).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def instructions() -> list[str]:
    """Instruction sets that a wheel for this machine's architecture carries."""
    return list(INSTRUCTIONS) if platform.machine().lower() in ("x86_64", "amd64") else ["baseline"]


def _compiler(library: str) -> list[str]:
    """The command, without flags; it exists."""
    variable, usual = ("CXX", ["g++", "c++", "clang++"]) if library == "cpu" else ("NVCC", ["nvcc"])
    asked = os.environ.get(variable, "").strip()
    if asked:
        command = shlex.split(asked)
        found = shutil.which(command[0])
        if found is None:
            raise BuildError(f"there is no compiler {command[0]!r}, which the variable {variable} names")
        return [found, *command[1:]]
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] if library == "cuda" else []
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home] + usual
    if library == "cuda":
        candidates.append("/usr/local/cuda/bin/nvcc")
    for name in candidates:
        found = shutil.which(name)
        if found is not None:
            return [found]
    raise BuildError(f"there is no compiler: neither {', '.join(usual)} nor the variable {variable} names one")


def _flags(library: str, level: str) -> list[str]:
    """To compile one file, without paths and without what the compiler itself must be asked."""
    if library == "cpu":
        return [*_COMMON, *_CPU, *INSTRUCTIONS[level]]
    # The CUDA runtime is linked in statically (nvcc's default), so the library loads where there is none.
    return [*_COMMON, "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", "--threads=2"]


def _targets(nvcc: list[str], level: str) -> list[str]:
    """Machine code for each architecture of `level`, "80-90" say, that this nvcc knows, and PTX for later ones."""
    known = sorted({int(number) for number in re.findall(r"compute_(\d+)\b", _run([*nvcc, "--list-gpu-arch"]))})
    asked = CUDA_ARCHITECTURES if level == "all" else tuple(int(number) for number in level.split("-"))
    chosen = [number for number in asked if number in known]
    # Before 12.8 there is no sm_100: the PTX of the newest below it runs there too.
    below = [number for number in known if number <= max(asked)]
    if not below:
        raise BuildError(f"{nvcc[0]} knows none of the architectures {', '.join(map(str, asked))}")
    return [
        *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in chosen),
        f"-gencode=arch=compute_{below[-1]},code=compute_{below[-1]}",
    ]


def _torch_folder() -> Path:
    """Where torch's headers and libraries are; torch itself is not imported for it."""
    module = sys.modules.get("torch")
    if module is not None:
        folder = Path(str(module.__file__)).parent
    else:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise BuildError("torch is not installed")
        folder = Path(spec.origin).parent
    if not (folder / "include" / "torch" / "csrc" / "stable" / "ops.h").is_file():
        raise BuildError(f"torch's headers have no stable ABI (2.10 and later have): {folder / 'include'}")
    return folder


def _run(command: Sequence[str]) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, timeout=_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}", str(error)) from error
    said = done.stdout + done.stderr
    if done.returncode != 0:
        first = next((line.strip() for line in said.splitlines() if re.search(r"\b(error|fatal)\b", line)), "")
        first = first or f"it ended with status {done.returncode}"
        raise BuildError(f"{os.path.basename(command[0])} failed: {first[:200]}", f"{shlex.join(command)}\n{said}")
    return said


def compile_library(library: str, target: Path, level: str, sources: Path | None = None) -> None:
    """Compile csrc/cpu or csrc/cuda into one shared library.

    Args:
        library: "cpu" or "cuda".
        target: the file to write; it appears whole, or not at all.
        level: for "cpu" a key of INSTRUCTIONS; for "cuda" the architectures, "80-90" say, or "all" of
            CUDA_ARCHITECTURES.
        sources: the folder csrc/; default the package's own.

    Raises:
        BuildError: no compiler, no torch, or the compiler failed.
    """
    sources = sources or source_folder()
    compiler = _compiler(library)
    flags = _flags(library, level) + (_targets(compiler, level) if library == "cuda" else [])
    torch_folder = _torch_folder()
    # No path of the building machine goes into the library: __FILE__ is in the messages of failed checks.
    host = "-Xcompiler=" if library == "cuda" else ""
    names = [f"{host}-ffile-prefix-map={sources}=csrc", f"{host}-ffile-prefix-map={torch_folder}=torch"]
    include = [f"-I{sources}", f"-I{torch_folder / 'include'}"]
    files = sorted((sources / library).glob(f"*{LIBRARIES[library]}"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        objects = [os.path.join(folder, f"{file.stem}.o") for file in files]
        commands = [
            [*compiler, *flags, *names, *include, "-c", str(file), "-o", made]
            for file, made in zip(files, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(_run, commands))
        linked = os.path.join(folder, "linked.so")
        _run([*compiler, "-shared", *objects, "-o", linked, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"])
        os.replace(linked, target)


def prebuilt_name(library: str, level: str, sources: Path) -> str:
    """File name of a wheel's library: one made from other sources is not taken for it."""
    return f"{library}-{level}-{source_digest(library, sources)}.so"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgan" / "extension"


def _key(library: str, level: str, sources: Path) -> str:
    import torch

    compiler = _compiler(library)
    program = os.path.realpath(compiler[0])
    status = os.stat(program)  # asking the compiler its version would cost every process a start of it
    parts = [
        *(source_digest(library, sources), platform.system(), platform.machine(), torch.__version__),
        *(*compiler, program, str(status.st_size), str(status.st_mtime_ns)),
        *(*_flags(library, level), *map(str, CUDA_ARCHITECTURES)),
    ]
    return f"{library}-{level}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time. Where the file system has no locks each builds for itself: the result is the same."""
    import fcntl

    with open(file, "a") as handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _cached(folder: Path, key: str) -> Path | None:
    """The library, if it is whole: its name ends with its content's digest. Loading a truncated one is a SIGBUS."""
    for file in sorted(folder.glob(f"{key}-*.so")):
        with contextlib.suppress(OSError):
            if file.stem.rpartition("-")[2] == _content(file):
                return file
    return None


def cached_library(library: str, level: str, sources: Path | None = None, folder: Path | None = None) -> Path:
    """The library for this machine, compiled if the cache has none.

    Processes that start at once compile once: the others wait, and share a failure as they share a library.

    Raises:
        BuildError: as `compile_library`; the message names the log with the compiler's words.
    """
    sources, folder = sources or source_folder(), folder or cache_folder()
    key = _key(library, level, sources)
    found = _cached(folder, key)
    if found is not None:
        return found
    log = folder / f"{key}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        began = time.time()
        with _locked(folder / f"{key}.lock"):
            found = _cached(folder, key)
            if found is not None:
                return found
            if log.exists() and log.stat().st_mtime >= began:
                raise BuildError(log.read_text().split("\n", 1)[0])
            for broken in folder.glob(f"{key}-*.so"):
                broken.unlink()
            if sys.stderr.isatty():
                print(f"fastgan: compiling its {library} kernels; this happens once", file=sys.stderr)
            made = folder / f"{key}.{os.getpid()}.tmp"
            try:
                compile_library(library, made, level, sources)
            except BuildError as error:
                message = f"{error}; the compiler's words are in {log}"
                log.write_text(f"{message}\n{error.output}\n")
                raise BuildError(message, error.output) from error
            log.unlink(missing_ok=True)
            found = folder / f"{key}-{_content(made)}.so"
            os.replace(made, found)
            return found
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be used ({error}); XDG_CACHE_HOME names another") from error


_found: dict[str, str | None] = {}  # library -> None when loaded, else the reason why not
_files: dict[str, Path] = {}
_lock = threading.RLock()


def _wish() -> str:
    wish = os.environ.get("FASTGAN_BUILD", "").strip().lower()
    if wish not in ("", "0", "1", "force"):
        raise ValueError(f"FASTGAN_BUILD must be 0, 1 or force, got {wish!r}")
    return wish


def level() -> str:
    """The instruction set that torch itself uses here, ATEN_CPU_CAPABILITY included."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    if len(instructions()) > 1:
        for name in ("avx512", "avx2"):
            if capability.lower().startswith(name):
                return name
    return "baseline"


def architectures() -> str:
    """Those of the GPUs here: compiled on first use, the CUDA library is for this machine alone, which takes less."""
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
    prebuilt = Path(__file__).resolve().parent / "lib" / prebuilt_name(library, kind, sources)
    if prebuilt.is_file():
        with contextlib.suppress(OSError):  # made for another C library, say: then it is built here
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
    reason = cpu()  # it defines what the CUDA library registers kernels for
    if reason is not None:
        raise Unavailable(f"the CUDA library needs the CPU library: {reason}")
    try:
        _compiler("cuda")
    except BuildError as error:
        # Most machines with a GPU have no CUDA toolkit, and triton needs none: no reason to warn.
        if _wish() != "force":
            raise Unavailable(str(error)) from error
        raise
    file = _load("cuda")
    refusal: str = torch.ops.fastgan.cuda_refusal()
    if refusal:
        raise Unavailable(refusal)
    return file


def _state(library: str, load: Callable[[], Path]) -> str | None:
    if library in _found:
        return _found[library]
    with _lock:
        if library in _found:
            return _found[library]
        wish = _wish()
        try:
            if wish == "0":
                raise Unavailable("FASTGAN_BUILD=0 switches it off")
            _files[library] = load()
            _found[library] = None
        except Unavailable as reason:
            _found[library] = str(reason)
        except Exception as error:  # whatever it is, plain PyTorch can go on
            if wish == "force":
                raise RuntimeError(f"FASTGAN_BUILD=force, and the {library} library is not there: {error}") from error
            _found[library] = str(error)
            warnings.warn(
                f"fastgan's compiled {library} kernels cannot be used, and plain PyTorch runs instead: {error} "
                "(FASTGAN_BUILD=0 silences this)",
                RuntimeWarning,
                stacklevel=3,
            )
        return _found[library]


def cpu() -> str | None:
    """None once the CPU library is loaded (its ops are torch.ops.fastgan.*), else the reason why it is not.

    The first call looks for it, and compiles it where there is none (seconds); the answer then stays.

    Raises:
        RuntimeError: it cannot be built, under FASTGAN_BUILD=force.
        ValueError: FASTGAN_BUILD has another value than 0, 1 or force.
    """
    return _state("cpu", lambda: _load("cpu"))


def cuda() -> str | None:
    """As `cpu`, for the CUDA library: without a GPU, nvcc or a driver that runs it there is a reason, not a warning."""
    return _state("cuda", _load_cuda)


def file(library: str) -> Path | None:
    """Where the library that is loaded was loaded from."""
    return _files.get(library)
