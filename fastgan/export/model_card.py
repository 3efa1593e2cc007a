"""The model card of an exported generator: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from fastgan.export.formats import FORMATS

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
    """What a card may say of `--data`: its kind and the last part of its path, not where it lies on this machine."""
    kind, colon, path = data.partition(":")
    return f"{kind}{colon}{Path(path).name}" if colon else Path(kind).name  # a prepared set may be a bare path


def evaluations(run: Path, images: int | None, fingerprint: str | None = None) -> list[dict[str, Any]]:
    """Rows of RUN/evaluation.jsonl that measured the generator at `images`: "metrics", "features" or None, n and other.

    other: the kind of the real images where they are not the training data, whose `fingerprint` is given; else None.
    A later row of the same features, samples and real images replaces an earlier one; what is no such row is passed
    over, as a line that a kill cut short.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        lines = (run / "evaluation.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
            metrics = {str(k): float(v) for k, v in row["metrics"].items() if isinstance(v, int | float)}
            seen, n = round(1000 * row["kimg"]), row["images"]["generated"]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if metrics and seen == images:
            features, beside = row.get("features"), row.get("fingerprint")
            other = str(row.get("data")) if fingerprint and beside and beside != fingerprint else None
            key = f"{features} {n} {sorted(metrics)} {beside}"
            found[key] = {"metrics": metrics, "features": features, "n": n, "other": other}
    return list(found.values())


def _front(meta: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The YAML block at the top."""
    networks = meta["networks"]
    name = meta.get("variant") or networks["model"]
    task = "unconditional-image-generation"
    values: dict[str, Any] = {
        "library_name": "fastgan",
        "license": meta.get("license") or "unknown",
        "pipeline_tag": task,
        "tags": sorted({"gan", "image-generation", name, networks["model"]}),
    }
    if rows:
        data = meta.get("data") or "unknown"
        values["model-index"] = [
            {
                "name": f"{name} {networks['resolution']} px",
                "results": [
                    {
                        "task": {"type": task},
                        "dataset": {"name": row["other"] or data, "type": row["other"] or data},
                        "metrics": [
                            {"type": metric, "value": value, "name": f"{metric}, {row['features'] or 'no'} features"}
                            for metric, value in row["metrics"].items()
                        ],
                    }
                    for row in rows
                ],
            }
        ]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _facts(meta: dict[str, Any]) -> list[tuple[str, str]]:
    networks, images = meta["networks"], meta.get("images")
    name = meta.get("variant") or networks["model"]
    side = networks["resolution"]
    size = f"{side} x {side} pixels, " + ("gray" if networks["channels"] == 1 else "color")
    alpha = meta.get("alpha", 1.0)
    if alpha < 1:
        size += f", in the middle of a growth: {alpha:.0%} of the newest level"
    facts = [
        ("Variant", f"{name} ({_PAPERS[name]})" if name in _PAPERS else name),
        ("Images", size),
        ("Latent", f"{networks['latent']} numbers, standard normal"),
        ("Classes", str(networks["num_classes"] or "none")),
        ("Trained on", meta.get("data") or "not recorded"),
        ("Trained for", f"{images / 1000:g} kimg (thousands of real images shown)" if images else "not recorded"),
        ("Weights", meta.get("weights", "moving average of the generator's")),
        ("Batch", str(meta.get("batch") or "any")),
        ("License of the weights", meta.get("license") or "not stated; the training data may restrict their use"),
        ("Written by", f"fastgan {meta.get('version', '')}".strip()),
    ]
    return facts


def text(meta: dict[str, Any], files: list[str], rows: list[dict[str, Any]]) -> str:
    """The card of the exported `files`, which lie beside it."""
    networks = meta["networks"]
    name = meta.get("variant") or networks["model"]
    out = ["---", _front(meta, rows) + "---", "", _MARK, "", f"# {name}, {networks['resolution']} px", ""]
    out += ["A generator of images, trained with fastgan.", "", "| | |", "| --- | --- |"]
    out += [f"| {what} | {value} |" for what, value in _facts(meta)]
    out += ["", "## Metrics", ""]
    if rows:
        out += ["| metric | value | features | samples |", "| --- | --- | --- | --- |"]
        for row in rows:
            beside = f", beside {row['other']}, not the training data" if row["other"] else ""
            for metric, value in row["metrics"].items():
                out.append(f"| {metric}{beside} | {value:.4g} | {row['features'] or ''} | {row['n']} |")
        out += ["", "Measured by `fastgan evaluate`."]
    else:
        out.append("Not measured.")
    out += ["", "## Use", "", "| file | opened with |", "| --- | --- |"]
    formats = {it.suffix: it for it in FORMATS.values()}
    for file in files:
        out.append(f"| `{file}` | `{formats[Path(file).suffix].opened_with.format(file=file)}` |")
    labels = ", and `labels`, int64 [N]" if networks["num_classes"] else ""
    loaded = [file for file in files if formats[Path(file).suffix].loads]
    if loaded:
        images = f"images = fastgan.load({loaded[0]!r}).sample(16, seed=0)   # float32 [16, C, R, R] in [-1, 1]"
        out += ["", "    import fastgan", f"    {images}"]
    out += [
        "",
        f"In other tools the inputs are `latent`, float32 [N, {networks['latent']}]{labels}; the output is `images`,",
        "float32 [N, C, R, R], where -1 is black and 1 white"
        + ("; clamp it, values may lie beyond." if networks["model"] == "pggan" else "."),
        "",
    ]
    return "\n".join(out)


def replaceable(path: Path) -> bool:
    """Whether there is no file at `path`, or one of ours."""
    return not path.exists() or _MARK in path.read_text(encoding="utf-8", errors="replace")
