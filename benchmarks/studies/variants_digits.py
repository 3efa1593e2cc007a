"""Train every variant with its default settings, and classify 1,000 samples of each.

    python -m benchmarks.studies.variants_digits [VARIANT ...] [-- FLAG ...]

Prints for each variant: minutes of the whole command, digits present among 1,000 samples, share of samples with a class
probability above 0.9, by a classifier of real digits. Without FLAGs, sample grids go to docs/samples/VARIANT.png.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fastgan
from fastgan.config.variants import VARIANTS
from fastgan.evaluation import digits
from fastgan.training.observability.metrics_log import save_grid

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    variants, flags = argv[:split] or list(VARIANTS), argv[split + 1 :]
    print(f"classifier: {100 * digits.classifier()[1]:.1f}% of held-out real digits", flush=True)
    for variant in variants:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / variant
            start = time.monotonic()
            command = [sys.executable, str(ROOT / "fastgan" / "train.py"), "--variant", variant, "--out", str(run)]
            subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
            minutes = (time.monotonic() - start) / 60
            trained = fastgan.load(run)
            print(f"{variant:9} {minutes:5.1f} min  {digits.report(trained.sample(1000, seed=1))}", flush=True)
            if not flags:
                grids = ROOT / "docs" / "samples"
                grids.mkdir(parents=True, exist_ok=True)
                save_grid(trained.sample(100), grids / f"{variant}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
