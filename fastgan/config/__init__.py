"""What was asked for: one typed record of a run, its file form, and the checks that need no data and no device.

Precedence: the preset of the variant, then `--config FILE`, then flags. The same record is written to a run's
`config.yaml` and read back by `--resume`, `fastgan sample` and `fastgan.load`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fastgan.errors import ArgumentError
from fastgan.utils.old_names import current_names

SCHEMA = 1

ModelName = Literal["mlp", "dcgan", "sagan", "pggan"]
LossName = Literal["minimax", "minimax-saturating", "least-squares", "wasserstein", "hinge"]
RegularizerName = Literal["none", "weight-clipping", "gradient-penalty", "wasserstein-divergence", "zero-centered"]
Norm = Literal["batch", "none"]


def _pairs(words: list[str]) -> dict[int, int]:
    if len(words) % 2:
        raise ValueError("must be pairs of a resolution and a batch")
    return {int(key): int(value) for key, value in zip(words[::2], words[1::2], strict=True)}


# Of a dict that has a default tyro makes a flag for each key, in place of the one for all.
_PAIRS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[INT INT [INT INT ...]]",
    instance_from_str=_pairs,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [str(number) for pair in value.items() for number in pair],
)


class _Strict:
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Networks(_Strict):
    """Networks."""

    model: ModelName = "dcgan"
    """Generator and discriminator."""
    latent: int = 128
    """Size of the latent vector."""
    width: int = 64
    """Channels at the highest resolution (dcgan, sagan) or units of a hidden layer (mlp)."""
    max_width: int = 1024
    """Limit of the doubling of channels towards 4x4 (dcgan, sagan)."""
    fmap_base: int = 8192
    """Feature maps at resolution r are min(2 fmap_base / r, fmap_max) (pggan)."""
    fmap_max: int = 512
    """Most feature maps at any resolution (pggan)."""
    norm_g: Norm = "batch"
    """Normalization in the generator (dcgan)."""
    norm_d: Norm = "batch"
    """Normalization in the discriminator (dcgan); none is what a gradient penalty asks for."""
    attention_at: int | None = None
    """Width of the feature map, in pixels, that gets self-attention (sagan); None: 32, or half a smaller image."""
    conditional: bool = False
    """Give both networks the class labels of the data (sagan)."""
    fused_scale: bool = True
    """Change the scale inside the convolution (pggan), as the authors' code; else convolve, activate, pool."""


@dataclass(frozen=True)
class Objective(_Strict):
    """Loss and regularizer."""

    loss: LossName = "minimax"
    """Adversarial loss."""
    regularizer: RegularizerName = "none"
    """What constrains the discriminator besides its loss."""
    label_fake: float = 0.0
    """Least squares: a, the discriminator's target for fake images."""
    label_real: float = 1.0
    """Least squares: b, the discriminator's target for real images."""
    label_generator: float = 1.0
    """Least squares: c, the generator's target for its images."""
    clip: float = 0.01
    """Weight clipping: every weight of the critic stays in [-clip, clip]."""
    penalty_weight: float = 10.0
    """Coefficient of the gradient penalty; zero-centered: of mean |grad D|^2 on real images, half of R1's gamma."""
    divergence_k: float = 2.0
    """Wasserstein divergence: k, its coefficient."""
    divergence_p: float = 6.0
    """Wasserstein divergence: p, the power of the gradient's norm."""
    drift: float = 0.0
    """Coefficient of the mean squared score of real images, which keeps the scores near zero."""


@dataclass(frozen=True)
class Optimizer(_Strict):
    """Optimizer."""

    optimizer: Literal["adam", "rmsprop", "sgd"] = "adam"
    """Of both networks."""
    lr_g: float = 2e-4
    """Learning rate of the generator."""
    lr_d: float = 2e-4
    """Learning rate of the discriminator."""
    lr_decay: float = 0.0
    """Share of the run, at its end, over which both learning rates fall linearly towards 0; 0: they stay."""
    beta1: float = 0.5
    """Adam's first coefficient; the momentum of sgd."""
    beta2: float = 0.999
    """Adam's second coefficient; the smoothing of rmsprop."""
    n_critic: int = 1
    """Discriminator steps for each generator step."""
    ema_decay: float = 0.999
    """Decay of the moving average of the generator's weights, for each generator step."""
    ema_warmup: bool = False
    """Start with a short average: decay min(ema_decay, (1 + t) / (10 + t)) at generator step t."""


