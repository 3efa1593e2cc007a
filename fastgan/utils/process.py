"""Settings of the process that must come early: memory that malloc keeps, and OpenMP threads that do not spin.

Both are decided before torch is loaded, so nothing here imports it.
"""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt(3). A step frees and allocates the same gigabytes; the system clears every page that was given back before it
# gives it out again, which takes longer than the arithmetic. 32 MiB is the largest block that glibc can be made to keep
# on its heap, and 2 GiB - 1 byte the most that mallopt takes for the trim.
_MALLOPT = {
    "M_MMAP_THRESHOLD": (-3, 32 * 2**20),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 256 * 2**20),
}
KEEP_VARIABLE = "FASTGAN_KEEP_MEMORY"
_THEIR_MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
# A thread that waits for the next parallel region spins first. Beside other programs it spins on a core that they need,
# and on which a thread of its own process may be waiting. 1,000 turns are some microseconds.
SPIN_VARIABLE, SPIN_COUNT = "GOMP_SPINCOUNT", "1000"
FALLBACK_VARIABLE = "PYTORCH_ENABLE_MPS_FALLBACK"
_THEIR_WAITING = (SPIN_VARIABLE, "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc and allocates its memory."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None


def keep_memory() -> str:
    """Let malloc keep what is freed, where it is glibc's and the user has not decided; what was done, in words."""
    if os.environ.get(KEEP_VARIABLE) == "0":
        return f"not kept: {KEEP_VARIABLE}=0"
    theirs = [name for name in _THEIR_MALLOC if name in os.environ]
    if theirs:
        return f"as the environment says: {', '.join(theirs)}"
    other = [name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in os.environ.get("LD_PRELOAD", "")]
    if other:
        return f"kept by {other[0]}, which LD_PRELOAD names"
    library = _glibc()
    if library is None:
        return "not kept: malloc here is not glibc's; one that keeps memory, such as jemalloc, can be preloaded"
    refused = [name for name, (parameter, value) in _MALLOPT.items() if not library.mallopt(parameter, value)]
    return f"not kept: mallopt refuses {', '.join(refused)}" if refused else "kept by glibc's malloc (mallopt)"


def wait_without_spinning() -> str:
    """Let idle OpenMP threads sleep soon, unless the user has decided or torch is loaded; what was done, in words."""
    theirs = [f"{name}={os.environ[name]}" for name in _THEIR_WAITING if name in os.environ]
    if theirs:
        return ", ".join(theirs)
    if "torch" in sys.modules:
        return f"as OpenMP has it: torch was loaded before {SPIN_VARIABLE} could be set"
    os.environ[SPIN_VARIABLE] = SPIN_COUNT
    return f"{SPIN_VARIABLE}={SPIN_COUNT}"


def fall_back_from_mps() -> str:
    """On a Mac, let torch compute what its GPU backend lacks on the CPU, with a warning that names the op."""
    if sys.platform != "darwin":
        return "no Mac"
    if FALLBACK_VARIABLE in os.environ:
        return f"{FALLBACK_VARIABLE}={os.environ[FALLBACK_VARIABLE]}"
    if "torch" in sys.modules:
        return f"as torch has it: torch was loaded before {FALLBACK_VARIABLE} could be set"
    os.environ[FALLBACK_VARIABLE] = "1"
    return f"{FALLBACK_VARIABLE}=1: what the GPU backend lacks runs on the CPU, and torch names it"


def configure_process() -> dict[str, str]:
    """Let malloc keep freed memory for the next step, and let idle OpenMP threads sleep soon.

    The commands call it; a program of one's own calls `fastgan.configure_process()` before it imports torch. What the
    environment sets already stays: `MALLOC_..._`, `GLIBC_TUNABLES`, `OMP_WAIT_POLICY`, `GOMP_SPINCOUNT`,
    `KMP_BLOCKTIME`. `FASTGAN_KEEP_MEMORY=0` leaves malloc as it is. It may be called again.

    Returns:
        What was done about "freed memory", "idle threads" and, on a Mac, "ops that mps lacks", in words.
    """
    found = {"freed memory": keep_memory(), "idle threads": wait_without_spinning()}
    return found | ({"ops that mps lacks": fall_back_from_mps()} if sys.platform == "darwin" else {})
