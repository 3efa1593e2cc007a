"""The nine variants as typed data: each is networks, objective, optimizer and schedule, in presets.

`paper` is the recipe as published, at its widths and schedule; `digits` is small and tuned for scikit-learn's digits
on a CPU, and is what runs when no data is named. A new variant is a new entry.

Where `paper` is not what the authors ran: all variants average the generator, only pggan's authors did. gan: the
discriminator is as wide as the generator, without dropout (`models.mlp`), batches are of 128 and not 100, so that more
ranks can share them, rates and momentum stay, and D's loss is not halved. lsgan and the wgan family have the networks
of dcgan: lsgan's authors had deeper ones, wgan-gp's and wgan-div's residual ones, the latter with layer norm in the
critic. wgan: always 5 critic steps, where the authors' code takes 100 now and then. wgan-div: k is the paper's, not the
10 of the authors' code. sagan: classes are asked for by `--conditional`. pggan: schedule and batches of the authors'
preset for one GPU, with the paper's one rate for all resolutions (1.5e-3 at 1024 px there); `paper-8-gpus` has the
batches and the rates by resolution of their preset for eight; in both the optimizers start fresh at a growth, not once
more when its fade ends. r3gan: over 20,000 kimg the authors lower the penalty's weight to a tenth and the learning
rates to a quarter, and raise beta2 to 0.99 and the moving average's half-life from 0; here all are constant, the
half-life at its end. They augment, with up to 0.3 (`--augment`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from fastgan.config import Config, Data, Networks, Objective, Optimizer, Schedule
from fastgan.errors import ArgumentError

Preset = Literal["paper", "paper-8-gpus", "digits"]


@dataclass(frozen=True)
class Recipe:
    """What a variant decides; the rest of a `Config` is the user's."""

    networks: Networks
    objective: Objective
    optimizer: Optimizer
    schedule: Schedule

    def but(self, **sections: dict[str, Any]) -> Recipe:
        """This recipe with some values changed: but(schedule={"kimg": 100.0})."""
        return replace(self, **{name: replace(getattr(self, name), **values) for name, values in sections.items()})


@dataclass(frozen=True)
class Variant:
    name: str
    paper: Recipe
    digits: Recipe
    reference: str
    paper_8_gpus: Recipe | None = None

    @property
    def presets(self) -> dict[str, Recipe]:
        """The recipes by name."""
        found = {"paper": self.paper, "paper-8-gpus": self.paper_8_gpus, "digits": self.digits}
        return {name: recipe for name, recipe in found.items() if recipe is not None}

    def config(self, preset: str) -> Config:
        """The configuration of a preset, with everything else as it is by default.

        Raises:
            ArgumentError: the variant has no such preset.
        """
        if preset not in self.presets:
            allowed = f"must be {', '.join(self.presets)} for the variant {self.name}"
            raise ArgumentError("--preset", preset, allowed)
        recipe = self.presets[preset]
        return Config(
            networks=recipe.networks,
            objective=recipe.objective,
            optimizer=recipe.optimizer,
            schedule=recipe.schedule,
            data=Data(),
        )


