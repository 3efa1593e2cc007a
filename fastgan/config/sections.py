"""A run's configuration: typed sections, with the bounds of each value on its field.

Precedence: the preset of the variant, then `--config FILE`, then flags. The result is written to the run as
`config.yaml`, which `--resume`, `fastgan sample` and `fastgan.load` read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastgan.config.bounds import COUNT, Bound, above, at_least, at_most, one_of
from fastgan.utils.system import MAX_THREADS

ModelName = Literal["mlp", "dcgan", "sagan", "pggan", "r3gan"]
LossName = Literal["minimax", "minimax-saturating", "least-squares", "wasserstein", "hinge", "relativistic"]
RegularizerName = Literal[
    "none", "weight-clipping", "gradient-penalty", "wasserstein-divergence", "zero-centered", "zero-centered-both"
]
Norm = Literal["batch", "none"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
PenaltyMethod = Literal["exact", "finite-difference"]
AugmentName = Literal["none", "ada", "diffaugment"]

FINITE = Bound(lambda value: True, "a finite number")
SHARE = Bound(lambda value: 0 <= value <= 1, "0 to 1")
SHARE_ABOVE_0 = Bound(lambda value: 0 < value <= 1, "above 0 and at most 1")
SHARE_BELOW_1 = Bound(lambda value: 0 <= value < 1, "at least 0 and below 1")
KIMG = Bound(lambda value: value < 10**7 and 1 <= round(1000 * value) < 10**9, "at least 0.001 and below 1,000,000")
# A torch generator takes 64 bits; 12 of them tell the networks of one resolution from those of another.
SEED = Bound(lambda value: 0 <= value < 2**51, "at least 0 and below 2**51")


class _Section:
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (for config/files.py; pydantic is not imported here)


@dataclass(frozen=True)
class Networks(_Section):
    """Networks."""

    model: ModelName = "dcgan"
    """Generator and discriminator."""
    latent: Annotated[int, *COUNT] = 128
    """Size of the latent vector."""
    width: Annotated[int, *COUNT] = 64
    """Channels at the highest resolution (dcgan, sagan, r3gan) or units of a hidden layer (mlp)."""
    max_width: Annotated[int, *COUNT] = 1024
    """Limit of the doubling of channels towards 4x4 (dcgan, sagan, r3gan)."""
    fmap_base: Annotated[int, *COUNT] = 8192
    """Feature maps at resolution r are min(2 fmap_base / r, fmap_max) (pggan)."""
    fmap_max: Annotated[int, *COUNT] = 512
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
class Objective(_Section):
    """Loss and regularizer."""

    loss: LossName = "minimax"
    """Adversarial loss."""
    regularizer: RegularizerName = "none"
    """Regularizer of the discriminator."""
    label_fake: Annotated[float, FINITE] = 0.0
    """Least squares: a, the discriminator's target for fake images."""
    label_real: Annotated[float, FINITE] = 1.0
    """Least squares: b, the discriminator's target for real images."""
    label_generator: Annotated[float, FINITE] = 1.0
    """Least squares: c, the generator's target for its images."""
    clip: Annotated[float, above(0)] = 0.01
    """Weight clipping: every weight of the critic stays in [-clip, clip]."""
    penalty_weight: Annotated[float, at_least(0)] = 10.0
    """Coefficient of the gradient penalty; zero-centered: of mean |grad D|^2 on real images, half of R1's gamma (both:
    on real and on generated images)."""
    penalty_every: Annotated[int, *COUNT] = 1
    """Lazy regularization: penalize in a step of its own after so many discriminator steps, with so many times the
    weight, and with rates and momenta corrected (Karras et al. 2020); 1: in every step, as part of the loss."""
    penalty_method: PenaltyMethod = "exact"
    """exact, or finite-difference: a noisy estimate without second derivatives (zero-centered penalties)."""
    penalty_sigma: Annotated[float, above(0)] = 0.01
    """Finite differences: length of the random step, where images are in [-1, 1]."""
    divergence_k: Annotated[float, at_least(0)] = 2.0
    """Wasserstein divergence: k, its coefficient."""
    divergence_p: Annotated[float, above(0)] = 6.0
    """Wasserstein divergence: p, the power of the gradient's norm."""
    drift: Annotated[float, at_least(0)] = 0.0
    """Coefficient of the mean squared score of real images, which keeps the scores near zero."""


