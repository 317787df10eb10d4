"""What is made of a benchmark's results: tables, figures, the page of the documentation, and comparisons."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from xml.etree import ElementTree

import bench_results as made
import compare
import figures
import mkdocs_hooks
import overview
import pytest
import report
import svg
import tables

PEERS = {"pytorch_metric_learning fp32": 12.0, "timm fp32": 7.0, **made.SPEEDS}


@pytest.fixture
def write(tmp_path):
    def write(name: str, *races, **facts):
        path = tmp_path / name
        path.write_text(json.dumps(made.results(*races, **facts)), encoding="utf-8")
        return path

    return write


def rows(markdown: str, heading: str) -> list[dict[str, str]]:
    """The first table below a heading, by column."""
    lines = markdown.partition(f"## {heading}\n")[2].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    cells = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


# ---- tables and page


def test_the_tables_follow_the_figures():
    race = made.race("nt_xent", "views512_d128", 12.5)
    race["ratios"]["over eager fp32"], race["ratios"]["share of roofline fp32"] = 7.25, 0.913
    page = report.page(made.results(race), {})
    [row] = rows(page, "nt_xent")
    assert (row["× eager"], row["of roofline"], row["ours ms"]) == ("7.25", "91%", "12.5")
    assert (row["ours MiB"], row["eager MiB"]) == ("2.0", "10.0")
    times = {row["contender"]: row for row in rows(page, "All times")}
    assert times["ours fp32"]["ms"] == "12.5 [12.2, 12.9]" and times["ours fp32"]["MiB"] == "2.0"
    assert times["roofline fp32"]["ms"] == "10"
    rates = {row["rate"]: row["median"] for row in rows(page, "Rates of this machine")}
    assert rates == {"fma fp32": "100.0", "exp": "2.0", "copy": "20.0"}


def test_ops_that_move_memory_name_their_ratios():
    race = made.race("ema_update_", "vit_b", 20.0, "update", speeds={"foreach fp32": 1.5, "ours fp32": 1.0})
    race |= {"roofline": {}, "ratios": {"over foreach": 1.5, "bandwidth ours fp32": 0.75}}
    [row] = rows(report.page(made.results(race), {}), "ema_update_")
    assert (row["× foreach"], row["of bandwidth, ours fp32"], row["ours MiB"]) == ("1.50", "75%", "2.0")


def test_a_curve_has_a_row_for_each_point():
    points = made.curve("nt_xent", "N", (64, 256))
    del points[1]["contenders"]["lightly fp32"]
    small, large = rows(report.page(made.results(*points), {}), "nt_xent")
    assert (small["N"], small["ours ms"], small["lightly ms"], small["of roofline"]) == ("64", "0.41", "3.28", "80%")
    assert (large["N"], large["ours ms"], large["lightly ms"], large["lightly MiB"]) == ("256", "6.55", "–", "–")


def test_the_page_says_what_machine_it_was_and_what_was_not_measured():
    page = report.page(made.results(made.race("nt_xent", "views512_d128", 1.0)), {})
    for fact in ("a processor, 2 threads", "torch 2.14.1", "commit: c0ffee", "date: 2026-01-31"):
        assert fact in page
    missing = page.partition("## What was not measured\n")[2].partition("\n## ")[0]
    for gap in ("Any GPU", "AVX-512 with bfloat16", "aarch64", "not installed: timm", "scaling curves"):
        assert gap in missing
    settings = {"device": "cuda", "peers": "", "quick": True, "curves": False, "cuda-graphs": True}
    race = made.race("nt_xent", "views512_d128", 1.0)
    race["contenders"]["lightly fp32"]["graph"] = False
    page = report.page(made.results(race, settings=settings), {})
    assert "`sslkernels bench --device cuda --peers none --quick --cuda-graphs`" in page
    missing = page.partition("## What was not measured\n")[2].partition("\n## ")[0]
    assert "Any GPU" not in missing and "quick run" in missing and "cannot be recorded: lightly fp32" in missing


def test_figures_of_a_busy_machine_are_called_so():
    race = made.race("nt_xent", "views512_d128", 1.0)
    assert tables.disturbances([race]) == "Of 40 samples 4 were disturbed: their threads waited for a core."
    race["contenders"]["compile fp32"].update(samples=0, disturbed=9)
    text = tables.disturbances([race])
    assert "do not rely on the figures of:** nt_xent views512_d128 forward+backward compile fp32." in text


def test_the_documentation_gets_its_page_and_figures(write, tmp_path, capsys):
    file = write("new.json", made.race("nt_xent", "views512_d128", 1.0), *made.curve("nt_xent", "N", (64, 256)))
    docs = tmp_path / "docs"
    docs.mkdir()
    assert report.main([str(file), "--docs", str(docs)]) == 0
    page = (docs / "benchmarks.md").read_text()
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert shown == ["figures/overview.svg", "figures/nt_xent.svg"]
    assert all((docs / name).is_file() for name in shown)
    assert not file.with_suffix(".md").exists()
    assert str(docs / "figures/nt_xent.svg") in capsys.readouterr().out


@pytest.mark.parametrize("exists", (False, True))
def test_the_page_of_an_op_shows_its_figure_once_there_is_one(tmp_path, exists):
    (tmp_path / "figures").mkdir()
    if exists:
        (tmp_path / "figures/nt_xent.svg").write_text("<svg/>")
    page, config = SimpleNamespace(file=SimpleNamespace(src_uri="ops/nt_xent.md")), SimpleNamespace(docs_dir=tmp_path)
    text = mkdocs_hooks.on_page_markdown("::: figure nt_xent", page, config, None)
    assert ("](../figures/nt_xent.svg)" in text) == exists
    assert ("sslkernels bench --curves --op nt_xent" in text) != exists


# ---- figures


def drawn(path) -> tuple[str, set[str]]:
    """The source of a figure and its texts."""
    source = path.read_text(encoding="utf-8")
    return source, {
        "".join(node.itertext()) for node in ElementTree.fromstring(source).iter("{http://www.w3.org/2000/svg}text")
    }


def test_the_figure_of_an_op_names_every_contender(tmp_path):
    races = [*made.curve("sup_con", "N", (64, 256, 1024), PEERS), *made.curve("sup_con", "D", (32, 128), PEERS)]
    assert figures.draw("sup_con", races, tmp_path / "sup_con.svg")
    _, texts = drawn(tmp_path / "sup_con.svg")
    assert {"pytorch_metric_learning", "timm", "lightly", "compile", "eager", "ours", "roofline"} <= texts
    assert {"64", "256", "1024", "32", "128", "N", "D"} <= texts
    assert {"sup_con: forward and backward, ms (D = 128)", "memory on top of the inputs, MiB (D = 128)"} <= texts


def test_one_point_is_no_curve(tmp_path):
    races = [made.race("nt_xent", "views512_d128", 1.0), *made.curve("nt_xent", "N", (64,))]
    assert not figures.draw("nt_xent", races, tmp_path / "nt_xent.svg")
    assert not list(tmp_path.iterdir())


def test_the_overview_shows_ratios_of_whole_steps(tmp_path):
    races = [
        made.race("nt_xent", "small", 1.0),
        made.race("nt_xent", "large", 250.0, speeds=PEERS | {"timm fp32": 0.5}),
        made.race("nt_xent", "large", 900.0, "forward"),
        made.race("block_mask", "dinov2", 1.0),
    ]
    overview.draw(races, tmp_path / "overview.svg")
    _, texts = drawn(tmp_path / "overview.svg")
    assert {"nt_xent  large", "250 ms (2.0 MiB)", "lightly 8× (16 MiB)", "timm 0.5× (1.0 MiB)"} <= texts
    assert {"pytorch_metric_learning 12× (24 MiB)", "compile 3× (6.0 MiB)", "eager 5× (10 MiB)"} <= texts
    assert not any("block_mask" in text or "forward" in text for text in texts)
    overview.draw(races[3:], tmp_path / "overview.svg")
    assert "block_mask  dinov2" in drawn(tmp_path / "overview.svg")[1]


def test_figures_are_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        figures.draw("nt_xent", made.curve("nt_xent", "N", (64, 256)), tmp_path / name / "nt_xent.svg")
        overview.draw([made.race("nt_xent", "views512_d128", 1.0)], tmp_path / name / "overview.svg")
    for name in ("nt_xent.svg", "overview.svg"):
        source = (tmp_path / "one" / name).read_text()
        assert source == (tmp_path / "two" / name).read_text()
        assert "dc:date" not in source


def luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_figures_can_be_read_on_light_and_on_dark_pages(tmp_path):
    """Every colour of a figure has a dark counterpart, and text the contrast that WCAG 2.1 asks for, on either."""
    figures.draw("sup_con", made.curve("sup_con", "N", (64, 256), PEERS), tmp_path / "figure.svg")
    source, _ = drawn(tmp_path / "figure.svg")
    body = source.partition("</style>")[2]
    assert set(re.findall(r"#[0-9a-f]{6}", body)) <= svg.DARK.keys()
    for light, dark in svg.DARK.items():
        assert f'[style*="fill: {light}"]{{fill:{dark} !important}}' in source
        if light not in (svg.PAPER, svg.GRID):
            for color, paper in ((light, svg.PAPER), (dark, svg.DARK[svg.PAPER])):
                bright, dim = sorted((luminance(color), luminance(paper)), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, color


def test_contenders_are_told_apart_by_color_and_marker():
    looks = svg.looks(["lightly", "timm", "eager", "ours", "compile", "foreach", "mae"])
    assert len({look["color"] for look in looks.values()}) == len({look["marker"] for look in looks.values()}) == 7


def test_labels_keep_their_order_and_their_distance():
    places = figures.spread({"a": 0.98, "b": 0.99, "c": 0.97, "d": 0.1}, 0.1)
    assert sorted(places, key=places.get) == ["d", "c", "a", "b"]
    assert places == pytest.approx({"d": 0.1, "c": 0.8, "a": 0.9, "b": 1.0})


# ---- comparison


def changed(race: dict, label: str, factor: float) -> dict:
    race = json.loads(json.dumps(race))
    entry = race["contenders"][label]
    entry["median"] *= factor
    entry["quartiles"] = [factor * value for value in entry["quartiles"]]
    return race


def test_a_change_counts_where_the_quartiles_are_apart(write, capsys):
    old = made.race("nt_xent", "views512_d128", 10.0)
    new = changed(changed(changed(old, "ours fp32", 0.5), "eager fp32", 1.02), "compile fp32", 2.0)
    status = compare.main([str(write("old.json", old)), str(write("new.json", new))])
    output = capsys.readouterr().out
    lines = {line.split()[3]: " ".join(line.split()) for line in output.splitlines() if "views512_d128" in line}
    assert status == 0
    assert "10 5 0.50 0.48 to 0.53 faster 2.0 -> 2.0" in lines["ours"]
    assert "50 51 1.02 0.97 to 1.07 within noise" in lines["eager"]
    assert "2.00 1.90 to 2.10 slower" in lines["compile"]
    assert "contenders other than ours took 1.02 times as long (1.00 to 2.00)" in output
    assert "all: 1 faster, 1 slower, 2 within noise" in output and "ours: 1 faster, 0 slower" in output
    assert "differs" not in output


def test_a_disturbed_time_is_no_change():
    old, new = {"quartiles": [1.0, 1.1], "samples": 5}, {"quartiles": [2.0, 2.1], "samples": 0}
    assert compare.verdict(old, new) == "disturbed"
    assert compare.verdict(old, new | {"samples": 5}) == "slower"


def test_other_machines_and_versions_are_named(write, capsys):
    race = made.race("nt_xent", "views512_d128", 10.0)
    old = write("old.json", race, made.race("nt_xent", "gone", 1.0))
    versions = {"sslkernels": "0.1.0", "torch": "2.13.0", "lightly": "1.6.0", "timm": "1.0.0"}
    new = write("new.json", race, processor="another", versions=versions)
    assert compare.main([str(old), str(new)]) == 0
    output = capsys.readouterr().out
    assert "differs: processor: a processor -> another\n" in output
    assert "differs: torch: 2.14.1 -> 2.13.0\n" in output and "differs: timm: not installed -> 1.0.0\n" in output
    assert output.count("differs") == 3
    assert "only in old: 4 of 8 times" in output


@pytest.mark.parametrize(
    "text, complaint",
    (
        (None, "No such file or directory"),
        ("{", "is not JSON"),
        ("[1]", "holds no results of sslkernels bench"),
        ('{"machine_info": {}, "benchmarks": []}', "holds no results of sslkernels bench"),
        (json.dumps(made.results({"op": "nt_xent"})), "holds no results of sslkernels bench"),
        (json.dumps(made.results()), "holds no race that was finished"),
        (json.dumps(made.results(made.race("sup_con", "other", 1.0))), "have no race in common"),
    ),
)
def test_a_bad_file_is_one_line(write, tmp_path, capsys, text, complaint):
    good, bad = write("good.json", made.race("nt_xent", "views512_d128", 1.0)), tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    assert compare.main([str(good), str(bad)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("sslkernels bench: ") and complaint in captured.err
    if "common" not in complaint:
        assert report.main([str(bad)]) == 2
        assert complaint in capsys.readouterr().err
