"""The figure of an op: time and memory over its main size, and time over the others."""

from __future__ import annotations

import math
from pathlib import Path

import results
from matplotlib import pyplot, ticker
from svg import FAINT, PAPER, STYLE, WIDTH, looks, save

SIZES = {"N": "N", "D": "D", "K": "keys in the queue, K", "L": "tokens, L", "P": "parameters", "T": "tensors"}
LEAST_MIB = 0.1  # what a logarithmic axis can show of nothing
PANEL, GAP, TOP, BOTTOM, LEFT = 1.6, 0.85, 0.35, 0.5, 0.65  # inches
LETTER = 0.085  # inches that a letter of a label takes at most
LINE = 0.17  # inches between two labels


def draw(op: str, races: list[dict], path: Path) -> bool:
    """Write the figure of the op; whether there is a curve to be drawn."""
    found = {size: points for size, points in results.curves(races).items() if len(points) > 1}
    if not found:
        return False
    main, *others = found
    panels = [(found[main], "time"), (found[main], "memory"), *((found[size], "time") for size in others)]
    panels = [panel for panel in panels if _series(*panel)]
    names = list(dict.fromkeys(name for points, quantity in panels for name in _series(points, quantity)))
    with pyplot.rc_context(STYLE):
        save(_figure(op, panels, names), path)
    return True


def _series(points: list[dict], quantity: str) -> dict[str, list[tuple[int, float, float, float]]]:
    """By contender: size, value and quartiles."""
    lines: dict[str, list] = {}
    for race in points:
        for label, entry in race["contenders"].items():
            if quantity == "time":
                value, (low, high) = entry["median"], entry["quartiles"]
                point = tuple(1e3 * seconds for seconds in (value, low, high))
            elif entry.get("extra_mib") is not None:
                point = (max(entry["extra_mib"], LEAST_MIB),) * 3
            else:
                continue
            lines.setdefault(label.removesuffix(" fp32"), []).append((race["curve"]["value"], *point))
    return lines


def _figure(op: str, panels: list, names: list[str]) -> pyplot.Figure:
    height = TOP + len(panels) * (PANEL + GAP) - GAP + BOTTOM
    right = 0.2 + LETTER * max(map(len, [*names, "roofline"]))
    figure = pyplot.figure(figsize=(WIDTH, height))
    styles = looks(names)
    for number, (points, quantity) in enumerate(panels):
        bottom = height - TOP - PANEL - number * (PANEL + GAP)
        axes = figure.add_axes(
            (LEFT / WIDTH, bottom / height, (WIDTH - LEFT - right) / WIDTH, PANEL / height), label=str(number)
        )
        _panel(axes, points, quantity, styles)
        unit = f"{op}: {_direction(points)}, ms" if quantity == "time" else "memory on top of the inputs, MiB"
        axes.set_title(
            f"{unit} ({points[0]['curve']['rest']})", loc="left", x=-LEFT / (WIDTH - LEFT - right), fontsize=10
        )
    return figure


def _direction(points: list[dict]) -> str:
    return points[0]["direction"].replace("+", " and ")


def _panel(axes, points: list[dict], quantity: str, styles: dict[str, dict]) -> None:
    lines, ends, drawn = _series(points, quantity), {}, []
    if quantity == "time" and all(race.get("least_seconds") for race in points):
        bound = [(race["curve"]["value"], 1e3 * race["least_seconds"]) for race in points]
        axes.plot(*zip(*bound, strict=True), color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2)
        ends["roofline"] = (*bound[-1], FAINT)
        drawn += [value for _, value in bound]
    for name, line in lines.items():
        sizes, values, low, high = zip(*line, strict=True)
        color = styles[name]["color"]
        ours = name == "ours"
        axes.vlines(sizes, low, high, color=color, linewidth=1.0)
        axes.plot(
            sizes, values, **styles[name], linewidth=2.4 if ours else 1.4, markersize=5, markeredgecolor=PAPER,
            markeredgewidth=0.6, zorder=4 if ours else 3,
        )  # fmt: skip
        ends[name] = (sizes[-1], values[-1], color)
    drawn += [value for line in lines.values() for point in line for value in point[1:]]
    _scale(axes, points, drawn)
    _label(axes, ends)


def _scale(axes, points: list[dict], values: list[float]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = [race["curve"]["value"] for race in points]
    axes.set_xticks(sizes, [str(size) if size < 1e5 else f"{size / 1e6:.2g}M" for size in sizes])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
    axes.set_xlabel(SIZES[points[0]["curve"]["size"]])
    low, high = min(values) / 1.5, max(values) * 1.5
    axes.set_ylim(low, high)
    steps = (1.0,) if high / low > 200 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=steps, numticks=9))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _label(axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Every name beside the end of its line, moved up or down where two would overlap."""
    low, high = (math.log(edge) for edge in axes.get_ylim())
    heights = {name: (math.log(y) - low) / (high - low) for name, (_, y, _) in ends.items()}
    for name, place in spread(heights, LINE / PANEL).items():
        x, y, color = ends[name]
        axes.annotate(
            name, (x, y), (1.07, place), "data", "axes fraction", color=color, verticalalignment="center",
            fontweight="bold" if name == "ours" else "normal", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 4
            },
        )  # fmt: skip


def spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Heights from 0 to 1 that differ by ``gap`` at least, in their order and near where they were."""
    order = sorted(heights, key=heights.get)
    places = []
    for name in order:
        places.append(max(heights[name], places[-1] + gap if places else 0.0))
    for index in reversed(range(len(places))):
        places[index] = min(places[index], 1.0 if index == len(places) - 1 else places[index + 1] - gap)
    return dict(zip(order, places, strict=True))
