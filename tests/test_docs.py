"""The documentation's site builds without a warning and lacks no public name, and docstrings become pages."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import require_or_skip
from docstring_markdown import to_markdown
from pages import ROOT, TEXTS

import sslkernels
import sslkernels.nn
from sslkernels import registry


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built pages."""
    require_or_skip(find_spec("material") and find_spec("latex2mathml"), "the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # of a later release, not of these pages
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    assert not re.search(r"warn", result.stdout, re.IGNORECASE), result.stdout
    return folder


def html(site) -> dict[str, str]:
    return {str(path.relative_to(site)): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_no_markup_is_left_over(site):
    for name, text in html(site).items():
        prose = re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.DOTALL)
        for markup in ("arithmatex", ":math:", ".. math", ":::", "``", "$$"):
            assert markup not in prose, f"{name}: {markup}"


def test_equations_are_drawn_without_scripts_or_fonts(site):
    assert html(site)["ops/nt_xent.html"].count('display="block"') == 1
    for name, text in html(site).items():
        fetched = re.findall(r"<(?:script|img|link|iframe)\b[^>]*(?:src|href)=\"?(https?:[^\s\">]+)", text)
        assert not fetched, f"{name} fetches {fetched}"


def test_docstrings_link_to_what_they_name(site):
    text = html(site)["ops/nt_xent.html"]
    for target in ("#sslkernels.ContrastiveStats", "../distributed.html#sslkernels.distributed"):
        assert f'href="{target}"' in text


def directives(kind: str = "") -> list[str]:
    pattern = re.compile(rf"^::: {kind}(\S+)$", re.MULTILINE)
    return [name for text in TEXTS.values() for name in pattern.findall(text)]


COMPATIBLE = [importlib.import_module(f"sslkernels.compat.{name}") for name in ("dinov2", "lightly", "mae")]


def test_every_public_name_has_its_page():
    public = {f"sslkernels.{name}" for name in sslkernels.__all__}
    public |= {f"sslkernels.nn.{name}" for name in sslkernels.nn.__all__}
    public |= {f"{module.__name__}.{name}" for module in COMPATIBLE for name in module.__all__}
    shown = [name for name in directives() if not name.startswith("sslkernels.distributed")]
    assert sorted(shown) == sorted(public)


def test_every_op_has_costs_and_a_place_for_its_figure():
    timed = {spec.name for spec in registry.ops() if spec.tagged("bench")}
    assert timed == set(directives("costs ")) == set(directives("figure "))


def test_docstring_as_markdown():
    docstring = r"""Adds `b` to ``a``, see `known` and docs/page.md.

    With :math:`x_i` the rows:

    .. math:: y =
              x + 1

    Equivalent PyTorch, for one row::

        y = x

        y += 1

    Contract:

    * one thing,
      continued;
    * another.

    Args:
        a, b: (N,) numbers;
            more of it: here.
        c: the rest.

    Returns:
        The sum.

    Cost: N flops
    and no more.
    """
    assert to_markdown(docstring, {"known": "known.md#known", "docs/page.md": "page.md"}.get) == (
        "Adds `b` to `a`, see [`known`](known.md#known) and [page.md](page.md).\n\nWith $x_i$ the rows:\n\n"
        "$$\ny = x + 1\n$$\n\nEquivalent PyTorch, for one row:\n\n```python\ny = x\n\ny += 1\n```\n\nContract:\n\n"
        "- one thing, continued;\n- another.\n\n**Arguments**\n\n`a`, `b`\n:   (N,) numbers; more of it: here.\n\n"
        "`c`\n:   the rest.\n\n**Returns**\n\nThe sum.\n\n**Cost**: N flops and no more."
    )


@pytest.mark.parametrize("docstring", ["Text.\n\nMore:\n    indented", "Text.\n\nArgs:\n    a without a colon"])
def test_docstring_that_would_be_garbled_is_an_error(docstring):
    with pytest.raises(ValueError, match="a docstring has"):
        to_markdown(docstring, lambda name: None)
