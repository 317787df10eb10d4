"""The figure of all ops: how many times as long as ours every contender takes, and the memory of both."""

from __future__ import annotations

import math
from pathlib import Path

import results
from matplotlib import pyplot, ticker
from svg import EAGER, FAINT, INK, OTHERS, PAPER, STYLE, WIDTH, save

MAIN = (
    "nt_xent", "info_nce_queue", "clip_loss", "sup_con", "random_masking", "restore_tokens", "masked_patch_loss",
    "ema_update_",
)  # fmt: skip
ROW, GAP, TOP, BOTTOM = 0.2, 0.34, 0.55, 0.45  # inches
MARGIN = 0.2  # inches
LETTER = 0.078  # inches that a letter of a label takes at most
MARKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000, 10000)
PEER, COMPILED = OTHERS[0], OTHERS[1]


def draw(found: list[dict], path: Path) -> bool:
    """Whether there was anything to draw: a run that was stopped may have no whole step."""
    races = shown(found)
    if not races:
        return False
    rows = [(race, name) for race in races for name in ratios(race)]
    height = TOP + BOTTOM + ROW * len(rows) + GAP * len(races)
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(WIDTH, height))
        axes = figure.add_axes((MARGIN / WIDTH, BOTTOM / height, 1 - 2 * MARGIN / WIDTH, 1 - (TOP + BOTTOM) / height))
        _bars(axes, races)
        figure.text(
            0.02, 1 - 0.2 / height, "How many times faster ours is", fontsize=12, fontweight="bold", va="center"
        )
        figure.text(0.02, 1 - 0.42 / height, _legend(races), color=FAINT, va="center")
        save(figure, path)
    return True


def _legend(races: list[dict]) -> str:
    legend = "in brackets: memory on top of the inputs"
    if any(not entry["samples"] for race in races for entry in race["contenders"].values()):
        legend += "; hatched: disturbed by other processes"
    return legend


def shown(found: list[dict]) -> list[dict]:
    """Of each main op, or of all if none was raced, the input that takes ours longest, as a whole step.

    Where no input was raced, a point of its main curve serves.
    """
    whole = [race for race in found if race["whole"]]
    mains = {op: next(iter(results.curves(races).values()), races) for op, races in results.by_op(whole).items()}
    groups = mains | results.by_op(results.of_inputs(whole))
    names = [op for op in MAIN if op in groups] or list(groups)
    return [max(groups[op], key=lambda race: race["contenders"]["ours fp32"]["median"]) for op in names]


def ratios(race: dict) -> dict[str, float]:
    """By contender in fp32, slow ones first, its time in units of ours."""
    ours = race["contenders"]["ours fp32"]["median"]
    others = {
        label.removesuffix(" fp32"): entry["median"] / ours
        for label, entry in race["contenders"].items()
        if label.endswith(" fp32") and label.split()[0] not in ("ours", "EMATeacher")
    }
    return dict(sorted(others.items(), key=lambda item: -item[1]))


def _bars(axes, races: list[dict]) -> None:
    y, bars = 0.0, []
    colors = {"eager": EAGER, "compile": COMPILED}
    above = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "color": INK, "va": "bottom"}
    hides = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}  # the line at 1, which may run through the text
    beside = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    for race in races:
        y -= GAP
        ours = race["contenders"]["ours fp32"]
        time = f"{results.significant(1e3 * ours['median'])} ms{_memory(ours)}"
        axes.annotate(f"{race['op']}  {race['case']}", (0, y + 0.02), (0, 0), fontweight="bold", bbox=hides, **above)
        axes.annotate(time, (1, y + 0.02), (0, 0), ha="right", **above)
        for name, ratio in ratios(race).items():
            y -= ROW
            color = colors.get(name, PEER)
            entry = race["contenders"][f"{name} fp32"]
            doubtful = not (entry["samples"] and ours["samples"])
            fill = {"facecolor": PAPER, "edgecolor": color, "hatch": "////"} if doubtful else {"color": color}
            axes.barh(y + ROW / 2, ratio - 1, left=1, height=0.55 * ROW, **fill)
            label = f"{name} {ratio:.3g}×{_memory(entry)}"
            axes.annotate(label, (max(ratio, 1), y + ROW / 2), (4, 0), color=color, **beside)
            bars.append((ratio, LETTER * len(label) + 0.06))
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(_limits(bars))
    axes.set_ylim(y - ROW / 2, 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    marks = [mark for mark in MARKS if axes.get_xlim()[0] <= mark <= 1.3 * max(ratio for ratio, _ in bars)]
    axes.set_xticks(marks, [f"{mark:g}×" for mark in marks])


def _limits(bars: list[tuple[float, float]]) -> tuple[float, float]:
    """Of a logarithmic axis on which every bar has room for the label behind it, of so many inches."""
    width = WIDTH - 2 * MARGIN
    low = min(1.0, *(ratio for ratio, _ in bars)) / 1.02
    decade = min((width - label) / math.log10(max(ratio, 1.01) / low) for ratio, label in bars)
    return low, low * 10 ** (width / decade)


def _memory(entry: dict) -> str:
    mib = entry.get("extra_mib")
    return "" if mib is None else f" ({mib:.{0 if mib >= 10 else 1}f} MiB)"
