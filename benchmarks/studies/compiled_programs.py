"""Questions about compiled programs, each answered by a table.

    python -m benchmarks.studies.compiled_programs options  [CASE ...] [--arms ...]  Inductor's options, in turns
    python -m benchmarks.studies.compiled_programs outside  [CASE ...]  what a step takes outside of its programs
    python -m benchmarks.studies.compiled_programs fades    [CASE ...]  the program of a fade beside that of its end
    python -m benchmarks.studies.compiled_programs rounding [CASE ...]  how far from float64 both forms are

Cases are those of `benchmarks.training.whole_steps`. `--precision`, `--threads` and `--rounds` as there; `--kept off`
measures with an allocator that gives memory back. Times are medians of rounds in turns in one process; page faults and
system time are those of the whole process, so that they tell of memory that is fetched anew in every step.

`outside` is the most that an optimizer, a moving average and checks inside the program could save. `rounding` runs the
recorded operations once more with float64 in place of every other floating-point type.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fastgan

if __name__ == "__main__":
    fastgan.configure_process()  # before torch is loaded, as the commands do

import torch
from torch import Tensor, fx

from benchmarks.studies.result_cache import ROOT, markdown_table
from benchmarks.training.whole_steps import CASES, CPU, Case, arm, flops
from fastgan.compiled import recording
from fastgan.compiled.program import Program, compile_graph, difference_of, layout
from fastgan.ops import use_backend
from fastgan.training.compiling.build import Recorded, new_step, recordings
from fastgan.training.compiling.micro_step import MicroSteps
from fastgan.training.compiling.program_check import effect_of_rounding
from fastgan.training.compiling.programs import ProgramSpec, example
from fastgan.training.from_config import memory_format
from fastgan.utils.process import KEEP_VARIABLE

# Options of torch._inductor.config by arm. Freezing is not among them: weights are inputs of a program, and change.
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no layout optimization": {"layout_optimization": False},
    "memory planned": {"memory_planning": True},
    "cpp gemm": {"max_autotune": True, "max_autotune_gemm_backends": "ATEN,CPP"},
    "contracted": {"cpp.enable_floating_point_contract_flag": "fast"},
    "unsafe math": {"cpp.enable_unsafe_math_opt_flag": True, "cpp.enable_floating_point_contract_flag": "fast"},
    "no tiling heuristics": {"cpp.enable_tiling_heuristics": False},
    "wider fusion": {"cpp.max_horizontal_fusion_size": 64, "max_fusion_size": 128},
    "smaller chunks": {"cpp.min_chunk_size": 64},
    "realized late": {"realize_reads_threshold": 16, "realize_opcount_threshold": 120},
}


def spec_of(case: Case, precision: Any, fade: bool = False) -> ProgramSpec:
    """The programs of a case."""
    return ProgramSpec(case.config(precision), case.resolution, fade, case.channels, 0, case.batch)


def compiled(recorded: Recorded, options: dict[str, Any]) -> Callable[[], list[Tensor]]:
    """The program of a recording on its own arguments, compiled now."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.pt2"
        compile_graph(recorded.graph, recorded.arguments, file, options)
        program = Program.load(file, [layout(x) for x in recorded.arguments])
    return lambda: program(recorded.arguments)


