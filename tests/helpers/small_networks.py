"""Flags of networks that train in a moment, by model."""

from __future__ import annotations

SMALL = {
    "mlp": "--width 16 --resolution 8",
    "dcgan": "--width 8 --max-width 8 --resolution 8",
    "sagan": "--width 8 --max-width 8 --resolution 8 --conditional",
    "pggan": "--fmap-base 32 --fmap-max 8 --resolution 8 --kimg 0.8",
    "r3gan": "--width 16 --max-width 16 --resolution 8",
}
