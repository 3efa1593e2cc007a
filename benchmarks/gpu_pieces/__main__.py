"""One piece: `python -m benchmarks.gpu_pieces NUMBER --rows FILE --before FILE [--rehearse]`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import fastgan
from benchmarks.gpu_pieces.pieces import PIECES


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    fastgan.configure_process()  # before torch is loaded, as the commands do
    from benchmarks.gpu_pieces.context import Context

    piece = next(it for it in PIECES if it.number == args.number)
    before = json.loads(args.before.read_text())
    context = Context(args.rows, args.rehearse, frozenset(before["done"]), frozenset(before["faulted"]))
    getattr(importlib.import_module(f"benchmarks.gpu_pieces.{piece.module}"), piece.function)(context)
    context.finish()
    return 1 if context.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
