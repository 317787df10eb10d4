"""The documentation's site builds without a warning and lacks no public name; what docstrings call equivalent is so."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from conftest import require_or_skip
from docstring_markdown import to_markdown
from pages import ROOT, TEXTS

import sslkernels
import sslkernels.distributed
import sslkernels.nn
from sslkernels import registry


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built pages."""
    require_or_skip(find_spec("material") and find_spec("latex2mathml"), "the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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


def test_every_public_name_has_its_page():
    public = {f"sslkernels.{name}" for name in sslkernels.__all__}
    public |= {f"sslkernels.nn.{name}" for name in sslkernels.nn.__all__}
    shown = [name for name in directives() if not name.startswith("sslkernels.distributed")]
    assert sorted(shown) == sorted(public)


@pytest.mark.parametrize(
    "module", [sslkernels, sslkernels.nn, sslkernels.ops, sslkernels.distributed], ids=lambda m: m.__name__
)
def test_public_modules_list_what_is_public(module):
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__doc__, name


def test_every_op_is_at_the_top():
    assert set(sslkernels.ops.__all__) <= set(sslkernels.__all__)


def test_every_op_has_costs_and_a_place_for_its_figure():
    functions = {spec.name for spec in registry.ops()} & set(sslkernels.__all__)
    assert functions == set(directives("costs ")) == set(directives("figure "))


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


N, D = 6, 4
Z0, Z1 = torch.randn(2, N, D, generator=torch.Generator().manual_seed(0))
UNIT0, UNIT1 = F.normalize(Z0, dim=1), F.normalize(Z1, dim=1)
TOWERS = {"image_features": UNIT0, "text_features": UNIT1}
CALLS = {
    "nt_xent": {"z0": Z0, "z1": Z1, "temperature": 0.3},
    "decoupled_nt_xent": {"z0": Z0, "z1": Z1, "temperature": 0.3, "positive_weight": torch.rand(2 * N)},
    "info_nce": {"query": Z0, "positive_key": Z1, "negative_keys": torch.randn(9, D), "temperature": 0.3}
    | {"label_smoothing": 0.1},
    "clip_loss": TOWERS | {"logit_scale": 5.0, "logit_bias": -1.0},
    "sigmoid_loss": TOWERS | {"logit_scale": 5.0, "logit_bias": -1.0},
    "sup_con": {"features": Z0, "labels": torch.tensor([0, 1, 0, 2, -1, 1]), "temperature": 0.3},
    "ema_update_": {"teacher": [Z0.clone()], "student": [Z1], "momentum": 0.9},
}
ALIASES = {"positive_weight": "weight"}


def equivalents() -> dict[str, str]:
    """Of each public function the code that its docstring calls equivalent."""
    found = {}
    for name in sslkernels.__all__:
        pattern = r"Equivalent PyTorch[^\n]*::\n\n((?:    [^\n]*\n|\n)+)"
        match = re.search(pattern, inspect.getdoc(getattr(sslkernels, name)) + "\n")
        if match:
            found[name] = inspect.cleandoc("\n" + match[1])
    return found


def test_equivalents_are_all_tried():
    assert set(equivalents()) == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_what_a_docstring_calls_equivalent_is_so(name):
    arguments = CALLS[name]
    names = {"torch": torch, "F": F, "N": N, "D": D, **arguments}
    names |= {alias: arguments[argument] for argument, alias in ALIASES.items() if argument in arguments}
    teacher = [t.clone() for t in arguments.get("teacher", ())]
    exec(equivalents()[name], names)
    if name == "ema_update_":
        sslkernels.ema_update_(**{**arguments, "teacher": teacher})
        torch.testing.assert_close(teacher, names["teacher"])
    else:
        torch.testing.assert_close(getattr(sslkernels, name)(**arguments), names["loss"])
