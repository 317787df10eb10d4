"""A docstring of the house as Markdown: its equations, literal blocks, lists of arguments and references."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator

LISTS = ("Args", "Attributes", "Raises")  # sections of ``names: description`` items
LEADS = ("Args", "Attributes", "Raises", "Returns", "Source", "Cost")
TITLES = {"Args": "Arguments"}

Link = Callable[[str], "str | None"]  # the address of a public name, or None where it has no page


def to_markdown(docstring: str, link: Link) -> str:
    """The whole docstring."""
    return "\n\n".join(block for lines in _paragraphs(inspect.cleandoc(docstring)) for block in _convert(lines, link))


def definitions(items: list[tuple[str, str]], link: Link) -> str:
    """Names and their descriptions as a definition list."""
    return "\n\n".join(
        f"{', '.join(f'`{name}`' for name in names.split(', '))}\n:   {inline(text, link)}" for names, text in items
    )


def inline(text: str, link: Link) -> str:
    """Double backquotes are code, single ones refer to a public name, and ``:math:`` is an equation."""

    def reference(match: re.Match) -> str:
        math, code, name = match.groups()
        if math:
            return f"${math}$"
        target = None if code else link(name)
        return f"`{code or name}`" if target is None else f"[`{name}`]({target})"

    text = re.sub(r":math:`([^`]+)`|``(.+?)``|`([^`]+)`", reference, text)
    return re.sub(r"(?<![(/])docs/([\w-]+\.md)", lambda match: f"[{match[1]}]({link(match[0])})", text)


def _paragraphs(text: str) -> Iterator[list[str]]:
    """Runs of lines between empty lines; what is indented below a line stays with it."""
    lines: list[str] = []
    for line in text.splitlines():
        starts = lines and not lines[-1] and line and not line.startswith(" ")
        if starts:
            yield _trimmed(lines)
            lines = []
        lines.append(line)
    if lines:
        yield _trimmed(lines)


def _trimmed(lines: list[str]) -> list[str]:
    while lines and not lines[-1]:
        lines = lines[:-1]
    return lines


def _convert(lines: list[str], link: Link) -> Iterator[str]:
    first = lines[0]
    if first.startswith(".. math::"):
        yield f"$$\n{' '.join([first.removeprefix('.. math::').strip(), *map(str.strip, lines[1:])]).strip()}\n$$"
        return
    if first.startswith("* "):
        yield "\n".join(_bullets(lines, link))
        return
    lead, _, rest = first.partition(":")
    if lead in LEADS:
        title = f"**{TITLES.get(lead, lead)}**"
        if rest:
            yield f"{title}: {inline(' '.join([rest.strip(), *map(str.strip, lines[1:])]), link)}"
            return
        yield title
        body = [line.removeprefix("    ") for line in lines[1:]]
        yield definitions(_items(body), link) if lead in LISTS else inline(" ".join(map(str.strip, body)), link)
        return
    prose = next((n for n, line in enumerate(lines) if line.startswith(" ") or not line), len(lines))
    text = " ".join(lines[:prose])
    if text.endswith("::"):
        yield inline(text[:-1], link)
        yield f"```python\n{inspect.cleandoc(chr(10).join(['', *lines[prose:]]))}\n```"
        return
    if prose < len(lines):
        raise ValueError(f"a docstring has an indented block after {text!r}, which ends in no '::'")
    yield inline(text, link)


def _bullets(lines: list[str], link: Link) -> Iterator[str]:
    item: list[str] = []
    for line in [*lines, "* "]:
        if line.startswith("* ") and item:
            yield f"- {inline(' '.join(item), link)}"
            item = []
        item.append(line.removeprefix("* ").strip())


def _items(lines: list[str]) -> list[tuple[str, str]]:
    """``names: description``, whose further lines are indented, as pairs."""
    items: list[str] = []
    for line in lines:
        if line.startswith(" ") and items:
            items[-1] += f" {line.strip()}"
        elif line:
            items.append(line)
    pairs = []
    for item in items:
        names, separator, text = item.partition(": ")
        if not separator:
            raise ValueError(f"a docstring has an item without a description: {item!r}")
        pairs.append((names, text))
    return pairs
