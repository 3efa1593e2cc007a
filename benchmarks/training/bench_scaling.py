"""How training scales over ranks, and whether `fastgan plan` knows: writes docs/scaling/*.png.

    python -m benchmarks.training.bench_scaling [--parts ranks hosts curve] [--hosts 2 4] [--seconds 8] [--rounds 4]

ranks: two ranks of one thread beside one rank of one thread, pggan's digits preset at 32 px, the same images per rank;
and beside two runs of one rank that have nothing to do with each other, which shows what the cores share.
hosts: the plan's prediction beside what 2 and 4 hosts measure at three bandwidths, on network namespaces (root, Linux,
and what tests/helpers/hosts.py names). curve: kimg an hour of each stage of the published recipe on up to 1,024 hosts
of 8, from the step times of benchmarks/results/step_times_cpu.json and the model.

Jobs are started once and take turns, a few steps each, so that a machine that slows down slows all of them; medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
FIGURES = ROOT / "docs" / "scaling"
STEP_TIMES = ROOT / "benchmarks" / "results" / "step_times_cpu.json"
RESOLUTION, PER_RANK = 32, 32
MEGABITS = (40, 150, 600)


# --- a rank of a job: waits for orders in files, as ranks on several hosts have nothing else in common ----------------


def worker(folder: Path, per_rank: int, resolution: int) -> None:
    import torch
    import torch.distributed as dist

    from fastgan.cli.train import parse
    from fastgan.data import open_source
    from fastgan.training.distributed import rendezvous as processes
    from fastgan.training.step_measurement import Bench
    from fastgan.training.trainer import Trainer

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    world = processes.start("auto", "cpu")
    flags = ["--variant", "pggan", "--batch", str(per_rank * world.size), "--resolution", str(resolution)]
    config = parse(flags).config
    source = open_source("digits", resolution)
    trainer = Trainer(config, "pggan", world, source, folder)
    trainer.images = trainer.stages[-1].fade_end
    for _ in range(3):  # grows, warms up, and shows in which order gradients come
        trainer.train_step()
    bench = Bench(config, "pggan", world.device, source.channels, 0.0)

    def together() -> None:
        if world.size > 1:
            dist.barrier()

    def latency() -> float:
        """Seconds of one message of an all-reduce that carries nothing."""
        flag, taken = torch.zeros(1), []
        for _ in range(30):
            together()
            began = time.perf_counter()
            world.sum(flag)
            taken.append((time.perf_counter() - began) / (2 * (world.size - 1)))
        return statistics.median(taken)

    def obey(order: dict[str, Any]) -> dict[str, Any]:
        together()
        if order["kind"] == "alone":
            bench._seconds = order["seconds"]
            timing = bench.time(resolution, per_rank, False)
            return {"timing": dataclasses.asdict(timing), "latency": latency() if world.size > 1 else 0.0}
        began, steps, processor = [time.perf_counter()], 0, time.process_time()
        while steps < order["steps"]:
            trainer.train_step()
            began.append(time.perf_counter())
            steps += 1
        own = trainer.stragglers.report().seconds if world.size > 1 else []
        busy = (time.process_time() - processor) / steps
        return {"seconds": [b - a for a, b in itertools.pairwise(began)], "own": own, "processor": busy}

    number = 0
    (folder / f"ready-{world.rank}").touch()
    while True:
        file = folder / f"order-{number}.json"
        while not file.exists():
            time.sleep(0.02)
        order = json.loads(file.read_text())
        if order["kind"] == "end":
            break
        answer = folder / f"answer-{number}-{world.rank}.json"
        answer.with_suffix(".part").write_text(json.dumps(obey(order)))
        os.replace(answer.with_suffix(".part"), answer)
        number += 1
    world.done()
    processes.stop()


class Job:
    """Ranks that were started, and what they answer."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks, self._number = folder, ranks, 0
        self.processes: list[subprocess.Popen[str]] = []
        folder.mkdir()

    def command(self) -> list[str]:
        return [sys.executable, str(Path(__file__).resolve()), "--worker", str(self.folder)]

    def start_here(self) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(self.ranks)}
        for rank in range(self.ranks):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if self.ranks > 1 else {}
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **own}
            self.processes.append(subprocess.Popen(self.command(), env=environment, text=True))

    def _wait_for(self, files: list[Path]) -> None:
        while not all(file.exists() for file in files):
            for process in self.processes:
                if process.poll() not in (None, 0):
                    raise SystemExit(process.communicate()[0] or f"a rank ended with {process.returncode}")
            time.sleep(0.02)

    def ready(self) -> None:
        self._wait_for([self.folder / f"ready-{rank}" for rank in range(self.ranks)])

    def order(self, **order: Any) -> list[dict[str, Any]]:
        """Each rank's answer."""
        self.send(**order)
        return self.answers()

    def end(self) -> None:
        self.send(kind="end")
        for process in self.processes:
            process.communicate(timeout=60)

    def send(self, **order: Any) -> None:
        file = self.folder / f"order-{self._number}.json"
        file.with_suffix(".part").write_text(json.dumps(order))
        os.replace(file.with_suffix(".part"), file)

    def answers(self) -> list[dict[str, Any]]:
        answers = [self.folder / f"answer-{self._number}-{rank}.json" for rank in range(self.ranks)]
        self._wait_for(answers)
        self._number += 1
        return [json.loads(answer.read_text()) for answer in answers]


