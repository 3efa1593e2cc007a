"""Stages that run as programs: equal to eager, checked before they are used, the same after a resume."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import FLAGS, assert_same_weights, case, launch
from safetensors.torch import load_file
from small_networks import SMALL
from torch import Tensor

from fastgan import data
from fastgan.cli.train import parse
from fastgan.compiled import recording
from fastgan.compiled.program import CompileError, file_of
from fastgan.config.variants import VARIANTS
from fastgan.ops import qualification
from fastgan.ops.dispatch.backend import OPS
from fastgan.training.compiling import build as build_module
from fastgan.training.compiling import compilation, program_check, programs
from fastgan.training.compiling.build import build
from fastgan.training.compiling.micro_step import MicroSteps
from fastgan.training.compiling.programs import ProgramSpec, StagePrograms, load
from fastgan.training.distributed import process_group as processes
from fastgan.training.trainer import Trainer
from fastgan.utils.system import cache_folder

CPU = torch.device("cpu")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache without programs, and with the kernels that are compiled already."""
    kernels, own = cache_folder("extension"), tmp_path / "cache" / "fastgan"
    kernels.mkdir(parents=True, exist_ok=True)
    own.mkdir(parents=True)
    (own / "extension").symlink_to(kernels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(own.parent))


@pytest.fixture
def interpreted(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> dict[Path, Any]:
    """Recorded graphs run operation by operation instead of being compiled, with the default forms of ops."""
    graphs: dict[Path, Any] = {}

    class Interpreted(programs.Program):
        @classmethod
        def load(cls, file: Path, layouts: Any) -> Any:
            return cls(file, tuple(layouts), graphs[file])

    monkeypatch.setattr(programs, "Program", Interpreted)
    monkeypatch.setattr(build_module, "compile_graph", lambda graph, inputs, file: graphs.update({file: graph}))
    monkeypatch.setattr(recording, "recorded_forms", contextlib.nullcontext)
    monkeypatch.setattr(program_check, "_TIMED", 1)
    return graphs


def make(variant: str, run: Path, *flags: str) -> Trainer:
    model = VARIANTS[variant].config("digits").networks.model
    line = ["--variant", variant, "--latent", "8", "--batch", "8", *SMALL[model].split(), *flags]
    config = parse([*line, "--compile", "off"]).config
    world = processes.ProcessGroup(0, 1, CPU, "torch", "test")
    source = data.open_source("digits", config.schedule.resolution)
    run.mkdir(exist_ok=True)
    return Trainer(config, variant, world, source, run)


def spec_of(trainer: Trainer) -> ProgramSpec:
    config, resolution = trainer.config, trainer.stage.resolution
    micro_batch = config.schedule.batch // config.schedule.accumulation
    return ProgramSpec(config, resolution, trainer.stage.fades, 1, trainer.source.num_classes, micro_batch)


def compiled(trainer: Trainer) -> StagePrograms:
    spec = spec_of(trainer)
    stored = build(spec, CPU)
    assert "reason" not in stored, stored
    assert spec.compiled(CPU)
    found = load(spec, trainer.stage.step)
    assert isinstance(found, StagePrograms), found
    return found


def everything(trainer: Trainer) -> dict[str, Tensor]:
    state = {f"{i}.{k}": v for i, module in enumerate(trainer.stage.modules) for k, v in module.state_dict().items()}
    return state | {f"o{i}.{k}": v for i, e in enumerate(trainer.stage.engines) for k, v in e.state().items()}


def require_equal(ours: Trainer, theirs: Trainer) -> None:
    expected, found = everything(theirs), everything(ours)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


CASES = [
    pytest.param(variant, "", marks=[pytest.mark.slow] if variant not in ("dcgan", "wgan-gp", "pggan") else [])
    for variant in VARIANTS
] + [
    ("wgan-gp", "--accumulation 2"),
    ("pggan", "--accumulation 2"),
    ("dcgan", "--augment ada --accumulation 2"),
    ("wgan-gp", "--augment diffaugment"),
    ("wgan-gp", "--penalty-every 2 --n-critic 1 --accumulation 2"),
]


@pytest.mark.parametrize(("variant", "flags"), CASES)
def test_programs_compute_the_bits_of_eager_steps(variant, flags, tmp_path, interpreted):
    ours, theirs = (make(variant, tmp_path / name, *flags.split()) for name in ("ours", "theirs"))
    trainers = (ours, theirs)
    if variant == "pggan":
        for trainer in trainers:
            while trainer.stage.resolution < 8:
                trainer.train_step()
        assert ours.stage.fades
    used = compiled(ours)
    ours.stage.use(used)
    for _ in range(4):
        for trainer in trainers:
            trainer.train_step()
    assert ours.stage.programs is used and ours.stage.refusal is None
    require_equal(ours, theirs)
    assert ours.meters.totals(ours.stage.step.metrics, CPU).equal(theirs.meters.totals(ours.stage.step.metrics, CPU))
    assert not torch.any(ours.stage.nonfinite.pending() != theirs.stage.nonfinite.pending())


@pytest.mark.slow
def test_programs_of_one_seed_run_with_another(tmp_path, interpreted):
    """Latents, interpolation, labels and augmentation are those of the run that uses them."""
    flags = ("--conditional", "--augment", "ada", "--regularizer", "gradient-penalty")
    other = make("sagan", tmp_path / "other", *flags)
    compiled(other)
    ours, theirs = (make("sagan", tmp_path / name, *flags, "--seed", "5") for name in ("ours", "theirs"))
    used = load(spec_of(ours), ours.stage.step)
    assert isinstance(used, StagePrograms)
    ours.stage.use(used)
    for _ in range(2):
        for trainer in (ours, theirs):
            trainer.train_step()
    assert ours.stage.programs is used and ours.stage.refusal is None
    require_equal(ours, theirs)
    for _ in range(2):
        other.train_step()
    assert not torch.equal(everything(other)["1.output.bias"], everything(ours)["1.output.bias"])


# Relative errors of gradients: of a program in each of five checks, and of eager steps that are rounded otherwise.
ROUNDED = {
    "exact": ([0.0] * 5, [0.0] * 5, True),
    "kinks in some steps": ([3e-3, 1e-5, 4e-3, 5e-3, 1e-5], [], True),
    "kinks in every step, as rounding has": ([9e-4, 6e-4, 7e-4, 8e-4, 9e-4], [5e-4] * 5, True),
    "wrong by a little": ([9e-4] * 5, [1e-6] * 5, False),
    "wrong by more than rounding": ([9e-3] * 5, [1e-3] * 5, False),
    "nothing is known": ([float("nan")] * 5, [float("inf")] * 5, False),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_what_rounding_explains_is_right(case: str) -> None:
    differences, roundings, right = ROUNDED[case]
    with contextlib.nullcontext() if right else pytest.raises(program_check.ProgramDiffers, match="rounding explains"):
        program_check._require_right("generator", differences, roundings, 1e-4)


@pytest.mark.parametrize("factor", [1.001, 1.01])
def test_a_program_that_is_a_little_wrong_is_never_stored(factor, tmp_path, interpreted, monkeypatch):
    trainer = make("wgan-gp", tmp_path)
    run = programs.StagePrograms.run

    def wrong(self: StagePrograms, name: str, *inputs: Tensor) -> Any:
        found = run(self, name, *inputs)
        return found._replace(gradients=[None if g is None else factor * g for g in found.gradients])

    monkeypatch.setattr(programs.StagePrograms, "run", wrong)
    assert "of the norm" in build(spec_of(trainer), CPU)["reason"]


def test_the_effect_of_rounding_leaves_the_networks_as_they_were(tmp_path):
    trainer = make("dcgan", tmp_path)
    step, before = trainer.stage.step, {name: x.clone() for name, x in everything(trainer).items()}
    eager, inputs = MicroSteps(step, 1, torch.channels_last), [torch.rand(8, 1, 8, 8), torch.arange(8)]
    expected = eager.discriminator(*inputs)
    for name, value in everything(trainer).items():  # running statistics of the call
        before[name] = value.clone()
    found = program_check.effect_of_rounding(step, inputs, eager.discriminator, expected)
    assert 1e-8 < found < 1e-2
    assert all(torch.equal(value, before[name]) for name, value in everything(trainer).items())


def test_a_program_that_becomes_wrong_is_refused_at_its_first_step(tmp_path, interpreted):
    ours, theirs = make("wgan-gp", tmp_path / "ours"), make("wgan-gp", tmp_path / "theirs")
    used = compiled(ours)
    right = used.bound["discriminator"]
    wrong = dataclasses.replace(right.program, _run=lambda *x: [1.1 * y for y in right.program._run(*x)])
    used = dataclasses.replace(used, bound={**used.bound, "discriminator": dataclasses.replace(right, program=wrong)})
    ours.stage.use(used)
    for _ in range(2):
        ours.train_step()
        theirs.train_step()
    assert ours.stage.programs is None
    assert "discriminator differs from eager" in str(ours.stage.refusal)
    require_equal(ours, theirs)


def test_a_gradient_that_is_not_finite_is_seen(tmp_path, interpreted):
    trainer = make("dcgan", tmp_path)
    trainer.stage.use(compiled(trainer))
    trainer.train_step()
    with torch.no_grad():
        trainer.stage.step.discriminator.layers[-1].weight[0, 0, 0, 0] = torch.nan  # type: ignore[index,union-attr]
    trainer.train_step()
    bad = trainer.stage.nonfinite.first_bad(trainer.stage.nonfinite.pending())
    assert bad is not None and bad[0] == 1


def test_why_a_stage_cannot_be_compiled_is_kept(tmp_path, interpreted, monkeypatch):
    trainer = make("gan", tmp_path)

    def fail(*_: object) -> None:
        raise CompileError("no C++ compiler")

    monkeypatch.setattr(build_module, "compile_graph", fail)
    build(spec_of(trainer), CPU)
    assert load(spec_of(trainer), trainer.stage.step) == "CompileError: no C++ compiler"


def test_the_next_run_forgets_a_failure_of_the_machine_and_no_other(tmp_path, interpreted, monkeypatch):
    trainer = make("gan", tmp_path)
    spec = spec_of(trainer)
    for error, forgotten in ((CompileError("no C++ compiler"), True), (recording.NotRecordable("a hook"), False)):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(build_module, "compile_graph", fail)
        build(spec, CPU)
        build_module.forget_failure(spec, CPU)
        assert spec.compiled(CPU) != forgotten


def test_programs_that_differ_from_eager_are_never_stored(tmp_path, interpreted, monkeypatch):
    trainer = make("gan", tmp_path)
    differences = itertools.count()
    monkeypatch.setattr(program_check, "difference_of", lambda *_, **__: float(next(differences) == 9))
    assert "differs from eager by 1.0e+00" in build(spec_of(trainer), CPU)["reason"]


def test_a_cache_that_cannot_be_read_is_a_reason(tmp_path, interpreted):
    trainer = make("gan", tmp_path)
    compiled(trainer)
    file_of(spec_of(trainer).key(CPU)).with_suffix(".json").write_text("{")
    found = load(spec_of(trainer), trainer.stage.step)
    assert "the cache cannot be read" in str(found)


def test_the_name_of_a_program_has_what_it_depends_on(tmp_path, own_cache):
    spec = spec_of(make("wgan-gp", tmp_path))
    others = [
        dataclasses.replace(spec, **{field: getattr(spec, field) + 1})
        for field in ("resolution", "channels", "num_classes", "micro_batch")
    ]
    for section, values in {
        "networks": {"width": 9},
        "objective": {"penalty_weight": 3.0},
        "schedule": {"accumulation": 2},
    }.items():
        changed = dataclasses.replace(getattr(spec.config, section), **values)
        others.append(dataclasses.replace(spec, config=dataclasses.replace(spec.config, **{section: changed})))
    keys = {one.key(CPU) for one in (spec, dataclasses.replace(spec, fade=True), *others)}
    assert len(keys) == 2 + len(others)
    for section, values in {"optimizer": {"lr_g": 1.0}, "run": {"seed": 1}}.items():
        changed = dataclasses.replace(getattr(spec.config, section), **values)
        same = dataclasses.replace(spec.config, **{section: changed})
        assert dataclasses.replace(spec, config=same).key(CPU) == spec.key(CPU)


def test_the_name_of_a_program_has_the_implementations_in_it(tmp_path, own_cache, monkeypatch):
    spec = spec_of(make("wgan-gp", tmp_path))
    assert qualification.forms_of_recordings(CPU)["bias_act"] == ["lean"]
    before = spec.key(CPU)
    monkeypatch.setattr(OPS["pixel_norm"], "wrong", {("cpu", torch.float32, "cpp"), ("cuda", torch.float32, "triton")})
    assert qualification.forms_of_recordings(CPU)["pixel_norm"][-1] == "cpp is wrong in torch.float32"
    assert spec.key(CPU) != before


def test_programs_are_recorded_and_checked_without_measuring(tmp_path, interpreted, monkeypatch):
    """As in the process that compiles, which follows the run; the recorded forms are those of the shipped table."""
    trainer = make("pggan", tmp_path)
    operations = {}
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build_module, "measure", lambda *_: {"difference": 0.0, "eager_ms": 1.0, "compiled_ms": 1.0})
    monkeypatch.setattr(build_module, "bind", lambda *_: None)

    def keep(graph: Any, inputs: Any, file: Path) -> None:
        operations[file.name.rpartition("-")[2]] = graph.code

    monkeypatch.setattr(build_module, "compile_graph", keep)
    spec = spec_of(trainer)
    build(spec, CPU)
    shipped, key = dict(operations), spec.key(CPU)
    monkeypatch.delenv("FASTGAN_QUALIFY")
    qualification.configure(enabled=True)
    try:
        qualification.follow(qualification.record(CPU), CPU)
        trainer.train_step()
        run = qualification.record(CPU)
        assert run["classes"] and set(run["classes"].values()) == {None}
        run["classes"] = {label: ["torch"] for label in run["classes"]}  # what its eager steps run
        qualification.follow(run, CPU)
        assert spec.key(CPU) == key
        build(spec, CPU)
        assert operations == shipped
        trainer.train_step()
        found = qualification.record(CPU)["classes"]
        assert all(found.get(label) == ["torch"] for label in run["classes"])
        assert not list((tmp_path / "cache" / "fastgan").glob("qualification/*.json"))
    finally:
        monkeypatch.setenv("FASTGAN_QUALIFY", "0")
        qualification.configure(enabled=True)


def train(run: Path, *flags: str, resume: bool = False) -> str:
    command = [sys.executable, "-m", "fastgan", "train"]
    small = "--variant wgan-gp --latent 8 --width 8 --max-width 8 --resolution 8 --batch 8 --n-critic 1 --threads 1"
    line = ["--resume", str(run)] if resume else [*small.split(), "--out", str(run)]
    done = subprocess.run([*command, *line, *flags], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def weights(run: Path) -> dict[str, Tensor]:
    newest = sorted((run / "checkpoints").glob("kimg-*"))[-1]
    return {**load_file(newest / "training.safetensors"), **load_file(newest / "generator.safetensors")}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow  # it compiles two programs
def test_a_deterministic_run_waits_for_its_program_and_resumes_to_the_bit(tmp_path, own_cache):
    flags = ("--compile", "on", "--deterministic", "--checkpoint-kimg", "0.1")
    text = train(tmp_path / "a", *flags, "--kimg", "0.3")
    assert "8 px: compiled from 0 kimg on" in text
    assert {row["form"] for row in rows(tmp_path / "a")} == {"compiled"}
    train(tmp_path / "b", *flags, "--kimg", "0.2")
    train(tmp_path / "b", "--kimg", "0.3", resume=True)
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_of_every_variant_are_compiled_and_stay_so(variant, tmp_path, own_cache):
    sizes = SMALL[VARIANTS[variant].config("digits").networks.model].split()
    flags = ("--variant", variant, "--n-critic", "1", *sizes, "--batch", "8", "--kimg", "0.1", "--log-kimg", "0.02")
    text = train(tmp_path / "run", *flags, "--resolution", "8", "--compile", "on", "--deterministic")
    assert "compiled from" in text and " eager, " not in text
    assert {row["form"] for row in rows(tmp_path / "run")} == {"compiled"}


@pytest.mark.slow
def test_a_run_may_start_in_one_form_and_resume_in_the_other(tmp_path, own_cache):
    train(tmp_path, "--compile", "off", "--kimg", "0.1")
    text = train(tmp_path, "--compile", "on", "--deterministic", "--kimg", "0.2", resume=True)
    assert "8 px: compiled from 0.104 kimg on" in text
    text = train(tmp_path, "--compile", "off", "--kimg", "0.3", resume=True)
    forms = (
        [(row["images"] > 104) + (row["images"] > 200) for row in rows(tmp_path)],
        [r["form"] for r in rows(tmp_path)],
    )
    assert set(zip(*forms, strict=True)) == {(0, "eager"), (1, "compiled"), (2, "eager")}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_compiled_ranks_train_as_one_eager_process(engine, tmp_path, own_cache):
    cases = [case("eager", "wgan-gp", 0, 2)]
    launch(Path(__file__).parents[2] / "helpers" / "ranks.py", cases, tmp_path, 1)
    several = [case("compiled", "wgan-gp", 0, 1)]
    several[0]["flags"] += ["--compile", "on", "--deterministic"]
    launch(Path(__file__).parents[2] / "helpers" / "ranks.py", several, tmp_path, 2, engine)
    assert "--n-critic 2" in FLAGS["wgan-gp"]
    assert_same_weights(load_file(tmp_path / "eager.safetensors"), load_file(tmp_path / "compiled.safetensors"))


def test_auto_starts_to_compile_where_the_run_is_long_enough_to_earn_it(tmp_path, monkeypatch):
    started: list[Any] = []

    class Builder:
        def __init__(self, specs: Any, device: torch.device) -> None:
            started.append([(spec.resolution, spec.fade) for spec in specs])

        def failure(self) -> None: ...

        def close(self) -> None: ...

    clock = itertools.count(step=10)
    monkeypatch.setattr(compilation, "ProgramBuilder", Builder)
    monkeypatch.setattr(compilation.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(ProgramSpec, "compiled", lambda *_: False)
    trainer = make("pggan", tmp_path, "--kimg", "40")
    for mode, speed, expected in (
        ("off", 1.0, []),
        ("auto", 1e9, []),  # over in no time
        ("auto", 8.0, [[(4, False), (8, True), (8, False)]]),
        ("auto", 20.0, [[(8, True), (8, False)]]),  # a step of 8 px takes twice as long
    ):
        started.clear()
        config = dataclasses.replace(trainer.config, system=dataclasses.replace(trainer.config.system, compile=mode))
        chosen = compilation.Compilation(config, trainer.world, trainer.stages, channels=1, num_classes=10)
        chosen.follow(trainer.stage, 0)
        for _ in range(5):
            chosen.at_log(trainer.stage, 0, speed)
        assert started == expected
        chosen.close()