_GAN = Recipe(
    # The authors' MNIST generator; their discriminator has 240 maxout units in each layer, here it is 1200.
    Networks(model="mlp", latent=100, width=1200),
    Objective(loss="minimax"),
    Optimizer(optimizer="sgd", lr_g=0.1, lr_d=0.1, beta1=0.5),
    Schedule(resolution=32, kimg=10_000, batch=128),
)
_DCGAN = Recipe(
    Networks(model="dcgan", latent=100, width=128, max_width=1024),
    Objective(loss="minimax"),
    Optimizer(lr_g=2e-4, lr_d=2e-4, beta1=0.5),
    Schedule(resolution=64, kimg=5_000, batch=128),
)
_LSGAN = _DCGAN.but(objective={"loss": "least-squares"}, optimizer={"lr_g": 1e-3, "lr_d": 1e-3}, schedule={"batch": 64})
_WGAN = _DCGAN.but(
    objective={"loss": "wasserstein", "regularizer": "weight-clipping", "clip": 0.01},
    optimizer={"optimizer": "rmsprop", "lr_g": 5e-5, "lr_d": 5e-5, "beta2": 0.99, "n_critic": 5},
    schedule={"batch": 64, "kimg": 25_000},
)
_WGAN_GP = _WGAN.but(
    networks={"norm_d": "none", "latent": 128},
    objective={"regularizer": "gradient-penalty", "penalty_weight": 10.0},
    optimizer={"optimizer": "adam", "lr_g": 1e-4, "lr_d": 1e-4, "beta1": 0.0, "beta2": 0.9},
)
_WGAN_DIV = _WGAN_GP.but(
    objective={"regularizer": "wasserstein-divergence", "divergence_k": 2.0, "divergence_p": 6.0},
    optimizer={"lr_g": 2e-4, "lr_d": 2e-4, "n_critic": 4},  # of the authors' code
)
_SAGAN = Recipe(
    Networks(model="sagan", latent=128, width=64, max_width=1024),
    Objective(loss="hinge"),
    Optimizer(lr_g=1e-4, lr_d=4e-4, beta1=0.0, beta2=0.9),
    Schedule(resolution=128, kimg=256_000, batch=256),
)
_PGGAN = Recipe(
    Networks(model="pggan", latent=512, fmap_base=8192, fmap_max=512),
    Objective(loss="wasserstein", regularizer="gradient-penalty", penalty_weight=10.0, drift=0.001),
    Optimizer(lr_g=1e-3, lr_d=1e-3, beta1=0.0, beta2=0.99),
    Schedule(
        resolution=1024,
        kimg=12_000,
        batch=128,
        batch_at={32: 64, 64: 32, 128: 16, 256: 8, 512: 4},
        fade_kimg=600,
        stable_kimg=600,
    ),
)
# Sixteen times the batch of one GPU at 4 px, eight times at 1024 px, and rates that rise with the resolution.
_PGGAN_8_GPUS = _PGGAN.but(
    optimizer={"lr_factor_at": {128: 1.5, 256: 2.0, 512: 3.0}},
    schedule={"batch": 512, "batch_at": {8: 256, 16: 128, 32: 64, 64: 32}},
)
_R3GAN = Recipe(
    # FFHQ at 64 px.
    Networks(model="r3gan", latent=64, width=384, max_width=768),
    Objective(loss="relativistic", regularizer="zero-centered-both", penalty_weight=1.0),  # gamma of 2
    # The average's half-life is 500 kimg, which the authors reach after 20,000.
    Optimizer(lr_g=2e-4, lr_d=2e-4, beta1=0.0, beta2=0.9, ema_decay=0.99965),
    Schedule(resolution=64, kimg=20_000, batch=256),
)

# What the digits presets share. Runs are short: a moving average of the paper's length starts shorter and grows.
_SMALL: dict[str, Any] = {"latent": 64, "width": 32, "max_width": 64}
_QUICK: dict[str, Any] = {"ema_decay": 0.999, "ema_warmup": True}
# One critic step, not five, for each generator step: at this size a generator that moves five times as often reaches
# better digits in the same minutes (about 79% recognized against 69%), and a longer beta2 steadies its larger steps.
_ONE_CRITIC: dict[str, Any] = {"lr_g": 1e-3, "lr_d": 1e-3, "beta2": 0.99, "n_critic": 1, **_QUICK}
# At one rate for both, the discriminator of so small a data set wins early, and slowing it down keeps the game level at
# 70% recognized. Holding its gradient on the real images near 0 (R1) keeps it level at any rate: both learn fast, as
# the critics with a penalty do and like them without batch norm, and reach about 80%.
_R1: dict[str, Any] = {"regularizer": "zero-centered"}
_R1_FAST: dict[str, Any] = {"beta1": 0.0, "beta2": 0.99, **_QUICK}

VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant(
            "gan",
            _GAN,
            _GAN.but(
                networks={"latent": 64, "width": 256},
                optimizer={"optimizer": "adam", "lr_g": 2e-4, "lr_d": 2e-4, "beta1": 0.5, **_QUICK},
                schedule={"resolution": 16, "kimg": 400, "batch": 64},
            ),
            "Goodfellow et al. 2014, Generative adversarial nets",
        ),
        Variant(
            "dcgan",
            _DCGAN,
            _DCGAN.but(
                networks={**_SMALL, "norm_d": "none"},
                objective={**_R1, "penalty_weight": 0.3},
                optimizer={**_R1_FAST, "lr_g": 4e-3, "lr_d": 4e-3},
                schedule={"resolution": 16, "kimg": 600, "batch": 64},
            ),
            "Radford et al. 2015, Unsupervised representation learning with deep convolutional GANs",
        ),
        Variant(
            "lsgan",
            _LSGAN,
            _LSGAN.but(
                networks={**_SMALL, "norm_d": "none"},
                # Labels 0 and 1 ask for smaller scores than dcgan's logits, and it takes more weight to hold them: at
                # weight 1 and dcgan's rates 72% are recognized.
                objective={**_R1, "penalty_weight": 4.0},
                # Falling rates are worth two points: 83.9% against 81.8%, one run of each on one thread.
                optimizer={**_R1_FAST, "lr_g": 2e-3, "lr_d": 2e-3, "lr_decay": 1.0},
                schedule={"resolution": 16, "kimg": 600, "batch": 64},
            ),
            "Mao et al. 2017, Least squares generative adversarial networks",
        ),
        Variant(
            "wgan",
            _WGAN,
            _WGAN.but(
                networks=_SMALL,
                optimizer={"lr_g": 5e-4, "lr_d": 5e-4, **_QUICK},
                schedule={"resolution": 16, "kimg": 400, "batch": 64},
            ),
            "Arjovsky et al. 2017, Wasserstein GAN",
        ),
        Variant(
            "wgan-gp",
            _WGAN_GP,
            _WGAN_GP.but(
                networks=_SMALL,
                optimizer={**_ONE_CRITIC, "lr_g": 2e-3, "lr_d": 2e-3},
                schedule={"resolution": 16, "kimg": 540, "batch": 64},
            ),
            "Gulrajani et al. 2017, Improved training of Wasserstein GANs",
        ),
        Variant(
            "wgan-div",
            _WGAN_DIV,
            _WGAN_DIV.but(
                networks=_SMALL,
                optimizer=_ONE_CRITIC,
                schedule={"resolution": 16, "kimg": 500, "batch": 64},
            ),
            "Wu et al. 2018, Wasserstein divergence for GANs",
        ),
        Variant(
            "sagan",
            _SAGAN,
            _SAGAN.but(
                networks={"latent": 64, "width": 16, "max_width": 64},
                optimizer={"lr_g": 5e-4, "lr_d": 1e-3, **_QUICK},
                schedule={"resolution": 16, "kimg": 130, "batch": 64},
            ),
            "Zhang et al. 2018, Self-attention generative adversarial networks",
        ),
        Variant(
            "pggan",
            _PGGAN,
            _PGGAN.but(
                networks={"latent": 64, "fmap_base": 256, "fmap_max": 64},
                # The paper's rates and its equal shares for each resolution are for runs a hundred times as long: with
                # rates of 2e-3, equal shares and batches of 32, 150 kimg end at a Frechet distance of 31.5; 100 kimg
                # of these end at 16.2 (docs/variants.md).
                optimizer={"lr_g": 4e-3, "lr_d": 4e-3, **_QUICK},
                schedule={
                    "resolution": 32,
                    "kimg": 80,
                    "batch": 16,
                    "batch_at": {},
                    "fade_kimg": None,
                    "stable_kimg": None,
                    "grown_at": 0.2,
                },
            ),
            "Karras et al. 2018, Progressive growing of GANs for improved quality, stability, and variation",
            _PGGAN_8_GPUS,
        ),
        Variant(
            "r3gan",
            _R3GAN,
            _R3GAN.but(
                networks={"width": 16, "max_width": 64},
                optimizer={"lr_g": 2e-3, "lr_d": 2e-3, "beta2": 0.99, **_QUICK},
                schedule={"resolution": 16, "kimg": 120, "batch": 64},
            ),
            "Huang et al. 2024, The GAN is dead; long live the GAN! A modern baseline GAN",
        ),
    )
}