@dataclass(frozen=True)
class Schedule(_Strict):
    """Schedule."""

    resolution: int = 64
    """Size of the images in pixels, a power of two."""
    kimg: float = 1000.0
    """Length of the run in thousands of real images shown to the discriminator."""
    batch: int = 64
    """Images of a discriminator step, over all ranks."""
    batch_at: Annotated[dict[int, int], _PAIRS] = field(default_factory=dict)
    """Smaller batches from a resolution on, as pairs `RESOLUTION BATCH ...`, in place of the preset's (pggan)."""
    accumulation: int = 1
    """Micro-batches in which each rank takes its share of a batch."""
    fade_kimg: float | None = None
    """Length of a fade-in (pggan); None: half of an equal share of --kimg, or see grown_at."""
    stable_kimg: float | None = None
    """Length of the training after a fade-in, before the next growth (pggan); None: as fade_kimg."""
    grown_at: float | None = None
    """Share of the run after which the last resolution is faded in (pggan), where neither length is given."""


@dataclass(frozen=True)
class Data(_Strict):
    """Data."""

    data: str = "digits"
    """digits, stacked-digits, folder:PATH, cifar10:ROOT, mnist:ROOT, celeba:ROOT, synthetic or a prepared set: PATH."""
    channels: int | None = None
    """Channels of the images, 1 or 3; None: those of the data."""
    mirror: bool = False
    """Flip half of the real images left to right."""
    pipeline: Literal["auto", "cache", "dali", "torch"] = "auto"
    """cache: decoded images; dali, torch: decoded a batch ahead. auto: the first that can; a run says which and why."""
    workers: int = 0
    """Threads of each rank that decode images where they are not in memory; 0: its share of the cores, at most 8."""
    resident_gb: float | None = None
    """A set that takes no more decoded is kept in memory or on the GPU; None: 1.1, or a quarter of the GPU's free."""


@dataclass(frozen=True)
class Run(_Strict):
    """Run."""

    out: str | None = None
    """Run directory; None: runs/VARIANT-TIME."""
    seed: int = 0
    """Of the initial weights, the order of the data and every random number of a sample."""
    checkpoint_kimg: float | None = None
    """Between checkpoints; None: a twentieth of --kimg, at most 200."""
    sample_kimg: float | None = None
    """Between sample grids; None: as checkpoints."""
    log_kimg: float | None = None
    """Between log lines; None: a hundredth of --kimg, at most 4."""
    evaluate_kimg: Annotated[float | None, tyro.conf.arg(aliases=["--every"])] = None
    """Between evaluations (see fastgan evaluate), and one at the end; None: no evaluation."""
    evaluate_n: int = 5000
    """Generated images of an evaluation."""
    evaluate_features: str | None = None
    """Features of an evaluation, as for fastgan evaluate; None: digits for digits, else Inception."""
    keep: int = 3
    """Checkpoints to keep, the newest ones."""
    samples: int = 64
    """Images in a sample grid."""


@dataclass(frozen=True)
class System(_Strict):
    """Machine."""

    engine: Literal["auto", "deepspeed", "torch"] = "auto"
    """auto: deepspeed under a launcher, torch in a process of its own."""
    zero: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO stage."""
    deepspeed_config: str | None = None
    """DeepSpeed configuration file; None: one is built from these flags."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision, by autocast; parameters and optimizer state are always float32."""
    penalty_precision: Literal["auto", "fp32"] = "auto"
    """fp32: no autocast in the critic's passes of a penalty; its gradient and norm are float32 either way."""
    tf32: bool = False
    """Let float32 products on a GPU use TF32."""
    deterministic: bool = False
    """Only deterministic kernels: the same machine gives the same bits."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Of images and convolution weights; auto: channels_last."""
    sync_bn: bool = False
    """Batch-norm statistics over all ranks (GPU only)."""
    threads: int | None = None
    """CPU threads of each rank; None: what torch chooses."""
    timeout: float = 600.0
    """Seconds that ranks wait for one another; one that is silent for three quarters of it is given up, and named."""


@dataclass(frozen=True)
class Config(_Strict):
    """Everything a run is made from."""

    networks: Networks = Networks()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = field(default_factory=Schedule)
    data: Data = Data()
    run: Run = Run()
    system: System = System()


_ADAPTER = TypeAdapter(Config)


