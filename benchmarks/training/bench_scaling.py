"""How training scales over ranks, and how accurate `fastgan plan` is. Writes docs/scaling/*.png.

    python -m benchmarks.training.bench_scaling [--parts ranks hosts curve] [--hosts 2 4] [--seconds 8] [--rounds 4]

Parts:
    ranks: two ranks of one thread against one rank of one thread, pggan's digits preset at 32 px, with the same images
        per rank; and two independent runs of one rank, which show what the two cores share.
    hosts: measured steps of 2 and 4 hosts at three bandwidths against the forecast. The hosts are network namespaces
        (needs root, Linux, and the packages that tests/helpers/hosts.py names).
    curve: kimg per hour of each stage of the published recipe on up to 1,024 hosts of 8 ranks, from the step times in
        benchmarks/results/step_times_cpu.json and the communication model.

The jobs of a part are started once and take turns of a few steps each, so that a slowdown of the machine affects all of
them. Results are medians.
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


# --- a rank of a job -------------------------------------------------------------------------------------------------
# It reads its orders from files, because files are all that ranks on several hosts share with this process.


class Worker:
    """One rank: a trainer past its last fade-in, and the orders that it carries out."""

    def __init__(self, folder: Path) -> None:
        import torch

        from fastgan.cli.train import parse
        from fastgan.data import open_source
        from fastgan.training.distributed import rendezvous
        from fastgan.training.step_measurement import Bench
        from fastgan.training.trainer import Trainer

        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        self._world = rendezvous.start("auto", "cpu")
        flags = f"--variant pggan --batch {PER_RANK * self._world.size} --resolution {RESOLUTION}"
        config = parse(flags.split()).config
        source = open_source("digits", RESOLUTION)
        self._trainer = Trainer(config, "pggan", self._world, source, folder)
        self._trainer.images = self._trainer.stages[-1].fade_end
        for _ in range(3):  # grows, warms up, and records the order of the gradients
            self._trainer.train_step()
        self._bench = Bench(self._trainer.config, self._world.device, source.channels, 0.0)

    def run(self, folder: Path) -> None:
        """Carry out the orders in `folder` until the one to end."""
        from fastgan.training.distributed import rendezvous

        (folder / f"ready-{self._world.rank}").touch()
        for number in itertools.count():
            file = folder / f"order-{number}.json"
            while not file.exists():
                time.sleep(0.02)
            order = json.loads(file.read_text())
            if order["kind"] == "end":
                break
            self._barrier()
            result = self._alone(order["seconds"]) if order["kind"] == "alone" else self._steps(order["steps"])
            _write(folder / f"answer-{number}-{self._world.rank}.json", result)
        self._world.done()
        rendezvous.stop()

    def _barrier(self) -> None:
        import torch.distributed as dist

        if self._world.size > 1:
            dist.barrier()

    def _alone(self, seconds: float) -> dict[str, Any]:
        """A timing of steps without communication, and the latency of the network."""
        self._bench.seconds = seconds
        timing = self._bench.time(RESOLUTION, PER_RANK, False)
        return {"timing": dataclasses.asdict(timing), "latency": self._latency() if self._world.size > 1 else 0.0}

    def _latency(self) -> float:
        """Seconds of one message of an all-reduce of a single number."""
        import torch

        flag, messages = torch.zeros(1), []
        for _ in range(30):
            self._barrier()
            start = time.perf_counter()
            self._world.sum(flag)
            messages.append((time.perf_counter() - start) / (2 * (self._world.size - 1)))
        return statistics.median(messages)

    def _steps(self, count: int) -> dict[str, Any]:
        """Seconds of each of `count` steps, the ranks' own parts of them, and processor time of a step."""
        marks, processor = [time.perf_counter()], time.process_time()
        for _ in range(count):
            self._trainer.train_step()
            marks.append(time.perf_counter())
        own = self._trainer.stragglers.report().seconds if self._world.size > 1 else []
        processor = (time.process_time() - processor) / count
        return {"seconds": [b - a for a, b in itertools.pairwise(marks)], "own": own, "processor": processor}


