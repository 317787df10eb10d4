"""A run that is killed at any moment goes on, bit for bit, as if nothing had happened."""

import os
import signal

import pytest
import torch
from train_children import (
    MOMENTS,
    TINY,
    finish,
    own_threads,  # noqa: F401  a fixture that every test here uses
    parse,
    start,
    train_until,
)

from sslkernels.trainers import TrainError, _checkpoint, simclr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    output = folder.with_name("output.txt")
    assert finish(start(train_until, [*TINY, f"--out={folder}"], None, output)) == 0, output.read_text()
    return folder


def _weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def _assert_same_run(folder, expected):
    assert (folder / "log.csv").read_bytes() == (expected / "log.csv").read_bytes()
    weights, expected_weights = _weights(folder), _weights(expected)
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def test_the_log_has_one_row_a_step(uninterrupted):
    lines = (uninterrupted / "log.csv").read_text().splitlines()
    assert lines[0] == "step,loss,top1,lr"
    assert [line.split(",")[0] for line in lines[1:]] == [str(step) for step in range(8)]


def test_killed_again_and_again_equals_uninterrupted(uninterrupted, tmp_path):
    folder, output = tmp_path / "run", tmp_path / "output.txt"
    for moment in MOMENTS:
        died = finish(start(train_until, [*TINY, f"--out={folder}", "--resume"], moment, output))
        assert died == -signal.SIGKILL, f"{moment}: {output.read_text()}"
    assert finish(start(train_until, [*TINY, f"--out={folder}", "--resume"], None, output)) == 0, output.read_text()
    _assert_same_run(folder, uninterrupted)


def test_killed_from_outside_equals_uninterrupted(uninterrupted, tmp_path):
    folder, output = tmp_path / "run", tmp_path / "output.fifo"
    os.mkfifo(output)
    process = start(train_until, [*TINY, f"--out={folder}"], None, output)
    with open(output) as lines:
        assert any("step 5/8" in line for line in lines)
        os.kill(process.pid, signal.SIGKILL)
    assert finish(process) == -signal.SIGKILL
    simclr.train(parse([*TINY, f"--out={folder}", "--resume"]))
    _assert_same_run(folder, uninterrupted)


def test_stopping_workers_and_checkpoints_leave_the_curve(uninterrupted, tmp_path):
    options = [*TINY, f"--out={tmp_path}", "--workers=1", "--checkpoint-every=2"]
    assert simclr.train(parse([*options, "--stop-after=5"])) == {}
    simclr.train(parse([*options, "--resume"]))
    _assert_same_run(tmp_path, uninterrupted)


def test_a_finished_run_resumes_to_its_result(uninterrupted):
    before = (uninterrupted / "log.csv").read_bytes()
    accuracies = simclr.train(parse([*TINY, f"--out={uninterrupted}", "--resume"]))
    assert set(accuracies) == {"raw pixels", "untrained encoder", "trained encoder"}
    assert (uninterrupted / "log.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "--seed=1"], "the run began with --seed 0, not 1"),
        (["--resume", "--temperature=0.3"], "the run began with --temperature 0.2, not 0.3"),
        ([], "holds a run: --resume goes on with it, --overwrite begins anew"),
    ],
)
def test_another_curve_is_refused(uninterrupted, options, message):
    with pytest.raises(TrainError, match=message):
        simclr.train(parse([*TINY, f"--out={uninterrupted}", *options]))


def test_other_software_is_told(tmp_path, monkeypatch, capsys):
    simclr.train(parse([*TINY, f"--out={tmp_path}", "--stop-after=1"]))
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    simclr.train(parse([*TINY, f"--out={tmp_path}", "--stop-after=1", "--resume"]))
    assert "goes on with torch 0.0.1" in capsys.readouterr().out


def test_a_shortened_log_is_refused(tmp_path):
    simclr.train(parse([*TINY, f"--out={tmp_path}", "--stop-after=2"]))
    os.truncate(tmp_path / "log.csv", 30)
    with pytest.raises(TrainError, match=r"log\.csv is missing or shorter"):
        simclr.train(parse([*TINY, f"--out={tmp_path}", "--resume"]))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(TrainError, match=r"checkpoint\.pt: not a readable checkpoint"):
        simclr.train(parse([*TINY, f"--out={tmp_path}", "--resume"]))


def test_overwriting_leaves_nothing_of_the_old_run(tmp_path):
    simclr.train(parse([*TINY, f"--out={tmp_path}", "--stop-after=2", "--seed=5"]))
    simclr.train(parse([*TINY, f"--out={tmp_path}", "--stop-after=1", "--overwrite"]))
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["options"]["seed"] == 0


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    _checkpoint.write_atomically({"step": 1}, path)

    def disk_full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        _checkpoint.write_atomically({"step": 2}, path)
    assert _checkpoint.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
