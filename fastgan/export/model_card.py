"""The model card of an exported generator: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from fastgan.errors import printable
from fastgan.export.formats import FORMATS
from fastgan.utils.files import read_regular
from fastgan.utils.stored_values import MALFORMED

_MARK = "<!-- Written by fastgan export, which replaces it; delete this line to keep your own. -->"
_PAPERS = {
    "gan": "Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661",
    "dcgan": "Radford et al. 2015, https://arxiv.org/abs/1511.06434",
    "lsgan": "Mao et al. 2017, https://arxiv.org/abs/1611.04076",
    "wgan": "Arjovsky et al. 2017, https://arxiv.org/abs/1701.07875",
    "wgan-gp": "Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028",
    "wgan-div": "Wu et al. 2018, https://arxiv.org/abs/1712.01026",
    "sagan": "Zhang et al. 2018, https://arxiv.org/abs/1805.08318",
    "pggan": "Karras et al. 2018, https://arxiv.org/abs/1710.10196",
}


def data_name(data: str) -> str:
    """`--data` as a card may show it: the kind and the last part of the path, without folders of this machine."""
    kind, colon, path = data.partition(":")
    return f"{kind}{colon}{Path(path).name}" if colon else Path(kind).name  # a prepared set may be a bare path


def evaluations(run: Path, images: int | None, fingerprint: str | None = None) -> list[dict[str, Any]]:
    """Evaluations in RUN/evaluation.jsonl of the generator at `images` images seen.

    Args:
        fingerprint: fingerprint of the training data, if it is known.

    Returns:
        Dictionaries with "metrics", "features" (or None), "n" and "other", which names the real images if they were
        not the training data, else None. Of rows with the same features, samples and real images the last one counts.
        Lines that cannot be read, such as one cut short by a kill, are skipped.
    """
    rows: dict[str, dict[str, Any]] = {}
    try:
        lines = read_regular(run / "evaluation.jsonl").decode(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
            metrics = {str(k): float(v) for k, v in row["metrics"].items() if isinstance(v, int | float)}
            seen, n = round(1000 * row["kimg"]), row["images"]["generated"]
        except MALFORMED:
            continue
        if metrics and seen == images:
            features, real = row.get("features"), row.get("fingerprint")
            other = str(row.get("data")) if fingerprint and real and real != fingerprint else None
            key = f"{features} {n} {sorted(metrics)} {real}"
            rows[key] = {"metrics": metrics, "features": features, "n": n, "other": other}
    return list(rows.values())


def _name(meta: dict[str, Any]) -> str:
    return meta.get("variant") or meta["networks"]["model"]


def _front_matter(meta: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The YAML block at the top, with the evaluations as the hub's model-index."""
    networks, name = meta["networks"], _name(meta)
    task = "unconditional-image-generation"
    values: dict[str, Any] = {
        "library_name": "fastgan",
        "license": meta.get("license") or "unknown",
        "pipeline_tag": task,
        "tags": sorted({"gan", "image-generation", name, networks["model"]}),
    }
    if rows:
        results = []
        for row in rows:
            data = row["other"] or meta.get("data") or "unknown"
            features = row["features"] or "no"
            metrics = [
                {"type": metric, "value": value, "name": f"{metric}, {features} features"}
                for metric, value in row["metrics"].items()
            ]
            results.append({"task": {"type": task}, "dataset": {"name": data, "type": data}, "metrics": metrics})
        values["model-index"] = [{"name": f"{name} {networks['resolution']} px", "results": results}]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _facts(meta: dict[str, Any]) -> list[tuple[str, str]]:
    networks, images, name = meta["networks"], meta.get("images"), _name(meta)
    side = networks["resolution"]
    kinds = {1: "gray", 4: "color with transparency (RGBA, colors multiplied by alpha)"}
    size = f"{side} x {side} pixels, {kinds.get(networks['channels'], 'color')}"
    alpha = meta.get("alpha", 1.0)
    if alpha < 1:
        size += f", fading in: the newest level has a weight of {alpha:.0%}"
    return [
        ("Variant", f"{name} ({_PAPERS[name]})" if name in _PAPERS else name),
        ("Images", size),
        ("Latent", f"{networks['latent']} numbers, standard normal"),
        ("Classes", str(networks["num_classes"] or "none")),
        ("Trained on", meta.get("data") or "not recorded"),
        ("Trained for", f"{images / 1000:g} kimg (thousands of real images shown)" if images else "not recorded"),
        ("Weights", meta.get("weights", "moving average of the generator's weights")),
        ("Batch", str(meta.get("batch") or "any")),
        ("License of the weights", meta.get("license") or "not stated; the training data may restrict their use"),
        ("Written by", f"fastgan {meta.get('version', '')}".strip()),
    ]


def _cell(text: str) -> str:
    """Text of others in a table: one line, and neither a column, a tag, a link nor code of its own."""
    return re.sub(r"([|<>\[\]`\\])", r"\\\1", printable(text))


def render(meta: dict[str, Any], files: list[str], rows: list[dict[str, Any]]) -> str:
    """The card, in Markdown, of the exported `files` beside it; `rows` as `evaluations` returns them."""
    networks = meta["networks"]
    lines = [
        "---",
        _front_matter(meta, rows) + "---",
        "",
        _MARK,
        "",
        f"# {_cell(_name(meta))}, {networks['resolution']} px",
        "",
    ]
    lines += ["A generator of images, trained with fastgan.", "", "| | |", "| --- | --- |"]
    lines += [f"| {label} | {_cell(value)} |" for label, value in _facts(meta)]
    lines += ["", "## Metrics", ""]
    if rows:
        lines += ["| metric | value | features | samples |", "| --- | --- | --- | --- |"]
        for row in rows:
            against = f" against {_cell(row['other'])}, not the training data" if row["other"] else ""
            features, samples = _cell(str(row["features"] or "")), _cell(str(row["n"]))
            for metric, value in row["metrics"].items():
                lines.append(f"| {_cell(metric)}{against} | {value:.4g} | {features} | {samples} |")
        lines += ["", "Measured by `fastgan evaluate`."]
    else:
        lines.append("Not measured.")
    lines += ["", "## Use", "", "| file | opened with |", "| --- | --- |"]
    formats = {format.suffix: format for format in FORMATS.values()}
    for file in files:
        lines.append(f"| `{file}` | `{formats[Path(file).suffix].opened_with.format(file=file)}` |")
    labels = ", and `labels`, int64 [N]" if networks["num_classes"] else ""
    loadable = [file for file in files if formats[Path(file).suffix].loadable]
    if loadable:
        images = f"images = fastgan.load({loadable[0]!r}).sample(16, seed=0)   # float32 [16, C, R, R] in [-1, 1]"
        lines += ["", "    import fastgan", f"    {images}"]
    lines += [
        "",
        f"In other tools, the inputs are `latent`, float32 [N, {networks['latent']}]{labels}; the output is `images`,",
        "float32 [N, C, R, R], where -1 is black and 1 is white."
        + (" Values may lie beyond: clamp them." if networks["model"] == "pggan" else ""),
        "",
    ]
    return "\n".join(lines)


def may_replace(path: Path) -> bool:
    """Whether `path` is missing, or is a card that fastgan wrote."""
    return not os.path.lexists(path) or (path.is_file() and _MARK in path.read_text(encoding="utf-8", errors="replace"))