@dataclass(frozen=True)
class Optimizer(_Section):
    """Optimizer."""

    optimizer: Literal["adam", "rmsprop", "sgd"] = "adam"
    """Optimizer of both networks."""
    lr_g: Annotated[float, above(0)] = 2e-4
    """Learning rate of the generator."""
    lr_d: Annotated[float, above(0)] = 2e-4
    """Learning rate of the discriminator."""
    lr_decay: Annotated[float, SHARE] = 0.0
    """Share of the run, at its end, over which both learning rates fall linearly to 0; 0: constant rates."""
    lr_factor_at: dict[int, float] = field(default_factory=dict)
    """Factor on both learning rates from a resolution on, as pairs `RESOLUTION FACTOR ...` (pggan)."""
    beta1: Annotated[float, SHARE_BELOW_1] = 0.5
    """Adam's first coefficient; the momentum of sgd."""
    beta2: Annotated[float, SHARE_BELOW_1] = 0.999
    """Adam's second coefficient; the smoothing of rmsprop."""
    n_critic: Annotated[int, *COUNT] = 1
    """Discriminator steps for each generator step."""
    ema_decay: Annotated[float, SHARE_BELOW_1] = 0.999
    """Decay of the moving average of the generator's weights at each generator step."""
    ema_warmup: bool = False
    """Start with a short average: decay min(ema_decay, (1 + t) / (10 + t)) at generator step t."""


@dataclass(frozen=True)
class Schedule(_Section):
    """Schedule."""

    resolution: int = 64
    """Size of the images in pixels, a power of two."""
    kimg: Annotated[float, KIMG] = 1000.0
    """Length of the run in thousands of real images shown to the discriminator."""
    batch: Annotated[int, *COUNT] = 64
    """Images of a discriminator step, over all ranks."""
    batch_at: dict[int, int] = field(default_factory=dict)
    """Smaller batches from a resolution on, as pairs `RESOLUTION BATCH ...`; replaces those of the preset (pggan)."""
    accumulation: Annotated[int, *COUNT] = 1
    """Micro-batches of each rank in a batch (gradient accumulation)."""
    first_resolution: int | None = None
    """Resolution at which training starts (pggan); None: 4, or that of the weights of init_from."""
    fade_kimg: Annotated[float | None, at_least(0)] = None
    """Length of a fade-in (pggan); None: half of an equal share of --kimg, or see grown_at."""
    stable_kimg: Annotated[float | None, at_least(0)] = None
    """Length of the training after a fade-in, before the next growth (pggan); None: as fade_kimg."""
    grown_at: Annotated[float | None, SHARE_ABOVE_0] = None
    """Share of the run after which the last fade-in ends (pggan), where neither length is given."""


@dataclass(frozen=True)
class Data(_Section):
    """Data."""

    data: str = "digits"
    """A folder of images or a prepared set, as a path; or digits, stacked-digits, fashion-mnist[:ROOT], mnist:ROOT,
    cifar10:ROOT (these three also ROOT?split=test), celeba:ROOT, avatars[:STYLE][?n=N], folder:PATH, synthetic."""
    channels: Annotated[int | None, one_of(1, 3, 4)] = None
    """Channels of the images: 1, 3, or 4 for color with transparency; None: those of the data, at most 3."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How an image that is no square becomes one: its center square, whole on the background, or stretched."""
    background: str = "white"
    """Color of padding and behind transparent parts, as white or '#00ff80'; with 4 channels both stay transparent."""
    mirror: bool = False
    """Flip half of the real images left to right."""
    augment: AugmentName = "none"
    """Augment all that the discriminator sees, for few pictures: ada (adaptive strength), diffaugment or none."""
    augment_target: Annotated[float, SHARE_BELOW_1] = 0.6
    """ada: how sure the discriminator may be of real images, as the mean sign of its scores, before strength rises."""
    augment_kimg: Annotated[float | None, above(0)] = None
    """ada: kimg in which the strength can rise from 0 to 1; None: a fifth of --kimg, at most 500."""
    pipeline: Literal["auto", "cache", "dali", "torch"] = "auto"
    """cache: decoded images; dali, torch: decode a batch ahead; auto: the first that works, which the run names."""
    workers: Annotated[int, at_least(0), at_most(MAX_THREADS)] = 0
    """Decoding threads of each rank, for images that are not in memory; 0: its share of the cores, at most 8."""
    resident_gb: Annotated[float | None, at_least(0)] = None
    """Largest decoded set, in GB, that is kept in memory or on the GPU; None: 1.1, or a quarter of free GPU memory."""