def _step(answers: list[dict[str, Any]]) -> float:
    """Median seconds of a step; the slowest rank's."""
    return max(statistics.median(answer["seconds"]) for answer in answers)


# --- two ranks beside one --------------------------------------------------------------------------------------------


def scale_ranks(folder: Path, seconds: float, rounds: int) -> dict[str, Any]:
    alone, together, other = (Job(folder / name, n) for name, n in (("alone", 1), ("two", 2), ("other", 1)))
    for job in (alone, together, other):
        job.start_here()
        job.ready()
    steps = max(2, round(seconds / _step(alone.order(kind="steps", steps=2))))
    kinds = {"one rank": [alone], "two ranks": [together], "two runs of one rank": [alone, other]}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    busy: dict[str, list[float]] = {kind: [] for kind in kinds}
    own: list[float] = []
    for _ in range(2 * rounds):
        for kind, jobs in kinds.items():
            for job in jobs:
                job.send(kind="steps", steps=steps)
            answers = [answer for job in jobs for answer in job.answers()]
            taken[kind].append(_step(answers))
            busy[kind] += [answer["processor"] for answer in answers]
            own += answers[0]["own"]
    for job in (alone, together, other):
        job.end()
    found: dict[str, Any] = {"own": statistics.median(own)}
    for kind in kinds:
        step = statistics.median(taken[kind])
        # Each pair of neighbors in time is a measurement of its own.
        pairs = sorted(a / b for a, b in zip(taken["one rank"], taken[kind], strict=True))
        processor = statistics.median(busy[kind])
        found[kind] = {"step": step, "processor": processor, "of_linear": statistics.median(pairs), "pairs": pairs}
        print(
            f"{kind + ':':22} {1000 * step:6.1f} ms a step, {1000 * processor:6.1f} ms of processor time; of linear "
            f"{statistics.median(pairs):.3f} (pairs from {pairs[0]:.3f} to {pairs[-1]:.3f})"
        )
    print(f"a rank's own part of a step of two ranks: {1000 * found['own']:.1f} ms")
    return found


# --- hosts beside the plan -------------------------------------------------------------------------------------------


