"""What README, CONTRIBUTING and docs tell a person to run exists and runs."""

from __future__ import annotations

import importlib
import re
import shlex

import pages
import pytest
import torch
from conftest import require_or_skip
from pages import ROOT, TEXTS, blocks

from sslkernels import cli

ERRORS = "docs/errors.md"  # its blocks end in the errors that their headings show
FRAGMENTS = "docs/migration-masking.md"  # its diffs but the first are parts of programs that stand elsewhere
PROGRAMS = [block for block in blocks("diff") if block.page != FRAGMENTS or block.text.startswith("-from")]
# tests have timm, and torch itself: programs that come from these can be run as they are before the change
BEFORE_IS_INSTALLED = [
    block for block in PROGRAMS if set(re.findall(r"^-from (\w+)", block.text, re.MULTILINE)) <= {"timm", "torch"}
]


def commands() -> list[str]:
    """The indented lines of a page are commands, with a comment behind them or, in a list, more words after spaces."""
    lines = [line[4:] for text in TEXTS.values() for line in pages.outside_blocks(text) if re.match(r" {4}\S", line)]
    found = [re.split(r"\s{2,}|\s#", line)[0] for line in lines]
    return [part.strip() for line in found for part in line.split(",") if part.strip()]


def test_the_readme_opens_with_the_two_commands():
    assert [line.split()[:2] for line in TEXTS["README.md"].splitlines()[2:4]] == [["make", "demo"], ["make", "test"]]


def check(failure: pages.Failure | None) -> None:
    missing = failure and re.match(r"ModuleNotFoundError: No module named '(?!sslkernels)([\w.]+)", failure.error)
    require_or_skip(not missing, f"{missing and missing[1]} is not installed")
    assert failure is None, failure.report


@pytest.mark.parametrize("block", [block for block in blocks("python") if block.page != ERRORS], ids=str)
def test_python_blocks_run(block):
    check(pages.run(block, block.text))


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_programs_run_after_the_change(block):
    z0, z1 = torch.randn(2, 8, 4)  # which README leaves to the reader
    check(pages.run(block, block.side("+"), z0=z0, z1=z1))


@pytest.mark.parametrize("block", BEFORE_IS_INSTALLED, ids=str)
def test_programs_run_before_the_change(block):
    check(pages.run(block, block.side("-")))


def test_parts_of_programs_stand_in_examples_or_tests():
    sources = [*(ROOT / "examples").glob("*.py"), ROOT / "tests/test_mask_drop_ins.py"]
    there = {line.strip() for path in sources for line in path.read_text(encoding="utf-8").splitlines()}
    parts = [block for block in blocks("diff") if block not in PROGRAMS]
    shown = {line[1:].strip() for block in parts for line in block.text.splitlines() if re.match(r"\+(?!from)", line)}
    assert len(shown) > 6 and shown <= there, shown - there


def test_every_program_imports_from_here():
    for block in PROGRAMS:
        assert re.search(r"^\+from sslkernels", block.text, re.MULTILINE), block


def error_sections() -> list[tuple[str, pages.Block | None]]:
    """The messages of the page of errors, each with the block that ends in it."""
    lines = TEXTS[ERRORS].splitlines()
    headings = {number: line for number, line in enumerate(lines, 1) if line.startswith("##")}
    sections = {number: None for number, line in headings.items() if line.startswith("### ")}
    for block in blocks("python"):
        if block.page == ERRORS:
            sections[max(number for number in headings if number < block.line)] = block
    return [(headings[number].removeprefix("### ").strip("`"), block) for number, block in sections.items()]


@pytest.mark.parametrize("message, block", [section for section in error_sections() if section[1]], ids=str)
def test_blocks_end_in_the_error_above_them(message, block):
    failure = pages.run(block, block.text)
    assert failure is not None, "no error"
    pattern = ".*".join(map(re.escape, message.split("…")))
    assert re.search(pattern, failure.error), failure.report


@pytest.mark.parametrize("message", [message for message, block in error_sections() if block is None])
def test_errors_without_a_block_are_in_the_sources(message):
    files = [*ROOT.glob("sslkernels/**/*.py"), ROOT / "tests/conftest.py"]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # one message over several lines
    sources = re.sub(r'_fail\("(\w+)", f?"', r"sslkernels \1: ", sources)
    assert message in sources


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make")])
def test_make_targets_exist(command):
    target = shlex.split(command)[1]
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in commands() if "sslkernels" in c])
def test_arguments_of_commands_are_understood(command, monkeypatch):
    words = shlex.split(command)
    arguments = words[words.index("sslkernels") + 1 :]
    if arguments[-1] == "--help":
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments)
    elif arguments[0] == "train":
        monkeypatch.setattr(importlib.import_module(f"sslkernels.trainers.{arguments[1]}"), "main", lambda args: 0)
        assert cli.main(arguments) == 0
    else:
        assert cli._parser().parse_args(arguments).command == arguments[0]


def test_every_command_is_one_of_these_kinds():
    """A command that no test above looks at would go stale unseen."""
    assert len(commands()) > 8
    for command in commands():
        assert re.match(r"make |sslkernels |torchrun .* -m sslkernels |pip install \.$", command), command


def test_files_that_are_named_exist():
    for name, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / name).parent / link).exists(), f"{name}: {link}"
        for path in re.findall(r"`((?:csrc|tests|sslkernels|bench|examples)/[\w./]+)`", text):
            assert (ROOT / path).exists(), f"{name}: {path}"
