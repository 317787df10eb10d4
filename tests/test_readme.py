"""What README, CONTRIBUTING and docs tell a person to run exists and runs."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sslkernels import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/migration-losses.md", "docs/migration-masking.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}


def blocks(language: str) -> list[str]:
    return [block for text in TEXTS.values() for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands() -> list[str]:
    """The indented lines of a page are commands, with a comment behind them or, in a list, more words after spaces."""
    lines = [line[4:] for text in TEXTS.values() for line in outside_blocks(text) if re.match(r" {4}\S", line)]
    found = [re.split(r"\s{2,}|\s#", line)[0] for line in lines]
    return [part.strip() for line in found for part in line.split(",") if part.strip()]


def outside_blocks(text: str) -> list[str]:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines()


def test_the_readme_opens_with_the_two_commands():
    assert [line.split()[:2] for line in TEXTS["README.md"].splitlines()[2:4]] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_blocks_run(index):
    subprocess.run([sys.executable, "-c", blocks("python")[index]], cwd=ROOT, check=True)


def test_imports_that_replace_others_exist():
    added = [line[1:] for block in blocks("diff") for line in block.splitlines() if line.startswith("+from")]
    assert added
    subprocess.run([sys.executable, "-c", "\n".join(added)], cwd=ROOT, check=True)


def test_lines_that_replace_others_run_elsewhere():
    """What docs/migration-masking.md tells a person to write stands in an example or a test."""
    sources = [*(ROOT / "examples").glob("*.py"), ROOT / "tests" / "test_mask_drop_ins.py"]
    run = {line.strip() for path in sources for line in path.read_text(encoding="utf-8").splitlines()}
    diffs = re.findall(r"```diff\n(.*?)```", TEXTS["docs/migration-masking.md"], re.DOTALL)
    shown = {line[1:].strip() for diff in diffs for line in diff.splitlines() if re.match(r"\+(?!from)", line)}
    assert len(shown) > 6 and shown <= run, shown - run


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make")])
def test_make_targets_exist(command):
    target = shlex.split(command)[1]
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in commands() if "sslkernels" in c])
def test_arguments_of_commands_are_understood(command, monkeypatch):
    words = shlex.split(command)
    arguments = words[words.index("sslkernels") + 1 :]
    if arguments[0] == "train":
        monkeypatch.setattr(importlib.import_module(f"sslkernels.trainers.{arguments[1]}"), "main", lambda args: 0)
        assert cli.main(arguments) == 0
    else:
        assert cli._parser().parse_args(arguments).command == arguments[0]


def test_every_command_is_one_of_these_kinds():
    """A command that no test above looks at would go stale unseen."""
    assert len(commands()) > 8
    for command in commands():
        assert re.match(r"make |sslkernels |torchrun .* -m sslkernels ", command), command


def test_files_that_are_named_exist():
    for name, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / name).parent / link).exists(), f"{name}: {link}"
        for path in re.findall(r"`((?:csrc|tests|sslkernels|bench|examples)/[\w./]+)`", text):
            assert (ROOT / path).exists(), f"{name}: {path}"