@dataclass(frozen=True)
class Run(_Section):
    """Run."""

    out: str | None = None
    """Run directory; None: runs/VARIANT-TIME."""
    init_from: str | None = None
    """Run, checkpoint, .safetensors export or name (avatars, fashion-mnist) whose weights a new run starts from, on any
    data; None: new weights. An export has no discriminator: that starts from new ones."""
    seed: Annotated[int, SEED] = 0
    """Seed of the initial weights, the order of the data and every random number of a sample."""
    checkpoint_kimg: Annotated[float | None, above(0)] = None
    """Interval of checkpoints; None: a twentieth of --kimg, at most 200."""
    sample_kimg: Annotated[float | None, above(0)] = None
    """Interval of sample grids; None: that of checkpoints."""
    log_kimg: Annotated[float | None, above(0)] = None
    """Interval of log lines; None: a hundredth of --kimg, at most 4."""
    evaluate_kimg: Annotated[float | None, above(0)] = None
    """Interval of evaluations (see fastgan evaluate), with one at the end; None: no evaluation."""
    evaluate_n: Annotated[int, *COUNT] = 5000
    """Generated images of an evaluation."""
    evaluate_features: str | None = None
    """Features of an evaluation, as for fastgan evaluate."""
    keep_best: bool = False
    """Keep the checkpoint with the smallest Frechet distance, at the last resolution, in checkpoints/best."""
    keep: Annotated[int, *COUNT] = 3
    """Checkpoints to keep, the newest ones."""
    samples: Annotated[int, *COUNT] = 64
    """Images in a sample grid."""


@dataclass(frozen=True)
class System(_Section):
    """Machine."""

    engine: Literal["auto", "deepspeed", "torch"] = "auto"
    """auto: deepspeed under a launcher where it is installed, else torch."""
    zero: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO stage."""
    deepspeed_config: str | None = None
    """DeepSpeed configuration file; None: one is built from these flags."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda where there is one, else cpu; mps: the GPU of a Mac, in float32 (not tried on one)."""
    precision: Literal["auto", Precision] = "auto"
    """Of products and convolutions; weights stay float32. auto: bf16 where it is as good, TF32 on a GPU, else fp32."""
    deterministic: bool = False
    """Use deterministic kernels alone: the same machine computes the same bits."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile losses and gradients of each stage, beside training; auto: where the run is long enough to gain by it."""
    capture: bool = False
    """Repeat whole steps as one CUDA graph for each phase of a stage, after a check (GPU only; not yet run on one)."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Of images and convolution weights; auto: channels_last, contiguous on mps."""
    qualify: bool = True
    """Let the ops run what is right and fastest on this machine, measured once; else, and with --deterministic, the
    shipped choices."""
    sync_bn: bool = False
    """Batch-norm statistics over all ranks (GPU only)."""
    threads: Annotated[int | None, at_least(1), at_most(MAX_THREADS)] = None
    """CPU threads of each rank; None: what torch chooses."""
    timeout: Annotated[float, at_least(5)] = 600.0
    """Seconds that ranks wait for one another; a rank that is silent for three quarters of it is named and given up."""


@dataclass(frozen=True)
class Config(_Section):
    """Everything a run is made from."""

    networks: Networks = Networks()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = field(default_factory=Schedule)
    data: Data = Data()
    run: Run = Run()
    system: System = System()


def replace(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with some values of some sections changed: replace(config, schedule={"kimg": 5.0})."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of `config`, by section, without the schema version."""
    return dataclasses.asdict(config)
