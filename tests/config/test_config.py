from __future__ import annotations

import ast
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from fastgan import config as configs
from fastgan.config import Config, Schedule, batch_at, batches_for_all, files, replace, sections, validate
from fastgan.config.files import merge, read_yaml, write_yaml
from fastgan.config.variants import VARIANTS, Preset
from fastgan.errors import ArgumentError
from fastgan.training.from_config import rates
from fastgan.training.resilience.supervisor import read_hostfile

NAMES = ["gan", "dcgan", "lsgan", "wgan", "wgan-gp", "wgan-div", "sagan", "pggan", "r3gan"]
PRESETS: tuple[Preset, ...] = ("paper", "digits")


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(ArgumentError) as error:
        call(*args)
    text = str(error.value)
    assert "\n" not in text
    return text


# --- variants --------------------------------------------------------------------------------------------------------


def test_there_are_nine_variants() -> None:
    assert list(VARIANTS) == NAMES
    assert all(VARIANTS[name].name == name and VARIANTS[name].reference for name in NAMES)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", NAMES)
def test_every_preset_passes(name: str, preset: Preset) -> None:
    validate(VARIANTS[name].config(preset))


@pytest.mark.parametrize("name", NAMES)
def test_digits_is_the_same_method_in_small(name: str) -> None:
    paper, digits = VARIANTS[name].paper, VARIANTS[name].digits
    stabilised = {"dcgan", "lsgan"}  # see _R1 in variants.py
    objective = paper.objective
    if name in stabilised:
        weight = digits.objective.penalty_weight
        objective = dataclasses.replace(objective, regularizer="zero-centered", penalty_weight=weight)
    assert digits.objective == objective
    assert digits.networks.model == paper.networks.model
    assert digits.optimizer.n_critic in (1, paper.optimizer.n_critic)  # see _ONE_CRITIC in variants.py
    assert digits.schedule.resolution <= 32 < paper.schedule.resolution or name == "gan"
    assert digits.schedule.kimg < paper.schedule.kimg