def in_turns(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Median milliseconds, thousands of page faults and milliseconds of system time of each step."""
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            step()
            seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
            if number:  # the first round warms up
                faults = (after.ru_minflt - before.ru_minflt) / 1e3
                seen[name].append((1e3 * seconds, faults, 1e3 * (after.ru_stime - before.ru_stime)))
    return {name: [statistics.median(values) for values in zip(*found, strict=True)] for name, found in seen.items()}


def _table(first: str, rows: list[list[str]]) -> str:
    return markdown_table([first, "program", "ms", "1,000 page faults", "ms in the system"], rows)


def _rows(times: dict[str, list[float]]) -> list[list[str]]:
    return [[*name.split("/"), *(f"{value:.3g}" for value in values)] for name, values in times.items()]


def options(case: Case, args: Any) -> str:
    """The programs of a case, compiled with each of the arms' options, beside the recorded operations one by one."""
    spec = spec_of(case, args.precision)
    steps: dict[str, Callable[[], object]] = {}
    failed = []
    for name, recorded in recordings(spec, new_step(spec, CPU)):
        for label in args.arms:
            began = time.monotonic()
            try:
                steps[f"{label}/{name}"] = compiled(recorded, OPTIONS[label])
            except Exception as error:  # an arm that Inductor refuses is an answer
                failed.append(f"{label}, {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            print(f"{label}/{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    ordered = {f"{label}/{name}": steps[f"{label}/{name}"] for label in args.arms for name in spec.names
               if f"{label}/{name}" in steps}  # fmt: skip
    return "\n".join([_table("options", _rows(in_turns(ordered, args.rounds))), *failed])


def outside(case: Case, args: Any) -> str:
    """Whole compiled steps, and their programs alone."""
    spec = spec_of(case, args.precision)
    steps: dict[str, Callable[[], object]] = {"whole/step": arm(case, f"compiled-{args.precision}")}
    for name, recorded in recordings(spec, new_step(spec, CPU)):
        steps[f"program/{name}"] = compiled(recorded, {})
    times = in_turns(steps, args.rounds)
    rest = times["whole/step"][0] - sum(values[0] for name, values in times.items() if name != "whole/step")
    share = rest / times["whole/step"][0]
    return f"{_table('part', _rows(times))}\noutside of the programs: {rest:.1f} ms, {share:.1%} of the step"


def fades(case: Case, args: Any) -> str:
    """What the blend of a fade costs where it is over."""
    if case.variant != "pggan":
        return "only pggan fades"
    steps: dict[str, Callable[[], object]] = {}
    giga = {}
    for fade in (False, True):
        spec = spec_of(case, args.precision, fade)
        for name, recorded in recordings(spec, new_step(spec, CPU)):
            label = f"{'fades in' if fade else 'stable'}/{name}"
            giga[label] = flops(functools.partial(_run, recorded.graph, recorded.arguments)) / 1e9
            steps[label] = compiled(recorded, {})
    counted = ", ".join(f"{name} {value:.3g}" for name, value in giga.items())
    return f"{_table('stage', _rows(in_turns(steps, args.rounds)))}\nGFLOP: {counted}"


def _run(graph: fx.GraphModule, arguments: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return graph(*arguments)


_HALVES = (torch.float32, torch.bfloat16, torch.float16)


def in_float64(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a recorded graph that computes in float64 throughout; its inputs and constants are float64."""

    def widened(x: Any) -> Any:
        return torch.float64 if x in _HALVES else x

    nodes = fx.Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    copy = fx.GraphModule(graph, nodes)
    for node in copy.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, lambda x: widened(x) if isinstance(x, torch.dtype) else x)
        node.kwargs = fx.node.map_aggregate(node.kwargs, lambda x: widened(x) if isinstance(x, torch.dtype) else x)
        if node.op == "get_attr":
            value = getattr(graph, node.target)
            setattr(copy, node.target, value.double() if value.is_floating_point() else value)
    copy.recompile()
    return copy


def rounding(case: Case, args: Any) -> str:
    """Gradients of each parameter: compiled and eager beside float64, and eager beside itself rounded otherwise."""
    spec = spec_of(case, args.precision)
    step = new_step(spec, CPU)
    eager = MicroSteps(step, 1, memory_format(spec.config))
    buffers = [x for module in step.modules().values() for x in module.buffers()]
    networks = {"discriminator": step.discriminator, "penalty": step.discriminator, "generator": step.generator}
    rows, before = [], [x.clone() for x in buffers]

    @contextlib.contextmanager
    def restored() -> Iterator[None]:
        yield
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)

    inputs_of = example(spec, step)
    with mock.patch.object(recording, "recorded_forms", lambda: use_backend("torch")):  # kernels have no float64
        plain = dict(recordings(spec, step))
    for name, recorded in recordings(spec, step):
        count = sum(recorded.stored["present"]) - sum(recorded.stored["present"][-_trained(networks[name]) :])
        with restored():
            theirs = compiled(recorded, {})()[count:]
        with restored():
            ours = _run(recorded.graph, recorded.arguments)[count:]
        with restored():
            wide = [x.double() if x.is_floating_point() else x.clone() for x in plain[name].arguments]
            exact = _run(in_float64(plain[name].graph), wide)[count:]
        with restored():
            expected = getattr(eager, name)(*inputs_of[name])
        with restored():
            moved = effect_of_rounding(step, inputs_of[name], getattr(eager, name), expected)
        present = recorded.stored["present"][-_trained(networks[name]) :]
        names = [n for n, p in networks[name].named_parameters() if p.requires_grad]
        kept = [n for n, there in zip(names, present, strict=True) if there]
        pairs = [("all", theirs, ours, exact)]
        pairs += [(n, [a], [b], [c]) for n, a, b, c in zip(kept, theirs, ours, exact, strict=True)]
        for label, a, b, c in pairs:
            errors = [difference_of(x, y) for x, y in ((a, b), (a, c), (b, c))]
            last = f"{moved:.1e}" if label == "all" else ""
            rows.append([name, label, *(f"{error:.1e}" for error in errors), last])
    head = "program|gradient of|compiled to recorded|compiled to float64|recorded to float64|eager rounded otherwise"
    return markdown_table(head.split("|"), rows)


def _trained(network: torch.nn.Module) -> int:
    return sum(p.requires_grad for p in network.parameters())


QUESTIONS = {"options": options, "outside": outside, "fades": fades, "rounding": rounding}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: pggan-32")
    parser.add_argument("--arms", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kept", default="off", choices=["on", "off"])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.child:  # threads and memory are set before torch is loaded
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), KEEP_VARIABLE: str(int(args.kept == "on"))}
        command = [sys.executable, "-m", "benchmarks.studies.compiled_programs", *argv, "--child"]
        return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    for name in args.cases or ["pggan-32"]:
        print(f"{name}, {args.precision}, {args.threads} threads, memory kept {args.kept}, torch {torch.__version__}\n")
        print(QUESTIONS[args.question](CASES[name], args), "\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
