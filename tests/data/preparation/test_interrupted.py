"""`fastgan prepare` as a program: killed, started twice, with many workers, on a full disk."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from published import contents, miss_broken, noise, save, save_broken

from fastgan.data.preparation.archives import ZipCollection
from fastgan.data.preparation.prepare import prepare
from fastgan.data.preparation.settings import Settings
from fastgan.data.preparation.state import PreparationState
from fastgan.data.prepared.manifest import is_prepared, read_manifest
from fastgan.errors import ArgumentError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are followed through /proc, and forked")

COUNT, PER_SHARD = 60, 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take long enough to be interrupted. One of the first does not decode, which renumbers all others."""
    root = tmp_path_factory.mktemp("src") / "photos"
    for i in range(COUNT):
        save(root / "ab"[i % 2] / f"{i:03}.png", noise(128, 128, 3, seed=i), compress_level=0)
    save_broken(root / "a" / "002.broken.png", 128)
    return root


def command(src: Path, dst: Path, *flags: str, per_shard: int = PER_SHARD) -> list[str]:
    settings = ["--resolution", "128", "--cache-to", "16", "--per-shard", str(per_shard)]
    return [sys.executable, "-m", "fastgan", "prepare", str(src), str(dst), *settings, *flags]


def run(src: Path, dst: Path, *flags: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(src, dst, *flags), capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one worker writes without interruption."""
    dst = tmp_path_factory.mktemp("whole") / "set"
    done = run(photos, dst, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert read_manifest(dst).skipped == 1
    return contents(dst)


def kill_when(dst: Path, shards: int, process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> set[str]:
    """End a running prepare when `shards` shards are finished; return their files."""
    records = dst / ".preparing" / "done"
    deadline = time.monotonic() + 60
    while len(list(records.glob("[0-9]*.json"))) < shards:
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or finished nothing"
        time.sleep(0.005)
    process.send_signal(number)
    process.wait(timeout=30)
    names: set[str] = set()
    for record in records.glob("[0-9]*.json"):
        names |= json.loads(record.read_text())["files"].keys()
    return names


def children(process: subprocess.Popen[bytes]) -> list[int]:
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_killed_twice_it_resumes_and_writes_the_same_bytes(
    photos: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    dst = tmp_path / "set"
    for shards in (2, 7):
        process = subprocess.Popen(command(photos, dst, "--workers", "2"), stderr=subprocess.DEVNULL)
        while len(workers := children(process)) < 2 and process.poll() is None:
            time.sleep(0.005)
        finished = kill_when(dst, shards, process)
        assert not is_prepared(dst)
        with pytest.raises(ArgumentError, match="not finished"):
            read_manifest(dst)
        deadline = time.monotonic() + 20
        while any(map(alive, workers)):
            assert time.monotonic() < deadline, "its workers outlive it"
            time.sleep(0.01)
        before = {name: (dst / name).stat().st_mtime_ns for name in finished}
        assert before
    done = run(photos, dst, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert contents(dst) == whole
    arrays = [name for name in before if name.endswith(".npy")]
    assert {name: (dst / name).stat().st_mtime_ns for name in arrays} == {name: before[name] for name in arrays}


def end_at(number: int, before: bool) -> None:
    """End this process before or after it renames its n-th file."""
    replace, calls = os.replace, itertools.count()

    def killed(one: str, other: str) -> None:
        last = next(calls) == number
        if not (last and before):
            replace(one, other)
        if last:
            os._exit(9)

    os.replace = killed  # type: ignore[assignment]


def test_killed_at_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before and after each rename: the set is never taken for complete, and ends with the same bytes.

    One image is found damaged only when it is decoded, so that tars are renumbered, too.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which is for power cuts, and slow
    miss_broken(monkeypatch)
    src = tmp_path / "photos"
    for i in range(5):
        save(src / "ab"[i % 2] / f"{i}.png", noise(8, 8, seed=i))
    save_broken(src / "a" / "1.broken.png", 64)
    settings = Settings(per_shard=3, cache_to=4)
    prepare(str(src), tmp_path / "whole", settings, workers=1)
    whole = contents(tmp_path / "whole")
    for step in itertools.count():
        dst = tmp_path / f"set{step}"
        child = os.fork()
        if child == 0:
            end_at(step // 2, before=step % 2 == 1)
            prepare(str(src), dst, settings, workers=1)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert is_prepared(dst) == (dst / "manifest.json").is_file()
        if is_prepared(dst):
            assert {name: content for name, content in contents(dst).items() if name in whole} == whole
        prepare(str(src), dst, settings, workers=1)
        assert contents(dst) == whole, step
        if ended == 0:
            break
        assert ended == 9
    assert step > 40


def test_an_interrupt_prints_how_to_continue(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    dst = tmp_path / "set"
    for _ in range(10):  # the signal may come too late, when nothing is left to interrupt
        with (tmp_path / "stderr").open("wb") as stderr:
            process = subprocess.Popen(command(photos, dst, "--workers", "1"), stderr=stderr, start_new_session=True)
            kill_when(dst, 1, process, signal.SIGINT)
        if process.returncode != 0:
            break
        shutil.rmtree(dst)
    assert process.returncode == 130
    assert (tmp_path / "stderr").read_text().endswith("fastgan: interrupted; run the same command again to continue\n")
    # Other settings, another source and another order are refused, and what was done stays.
    kept = contents(dst / "cache")
    other = run(photos, dst, "--quality", "90")
    assert other.returncode == 2
    assert f"--quality 90: {dst} was started with 95; delete it to start again" in other.stderr
    new = save(photos / "a" / "new.png", noise(128, 128, 3))
    more = run(photos, dst)
    new.unlink()
    assert more.returncode == 2 and "a/new.png is new" in more.stderr
    file = photos / "b" / "003.png"
    time_before = file.stat().st_mtime_ns
    os.utime(file, ns=(0, 0))
    touched = run(photos, dst)
    os.utime(file, ns=(time_before, time_before))
    assert touched.returncode == 2 and "b/003.png has changed" in touched.stderr
    hidden = file.rename(photos / ".003.png")
    less = run(photos, dst)
    hidden.rename(file)
    assert less.returncode == 2 and "b/003.png is gone" in less.stderr
    assert {name: kept[name] for name in kept if not name.endswith(".part")} == contents(dst / "cache")
    done = run(photos, dst)
    assert done.returncode == 0, done.stderr
    assert contents(dst) == whole


def test_a_second_prepare_is_refused(photos: Path, tmp_path: Path) -> None:
    dst = tmp_path / "set"
    process = subprocess.Popen(command(photos, dst, "--workers", "1"), stderr=subprocess.DEVNULL)
    try:
        while not (dst / ".preparing" / "asked.json").is_file():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
        second = run(photos, dst)
        assert second.returncode == 2
        assert f"DST {str(dst)!r}: another prepare is writing to it" in second.stderr
    finally:
        process.kill()
        process.wait(timeout=30)


def test_full_disk(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The size of files is limited, and the first tar reaches the limit, as on a disk that fills up."""
    dst = tmp_path / "set"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    for workers in ("1", "2"):
        failed = run(photos, dst, "--workers", workers, preexec_fn=limit)
        assert failed.returncode == 2
        (line,) = [line for line in failed.stderr.splitlines() if line.startswith("fastgan:")]
        assert line.startswith(f"fastgan: DST {str(dst)!r}: it cannot be written ({dst}/encoded/")
        assert ".tar: File too large" in line and "run the same command again to continue" in line
        assert not is_prepared(dst)
        assert not list(dst.rglob("0128/*.tar"))
    done = run(photos, dst, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert contents(dst) == whole


def test_a_finished_file_that_was_cut_is_written_again(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    dst = tmp_path / "set"
    process = subprocess.Popen(command(photos, dst, "--workers", "1"), stderr=subprocess.DEVNULL)
    finished = sorted(kill_when(dst, 3, process))
    (dst / finished[0]).write_bytes(b"")
    (dst / finished[-1]).unlink()
    assert run(photos, dst, "--workers", "1").returncode == 0
    assert contents(dst) == whole


@pytest.mark.parametrize("phase", ["looked", "done"])
def test_images_of_a_lost_folder_are_not_skipped(tmp_path: Path, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk that disappears must not leave a set of the images before."""
    for i in range(9):
        save(tmp_path / "photos" / f"{i}.png", noise(8, 8, seed=i))
    dst = tmp_path / "set"
    write = PreparationState.write

    def vanish(state: PreparationState, kind: str, number: int, content: object) -> None:
        write(state, kind, number, content)
        if (kind, number) == (phase, 1):
            (tmp_path / "photos").rename(tmp_path / "away")
            (tmp_path / "photos").mkdir()

    with monkeypatch.context() as patched:
        patched.setattr(PreparationState, "write", vanish)
        with pytest.raises(ArgumentError, match=r"6\.png.* cannot be read now .No such file or directory"):
            prepare(str(tmp_path / "photos"), dst, Settings(per_shard=3), workers=1)
    assert not is_prepared(dst)
    (tmp_path / "photos").rmdir()
    (tmp_path / "away").rename(tmp_path / "photos")
    assert prepare(str(tmp_path / "photos"), dst, Settings(per_shard=3), workers=1).count == 9


def test_a_source_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\5\6" + bytes(18))

    def broken(self: ZipCollection) -> Iterator[object]:
        raise OSError(5, "Input/output error", str(tmp_path / "a.zip"))

    monkeypatch.setattr(ZipCollection, "_members", broken)
    with pytest.raises(ArgumentError, match=r"SRC 'zip a.zip': it cannot be read \(.*a.zip: Input/output error"):
        prepare(str(tmp_path / "a.zip"), tmp_path / "set", workers=1)
    assert not (tmp_path / "set").exists()


def memory(src: Path, dst: Path, *flags: str) -> float:
    """Peak resident memory of a prepare plus that of its largest worker, MB."""
    # Not ru_maxrss of the process itself, which also counts what it was forked from: this one, with torch.
    code = """
import re, resource, sys
from fastgan.cli.main import main
status = main(sys.argv[1:])
own = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print((own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024)
sys.exit(status)
"""
    words = ["prepare", str(src), str(dst), "--resolution", "8", "--workers", "2", *flags]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def tiny(root: Path, count: int) -> Path:
    """Make a flat folder of small files: 100 images, hard-linked as often as needed."""
    root.mkdir()
    for i in range(count):
        if i < 100:
            save(root / f"{i:07}.png", noise(8, 8, seed=i))
        else:
            os.link(root / f"{i % 100:07}.png", root / f"{i:07}.png")
    return root


def test_memory_hardly_grows_with_the_images(tmp_path: Path) -> None:
    few, many = (tiny(tmp_path / str(count), count) for count in (300, 3000))
    one, other = (memory(src, src.with_suffix(".set"), "--per-shard", "100") for src in (few, many))
    assert read_manifest(many.with_suffix(".set")).count == 3000
    assert one < 300 and other < one + 12, f"{one:.0f} MB for 300 images, {other:.0f} MB for 3,000"


@pytest.mark.slow
@pytest.mark.parametrize("archive", [False, True])
def test_memory_of_100_000_images(tmp_path: Path, archive: bool) -> None:
    """It grows by the names alone, in the process that lists them."""
    import zipfile

    peaks = []
    for count in (10_000, 100_000):
        src = tiny(tmp_path / str(count), count)
        if archive:
            with zipfile.ZipFile(tmp_path / f"{count}.zip", "w") as packed:
                for file in sorted(src.iterdir()):
                    packed.write(file, file.name)
            src = tmp_path / f"{count}.zip"
        peaks.append(memory(src, tmp_path / f"{count}.set"))
        assert read_manifest(tmp_path / f"{count}.set").count == count
    print(f"peak memory: {peaks[0]:.0f} MB for 10,000 images, {peaks[1]:.0f} MB for 100,000")
    # Sorted names take 77 bytes each, the list of files of a zip 660; both are counted twice, because the maximum of a
    # worker includes that of its parent at the start.
    per_name = 1500 if archive else 200
    assert peaks[0] < 300 and peaks[1] < peaks[0] + 16 + 90_000 * per_name / 1e6
