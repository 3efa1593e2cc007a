"""`make gpu`: the first fifteen minutes on a GPU, in pieces; needs no network and no installation.

    python3 benchmarks/gpu.py --out DIR --minutes 9    # the first call; the same again: what failed or is left
    python3 benchmarks/gpu.py --list                   # the pieces
    python3 benchmarks/gpu.py --out DIR --rehearse     # each piece on the CPU, at tiny sizes

Each piece is a process of its own with its own time limit, most telling first, and every measurement is written at
once. DIR gets results.json, which the next call continues from, log.txt, and table.md, which is printed too: its first
table is the README's. Packages that Python lacks may lie as wheels in wheels/ beside benchmarks/.
docs/gpu.md says what is measured. The exit code is 0, 1 after a fault, 2 if pieces are left for lack of time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # fastgan need not be installed

from benchmarks.gpu_pieces import table
from benchmarks.gpu_pieces.pieces import PIECES, run_piece
from fastgan.utils.files import write_atomic

_SOURCES = ("fastgan", "kernels", "csrc", "benchmarks", "tests")
_LEAST_SECONDS = 20.0  # a piece is not begun for less


def source_digest() -> str:
    """Digest of the sources, as a machine that is lent may have no git."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".cu", ".cpp", ".h", ".json") and "results" not in file.parts:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """What results must have in common. This process makes no use of the GPU."""
    gpus = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {"gpus": gpus, "python": sys.version.split()[0]}


def unpacked_wheels(target: Path) -> str | None:
    """The folder of the packages in wheels/ that fit this Python, if there are any."""
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = False
    for wheel in sorted((ROOT / "wheels").glob("*.whl")):
        tags = wheel.stem.split("-")[-3:]
        if own in tags[0] or "py3" in tags[0] or "abi3" in tags[1]:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
            found = True
    return str(target) if found else None


def load(out: Path, before: Path | None) -> dict[str, Any]:
    """The results so far, of this machine."""
    file, current = out / "results.json", machine()
    source = file if file.is_file() else before
    if source is not None and source.is_file():
        results: dict[str, Any] = json.loads(source.read_text())
        if results.get("machine") == current:
            return results
        if source == file:
            os.replace(file, file.with_name("results.before.json"))
        print(f"gpu: {source.name} is of another machine: begun anew", flush=True)
    return {"machine": current, "pieces": {}}


def save(out: Path, results: dict[str, Any]) -> None:
    write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomic(out / "table.md", table.text(results).encode())


def run(args: argparse.Namespace, results: dict[str, Any]) -> int:
    """Run the pieces that are not done, as time allows; the number of pieces that are left."""
    end, left, digest = time.monotonic() + 60 * args.minutes, 0, source_digest()
    results["revision"] = _output("git", "rev-parse", "--short", "HEAD")
    chosen = [piece for piece in PIECES if args.only is None or piece.number in args.only]
    # What has never run comes first: a fault may be there again.
    for piece in sorted(chosen, key=lambda it: str(it.number) in results["pieces"]):
        entry = results["pieces"].get(str(piece.number), {"rows": [], "done": False})
        if entry["done"]:
            continue
        limit = min(piece.seconds * (20 if args.rehearse else 1), end - time.monotonic() - 5)
        if limit < _LEAST_SECONDS:
            left += 1
            continue
        print(f"gpu: {piece.number} {piece.title}, at most {limit:.0f} s", flush=True)
        packages = unpacked_wheels(args.out / ".packages")
        path = os.pathsep.join(filter(None, [str(ROOT), packages, os.environ.get("PYTHONPATH")]))
        with (args.out / "log.txt").open("ab") as log:
            log.write(f"\n--- {piece.number} {piece.title}\n".encode())
            log.flush()
            entry = run_piece(piece, limit, entry["rows"], log, rehearse=args.rehearse, path=path)
        results["pieces"][str(piece.number)] = {**entry, "source": digest}
        save(args.out, results)
        number = sum("fault" in row for row in entry["rows"])
        how = "cut off" if entry["exit_code"] is None else f"{number} faults"
        print(f"gpu: {piece.number} took {entry['seconds']} s: {len(entry['rows'])} rows, {how}", flush=True)
        left += entry["exit_code"] is None
    return left


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="folder for results")
    parser.add_argument("--before", type=Path, metavar="FILE", help="results.json to continue, where --out has none")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop within this time")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="only these pieces")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--list", action="store_true", help="list the pieces and exit")
    args = parser.parse_args(arguments)
    if args.list:
        for piece in PIECES:
            print(f"{piece.number} {piece.title}, at most {piece.seconds:.0f} s")
        return 0
    if not args.rehearse and shutil.which("nvidia-smi") is None and not Path("/dev/nvidia0").exists():
        print("gpu: this machine seems to have no NVIDIA GPU; --rehearse runs every piece on the CPU", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    results = load(args.out, args.before)
    left = run(args, results)
    print(table.text(results))
    print(f"gpu: wrote {args.out / 'table.md'}" + (f"; {left} pieces are left: run it again" if left else ""))
    if left:
        return 2
    return int(any("fault" in row for piece in results["pieces"].values() for row in piece["rows"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
