"""The calibration study, on digits and with pixels as features: a second instead of minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.studies import calibrate_distance as study
from fastgan.evaluation.features import Extracted, Extractor


class Pixels(Extractor):
    """The pixels of an image, and the squares of their differences, at a quarter of the size."""

    name, dimension, resize, fingerprint = "pixels", 32, "", "0"

    def __call__(self, images: torch.Tensor) -> Extracted:
        pixels = images.float() / 255
        edges = torch.diff(pixels, dim=3, append=pixels[..., :1]) ** 2
        return Extracted(F.adaptive_avg_pool2d(torch.cat([pixels, 10 * edges], dim=1), 4).flatten(1), None)


def test_the_distance_rises_with_each_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "open_extractor", lambda name, channels: Pixels())
    argv = ["digits", "--resolution", "16", "--n", "200", "--cache", str(tmp_path)]
    assert study.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 2 + 13 and "| copies of the first half 100% | " in out
    (file,) = tmp_path.iterdir()
    results = json.loads(file.read_text())
    assert results["copies of the first half 100%"]["distance"] < 0.1 * results["as it is"]["distance"]
    assert results["copies of the first half 100%"]["memorized"] == 1
    shares = [results[f"copies of the first half {share}"]["memorized"] for share in ("10%", "50%", "100%")]
    assert results["as it is"]["memorized"] < shares[0] < shares[1] < shares[2]
    coverage = [results[f"each image repeated {times} times"]["coverage"] for times in (2, 10, 50)]
    assert coverage == sorted(coverage, reverse=True)
    # Again from the cache: no features are computed.
    before = file.stat().st_mtime_ns
    assert study.main(argv) == 0
    assert capsys.readouterr().out == out and file.stat().st_mtime_ns == before


def test_a_distance_that_does_not_rise_is_reported() -> None:
    names = ["as it is", *(f"{kind} {degree}" for kind in study.RISING for degree in study.CHANGES[kind])]
    results = {name: {"distance": float(i)} for i, name in enumerate(names)}
    assert study.faults(results) == []
    results[names[3]]["distance"] = 0.5
    assert len(study.faults(results)) == 1


def test_changes() -> None:
    images, first = (torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8) for _ in range(2))
    assert torch.equal(study.repeated(5)(images, first), images[torch.arange(10) % 2])
    assert torch.equal(study.copied(0.3)(images, first)[:3], first[:3])
    flat = torch.full((1, 1, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(study.blurred(1.5)(flat, flat), flat)
    assert study.blurred(1.0)(images, first).float().std() < images.float().std()
    assert (study.noisy(16.0)(flat.expand(50, 1, 8, 8), flat).float().std() - 16).abs() < 1
