"""The demo succeeds where the ops agree and the encoder learned, and says what the fused op saves."""

import argparse

import pytest

import sslkernels
from sslkernels.trainers import _compare, _demo

LEARNED = {"raw pixels": 0.9, "untrained encoder": 0.5, "trained encoder": 0.8}


def _demo_of(folder, monkeypatch, accuracies, off_by):
    """The status of a demo whose training is made up, and the argument sets it trained with."""
    calls = []

    def train(args):
        calls.append(args)
        args.out.mkdir(parents=True)
        losses = [4 - step / 10 + off_by * (args.ops == "reference") for step in range(args.stop_after or args.steps)]
        (args.out / "log.csv").write_text("step,loss\n" + "".join(f"{i},{loss!r}\n" for i, loss in enumerate(losses)))
        return accuracies

    monkeypatch.setattr(_compare, "compare_ops", lambda *_: None)
    args = argparse.Namespace(
        data="digits", steps=20, batch_size=8, dim=4, temperature=0.2, device="cpu", out=folder, ops="fused"
    )
    vars(args).update(resume=False, overwrite=False, stop_after=None)
    return _demo.demo(args, train), calls


@pytest.mark.parametrize(
    ("accuracies", "off_by", "status"),
    [
        (LEARNED, 9e-4, 0),
        (LEARNED, 1.1e-3, 1),
        ({**LEARNED, "trained encoder": 0.5}, 0, 1),
        ({}, 0, 0),
    ],
)
def test_the_status_tells_success(tmp_path, monkeypatch, capsys, accuracies, off_by, status):
    found, (fused, reference) = _demo_of(tmp_path / "run", monkeypatch, accuracies, off_by)
    assert found == status
    assert (fused.ops, fused.stop_after, reference.ops, reference.stop_after) == ("fused", None, "reference", 10)
    assert ("NOT within" in capsys.readouterr().out) == (off_by > 1e-3)


def test_a_sparkline_follows_the_curve():
    assert _demo.sparkline([8.0, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert _demo.sparkline([2.0] * 100) == "▁" * 40


def test_the_ops_are_compared_in_time_and_memory(monkeypatch, capsys):
    monkeypatch.setattr(_compare, "SECONDS", 0)
    _compare.compare_ops([(1024, 32)], 0.2, "cpu")
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("1024")]
    memory = {row[3]: row[-2:] for row in table}  # 1024 x 32 NAME ... MEMORY MiB
    assert set(memory) == {"eager", "fused"}
    if memory["eager"][-1] == "MiB":
        assert float(memory["eager"][0]) >= 1024**2 * 4 / 2**20  # at least one matrix of logits
        if sslkernels.backends()["nt_xent"]["cpu"].active == "cpp":
            assert float(memory["fused"][0]) < 1024**2 * 4 / 2**20