def replace(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with some values of some sections changed: replace(config, schedule={"kimg": 5.0})."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of `config`, by section, without the schema version."""
    return dataclasses.asdict(config)


def merge(base: Config, values: dict[str, Any], where: str) -> Config:
    """`base` overlaid with a nested dict as read from a file named `where`.

    Raises:
        ArgumentError: an unknown section or key, or a value of the wrong type.
    """
    merged = to_dict(base)
    for section, content in values.items():
        if section not in merged:
            raise ArgumentError(where, section, f"a section may be {', '.join(merged)}")
        if not isinstance(content, dict):
            raise ArgumentError(f"{where}: {section}", content, "must be a mapping of keys to values")
        for key in content:
            if key not in merged[section]:
                near = difflib.get_close_matches(str(key), merged[section], n=1)
                hint = f"did you mean {near[0]}?" if near else f"must be {', '.join(merged[section])}"
                raise ArgumentError(f"{where}: unknown key in {section}", key, hint)
        merged[section].update(content)
    return from_dict(merged, where)


def from_dict(values: dict[str, Any], where: str) -> Config:
    """The `Config` of a complete nested dict; `where` names its origin in errors."""
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ArgumentError(f"{where}: {name}", first["input"], first["msg"].lower()) from None


def read_yaml(path: Path, flag: str) -> dict[str, Any]:
    """The content of a configuration file without its schema and variant keys checked away.

    Raises:
        ArgumentError: the file cannot be read, is no YAML mapping, or has another schema version.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ArgumentError(flag, str(path), f"must be a readable YAML file ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(flag, str(path), f"it is no YAML file ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise ArgumentError(flag, str(path), "must be a YAML mapping of sections")
    schema = content.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise ArgumentError(f"{path}: schema", schema, f"this version reads schema {SCHEMA}")
    return current_names(content)


def write_yaml(config: Config, variant: str, preset: str, path: Path) -> None:
    """Write `config` so that `read_yaml` and `merge` give it back; `path` is replaced whole or not at all."""
    content = {"schema": SCHEMA, "variant": variant, "preset": preset, **to_dict(config)}
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(yaml.safe_dump(content, sort_keys=False))
    os.replace(partial, path)


def _require(condition: bool, flag: str, was: object, may_be: str) -> None:
    if not condition:
        raise ArgumentError(flag, was, may_be)


def batch_at(schedule: Schedule, resolution: int) -> int:
    """Images of a discriminator step at `resolution`: the smallest entry of `batch_at` at or below it, or `batch`."""
    limits = [size for at, size in schedule.batch_at.items() if at <= resolution]
    return min([schedule.batch, *limits])


def batches_for_all(schedule: Schedule, world: int) -> str:
    """Flags that leave none of `world` ranks without images at any resolution, and batches else as they are."""
    least = world * schedule.accumulation
    if schedule.batch <= least:
        return f"--batch {least}" + (" --batch-at" if schedule.batch_at else "")
    pairs = [f"{at} {max(size, least)}" for at, size in sorted(schedule.batch_at.items())]
    return " ".join(["--batch-at", *pairs])


def active_ranks(batch: int, world: int, accumulation: int) -> int | None:
    """How many of `world` ranks share a batch, in `accumulation` micro-batches each; None: it cannot be shared.

    All of them where it divides. A batch of fewer images than there are micro-batches goes to as many ranks as it
    divides over, and the others have no part in it.
    """
    if batch % (world * accumulation) == 0:
        return world
    if batch > world * accumulation:
        return None
    return next((n for n in range(batch // accumulation, 0, -1) if batch % (n * accumulation) == 0), None)


_SECOND_ORDER = ("gradient-penalty", "wasserstein-divergence", "zero-centered")


def zero3_fault(regularizer: str) -> str:
    """Why ZeRO 3 is refused."""
    if regularizer in _SECOND_ORDER:
        return f"ZeRO 3 cannot run the second derivative of --regularizer {regularizer}"
    return "the moving average and the checkpoints need whole parameters, which ZeRO 3 takes apart"


def check(config: Config) -> None:
    """Refuse what cannot run, whatever the data and the machine.

    Raises:
        ArgumentError: naming the flag, its value and what it may be.
    """
    n, o, s, r, m = config.networks, config.objective, config.schedule, config.run, config.system
    smallest = 4 if n.model == "pggan" else 8
    powers = [2**i for i in range(2, 11) if 2**i >= smallest]
    _require(s.resolution in powers, "--resolution", s.resolution, f"must be {', '.join(map(str, powers))}")
    positive = {
        "latent": n.latent,
        "width": n.width,
        "max-width": n.max_width,
        "fmap-base": n.fmap_base,
        "fmap-max": n.fmap_max,
        "n-critic": config.optimizer.n_critic,
        "batch": s.batch,
        "accumulation": s.accumulation,
        "evaluate-n": r.evaluate_n,
        "keep": r.keep,
        "samples": r.samples,
    }
    for flag, value in positive.items():
        _require(value >= 1, f"--{flag}", value, "must be at least 1")
    above_zero = {
        "kimg": s.kimg,
        "lr-g": config.optimizer.lr_g,
        "lr-d": config.optimizer.lr_d,
        "clip": o.clip,
        "divergence-p": o.divergence_p,
        "checkpoint-kimg": r.checkpoint_kimg,
        "sample-kimg": r.sample_kimg,
        "log-kimg": r.log_kimg,
        "evaluate-kimg": r.evaluate_kimg,
    }
    for flag, amount in above_zero.items():
        _require(amount is None or (math.isfinite(amount) and amount > 0), f"--{flag}", amount, "must be above 0")
    _require(1 <= round(1000 * s.kimg) < 10**9, "--kimg", s.kimg, "must be at least 0.001 and below 1,000,000")
    not_negative = {
        "fade-kimg": s.fade_kimg,
        "stable-kimg": s.stable_kimg,
        "penalty-weight": o.penalty_weight,
        "divergence-k": o.divergence_k,
        "drift": o.drift,
        "resident-gb": config.data.resident_gb,
    }
    for flag, amount in not_negative.items():
        _require(amount is None or (math.isfinite(amount) and amount >= 0), f"--{flag}", amount, "must be at least 0")
    for flag, label in {
        "label-fake": o.label_fake,
        "label-real": o.label_real,
        "label-generator": o.label_generator,
    }.items():
        _require(math.isfinite(label), f"--{flag}", label, "must be a finite number")
    _require(math.isfinite(m.timeout) and m.timeout >= 5, "--timeout", m.timeout, "must be at least 5 seconds")
    _require(m.threads is None or m.threads >= 1, "--threads", m.threads, "must be at least 1")
    for flag, rate in {
        "beta1": config.optimizer.beta1,
        "beta2": config.optimizer.beta2,
        "ema-decay": config.optimizer.ema_decay,
    }.items():
        _require(0 <= rate < 1, f"--{flag}", rate, "must be at least 0 and below 1")
    _require(0 <= config.optimizer.lr_decay <= 1, "--lr-decay", config.optimizer.lr_decay, "must be 0 to 1")
    _require(s.grown_at is None or 0 < s.grown_at <= 1, "--grown-at", s.grown_at, "must be above 0, to 1")
    # Torch's generators take 64 bits, 12 of which tell the networks of one resolution from another's.
    _require(0 <= r.seed < 2**51, "--seed", r.seed, "must be at least 0, below 2**51")
    _require(config.data.channels in (None, 1, 3), "--channels", config.data.channels, "must be 1 or 3")
    _require(
        all(k in powers and v >= 1 for k, v in s.batch_at.items()),
        "--batch-at",
        s.batch_at,
        "must be pairs of a resolution and a batch of at least 1",
    )
    if n.model == "sagan":
        at = [4, *[p for p in powers if p < s.resolution]]
        _require(
            n.attention_at in (None, *at),
            "--attention-at",
            n.attention_at,
            f"must be {', '.join(map(str, at))} at {s.resolution} px",
        )
        smallest_width = min(n.width, n.max_width)
        _require(smallest_width >= 8, "--width", smallest_width, "must be at least 8 in sagan")
    _require(not n.conditional or n.model == "sagan", "--conditional", True, "only --model sagan takes labels")
    if n.model == "pggan":
        _require(
            2 * n.fmap_base // s.resolution >= 1,
            "--fmap-base",
            n.fmap_base,
            f"must be at least {s.resolution // 2} at {s.resolution} px",
        )
    _require(
        not (m.sync_bn and n.model == "dcgan" and n.norm_d == "batch" and o.regularizer in _SECOND_ORDER),
        "--sync-bn",
        True,
        f"--regularizer {o.regularizer} takes a second derivative, which torch's synchronized batch norm has not; "
        "must be with --norm-d none",
    )
    _require(m.zero != 3, "--zero", 3, f"must be 0, 1 or 2; {zero3_fault(o.regularizer)}")
    _require(
        m.engine != "torch" or (m.zero == 0 and m.deepspeed_config is None),
        "--engine",
        "torch",
        "must be deepspeed with --zero or --deepspeed-config",
    )
