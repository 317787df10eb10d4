"""Public objects as Markdown: signature, docstring, fields and methods; what an op costs; its figure."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap

from docstring_markdown import Link, definitions, to_markdown

from sslkernels import registry

WIDTH = 76  # of a signature: what a page shows of a line


def find(path: str):
    """The object of a dotted name."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(f"no module of {path!r}")


def members(path: str) -> list[str]:
    """The documented methods of a class, or nothing."""
    found = find(path)
    if not inspect.isclass(found) or issubclass(found, tuple):
        return []
    return [name for name, value in vars(found).items() if not name.startswith("_") and _documented(value)]


def _documented(value) -> bool:
    value = getattr(value, "__func__", value)
    function = value.fget if isinstance(value, property) else value
    ours = getattr(function, "__module__", "").startswith("sslkernels")  # not what a class takes over from torch
    return ours and inspect.isfunction(function) and bool(value.__doc__)


def render(path: str, link: Link) -> str:
    """One object, a heading with its name as anchor first."""
    found, name = find(path), path.rpartition(".")[2]
    if inspect.ismodule(found):
        return f"## {path} {{: #{path} }}\n\n{to_markdown(found.__doc__, link)}"
    blocks = [f"## {name} {{: #{path} }}", _code(f"{path}{_arguments(found)}"), to_markdown(found.__doc__, link)]
    fields = _fields(found)
    if fields:
        blocks += ["**Fields**", definitions(fields, link)]
    for member in members(path):
        value = inspect.getattr_static(found, member)
        call = "" if isinstance(value, property) else _arguments(getattr(value, "__func__", value))
        blocks += [f"### {member} {{: #{path}.{member} }}", _code(f"{name}.{member}{call}")]
        blocks.append(to_markdown(value.__doc__, link))
    return "\n\n".join(blocks)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _arguments(found) -> str:
    """Names and defaults; the docstring says what they are."""
    signature = inspect.signature(found)
    words, seen_keyword = [], False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not seen_keyword:
            words.append("*")
        seen_keyword |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
        words.append(f"{stars}{parameter.name}{default}")
    line = f"({', '.join(words)})"
    if len(found.__qualname__) + len("sslkernels.nn.") + len(line) <= WIDTH:
        return line
    # no break within a default such as (0.15, 0.2)
    glued = ", ".join(word.replace(" ", "\0") for word in words)
    lines = textwrap.wrap(glued, WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
    return "(\n{},\n)".format("\n".join(lines).replace("\0", " "))


def _default(value) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:.4g}" if isinstance(value, float) and len(repr(value)) > 8 else repr(value)


def _fields(found) -> list[tuple[str, str]]:
    """The fields of a named tuple or a dataclass, each with the comment behind it."""
    if not inspect.isclass(found) or not (hasattr(found, "_fields") or dataclasses.is_dataclass(found)):
        return []
    return re.findall(r"^ {4}(\w+): .*?  # (.+)$", inspect.getsource(found), re.MULTILINE)


def costs(op: str) -> str:
    """A table of what the inputs that are timed need at the least, counted in the slice's ``cases.py``."""
    (spec,) = (spec for spec in registry.ops() if spec.name == op)
    rows = [(case.name, case.cost) for case in spec.tagged("bench")]
    if not rows:
        raise ValueError(f"{op} has no input that is timed")
    columns = [
        ("GFLOP forward", [cost.forward_flops / 1e9 for _, cost in rows]),
        ("backward", [cost.backward_flops / 1e9 for _, cost in rows]),
        ("million exps", [cost.exps / 1e6 for _, cost in rows]),
        ("MB moved", [cost.bytes / 1e6 for _, cost in rows]),
    ]
    columns = [(title, numbers) for title, numbers in columns if any(numbers)]
    lines = [["input", *(title for title, _ in columns)], ["---", *["---:"] * len(columns)]]
    lines += [[f"`{name}`", *(f"{numbers[i]:.3g}" for _, numbers in columns)] for i, (name, _) in enumerate(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
