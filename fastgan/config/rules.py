"""What a configuration must meet besides its types: bounds of single values, and rules that span fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Set

from fastgan.config.bounds import violations
from fastgan.config.sections import Config, to_dict
from fastgan.errors import ArgumentError

SECOND_ORDER = ("gradient-penalty", "wasserstein-divergence", "zero-centered", "zero-centered-both")
"""Regularizers whose step takes a second derivative of the discriminator."""
ZERO_CENTERED = ("zero-centered", "zero-centered-both")
"""Regularizers that can be estimated by finite differences."""


def zero3_reason(regularizer: str) -> str:
    """Why ZeRO 3 is refused."""
    if regularizer in SECOND_ORDER:
        return f"ZeRO 3 cannot run the second derivative of --regularizer {regularizer}"
    return "the moving average and the checkpoints need whole parameters, which ZeRO 3 partitions"


def _require(condition: bool, flag: str, got: object, problem: str) -> None:
    if not condition:
        raise ArgumentError(flag, got, problem)


def validate(config: Config) -> None:
    """Refuse what cannot run, whatever the data and the machine.

    Raises:
        ArgumentError: naming the flag, its value and what it must be.
    """
    for section in dataclasses.fields(config):
        for name, value, text in violations(getattr(config, section.name)):
            raise ArgumentError(f"--{name.replace('_', '-')}", value, f"must be {text}")
    _validate_networks(config)
    _validate_system(config)
    o = config.objective
    estimable = o.penalty_method == "exact" or o.regularizer in ZERO_CENTERED
    allowed = f"must be exact with --regularizer {o.regularizer}; only {' and '.join(ZERO_CENTERED)} have another"
    _require(estimable, "--penalty-method", o.penalty_method, allowed)
    changes = o.penalty_method == "finite-difference" and config.networks.model == "sagan"
    allowed = "must be exact with --model sagan, whose spectral norm changes from one call of a network to the next"
    _require(not changes, "--penalty-method", o.penalty_method, allowed)


# Field -> the field that decides whether it has an effect, and the values of that with which it has one.
_USED_WITH = {
    **dict.fromkeys(("width",), ("model", ("mlp", "dcgan", "sagan", "r3gan"))),
    **dict.fromkeys(("max_width",), ("model", ("dcgan", "sagan", "r3gan"))),
    **dict.fromkeys(("norm_g", "norm_d"), ("model", ("dcgan",))),
    **dict.fromkeys(("attention_at", "conditional"), ("model", ("sagan",))),
    **dict.fromkeys(
        ("fmap_base", "fmap_max", "fused_scale", "first_resolution", "fade_kimg", "stable_kimg", "grown_at"),
        ("model", ("pggan",)),
    ),
    **dict.fromkeys(("label_fake", "label_real", "label_generator"), ("loss", ("least-squares",))),
    "clip": ("regularizer", ("weight-clipping",)),
    "penalty_weight": ("regularizer", ("gradient-penalty", "zero-centered", "zero-centered-both")),
    "penalty_every": ("regularizer", SECOND_ORDER),
    "penalty_method": ("regularizer", ZERO_CENTERED),
    "penalty_sigma": ("penalty_method", ("finite-difference",)),
    **dict.fromkeys(("divergence_k", "divergence_p"), ("regularizer", ("wasserstein-divergence",))),
    **dict.fromkeys(("augment_target", "augment_kimg"), ("augment", ("ada",))),
    "beta1": ("optimizer", ("adam", "sgd")),
    "beta2": ("optimizer", ("adam", "rmsprop")),
}


def without_effect(config: Config, given: Set[str]) -> list[str]:
    """A line for each field of `given` that changes nothing in this configuration."""
    values = {key: value for section in to_dict(config).values() for key, value in section.items()}
    lines = []
    for name in sorted(given & _USED_WITH.keys()):
        decider, used = _USED_WITH[name]
        if values[decider] not in used:
            flag = name.replace("_", "-")
            lines.append(f"--{flag} has no effect with --{decider} {values[decider]}, only with {' or '.join(used)}")
    if config.run.evaluate_kimg is None:
        unused = sorted(given & {"evaluate_n", "evaluate_features", "keep_best"})
        lines += [f"--{name.replace('_', '-')} has no effect without --evaluate-kimg" for name in unused]
    return lines


def _validate_networks(config: Config) -> None:
    n, s = config.networks, config.schedule
    smallest = 4 if n.model == "pggan" else 8
    powers = [2**i for i in range(2, 11) if 2**i >= smallest]
    _require(s.resolution in powers, "--resolution", s.resolution, f"must be {', '.join(map(str, powers))}")
    starts = [p for p in powers if p <= s.resolution]
    allowed = f"must be {', '.join(map(str, starts))} at {s.resolution} px"
    _require(s.first_resolution in (None, *starts), "--first-resolution", s.first_resolution, allowed)
    pairs = all(k in powers and 1 <= v < 2**31 for k, v in s.batch_at.items())
    _require(pairs, "--batch-at", s.batch_at, "must be pairs of a resolution and a batch of at least 1")
    factors = config.optimizer.lr_factor_at
    pairs = all(k in powers and 0 < v < math.inf for k, v in factors.items())
    _require(pairs, "--lr-factor-at", factors, "must be pairs of a resolution and a factor above 0")
    if n.model == "sagan":
        at = [4, *[p for p in powers if p < s.resolution]]
        allowed = f"must be {', '.join(map(str, at))} at {s.resolution} px"
        _require(n.attention_at in (None, *at), "--attention-at", n.attention_at, allowed)
        width = min(n.width, n.max_width)
        _require(width >= 8, "--width", width, "must be at least 8 with --model sagan")
    _require(not n.conditional or n.model == "sagan", "--conditional", True, "only --model sagan takes labels")
    if n.model == "pggan":
        least = f"must be at least {s.resolution // 2} at {s.resolution} px"
        _require(2 * n.fmap_base // s.resolution >= 1, "--fmap-base", n.fmap_base, least)


def _validate_system(config: Config) -> None:
    n, regularizer, m = config.networks, config.objective.regularizer, config.system
    batch_norm = n.model == "dcgan" and n.norm_d == "batch"
    _require(
        not (m.sync_bn and batch_norm and regularizer in SECOND_ORDER),
        "--sync-bn",
        True,
        f"--regularizer {regularizer} takes a second derivative, which torch's synchronized batch norm does not have; "
        "use --norm-d none",
    )
    if m.device == "mps":
        _require(m.precision in ("auto", "fp32"), "--precision", m.precision, "must be fp32 with --device mps")
        _require(m.engine != "deepspeed", "--engine", m.engine, "must be torch with --device mps")
        _require(m.compile != "on", "--compile", m.compile, "must be off or auto with --device mps, which stays eager")
    _require(not m.capture or m.device in ("auto", "cuda"), "--capture", True, "must be off without a CUDA device")
    fp16 = m.precision == "fp16" and m.zero in (1, 2)
    _require(not fp16, "--zero", m.zero, "must be 0 with --precision fp16, whose skipped updates ZeRO would not count")
    _require(m.zero != 3, "--zero", 3, f"must be 0, 1 or 2; {zero3_reason(regularizer)}")
    needs_deepspeed = m.zero != 0 or m.deepspeed_config is not None
    _require(
        m.engine != "torch" or not needs_deepspeed,
        "--engine",
        "torch",
        "must be deepspeed with --zero or --deepspeed-config",
    )