def _write(file: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader never sees half of it."""
    file.with_suffix(".part").write_text(json.dumps(content))
    os.replace(file.with_suffix(".part"), file)


class Job:
    """Ranks of one run, which carry out orders together."""

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
                    raise SystemExit(process.communicate()[0] or f"a rank exited with {process.returncode}")
            time.sleep(0.02)

    def ready(self) -> None:
        self._wait_for([self.folder / f"ready-{rank}" for rank in range(self.ranks)])

    def order(self, **order: Any) -> list[dict[str, Any]]:
        """Let all ranks carry out an order; returns each rank's answer."""
        self.send(**order)
        return self.answers()

    def end(self) -> None:
        self.send(kind="end")
        for process in self.processes:
            process.communicate(timeout=60)

    def send(self, **order: Any) -> None:
        _write(self.folder / f"order-{self._number}.json", order)

    def answers(self) -> list[dict[str, Any]]:
        answers = [self.folder / f"answer-{self._number}-{rank}.json" for rank in range(self.ranks)]
        self._wait_for(answers)
        self._number += 1
        return [json.loads(answer.read_text()) for answer in answers]


def _step(answers: list[dict[str, Any]]) -> float:
    """Median seconds of a step of the slowest rank."""
    return max(statistics.median(answer["seconds"]) for answer in answers)


# --- two ranks against one -------------------------------------------------------------------------------------------


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
    result: dict[str, Any] = {"own": statistics.median(own)}
    for kind in kinds:
        step = statistics.median(taken[kind])
        # Turns that follow each other form a pair.
        pairs = sorted(a / b for a, b in zip(taken["one rank"], taken[kind], strict=True))
        processor = statistics.median(busy[kind])
        result[kind] = {"step": step, "processor": processor, "of_linear": statistics.median(pairs), "pairs": pairs}
        print(
            f"{kind + ':':22} {1000 * step:6.1f} ms a step, {1000 * processor:6.1f} ms of processor time; "
            f"{statistics.median(pairs):.3f} of linear scaling (pairs from {pairs[0]:.3f} to {pairs[-1]:.3f})"
        )
    print(f"step of two ranks, without waiting for each other: {1000 * result['own']:.1f} ms")
    return result


# --- hosts against the forecast --------------------------------------------------------------------------------------


def forecast(answers: list[dict[str, Any]], nodes: int, megabits: float) -> tuple[float, float]:
    """Seconds of a step, and seconds of it that wait for the network, by the communication model."""
    from fastgan.planning.cost_model import Cluster, Link, UpdateTime, step_cost

    latency = statistics.median(answer["latency"] for answer in answers)
    parts = []
    for name in ("d", "g"):
        # The mean, because four ranks on two cores take turns: what one loses another gains.
        updates = [answer["timing"][name] for answer in answers]
        seconds = statistics.fmean(update["seconds"] for update in updates)
        gradients = min(updates, key=lambda update: abs(update["seconds"] - seconds))["gradients"]
        lead = statistics.fmean(update["lead"] for update in updates)
        parts.append(UpdateTime(seconds, tuple((size, before) for size, before in gradients), lead))
    link = Link(megabits * 1e6 / 8, latency)
    step = step_cost(parts[0], parts[1], Cluster(nodes, 1, link, link), n_critic=1, accumulation=1)
    return step.seconds, step.exposed


def compare_hosts(folder: Path, seconds: float, rounds: int, counts: list[int]) -> list[dict[str, Any]]:
    from hosts import Hosts, missing

    reason = missing()
    if reason is not None:
        print(f"hosts: skipped, {reason}")
        return []
    rows = []
    for count in counts:
        place = folder / f"hosts-{count}"
        place.mkdir()
        with Hosts(count, place) as hosts:
            job = Job(place / "job", count)
            job.processes.append(hosts.deepspeed(Path(__file__).resolve(), "--worker", str(job.folder)))
            job.ready()
            results: dict[int, list[tuple[float, float, float]]] = {megabits: [] for megabits in MEGABITS}
            for _ in range(max(rounds // 2, 1)):
                alone = job.order(kind="alone", seconds=seconds)
                for megabits in MEGABITS:
                    for host in range(count):
                        hosts.limit(host, megabits)
                    # The first steps use up the token buckets of the limit, which start full.
                    job.order(kind="steps", steps=2)
                    expected = forecast(alone, count, megabits)
                    measured = _step(job.order(kind="steps", steps=max(2, round(seconds / expected[0]))))
                    results[megabits].append((measured, *expected))
                    for host in range(count):
                        hosts.limit(host, None)
            job.end()
        for megabits, triples in results.items():
            measured, plan, waiting = (statistics.median(part) for part in zip(*triples, strict=True))
            error = plan / measured - 1
            rows.append({"hosts": count, "megabits": megabits, "measured": measured, "plan": plan, "error": error})
            print(
                f"{count} hosts, {megabits:4d} Mbit/s: measured {1000 * measured:7.1f} ms a step, forecast "
                f"{1000 * plan:7.1f} ms ({waiting / plan:.0%} of it waiting), {error:+.1%}"
            )
    return rows


# --- the curve -------------------------------------------------------------------------------------------------------


def curves(speedup: float) -> Iterator[tuple[str, int, int, float, float]]:
    """(name of the batches, px, hosts, kimg per hour, share of the step that waits) of each stage.

    speedup: how much faster the ranks are than the device on which the step times were measured.
    """
    from fastgan.cli.plan import ClusterFlags, make_forecaster
    from fastgan.cli.train import parse
    from fastgan.config import replace
    from fastgan.data import open_source
    from fastgan.planning.step_times import read, recipe_of

    config = parse(["--data", "synthetic"]).config
    source = open_source("synthetic", 4)
    times = read(str(STEP_TIMES), recipe_of(config, 3))
    timings = [dataclasses.replace(t, d=t.d.scaled(1 / speedup), g=t.g.scaled(1 / speedup)) for t in times.timings]
    times = dataclasses.replace(times, timings=timings)
    # Counted once: the operations of a rank do not depend on the cluster, and its memory is not used here.
    footprint = make_forecaster(config, source, ClusterFlags().cluster()).footprint
    for nodes in (2**i for i in range(11)):
        cluster = ClusterFlags(nodes=nodes).cluster()
        four = replace(config, schedule={"batch": 4 * cluster.size, "batch_at": {}})
        for name, chosen in (("paper", config), ("four", four)):
            run = make_forecaster(chosen, source, cluster)
            run.footprint = footprint
            for batch in run.batches:
                cost, _ = run.cost(times, batch)
                rate = 3.6 * batch.images / cost.seconds
                yield name, batch.stage.resolution, nodes, rate, cost.exposed / cost.seconds


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
    axes[0].set_ylabel("kimg per hour")
    axes[1].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    print(f"{path.relative_to(ROOT)}: kimg per hour of ranks {speedup:g} times as fast as the measured one")
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
    axis.plot([], [], color="0.4", label="forecast")
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
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of a measurement")
    parser.add_argument("--rounds", type=int, default=4, help="number of measurements of each kind")
    parser.add_argument("--hosts", nargs="+", type=int, choices=(2, 4), default=[2, 4], help="host counts to measure")
    parser.add_argument("--speedup", type=float, default=1000.0, help="of the ranks in the curve")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_known_args()[0]  # a launcher adds --local_rank
    if arguments.worker is not None:
        Worker(arguments.worker).run(arguments.worker)
        return
    import matplotlib

    matplotlib.use("Agg")
    FIGURES.mkdir(exist_ok=True)
    results = ROOT / "benchmarks" / "results" / "scaling.json"
    kept = json.loads(results.read_text()) if results.exists() else {}
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    print(f"{cores} cores, load {load:.1f}" + (": other processes affect the result" if load > 0.3 else ""))
    with tempfile.TemporaryDirectory() as folder:
        if "ranks" in arguments.parts:
            kept["ranks"] = scale_ranks(Path(folder), arguments.seconds, arguments.rounds)
        if "hosts" in arguments.parts:
            rows = compare_hosts(Path(folder), arguments.seconds, arguments.rounds, arguments.hosts)
            measured = {row["hosts"] for row in rows}
            kept["hosts"] = [row for row in kept.get("hosts", []) if row["hosts"] not in measured] + rows
            kept["hosts"].sort(key=lambda row: (row["hosts"], row["megabits"]))
            draw_hosts(kept["hosts"], FIGURES / "hosts.png")
    if "curve" in arguments.parts:
        draw_curve(1.0, FIGURES / "curve_cpu.png")
        draw_curve(arguments.speedup, FIGURES / "curve_fast.png")
    results.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