def predicted(answers: list[dict[str, Any]], nodes: int, megabits: float) -> tuple[float, float]:
    """(seconds of a step, those of them that wait for the network), by the plan's model."""
    from fastgan.planning.communication import Cluster, Link, NetworkTime, step_seconds

    latency = statistics.median(answer["latency"] for answer in answers)
    parts = []
    for name in ("d", "g"):
        # Four ranks on two cores take turns: what one loses another gains, and in a step they wait for each other.
        found = [answer["timing"][name] for answer in answers]
        seconds = statistics.fmean(part["seconds"] for part in found)
        shape = min(found, key=lambda part: abs(part["seconds"] - seconds))["gradients"]
        lead = statistics.fmean(part["lead"] for part in found)
        parts.append(NetworkTime(seconds, tuple((size, before) for size, before in shape), lead))
    link = Link(megabits * 1e6 / 8, latency)
    step = step_seconds(parts[0], parts[1], Cluster(nodes, 1, link, link), n_critic=1, accumulation=1)
    return step.seconds, step.exposed


def compare_hosts(folder: Path, seconds: float, rounds: int, counts: list[int]) -> list[dict[str, Any]]:
    from hosts import Hosts, missing

    reason = missing()
    if reason is not None:
        print(f"hosts: left out, {reason}")
        return []
    rows = []
    for count in counts:
        place = folder / f"hosts-{count}"
        place.mkdir()
        with Hosts(count, place) as hosts:
            job = Job(place / "job", count)
            job.processes.append(hosts.deepspeed(Path(__file__).resolve(), "--worker", str(job.folder)))
            job.ready()
            found: dict[int, list[tuple[float, float, float]]] = {megabits: [] for megabits in MEGABITS}
            for _ in range(max(rounds // 2, 1)):
                alone = job.order(kind="alone", seconds=seconds)
                for megabits in MEGABITS:
                    for host in range(count):
                        hosts.limit(host, megabits)
                    # The first steps empty the buckets of the limit, which start full.
                    job.order(kind="steps", steps=2)
                    steps = max(2, round(seconds / predicted(alone, count, megabits)[0]))
                    measured = _step(job.order(kind="steps", steps=steps))
                    found[megabits].append((measured, *predicted(alone, count, megabits)))
                    for host in range(count):
                        hosts.limit(host, None)
            job.end()
        for megabits, triples in found.items():
            measured, plan, waiting = (statistics.median(part) for part in zip(*triples, strict=True))
            error = plan / measured - 1
            rows.append({"hosts": count, "megabits": megabits, "measured": measured, "plan": plan, "error": error})
            print(
                f"{count} hosts, {megabits:4d} Mbit/s: measured {1000 * measured:7.1f} ms a step, plan "
                f"{1000 * plan:7.1f} ms ({waiting / plan:.0%} of it waiting), {error:+.1%}"
            )
    return rows


# --- the curve -------------------------------------------------------------------------------------------------------


def curves(speedup: float) -> Iterator[tuple[str, int, int, float, float]]:
    """(which batch, px, nodes, kimg an hour, share of the step that waits), ranks as fast as `speedup` of what the file
    was measured on."""
    from fastgan.cli.plan import Machines, cluster_of
    from fastgan.cli.train import parse
    from fastgan.config import replace
    from fastgan.data import open_source
    from fastgan.training.forecast import Planner, shares
    from fastgan.training.step_measurement import read, recipe

    config = parse(["--data", "synthetic"]).config
    source = open_source("synthetic", 4)
    times = read(str(STEP_TIMES), recipe(config, 3))

    timings = [dataclasses.replace(t, d=t.d.scaled(1 / speedup), g=t.g.scaled(1 / speedup)) for t in times.timings]
    times = dataclasses.replace(times, timings=timings)
    # Operations are those of a rank, whatever the cluster; memory, which is not, is not asked for.
    counted = Planner(config, source, cluster_of(Machines()))._footprints
    for nodes in (2**i for i in range(11)):
        cluster = cluster_of(Machines(nodes=nodes))
        four = replace(config, schedule={"batch": 4 * cluster.size, "batch_at": {}})
        for name, wanted in (("paper", config), ("four", four)):
            planner = Planner(wanted, source, cluster)
            planner._footprints = counted
            for share in shares(wanted, cluster.size):
                time, _ = planner.time(times, share)
                images = share.stage.end - share.stage.start
                yield name, share.stage.resolution, nodes, 3.6 * images / time.seconds, time.exposed / time.seconds


def draw_curve(speedup: float, path: Path) -> list[dict[str, Any]]:
    from matplotlib import pyplot

    points = list(curves(speedup))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    colors = pyplot.get_cmap("viridis")
    sizes = sorted({px for _, px, *_ in points})
    for axis, (name, title) in zip(
        axes, (("paper", "the paper's batches"), ("four", "4 images per rank")), strict=True
    ):
        for i, px in enumerate(sizes):
            line = [(nodes, rate) for which, at, nodes, rate, _ in points if (which, at) == (name, px)]
            axis.plot(*zip(*line, strict=True), color=colors(i / len(sizes)), label=f"{px} px", marker=".")
        axis.set(xscale="log", yscale="log", xlabel="hosts of 8 ranks", title=title)
        axis.minorticks_off()
        axis.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("kimg an hour")
    axes[1].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    print(f"{path.relative_to(ROOT)}: kimg an hour, ranks {speedup:g} times as fast as those measured")
    for name in ("paper", "four"):
        for px in sizes:
            of = {nodes: (rate, waits) for which, at, nodes, rate, waits in points if (which, at) == (name, px)}
            shown = "  ".join(f"{n}: {of[n][0]:.3g} ({of[n][1]:.0%})" for n in (1, 4, 16, 64, 256, 1024))
            print(f"  {name:6} {px:5d} px  {shown}")
    return [dict(zip(("batch", "px", "nodes", "kimg_per_hour", "waiting"), p, strict=True)) for p in points]


def draw_hosts(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 3.2))
    for count, marker in ((2, "o"), (4, "s")):
        of = [row for row in rows if row["hosts"] == count]
        at = [row["megabits"] for row in of]
        axis.plot(at, [1000 * row["plan"] for row in of], color="0.4", linestyle="--" if count == 4 else "-")
        axis.plot(at, [1000 * row["measured"] for row in of], marker, label=f"{count} hosts, measured")
    axis.plot([], [], color="0.4", label="plan")
    axis.set(xscale="log", xlabel="bandwidth of a host, Mbit/s", ylabel="step, ms", ylim=(0, None))
    axis.set_xticks(list(MEGABITS), [str(m) for m in MEGABITS])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("ranks", "hosts", "curve"), default=["ranks", "hosts", "curve"])
    parser.add_argument("--seconds", type=float, default=8.0, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=4, help="measurements of each kind")
    parser.add_argument("--hosts", nargs="+", type=int, choices=(2, 4), default=[2, 4], help="of the part with hosts")
    parser.add_argument("--speedup", type=float, default=1000.0, help="of the curve's ranks over those measured")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_known_args()[0]  # a launcher adds --local_rank
    if asked.worker is not None:
        worker(asked.worker, PER_RANK, RESOLUTION)
        return
    import matplotlib

    matplotlib.use("Agg")
    FIGURES.mkdir(exist_ok=True)
    results = ROOT / "benchmarks" / "results" / "scaling.json"
    kept = json.loads(results.read_text()) if results.exists() else {}
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    print(f"{cores} cores, load {load:.1f}" + (": what else runs here takes part of the result" if load > 0.3 else ""))
    with tempfile.TemporaryDirectory() as folder:
        if "ranks" in asked.parts:
            kept["ranks"] = scale_ranks(Path(folder), asked.seconds, asked.rounds)
        if "hosts" in asked.parts:
            rows = compare_hosts(Path(folder), asked.seconds, asked.rounds, asked.hosts)
            measured = {row["hosts"] for row in rows}
            kept["hosts"] = [row for row in kept.get("hosts", []) if row["hosts"] not in measured] + rows
            kept["hosts"].sort(key=lambda row: (row["hosts"], row["megabits"]))
            draw_hosts(kept["hosts"], FIGURES / "hosts.png")
    if "curve" in asked.parts:
        draw_curve(1.0, FIGURES / "curve_cpu.png")
        draw_curve(asked.speedup, FIGURES / "curve_fast.png")
    results.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