# What the papers print; the ones that leave a number open are not listed for it.
PAPER: dict[str, dict[str, Any]] = {
    "gan": {
        "networks.model": "mlp",
        "networks.width": 1200,
        "objective.loss": "minimax",
        "optimizer.optimizer": "sgd",
        "optimizer.n_critic": 1,
    },
    "dcgan": {
        "networks.model": "dcgan",
        "networks.latent": 100,
        "networks.max_width": 1024,
        "objective.loss": "minimax",
        "objective.regularizer": "none",
        "optimizer.optimizer": "adam",
        "optimizer.lr_g": 2e-4,
        "optimizer.lr_d": 2e-4,
        "optimizer.beta1": 0.5,
        "optimizer.beta2": 0.999,
        "schedule.batch": 128,
        "schedule.resolution": 64,
    },
    "lsgan": {
        "objective.loss": "least-squares",
        "objective.label_fake": 0.0,
        "objective.label_real": 1.0,
        "objective.label_generator": 1.0,
        "optimizer.optimizer": "adam",
        "optimizer.lr_g": 1e-3,
        "optimizer.lr_d": 1e-3,
        "optimizer.beta1": 0.5,
        "schedule.batch": 64,
    },
    "wgan": {
        "objective.loss": "wasserstein",
        "objective.regularizer": "weight-clipping",
        "objective.clip": 0.01,
        "optimizer.optimizer": "rmsprop",
        "optimizer.lr_g": 5e-5,
        "optimizer.lr_d": 5e-5,
        "optimizer.n_critic": 5,
        "schedule.batch": 64,
    },
    "wgan-gp": {
        "networks.norm_d": "none",
        "networks.latent": 128,
        "objective.loss": "wasserstein",
        "objective.regularizer": "gradient-penalty",
        "objective.penalty_weight": 10.0,
        "optimizer.optimizer": "adam",
        "optimizer.lr_g": 1e-4,
        "optimizer.lr_d": 1e-4,
        "optimizer.beta1": 0.0,
        "optimizer.beta2": 0.9,
        "optimizer.n_critic": 5,
        "schedule.batch": 64,
    },
    "wgan-div": {
        "networks.norm_d": "none",
        "objective.loss": "wasserstein",
        "objective.regularizer": "wasserstein-divergence",
        "objective.divergence_k": 2.0,
        "objective.divergence_p": 6.0,
        # Of the authors' code.
        "networks.latent": 128,
        "optimizer.lr_g": 2e-4,
        "optimizer.lr_d": 2e-4,
        "optimizer.beta1": 0.0,
        "optimizer.beta2": 0.9,
        "optimizer.n_critic": 4,
        "schedule.batch": 64,
    },
    "sagan": {
        "networks.model": "sagan",
        "networks.latent": 128,
        "objective.loss": "hinge",
        "objective.regularizer": "none",
        "optimizer.optimizer": "adam",
        "optimizer.lr_g": 1e-4,
        "optimizer.lr_d": 4e-4,
        "optimizer.beta1": 0.0,
        "optimizer.beta2": 0.9,
        "optimizer.n_critic": 1,
        "schedule.resolution": 128,
        "schedule.batch": 256,
    },
    "pggan": {
        "networks.model": "pggan",
        "networks.latent": 512,
        "networks.fmap_base": 8192,
        "networks.fmap_max": 512,
        "objective.loss": "wasserstein",
        "objective.regularizer": "gradient-penalty",
        "objective.penalty_weight": 10.0,
        "objective.drift": 0.001,
        "optimizer.optimizer": "adam",
        "optimizer.lr_g": 1e-3,
        "optimizer.lr_d": 1e-3,
        "optimizer.beta1": 0.0,
        "optimizer.beta2": 0.99,
        "optimizer.n_critic": 1,
        "optimizer.ema_decay": 0.999,
        "schedule.resolution": 1024,
        "schedule.fade_kimg": 600,
        "schedule.stable_kimg": 600,
        "schedule.kimg": 12_000,
    },
    "r3gan": {
        "networks.model": "r3gan",
        "networks.latent": 64,
        "networks.width": 384,  # at 64 px; 768 from 32 px down to 4
        "networks.max_width": 768,
        "optimizer.ema_decay": 0.99965,  # 0.5 ** (256 / 500_000)
        "schedule.kimg": 20_000,
        "objective.loss": "relativistic",
        "objective.regularizer": "zero-centered-both",
        "objective.penalty_weight": 1.0,
        "optimizer.optimizer": "adam",
        "optimizer.lr_g": 2e-4,
        "optimizer.lr_d": 2e-4,
        "optimizer.beta1": 0.0,
        "optimizer.beta2": 0.9,
        "optimizer.n_critic": 1,
        "schedule.resolution": 64,
        "schedule.batch": 256,
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_paper_presets_hold_the_papers_numbers(name: str) -> None:
    config = VARIANTS[name].config("paper")
    actual = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in PAPER[name]}
    assert actual == PAPER[name]


def test_pggan_on_eight_gpus() -> None:
    """Batches and rates by resolution of the authors' preset; only pggan has it."""
    config = VARIANTS["pggan"].config("paper-8-gpus")
    sizes = {4: 512, 8: 256, 16: 128, 32: 64, 64: 32, 128: 32, 1024: 32}
    assert {resolution: batch_at(config.schedule, resolution) for resolution in sizes} == sizes
    steps = {4: 1e-3, 64: 1e-3, 128: 1.5e-3, 256: 2e-3, 512: 3e-3, 1024: 3e-3}
    assert {at: rates(config, 0, at) for at in steps} == {at: pytest.approx((rate, rate)) for at, rate in steps.items()}
    assert [name for name, variant in VARIANTS.items() if "paper-8-gpus" in variant.presets] == ["pggan"]
    with pytest.raises(ArgumentError, match="--preset must be paper, digits for the variant gan, got 'paper-8-gpus'"):
        VARIANTS["gan"].config("paper-8-gpus")


def test_recipe_but_changes_only_what_it_says() -> None:
    recipe = VARIANTS["dcgan"].paper
    other = recipe.but(schedule={"kimg": 7.0}, networks={"latent": 3})
    assert (other.schedule.kimg, other.networks.latent) == (7.0, 3)
    assert other.but(schedule={"kimg": recipe.schedule.kimg}, networks={"latent": 100}) == recipe
    assert other.optimizer is recipe.optimizer


# --- validate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", get_args(configs.ModelName))
def test_losses_regularizers_and_models_are_orthogonal(model: str) -> None:
    losses, regularizers = get_args(configs.LossName), get_args(configs.RegularizerName)
    assert (len(losses), len(regularizers)) == (6, 6)
    for loss, regularizer in itertools.product(losses, regularizers):
        validate(replace(Config(), networks={"model": model}, objective={"loss": loss, "regularizer": regularizer}))


BAD: list[tuple[str, str, Any]] = [
    *[("schedule", "resolution", v) for v in (0, 1, 4, 12, 63, 2048, -8)],
    *[("networks", key, v) for key in ("latent", "width", "max_width", "fmap_base", "fmap_max") for v in (0, -1)],
    *[("optimizer", "n_critic", v) for v in (0, -1)],
    *[(s, key, 10**30) for s, key in (("networks", "latent"), ("schedule", "batch"), ("run", "seed"), ("run", "keep"))],
    *[("schedule", key, v) for key in ("batch", "accumulation") for v in (0, -4)],
    *[("run", key, 0) for key in ("keep", "samples")],
    *[("schedule", "kimg", v) for v in (0.0, -1.0, math.nan, math.inf)],
    *[("optimizer", key, v) for key in ("lr_g", "lr_d") for v in (0.0, -1e-3, math.nan, math.inf)],
    *[("objective", "clip", v) for v in (0.0, -0.01, math.nan)],
    *[("run", key, v) for key in ("checkpoint_kimg", "sample_kimg", "log_kimg") for v in (0.0, -1.0, math.nan)],
    *[("schedule", key, v) for key in ("fade_kimg", "stable_kimg") for v in (-1.0, math.nan, math.inf)],
    ("schedule", "kimg", 4e-4),  # no image at all
    ("schedule", "kimg", 1e6),  # names of checkpoints are sorted, and have six digits
    *[("objective", key, v) for key in ("penalty_weight", "divergence_k", "drift") for v in (-1.0, math.nan, math.inf)],
    *[("objective", "divergence_p", v) for v in (0.0, -6.0, math.nan, math.inf)],
    *[("objective", f"label_{of}", v) for of in ("fake", "real", "generator") for v in (math.nan, math.inf)],
    *[("system", "threads", v) for v in (0, -1)],
    *[("optimizer", key, v) for key in ("beta1", "beta2", "ema_decay") for v in (-0.1, 1.0, 2.0, math.nan)],
    *[("optimizer", "lr_decay", v) for v in (-0.1, 1.1, math.nan)],
    *[("schedule", "grown_at", v) for v in (-0.1, 0.0, 1.1, math.nan)],
    ("run", "seed", -1),
    *[("data", "channels", v) for v in (0, 2, 5)],
    *[("schedule", "batch_at", v) for v in ({12: 4}, {16: 0}, {32: -1}, {2048: 4}, {16: 10**30})],
    *[("optimizer", "lr_factor_at", v) for v in ({12: 1.0}, {16: 0.0}, {32: math.inf}, {64: math.nan}, {2048: 1.0})],
    ("networks", "conditional", True),
]


@pytest.mark.parametrize(("section", "key", "value"), BAD)
def test_bad_values_name_the_flag(section: str, key: str, value: Any) -> None:
    text = refusal(validate, replace(Config(), **{section: {key: value}}))
    flag = f"--{key.replace('_', '-')}"
    assert text.startswith((f"{flag} must be ", f"{flag} {value!r}: ")) and repr(value) in text


def test_pggan_begins_at_4_pixels() -> None:
    validate(replace(Config(), networks={"model": "pggan"}, schedule={"resolution": 4}))
    assert "must be 8, 16" in refusal(validate, replace(Config(), schedule={"resolution": 4}))


def test_fmap_base_must_leave_one_map() -> None:
    config = replace(Config(), networks={"model": "pggan", "fmap_base": 31}, schedule={"resolution": 64})
    assert refusal(validate, config) == "--fmap-base must be at least 32 at 64 px, got 31"
    validate(replace(config, networks={"fmap_base": 32}))


@pytest.mark.parametrize(("resolution", "good", "bad"), [(32, (4, 8, 16), (32, 64, 12, 0)), (8, (4,), (8, 16))])
def test_attention_sits_inside_the_network(resolution: int, good: tuple[int, ...], bad: tuple[int, ...]) -> None:
    config = replace(Config(), networks={"model": "sagan"}, schedule={"resolution": resolution})
    for at in good:
        validate(replace(config, networks={"attention_at": at}))
    for at in bad:
        text = refusal(validate, replace(config, networks={"attention_at": at}))
        assert text.startswith("--attention-at must be 4") and text.endswith(f"px, got {at}")


def test_sagan_needs_eight_channels() -> None:
    config = replace(Config(), networks={"model": "sagan", "width": 7})
    assert refusal(validate, config) == "--width must be at least 8 with --model sagan, got 7"
    validate(replace(config, networks={"width": 8}))
    validate(replace(config, networks={"width": 8, "conditional": True}))


def test_zero_3_is_refused_with_the_reason() -> None:
    for regularizer in ("gradient-penalty", "wasserstein-divergence", "zero-centered", "zero-centered-both"):
        config = replace(Config(), objective={"regularizer": regularizer}, system={"zero": 3})
        text = refusal(validate, config)
        assert text.startswith("--zero must be 0, 1 or 2, got 3; ") and f"--regularizer {regularizer}" in text
        validate(replace(config, system={"zero": 2}))
    assert "whole parameters" in refusal(validate, replace(Config(), system={"zero": 3}))


@pytest.mark.parametrize("values", [{"zero": 1}, {"deepspeed_config": "ds.json"}])
def test_torch_engine_takes_no_deepspeed_settings(values: dict[str, Any]) -> None:
    text = refusal(validate, replace(Config(), system={"engine": "torch", **values}))
    assert text == "--engine must be deepspeed with --zero or --deepspeed-config, got 'torch'"
    validate(replace(Config(), system={"engine": "deepspeed", **values}))


def test_batch_at() -> None:
    schedule = Schedule(batch=128, batch_at={32: 64, 64: 32, 256: 8})
    sizes = {4: 128, 16: 128, 32: 64, 64: 32, 128: 32, 256: 8, 1024: 8}
    assert {resolution: batch_at(schedule, resolution) for resolution in sizes} == sizes
    assert batches_for_all(schedule, 16) == "--batch-at 32 64 64 32 256 16"
    assert batches_for_all(dataclasses.replace(schedule, accumulation=4), 16) == "--batch-at 32 64 64 64 256 64"
    assert batches_for_all(schedule, 256) == "--batch 256 --batch-at"
    assert batches_for_all(Schedule(batch=16), 32) == "--batch 32"
    assert batch_at(Schedule(batch=16), 512) == 16
    assert batch_at(Schedule(batch=16, batch_at={8: 64}), 512) == 16  # never larger than --batch
    paper = VARIANTS["pggan"].config("paper").schedule
    assert [batch_at(paper, 2**i) for i in range(2, 11)] == [128, 128, 128, 64, 32, 16, 8, 4, 4]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", NAMES)
def test_yaml_round_trip(name: str, preset: Preset, tmp_path: Path) -> None:
    config = replace(
        VARIANTS[name].config(preset),
        run={"out": "runs/ä b", "seed": 7},
        data={"data": "folder:C:\\x: y", "channels": 3},
        networks={"attention_at": None},
        schedule={"batch_at": {16: 32}},
        optimizer={"lr_g": 1e-7},
    )
    path = tmp_path / "config.yaml"
    write_yaml(config, name, preset, path)
    content = read_yaml(path, "--config")
    assert (content.pop("variant"), content.pop("preset")) == (name, preset)
    assert merge(Config(), content, str(path)) == config


def test_merge_changes_only_what_a_file_names() -> None:
    base = VARIANTS["wgan"].config("digits")
    merged = merge(base, {"optimizer": {"lr_g": 0.25}, "schedule": {"batch_at": {32: 8}}}, "f.yaml")
    assert merged == replace(base, optimizer={"lr_g": 0.25}, schedule={"batch_at": {32: 8}})
    assert merge(base, {}, "f.yaml") == base
    assert base == VARIANTS["wgan"].config("digits")  # the base is not written to


def test_numbers_as_yaml_reads_them(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-4 for a string, `none` too; both must arrive as meant."""
    path = tmp_path / "c.yaml"
    path.write_text("optimizer:\n  lr_g: 1e-4\nnetworks:\n  norm_d: none\nschedule:\n  kimg: 5\n  batch_at: {64: 8}\n")
    config = merge(Config(), read_yaml(path, "--config"), str(path))
    assert (config.optimizer.lr_g, config.networks.norm_d, config.schedule.kimg) == (1e-4, "none", 5.0)
    assert config.schedule.batch_at == {64: 8}


def test_unknown_names() -> None:
    assert refusal(merge, Config(), {"optimum": {"lr_g": 1.0}}, "f.yaml").startswith("f.yaml: section must be one of ")
    text = refusal(merge, Config(), {"optimizer": {"lr_gg": 1.0}}, "f.yaml")
    assert text == "f.yaml: unknown key in optimizer 'lr_gg': did you mean lr_g?"
    text = refusal(merge, Config(), {"optimizer": {"zzz": 1.0}}, "f.yaml")
    assert "'zzz'" in text and "ema_decay" in text
    assert "optimizer 5: " in refusal(merge, Config(), {"optimizer": {5: 1.0}}, "f.yaml")
    for content in (None, 3, [1]):
        assert refusal(merge, Config(), {"run": content}, "f.yaml") == (
            f"f.yaml: run must be a mapping of keys to values, got {content!r}"
        )


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optimizer", "lr_g", "fast"),
        ("optimizer", "optimizer", "lion"),
        ("networks", "model", "stylegan"),
        ("networks", "latent", 1.5),
        ("networks", "conditional", "perhaps"),
        ("objective", "loss", "wasserstein-gp"),
        ("objective", "regularizer", None),
        ("schedule", "batch", None),
        ("schedule", "kimg", [1, 2]),
        ("schedule", "batch_at", [[4, 8]]),
        ("schedule", "batch_at", {"large": 4}),
        ("system", "zero", 4),
        ("system", "precision", "fp64"),
        ("run", "keep", {}),
    ],
)
def test_wrong_types_name_the_key(section: str, key: str, value: Any) -> None:
    assert refusal(merge, Config(), {section: {key: value}}, "f.yaml").startswith(f"f.yaml: {section}.{key}")


def test_a_complete_dict() -> None:
    values = configs.to_dict(VARIANTS["sagan"].config("paper"))
    assert files.from_dict(values, "meta") == VARIANTS["sagan"].config("paper")
    values["run"]["color"] = 1
    assert refusal(files.from_dict, values, "meta").startswith("meta: run.color 1: ")


def test_schema_version(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("schema: 2\nrun: {seed: 1}\n")
    assert refusal(read_yaml, path, "--config") == f"{path}: schema must be 1, got 2; this version reads no other"
    path.write_text("schema: 1\nrun: {seed: 1}\n")
    assert read_yaml(path, "--config") == {"run": {"seed": 1}}
    path.write_text("run: {seed: 1}\n")  # a file by hand need not name it
    assert read_yaml(path, "--config") == {"run": {"seed": 1}}


@pytest.mark.parametrize("content", [b"a: [1, 2", b"- 1\n- 2\n", b"", b"word", b"\xff\xfe\x00", b"a: !!python/none x"])
def test_files_that_are_no_configuration(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    text = refusal(read_yaml, path, "--config")
    assert text.startswith("--config must be a YAML ") and f"got {str(path)!r}" in text


def test_a_line_of_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run: {seed: 1}\noptimizer:\n\tlr_g: 1e-4\n")
    assert "; line 3: " in refusal(read_yaml, path, "--config")


def test_aliases_are_refused_before_they_multiply(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    rows = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30)]
    path.write_text("\n".join(["l0: &l0 [1]", *rows, "run: *l29"]))
    assert "aliases are not supported" in refusal(read_yaml, path, "--config")


def test_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        assert refusal(read_yaml, path, "--config").startswith(
            f"--config must be a readable YAML file, got {str(path)!r}; "
        )


def test_every_value_of_a_configuration_is_described() -> None:
    """`--help` shows the docstring below each field: a field without one would be a flag without a word."""
    tree = ast.parse(Path(sections.__file__).read_text())
    classes = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    for section in dataclasses.fields(Config):
        body = classes[type(getattr(Config(), section.name)).__name__]
        described = {
            node.target.id
            for node, after in itertools.pairwise(body)
            if isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        }
        assert described == {f.name for f in dataclasses.fields(getattr(Config(), section.name))}


def test_flags_are_unique_over_sections() -> None:
    """Sections are left out of the flags, so that no two may share a name."""
    names = [f.name for s in dataclasses.fields(Config) for f in dataclasses.fields(getattr(Config(), s.name))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("schedule", "batch", True), ("run", "seed", False), ("schedule", "batch_at", {16: True}), ("data", "data", True)],
)
def test_true_is_no_number(section: str, key: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=rf"FILE: {section}\.{key} must not be true or false"):
        merge(Config(), {section: {key: value}}, "FILE")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\xef\xbb\xbfrun:\n  seed: 3\n")
    assert read_yaml(file, "--config") == {"run": {"seed": 3}}
    file.write_bytes(b"\xef\xbb\xbflocalhost slots=1\r\n")
    assert read_hostfile(file) == {"localhost": 1}


@pytest.mark.parametrize("name", ["threads", "workers"])
def test_more_threads_than_a_machine_has_are_refused(name: str) -> None:
    section = "system" if name == "threads" else "data"
    with pytest.raises(ArgumentError, match=f"--{name} must be at most 1,024, got 1000000"):
        validate(replace(Config(), **{section: {name: 1_000_000}}))


def test_an_error_has_no_control_characters() -> None:
    """A terminal would obey them; names of files may have any."""
    text = str(ArgumentError("--data", "x", "a\x1b[31mb\x07\r\n\u202ec\udcff is missing"))
    assert text == "--data 'x': a\\x1b[31mb\\x07\\x0d\\x0a\\u202ec\\udcff is missing"


@pytest.mark.parametrize("value", [{}, [], ["digits"], 3], ids=repr)
def test_data_that_is_no_text_is_refused(value: object, tmp_path: Path) -> None:
    import json

    from fastgan.cli import train

    (tmp_path / "config.yaml").write_text(json.dumps({"data": {"data": value}}))
    with pytest.raises(ArgumentError, match="data"):
        train.parse(["--variant", "dcgan", "--config", str(tmp_path / "config.yaml")])
