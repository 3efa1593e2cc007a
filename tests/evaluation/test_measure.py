from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stubs
import torch
from stubs import ALL, Stub, draw
from torch import Tensor

from fastgan.data import Source, open_source
from fastgan.errors import ArgumentError
from fastgan.evaluation import collect, compare, measure, neighbors
from fastgan.evaluation.compare import expected_modes
from fastgan.evaluation.features import open_extractor
from fastgan.evaluation.frechet import Moments, frechet_distance
from fastgan.evaluation.measure import Evaluation, choose_metrics
from fastgan.evaluation.neighbors import density_coverage, precision_recall
from fastgan.evaluation.similarity import PairSimilarity
from fastgan.utils.system import cache_folder


def silent(text: str) -> None:
    """A `warn` that accepts only the warning of `kid` about the few images used here."""
    assert text.startswith("kid: every subset holds all "), text


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source("digits", 16)


def evaluate(source: Source, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"metrics": ALL, "extractor": Stub(), "n": 300, **changes}
    images = settings.pop("draw", draw)
    result = Evaluation(**settings)(images, source, 16, silent)
    assert result is not None
    return result


def test_an_evaluation_equals_its_parts(digits: Source) -> None:
    result = evaluate(digits)
    assert result["images"] == {"generated": 300, "real": 1797, "neighbors": 300, "swd": 300, "ms_ssim_pairs": 150}
    extractor = Stub()
    fake = extractor(draw(torch.arange(300))).features
    order = np.random.default_rng(0).permutation(1797)
    real = extractor(torch.from_numpy(np.stack([digits.read(int(i), 16) for i in order]))).features
    a, b = Moments(12), Moments(12)
    a.update(fake)
    b.update(real)
    m = result["metrics"]
    assert m["frechet_distance"] == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert (m["precision"], m["recall"]) == pytest.approx(precision_recall(fake, real[:300]))
    assert (m["density"], m["coverage"]) == pytest.approx(density_coverage(fake, real[:300]))
    assert m["kernel_distance"] > 5 * m["kernel_distance_std"] >= 0
    assert 1 < m["class_score"] < 3 and m["swd"] == m["swd_level0"] > 0.05 and m["ms_ssim"] != m["ms_ssim_real"]


def test_real_images_against_themselves(digits: Source) -> None:
    def copy(indices: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([digits.read(int(i), 16) for i in indices]))

    extractor = open_extractor("digits", 1)
    metrics = choose_metrics(None, extractor, digits, 16)
    assert metrics == list(measure.METRICS)
    # The other two cost half a minute at this size.
    metrics = [name for name in metrics if name not in ("kid", "swd")]
    result = Evaluation(metrics, extractor, 1797)(copy, digits, 16, silent)
    assert result is not None
    m = result["metrics"]
    assert m["frechet_distance"] == pytest.approx(0, abs=1e-3)
    assert (m["precision"], m["recall"], m["coverage"]) == (1, 1, 1) and 0.9 < m["density"] < 1.3
    assert m["class_score"] > 9 and m["modes"] == m["modes_of"] == 10 and m["confident"] > 0.95 and m["kl"] < 1e-3
    assert m["ms_ssim"] == pytest.approx(m["ms_ssim_real"], abs=0.02)


def test_few_images_give_a_warning(digits: Source) -> None:
    warnings: list[str] = []
    few = open_source("digits", 16)
    Evaluation(["fid"], Stub(), 12)(draw, few, 16, warnings.append)
    assert warnings == [
        "fid: 12 generated images for 12 features: their covariance is singular, and the distance is biased upwards"
    ]

    class Wide(Stub):
        dimension = 1797

        def __call__(self, images: Tensor) -> Any:
            return super().__call__(images)._replace(features=images.float().flatten(1).repeat(1, 8)[:, :1797])

    warnings.clear()
    Evaluation(["fid"], Wide(), 1800)(draw, few, 16, warnings.append)
    assert len(warnings) == 1 and warnings[0].startswith(
        "fid: 1,797 real images for 1,797 features: their covariance is sing"
    )


