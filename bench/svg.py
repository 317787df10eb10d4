"""What all figures share: one palette for light pages and one for dark ones, and files that are the same every time."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from sslkernels._files import replacing

WIDTH = 5.0  # inches: text of 10 points is readable where a phone shows all of it
INK, FAINT, GRID, PAPER = "#1f2328", "#59636e", "#d8dee4", "#fffffe"
OURS, EAGER = "#0a5fb4", "#4d5560"
# told apart by people who see no red or no green, and by their markers and names besides
OTHERS = ("#a8480a", "#00705a", "#8e3f86", "#6f6400", "#a5264f", "#3d5a1e")
MARKERS = ("^", "D", "v", "P", "X", "*")
DARK = {
    INK: "#e6edf3", FAINT: "#9aa4af", GRID: "#30363d", PAPER: "#161b22", OURS: "#58a6ff", EAGER: "#b1bac4",
    OTHERS[0]: "#f0883e", OTHERS[1]: "#3fc99b", OTHERS[2]: "#d98ad0", OTHERS[3]: "#cbbf45", OTHERS[4]: "#ff8fab",
    OTHERS[5]: "#a3c97f",
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sslkernels",
    "font.size": 10.0,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": PAPER,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def looks(names: list[str]) -> dict[str, dict]:
    """Colour and marker of each contender: ours and eager always have the same."""
    fixed = {"ours": {"color": OURS, "marker": "o"}, "eager": {"color": EAGER, "marker": "s"}}
    fixed["EMATeacher"] = {"color": OURS, "marker": "d"}
    others = [name for name in names if name not in fixed]
    chosen = {
        name: {"color": OTHERS[number % len(OTHERS)], "marker": MARKERS[number % len(MARKERS)]}
        for number, name in enumerate(others)
    }
    return {name: fixed.get(name) or chosen[name] for name in names}


def save(figure: pyplot.Figure, path: Path) -> None:
    """Write the figure with a background of its own, whose colours follow the reader's system."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    rules = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark} !important}}'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    )
    text = drawn.getvalue().replace(
        "*{stroke-linejoin", f"@media (prefers-color-scheme: dark){{{rules}}}\n*{{stroke-linejoin", 1
    )
    with replacing(path) as file:
        file.write(re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).encode())
