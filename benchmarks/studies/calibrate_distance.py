"""Does the distance rise when images get worse? Real images beside other real ones, as they are, blurred, and so on.

    python -m benchmarks.studies.calibrate_distance DATA [--resolution 32] [--n 1000] [--features efficientnet-lite0]

Two disjoint random subsets of DATA with `--n` images each are compared. The second one is changed in four ways, each by
degrees: blurred, given noise, reduced to few different images that repeat, replaced by copies of the first subset.
Prints a table; exit code 1 if a distance does not rise with the degree of blur, noise or repeats. Results are stored in
`--cache` one by one: an interrupted study continues.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.result_cache import ROOT
from fastgan.data import open_source
from fastgan.evaluation.features import Extractor, open_extractor
from fastgan.evaluation.frechet import Moments, frechet_distance
from fastgan.evaluation.neighbors import density_coverage, memorized_share, precision_recall
from fastgan.utils.files import write_atomic

Change = Callable[[Tensor, Tensor], Tensor]
COLUMNS = ("distance", "precision", "recall", "density", "coverage", "memorized")


def blurred(sigma: float) -> Change:
    def change(images: Tensor, first: Tensor) -> Tensor:
        reach = int(3 * sigma) + 1
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
        kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
        wide = torch.nn.functional.pad(images.float(), [reach] * 4, mode="replicate")
        channels = images.shape[1]
        rows = torch.nn.functional.conv2d(wide, kernel, groups=channels)
        return torch.nn.functional.conv2d(rows, kernel.transpose(2, 3), groups=channels).round().to(torch.uint8)

    return change


def noisy(sigma: float) -> Change:
    def change(images: Tensor, first: Tensor) -> Tensor:
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return (images + sigma * noise).round().clamp(0, 255).to(torch.uint8)

    return change


def repeated(times: int) -> Change:
    return lambda images, first: images[torch.arange(len(images)) % max(1, len(images) // times)]


def copied(share: float) -> Change:
    def change(images: Tensor, first: Tensor) -> Tensor:
        count = round(share * len(images))
        return torch.cat([first[:count], images[count:]])

    return change


# In the order of the table; the distance has to rise within blur, noise and repeats, from the unchanged half on.
CHANGES: dict[str, dict[str, Change]] = {
    "as it is": {"": lambda images, first: images},
    "blurred, sigma": {f"{sigma:g} px": blurred(sigma) for sigma in (0.5, 1.0, 2.0)},
    "noise, sigma": {f"{sigma:g} of 255": noisy(sigma) for sigma in (8.0, 16.0, 32.0)},
    "each image repeated": {f"{times} times": repeated(times) for times in (2, 10, 50)},
    "copies of the first half": {f"{share:.0%}": copied(share) for share in (0.1, 0.5, 1.0)},
}
RISING = ("blurred, sigma", "noise, sigma", "each image repeated")


def features_of(images: Tensor, extractor: Extractor) -> Tensor:
    return torch.cat([extractor(part).features for part in images.split(100)])


def row(first: Tensor, second: Tensor) -> dict[str, float]:
    """The numbers of a table's row from features [n, D] of the first subset and the changed second one."""
    moments = []
    for rows in (second, first):
        moments.append(Moments(rows.shape[1]))
        moments[-1].update(rows)
    values = frechet_distance(*moments), *precision_recall(second, first), *density_coverage(second, first)
    return dict(zip(COLUMNS, (*values, memorized_share(second, first)), strict=True))


def faults(results: dict[str, dict[str, float]]) -> list[str]:
    """Degrees whose distance is not above that of the degree before."""
    found = []
    for kind in RISING:
        names = ["as it is", *(f"{kind} {degree}" for degree in CHANGES[kind])]
        for before, after in itertools.pairwise(names):
            if results[after]["distance"] <= results[before]["distance"]:
                found.append(f"{after}: {results[after]['distance']:.4g}, {before}: {results[before]['distance']:.4g}")
    return found


def study(data: str, resolution: int, n: int, extractor: Extractor, cache: Path) -> dict[str, dict[str, float]]:
    """All rows by name; those in the cache are not computed again."""
    source = open_source(data, resolution)
    if len(source) < 2 * n:
        raise SystemExit(f"--n must be at most {len(source) // 2}; {data} has {len(source)} images")
    order = np.random.default_rng(0).permutation(len(source))[: 2 * n]
    images = torch.from_numpy(np.stack([source.read(int(index), resolution) for index in order]))
    first, second = images[:n], images[n:]
    key = f"{source.fingerprint}-{resolution}px-{n}-{extractor.name}-{extractor.fingerprint}"
    file = cache / f"{source.name}-{key}.json"
    results: dict[str, dict[str, float]] = json.loads(file.read_bytes()) if file.is_file() else {}
    rows: Tensor | None = None
    for kind, degrees in CHANGES.items():
        for degree, change in degrees.items():
            name = f"{kind} {degree}".strip()
            if name not in results:
                rows = features_of(first, extractor) if rows is None else rows
                results[name] = row(rows, features_of(change(second, first), extractor))
                cache.mkdir(parents=True, exist_ok=True)
                write_atomic(file, json.dumps(results, indent=1).encode())
                print(f"{name}: {results[name]['distance']:.4g}", file=sys.stderr, flush=True)
    return results


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.calibrate_distance")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--features", default="efficientnet-lite0")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "calibration")
    args = parser.parse_args(argv)
    extractor = open_extractor(args.features, 3)
    results = study(args.data, args.resolution, args.n, extractor, args.cache)
    print("| second half | distance | precision | recall | density | coverage | memorized share |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, values in results.items():
        numbers = " | ".join(f"{values[column]:.2f}" for column in COLUMNS[1:])
        print(f"| {name} | {max(values['distance'], 0):.1f} | {numbers} |")  # rounding may leave -1e-6
    wrong = faults(results)
    for line in wrong:
        print(f"does not rise: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