def test_few_images_for_subsets_and_tenths_give_a_warning(digits: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    Evaluation(["kid", "is"], Stub(), 20)(draw, digits, 16, warnings.append)
    assert [text.partition(":")[0] for text in warnings] == ["kid", "is"]
    assert warnings[0].startswith("kid: every subset holds all 20 generated images, so the deviation over subsets")
    assert warnings[1].startswith("is: 20 generated images, 2 in a tenth, for 3 classes: the score is biased downwards")
    warnings.clear()
    Evaluation(["is"], Stub(), 30)(draw, digits, 16, warnings.append)
    monkeypatch.setattr(neighbors, "SUBSET", 10)
    Evaluation(["kid"], Stub(), 11)(draw, digits, 16, warnings.append)
    assert not warnings


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_evaluation_resumes(
    after: int, digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is the same to the bit, and only images of the interrupted batch are drawn twice."""
    monkeypatch.setattr(collect, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(collect.time, "monotonic", iter(range(10_000)).__next__)  # every batch is stored
    whole = evaluate(digits)
    drawn: list[int] = []

    def failing(indices: Tensor) -> Tensor:
        if len(drawn) >= 256 * after:
            raise Interrupted
        drawn.extend(indices.tolist())
        return draw(indices)

    if after == 1:
        with pytest.raises(Interrupted):
            evaluate(digits, draw=failing, partial=tmp_path / ".evaluation")
        assert [path.name for path in tmp_path.iterdir()] == [".evaluation.rank0of1"]
    else:  # after the last batch, while the numbers are computed

        def fail(*_: object) -> None:
            raise Interrupted

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(compare, "frechet_distance", fail)
            evaluate(digits, draw=failing, partial=tmp_path / ".evaluation")

    def counting(indices: Tensor) -> Tensor:
        drawn.extend(indices.tolist())
        return draw(indices)

    assert evaluate(digits, draw=counting, partial=tmp_path / ".evaluation") == whole
    assert drawn == list(range(300))
    collect.remove_partial(tmp_path / ".evaluation")
    assert not list(tmp_path.iterdir())


def test_a_damaged_partial_file_is_ignored(digits: Source, tmp_path: Path) -> None:
    (tmp_path / "p.rank0of1").write_bytes(b"half a file")
    assert evaluate(digits, partial=tmp_path / "p") == evaluate(digits)


class Counting(Source):
    """Digits that count reads, with a given fingerprint."""

    def __init__(self, inner: Source, fingerprint: str) -> None:
        super().__init__("counting", resolution=16, channels=1, labels=None, num_classes=0, fingerprint=fingerprint)
        self.inner, self.reads = inner, 0

    def __len__(self) -> int:
        return len(self.inner)

    def _target(self, index: int) -> np.ndarray:
        self.reads += 1
        return self.inner.read(index, 16)


def test_real_images_are_read_once_per_data_features_and_size(digits: Source, tmp_path: Path) -> None:
    settings = {"metrics": ["fid", "kid", "prdc", "msssim"], "cache": tmp_path / "cache"}
    source = Counting(digits, "a" * 16)
    first = evaluate(source, **settings)
    assert source.reads == 1797
    assert evaluate(source, **settings) == first and source.reads == 1797
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1 and files[0].name.startswith("counting-16px-")
    # Other data, other weights of the extractor, and a file that was damaged, are computed anew.
    other = Counting(digits, "b" * 16)
    evaluate(other, **settings)
    assert other.reads == 1797
    extractor = Stub()
    extractor.fingerprint = "f" * 16
    evaluate(source, extractor=extractor, **settings)
    assert source.reads == 2 * 1797
    files[0].write_bytes(files[0].read_bytes()[:1000])
    assert evaluate(source, **settings) == first and source.reads == 3 * 1797
    assert len(list((tmp_path / "cache").iterdir())) == 3  # no partial file is left


def test_a_cache_that_cannot_be_written_is_reported_before_the_images_are_read(
    digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Counting(digits, "a" * 16)
    evaluate(source, metrics=["fid"], cache=tmp_path)

    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    evaluate(source, metrics=["fid"], cache=tmp_path)  # what is there already is used
    with pytest.raises(ArgumentError, match=r"XDG_CACHE_HOME must name a writable folder \(Read-only file system"):
        evaluate(source, metrics=["prdc"], cache=tmp_path)
    assert source.reads == 1797


def test_memory_does_not_grow_with_the_number_of_images(digits: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "MAX_FEATURE_ROWS", 50)
    monkeypatch.setattr(collect, "MAX_PAIRED", 60)
    sizes = []
    for n in (100, 1000):
        kept = collect.ImageStatistics(set(ALL), Stub(), generated=True, channels=1, swd_images=20, seed=0)
        for part in torch.arange(n).split(50):
            kept.update(part, draw(part))
        assert kept.rows is not None and len(kept.rows.rows()) == 50
        sizes.append(sum(tensor.numel() for tensor in kept.state().values()))
    assert sizes[0] == sizes[1]


def test_statistics_of_other_real_images_have_another_name(digits: Source, tmp_path: Path) -> None:
    """The name depends on everything that the statistics depend on."""

    def name(
        at: int = 16, metrics: tuple[str, ...] = ("fid",), total: int = 9, of: str = "data", **changes: Any
    ) -> str:
        extractor, source = Stub(), Counting(digits, "a" * 16)
        for key, value in changes.items():
            setattr(extractor if of == "extractor" else source, key, value)
        file = Evaluation(["fid"], extractor, 2, cache=tmp_path)._cache_file(source, at, set(metrics), total)
        assert file is not None and file.parent == tmp_path
        return file.name.rpartition("-")[2]

    names = [
        *(name(), name(8), name(metrics=("fid", "kid")), name(total=10)),
        *(name(name="other"), name(fingerprint="b" * 16), name(channels=3), name(resolution=32), name(inner=range(5))),
        *(name(of="extractor", **change) for change in ({"name": "x"}, {"resize": "x"}, {"fingerprint": "f" * 16})),
    ]
    assert len(set(names)) == len(names) == 12 and name() == names[0]
    assert name(metrics=("msssim",)) == name(metrics=("msssim",), of="extractor", name="x")  # compares pixels only


def test_reading_real_images_resumes_where_it_was_interrupted(
    digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect.time, "monotonic", (100.0**i for i in itertools.count()).__next__)
    settings: dict[str, Any] = {"metrics": ["fid"], "n": 32}
    plain, source = evaluate(digits, **settings), Counting(digits, "a" * 16)

    def failing(self: Counting, index: int, resolution: int) -> np.ndarray:
        if self.reads >= 1024:
            raise Interrupted
        return Source.read(self, index, resolution)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Counting, "read", failing)
        evaluate(source, cache=tmp_path, **settings)
    before, source.reads = source.reads, 0
    assert evaluate(source, cache=tmp_path, **settings) == plain
    assert before >= 1024 and source.reads == 1797 - 1024
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]


def test_the_first_rank_decides_on_the_cache_and_reports_progress(
    digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache may be on a local disk: ranks that looked for themselves could disagree and wait for each other."""
    source = Counting(digits, "a" * 16)
    monkeypatch.setattr(measure.ranks, "rank_and_size", lambda: (1, 2))
    monkeypatch.setattr(measure.ranks, "broadcast", lambda value: True)
    evaluation = Evaluation(["fid"], Stub(), 12, cache=tmp_path, progress=True)
    new = partial(collect.ImageStatistics, extractor=Stub(), channels=1, swd_images=0, seed=0, generated=False)
    assert evaluation._real_statistics(new, source, 16, 0).count == 0 and source.reads == 0
    with evaluation._progress_bar("images", 12) as advance:
        advance(12)
    assert not capsys.readouterr().err


def test_only_as_many_real_images_are_read_as_the_metrics_need(digits: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MAX_FEATURE_ROWS", 50)
    monkeypatch.setattr(measure, "MAX_PAIRED", 60)
    for metrics, reads in ((["prdc"], 60), (["is"], 0), (["fid"], 1797)):
        source = Counting(digits, "a" * 16)
        evaluate(source, metrics=metrics, n=32)
        assert source.reads == reads


def test_folder_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", None):  # empty is as not set, by the XDG specification
        monkeypatch.delenv("XDG_CACHE_HOME") if value is None else monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder("evaluation") == tmp_path / ".cache" / "fastgan" / "evaluation"


def test_a_full_disk_costs_only_the_cache(
    digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"metrics": ["prdc"], "n": 20}
    plain = evaluate(digits, **settings)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert evaluate(digits, cache=tmp_path, **settings) == plain
    output = capsys.readouterr().err.splitlines()
    assert len(output) == 1 and "cannot be written (No space left on device)" in output[0]
    assert not list(tmp_path.iterdir())


def test_the_seed_is_used_everywhere_and_levels_are_averaged(digits: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def distances(a: list[Tensor], b: list[Tensor], seed: int = 0) -> dict[int, float]:
        seen.append(("directions", seed))
        return {0: 1.0, 1: 3.0}

    def kernel(generated: Tensor, real: Tensor, *, seed: int = 0) -> tuple[float, float]:
        seen.append(("subsets", seed, len(generated), len(real)))
        return 0.5, 0.25

    class Seen(collect.Patches):
        def __init__(self, seed: int, stream: str, limit: int) -> None:
            seen.append((stream, seed, limit))
            super().__init__(seed, stream, limit)

    monkeypatch.setattr(compare, "patch_distances", distances)
    monkeypatch.setattr(neighbors, "kernel_distance", kernel)
    monkeypatch.setattr(collect, "Patches", Seen)
    monkeypatch.setattr(measure, "_SWD_IMAGES", 9)
    result = evaluate(digits, metrics=["kid", "swd"], n=12, seed=7)
    assert set(seen) == {("directions", 7), ("subsets", 7, 12, 1797), ("generated", 7, 9), ("real", 7, 9)}
    assert result["images"]["swd"] == 9
    kid = {"kernel_distance": 0.5, "kernel_distance_std": 0.25}
    assert result["metrics"] == {**kid, "swd": 2.0, "swd_level0": 1.0, "swd_level1": 3.0}
    few = Counting(digits, "a" * 16)
    monkeypatch.setattr(Counting, "__len__", lambda self: 6)
    assert evaluate(few, metrics=["swd"], n=12)["images"]["swd"] == 6
    monkeypatch.setattr(measure, "_SWD_BYTES", 5 * 128 * 49 * 4)  # patches of five images
    assert evaluate(digits, metrics=["swd"], n=12)["images"]["swd"] == 5


def test_numbers_of_images_are_as_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    documented = [row.split("|")[2:] for row in text.splitlines() if re.match(r"\| `(kid|prdc|swd|msssim)` ", row)]
    kid, prdc, swd, msssim = (" ".join(cells) for cells in documented)
    assert f"subsets of {neighbors.SUBSET:,} " in kid and f"{collect.MAX_FEATURE_ROWS:,} of each" in kid
    assert f"{collect.MAX_FEATURE_ROWS:,} of each" in prdc and f"{collect.MAX_PAIRED:,} of each" in msssim
    assert f"{measure._SWD_IMAGES:,} of each" in swd and "over 2 GB" in swd and measure._SWD_BYTES == 2 * 2**30


@pytest.mark.parametrize("batch", [8, 16])
def test_the_number_of_pairs_does_not_depend_on_the_batch(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "MAX_PAIRED", 20)
    kept = collect.ImageStatistics({"msssim"}, None, generated=True, channels=1, swd_images=0, seed=0)
    for part in torch.arange(41).split(batch):  # one image without a pair
        kept.update(part, draw(part))
    direct = PairSimilarity()
    direct.update(draw(torch.arange(20)))
    assert kept.similarity is not None and kept.similarity.count == 10
    assert kept.similarity.result() == pytest.approx(direct.result(), rel=1e-6)


def test_pixel_metrics_compute_no_features(digits: Source) -> None:
    extractor = Stub()
    assert set(evaluate(digits, extractor=extractor, metrics=["msssim"])["metrics"]) == {"ms_ssim", "ms_ssim_real"}
    assert extractor.images == 0


def test_choice_of_metrics(digits: Source) -> None:
    stub, faces = Stub(), Counting(digits, "c" * 16)
    assert choose_metrics(None, stub, faces, 16) == ["fid", "kid", "is", "prdc", "swd", "msssim"]
    assert choose_metrics(None, stub, faces, 8) == ["fid", "kid", "is", "prdc", "swd"]
    assert choose_metrics(["prdc", "fid"], stub, faces, 16) == ["fid", "prdc"]
    assert choose_metrics(["swd"], stub, faces, 7) == ["swd"]
    stub.has_class_score = False
    assert "is" not in choose_metrics(None, stub, faces, 16)
    for name, resolution, reason in (
        ("is", 16, "--features stub does not classify whole images"),
        ("msssim", 8, "images of at least 11 px, these have 8 px"),
        ("swd", 4, "images of at least 7 px, these have 4 px"),
        ("modes", 16, "it needs --features digits and --data digits or stacked-digits"),
    ):
        with pytest.raises(ArgumentError, match=f"--metrics '{name}': cannot be computed here: .*{reason}"):
            choose_metrics([name], stub, faces, resolution)
    known = "fid, kid, is, prdc, swd, msssim, modes, separated by commas"
    with pytest.raises(ArgumentError, match=f"--metrics must be {known}, got 'lpips'"):
        choose_metrics(["lpips"], stub, faces, 16)
    for name, least in (("prdc", 6), ("fid", 2), ("kid", 2), ("msssim", 2)):
        with pytest.raises(ArgumentError, match=f"--n must be at least {least} for {name}, got {least - 1}"):
            Evaluation([name], stub, least - 1)(draw, digits, 16, silent)


def test_expected_modes() -> None:
    digits, stacked = open_source("digits", 8), open_source("stacked-digits", 8)
    assert digits.labels is not None and stacked.labels is not None
    assert torch.allclose(expected_modes(digits), torch.from_numpy(np.bincount(digits.labels) / 1797))
    expected = expected_modes(stacked)
    assert expected.sum().item() == pytest.approx(1)
    direct = np.bincount(stacked.labels, minlength=1000) / len(stacked)
    assert np.abs(expected.numpy() - direct).max() < 7e-4  # four deviations of 60 expected among 60,000
    thousands = [np.bincount(stacked.labels // place % 10) / len(stacked) for place in (100, 10, 1)]
    assert expected[273].item() == pytest.approx(thousands[0][2] * thousands[1][7] * thousands[2][3])


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one_process(digits: Source, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, stubs.__file__, str(tmp_path / "result.json")]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    two = json.loads((tmp_path / "result.json").read_text())
    one = evaluate(digits, n=600)
    assert two["images"] == one["images"]
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-8, abs=1e-10)
