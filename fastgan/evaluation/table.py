"""The numbers of an evaluation as a table for people."""

from __future__ import annotations

from typing import Any


def format_table(line: dict[str, Any]) -> str:
    """A line of evaluation.jsonl as a table. FID, KID and inception score are names for Inception's features only."""
    metrics, images, features = line["metrics"], line["images"], line["features"]
    inception = features == "inception-v3-compat"
    suffix = "" if inception else f" ({features} features)"
    rows: list[tuple[str, str, str]] = []

    def row(name: str, value: str, note: str) -> None:
        rows.append((name, value, note))

    if "frechet_distance" in metrics:
        name = "FID" if inception else f"Frechet distance{suffix}"
        row(name, f"{metrics['frechet_distance']:.4g}", "lower is better")
    if "kernel_distance" in metrics:
        name = "KID" if inception else f"kernel distance{suffix}"
        row(name, f"{metrics['kernel_distance']:.4g}", f"± {metrics['kernel_distance_std']:.2g} over subsets")
    if "class_score" in metrics:
        name = "inception score" if inception else f"class score{suffix}"
        note = f"± {metrics['class_score_std']:.2g} over tenths; higher is better"
        row(name, f"{metrics['class_score']:.4g}", note)
    for name, note in {"precision": "k = 3", "recall": "k = 3", "density": "k = 5", "coverage": "k = 5"}.items():
        if name in metrics:
            note += f", {images['neighbors']:,} images of each"
            note += "; 1 for real images" if name == "density" else ""
            row(f"{name}{suffix}", f"{metrics[name]:.4f}", note)
    if "memorized" in metrics:
        note = "nearer to a real image than that is to any other one"
        row(f"memorized share{suffix}", f"{metrics['memorized']:.4f}", note)
    if "swd" in metrics:
        levels: list[str] = []
        while f"swd_level{len(levels)}" in metrics:
            side = line["resolution"] >> len(levels)
            levels.append(f"{1000 * metrics[f'swd_level{len(levels)}']:.2f} at {side} px")
        note = f"{', '.join(levels)}; {images['swd']:,} images of each"
        row("sliced Wasserstein x 10^3", f"{1000 * metrics['swd']:.2f}", note)
    if "ms_ssim" in metrics:
        row("MS-SSIM of pairs", f"{metrics['ms_ssim']:.4f}", f"real images: {metrics['ms_ssim_real']:.4f}")
    if "modes" in metrics:
        note = f"of {metrics['modes_of']:,}; {100 * metrics['confident']:.1f}% of images are confident"
        row("modes", str(metrics["modes"]), note)
        row("KL of the modes", f"{metrics['kl']:.4f}", "nats, KL(generated || real)")
    widths = [max(len(r[i]) for r in rows) for i in range(2)]
    return "\n".join(f"  {name:{widths[0]}}  {value:>{widths[1]}}  {note}" for name, value, note in rows)
