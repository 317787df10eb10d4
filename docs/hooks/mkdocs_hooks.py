"""What mkdocs does to a page of `docs` besides: API text from docstrings, links into the repository, equations.

A line ``::: sslkernels.nt_xent`` becomes that object's signature and docstring, ``::: costs nt_xent`` the table of what
its inputs need at the least, and ``::: figure nt_xent`` the figure ``docs/figures/nt_xent.svg``, once there is one. So
it is with the page ``benchmarks.md``: ``sslkernels bench --docs`` writes both.
Files of the repository that pages link to are shown as pages if `INCLUDED` has them, else only named.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

import api
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
DIRECTIVE = re.compile(r"^::: (?:(costs|figure) )?(\S+)$", re.MULTILINE)
INCLUDED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tests/triton_resources.md": "triton-resources.md",
    "tests/cuda_resources.md": "cuda-resources.md",
}
# where an equation needs the thin space that TeX puts beside the name of a function
BESIDE_FUNCTION = re.compile(
    "(?<=</mi>)(?=<mi>(?:exp|log|cos)</mi>)|(?<=<mi>(?:exp|log|cos)</mi>)(?=<m(?:frac|sub|i|under)>)"
)
NO_FIGURE = "There is no figure yet. `sslkernels bench --curves --op {name}` draws it for your machine."
BENCHMARKS = "benchmarks.md"
NOT_MEASURED = (
    "# Benchmarks\n\nNothing has been measured for this page yet. `sslkernels bench --docs` does so, and writes it.\n"
)

_homes: dict[str, str] = {}  # public name: page that has it


def on_files(files, config):
    for source, page in INCLUDED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    if files.get_file_from_path(BENCHMARKS) is None:
        files.append(File.generated(config, BENCHMARKS, content=NOT_MEASURED))
    _homes.clear()
    for file in files.documentation_pages():
        for kind, name in DIRECTIVE.findall(file.content_string):
            if not kind and _homes.setdefault(name, file.src_uri) != file.src_uri:
                raise PluginError(f"{name} is on two pages, {_homes[name]} and {file.src_uri}")
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    own = next((source for source, target in INCLUDED.items() if target == here), f"docs/{here}")

    def link(name: str) -> str | None:
        return _relative(_address(name), here)

    def directive(match: re.Match) -> str:
        kind, name = match.groups()
        if kind == "figure":
            exists = (Path(config.docs_dir) / "figures" / f"{name}.svg").exists()
            if not exists:
                return NO_FIGURE.format(name=name)
            return f"![Time and memory of {name}]({_relative(f'figures/{name}.svg', here)}){{ loading=lazy }}"
        try:
            return api.costs(name) if kind else api.render(name, link)
        except (AttributeError, ImportError, ValueError) as error:
            raise PluginError(f"{here}: {match[0]}: {error}") from error

    return DIRECTIVE.sub(directive, _links(markdown, own, here))


def on_page_content(content, page, config, files):
    """Equations as MathML, which browsers draw by themselves."""
    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', _equation, content, flags=re.DOTALL)


def _equation(match: re.Match) -> str:
    display = "inline" if match[2] == "(" else "block"
    # the converter knows only brackets as large as what they hold
    latex = re.sub(r"\\Big([lr])", lambda side: {"l": r"\left", "r": r"\right"}[side[1]], html.unescape(match[3]))
    return BESIDE_FUNCTION.sub('<mspace width="0.17em"/>', convert(latex.strip(), display=display))


def _address(name: str) -> str | None:
    """Page and anchor of a public name or of a method of one, or the page of a file in docs."""
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    for full in (name, f"sslkernels.{name}", f"sslkernels.nn.{name}"):
        owner, _, member = full.rpartition(".")
        if full in _homes:
            return f"{_homes[full]}#{full}"
        if owner in _homes and member in api.members(owner):
            return f"{_homes[owner]}#{full}"
    return None


def _relative(address: str | None, here: str) -> str | None:
    return address and posixpath.relpath(address, posixpath.dirname(here) or ".")


def _links(markdown: str, source: str, here: str) -> str:
    """Links as they are in the repository, from the file ``source``, as they have to be on the page ``here``."""

    def rewrite(match: re.Match) -> str:
        label, target, anchor = match.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("docs/") or path in INCLUDED:
            address = INCLUDED.get(path, path.removeprefix("docs/"))
            return f"[{label}]({_relative(address, here)}{anchor})"
        return f"`{path}`" if path.endswith(label.strip("`")) else f"{label} (`{path}`)"

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)", rewrite, markdown)
