"""Writes docs/architecture.svg: the rooms of fastgan/ and their imports, as the code has them.

python -m scripts.architecture_picture

Rooms stand above those that they import. An arrow that follows from others is not drawn, and neither are
arrows to the rooms in the bottom row, which any room may import.
"""

from __future__ import annotations

from scripts.import_graph import GRAPH, ROOT, room_of

PICTURE = ROOT / "docs" / "architecture.svg"
FOUNDATION = ("errors", "utils")
DOORS = ("__main__", "evaluate", "train")
WIDTH, BOX, ROW, MARGIN, SWEEPS = 900, (128, 34), 78, 16, 12

Arrows = dict[str, set[str]]


def rooms() -> Arrows:
    """Room -> rooms that it imports: folders and files of fastgan/, without fastgan/__init__.py."""
    found: Arrows = {}
    for module, targets in GRAPH.items():
        room = room_of(module).split(".")[0]
        below = {room_of(target).split(".")[0] for target in targets}
        found.setdefault(room, set()).update(below - {room, ""})
    found.pop("")
    return found


def reduced(arrows: Arrows) -> Arrows:
    """Without the arrows that other arrows imply."""

    def reach(room: str) -> set[str]:
        return arrows[room].union(*(reach(below) for below in arrows[room]))

    return {
        room: {b for b in below if not any(b in reach(other) for other in below - {b})}
        for room, below in arrows.items()
    }


def rows(arrows: Arrows) -> tuple[list[list[str]], Arrows]:
    """Rooms in rows, the lowest first; each stands one row above the highest room that it imports.

    An arrow over several rows gets a point in each, named as its target and the row; arrows to one target share them.
    """

    def level(room: str) -> int:
        return 1 + max((level(below) for below in arrows[room]), default=-1)

    levels = {room: level(room) for room in sorted(arrows)}
    found: list[list[str]] = [[] for _ in range(1 + max(levels.values()))]
    for room, height in levels.items():
        found[height].append(room)
    steps: Arrows = {room: set() for room in arrows}
    for room in sorted(arrows):
        for below in sorted(arrows[room]):
            start = room
            for height in range(levels[room] - 1, levels[below], -1):
                point = f"{below}@{height}"
                if point not in steps:
                    steps[point] = set()
                    found[height].append(point)
                steps[start].add(point)
                start = point
            steps[start].add(below)
    return found, steps


def _space(name: str) -> float:
    return 26 if "@" in name else BOX[0] + 14


def places(found: list[list[str]], steps: Arrows) -> dict[str, float]:
    """The middle of each room and point, left to right, near to what it is connected with."""
    above: Arrows = {name: {other for other in steps if name in steps[other]} for name in steps}
    x = {name: WIDTH * (i + 0.5) / len(row) for row in found for i, name in enumerate(row)}
    for sweep in range(SWEEPS):
        neighbors = above if sweep % 2 else steps
        for row in found if sweep % 2 == 0 else found[::-1]:
            near = {name: sorted(x[other] for other in neighbors[name]) or [x[name]] for name in row}
            wanted = {name: sum(values) / len(values) for name, values in near.items()}
            row.sort(key=lambda name: (wanted[name], name))
            edge: float = MARGIN
            for name in row:  # as far left as the ones before leave it
                x[name] = max(wanted[name], edge + _space(name) / 2)
                edge = x[name] + _space(name) / 2
            edge = WIDTH - MARGIN
            for name in row[::-1]:
                x[name] = min(x[name], edge - _space(name) / 2)
                edge = x[name] - _space(name) / 2
    left = min(x[name] - _space(name) / 2 for name in x) - MARGIN
    return {name: value - left for name, value in x.items()}


def _box(x: float, y: float, name: str, kind: str) -> str:
    width, height = BOX
    return (
        f'<g class="{kind}"><rect x="{x - width / 2:.0f}" y="{y:.0f}" width="{width}" height="{height}" rx="5"/>'
        f'<text x="{x:.0f}" y="{y + 22:.0f}">{name}</text></g>'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float], *, from_point: bool, to_point: bool) -> str:
    (x1, y1), (x2, y2) = (start[0], start[1] + BOX[1]), (end[0], end[1])
    lead = f"M{x1:.0f} {start[1]:.0f}V{y1:.0f}" if from_point else f"M{x1:.0f} {y1:.0f}"
    bend = (y2 - y1) / 2
    head = "" if to_point else ' class="head"'
    return f'<path{head} d="{lead}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}"/>'


def picture() -> str:
    """The picture as SVG."""
    every = {room: below - set(FOUNDATION) for room, below in rooms().items() if room not in FOUNDATION}
    found, steps = rows(reduced(every))
    x = places(found, steps)
    width = round(max(x[name] + _space(name) / 2 for name in x) + MARGIN)
    height = 2 * MARGIN + ROW * len(found) + BOX[1]
    at = {name: (x[name], MARGIN + ROW * (len(found) - 1 - i)) for i, row in enumerate(found) for name in row}
    lines = [
        _arrow(at[name], at[below], from_point="@" in name, to_point="@" in below)
        for name in sorted(steps)
        for below in sorted(steps[name])
    ]
    boxes = [_box(*at[room], _label(room), _kind(room)) for room in sorted(at) if "@" not in room]
    bottom = height - MARGIN - BOX[1]
    names = " and ".join("errors.py" if name == "errors" else f"{name}/" for name in FOUNDATION)
    boxes.append(
        f'<g class="base"><rect x="{MARGIN}" y="{bottom}" width="{width - 2 * MARGIN}" height="{BOX[1]}" rx="5"/>'
        f'<text x="{width / 2:.0f}" y="{bottom + 22}">{names}: any room may import them</text></g>'
    )
    return "\n".join([_HEAD.format(width=width, height=height), *lines, *boxes, "</svg>", ""])


def _label(room: str) -> str:
    folder = ROOT / "fastgan" / room
    return f"{room}.py" if folder.with_suffix(".py").is_file() else f"{room}/"


def _kind(room: str) -> str:
    return "door" if room in DOORS else "outside" if room == "kernels" else "room"


_HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<title>Rooms of fastgan and what they import; written by python -m scripts.architecture_picture</title>
<style>
rect {{ fill: #eef2fb; stroke: #4a66b0; }}
.door rect {{ fill: #fdf3e0; stroke: #b07d1e; }}
.outside rect {{ fill: #eaf6ec; stroke: #3b8a4a; }}
.base rect {{ fill: #f1f1f1; stroke: #888; }}
text {{ font: 14px sans-serif; text-anchor: middle; fill: #1c1c1c; }}
path {{ fill: none; stroke: #888; stroke-width: 1.3; }}
.head {{ marker-end: url(#head); }}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4L0 8z" style="fill: #888; stroke: none"/></marker></defs>
<rect width="{width}" height="{height}" style="fill: #fff; stroke: none"/>"""


if __name__ == "__main__":
    PICTURE.write_text(picture())
