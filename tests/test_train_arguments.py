"""The trainers' arguments: help that states units and defaults, and one line with status 2 for every mistake."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from train_children import METHODS, TINY, trainer

from sslkernels import cli
from sslkernels.trainers import TrainError, _options, mae


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch):
    """Runs a trainer that must end with status 2 and one line on stderr, which is returned; {} is a folder."""
    monkeypatch.chdir(tmp_path)

    def fails(method, *options):
        options = [option.format(tmp_path) for option in options]
        try:
            status = cli.main(["train", method, *TINY, *options])
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        assert status == 2
        assert error.startswith(f"sslkernels train {method}: ") and error.count("\n") == 1
        return error

    return fails


@pytest.mark.parametrize("method", METHODS)
def test_help_is_grouped_and_states_what_it_can(method):
    module = trainer(method)
    parser = cli.Parser(prog=f"sslkernels train {method}", description=module.__doc__)
    module.add_arguments(parser)
    groups = {group.title: group._group_actions for group in parser._action_groups}
    assert [*groups][2:] == ["data", "run", "machine", "optimiser", method] and not groups["positional arguments"]
    for action in (action for actions in groups.values() for action in actions if action.dest != "help"):
        assert action.help, action.dest
        assert action.nargs == 0 or action.metavar, action.dest
        if action.nargs != 0 and action.default is not None:
            assert "default" in action.help, action.dest
    text = parser.format_help()
    assert (
        text.count(f"  sslkernels train {method}") == 3
        and f"torchrun --nproc-per-node 2 -m sslkernels train {method}" in text
    )
    description = text.split("\noptions:")[0]
    assert description.count("\n\n") == module.__doc__.strip().count("\n\n") + 1 and "%(" not in text
    assert max(map(len, description.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps=many"], "--steps: invalid whole number value: 'many'"),
        (["--steps=1.5"], "--steps: invalid whole number value: '1.5'"),
        (["--lr=fast"], "--lr: invalid number value: 'fast'"),
        (["--weight-decay=-1"], "--weight-decay: must be a finite number, 0 or above, got -1"),
        (["--weight-decay=nan"], "--weight-decay: must be"),
        (["--seed=99999999999999999999"], "--seed: must be at most 9223372036854775807"),
        (["--image-size=1000000"], "--image-size: must be at most 8192"),
        (["--device=tpu"], "--device: must be cpu or cuda, got 'tpu'"),
        (["--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
        (["--stop-after=9"], "--stop-after 9 lies beyond the last of --steps 8"),
        (["--tempreature=1"], "unrecognized arguments: --tempreature=1"),
        (["--temp=1"], "unrecognized arguments: --temp=1"),
        (["--data=folder:absent"], "absent: no such folder"),
        (["--data=folder:{}/one"], "--batch-size 16 is more than the 1 training images"),
        (["--out={}/file"], "file: File exists"),
        (["--out={}/file/run"], "file/run: Not a directory"),
        (["--out={}/foreign", "--resume"], "not a checkpoint of a trainer's"),
        (["--out={}/list", "--resume"], "not a readable checkpoint (it holds a list)"),
        (["--out={}/garbage", "--resume"], "not a readable checkpoint (Weights only load failed)"),
        (["--backbone=test_vit"], "--backbone test_vit does not take images of 8 pixels"),
    ],
)
def test_a_mistake_takes_one_line(fails, tmp_path, options, message):
    (tmp_path / "file").touch()
    for folder in ("one", "foreign", "list", "garbage"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one/a.png")
    torch.save({"a": 1}, tmp_path / "foreign/checkpoint.pt")
    torch.save([1], tmp_path / "list/checkpoint.pt")
    (tmp_path / "garbage/checkpoint.pt").write_text("nothing of ours")
    assert message in fails("simclr", *options)


def test_a_missing_gpu_takes_one_line(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device: torch sees no CUDA device" in fails("moco", "--device=cuda")


def test_the_run_of_another_method_is_not_resumed(fails, tmp_path):
    options = [*TINY, "--stop-after=1", f"--out={tmp_path}"]
    assert cli.main(["train", "simclr", *options]) == 0
    assert "the run began with another method, without --queue" in fails("moco", *options, "--resume")


@pytest.mark.parametrize(("ratio", "what"), ((0.0, "all"), (1.0, "none"), (0.99, "none")))
def test_a_mask_must_leave_something_to_see_and_to_predict(ratio, what):
    mae.check_mask(0.03, 16)  # floor(16 * 0.97) = 15: one is removed
    mae.check_mask(0.9, 10)
    with pytest.raises(TrainError, match=f"--mask-ratio {ratio:g} keeps {what} of the 16 patches"):
        mae.check_mask(ratio, 16)


@pytest.mark.parametrize(
    ("error", "message"),
    (
        (MemoryError(), "out of memory: make something smaller"),
        (
            RuntimeError("can't allocate memory: you tried to allocate 512 bytes."),
            "out of memory (512 bytes asked for)",
        ),
        (torch.OutOfMemoryError("Tried to allocate 20.00 GiB. GPU 0 has"), "out of memory (20.00 GiB asked for)"),
    ),
)
def test_a_run_too_large_takes_one_line(capsys, error, message):
    def run():
        raise error

    assert _options.run_guarded("simclr", run) == 2
    assert message in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback():
    def run():
        raise RuntimeError("a shape is wrong")

    with pytest.raises(RuntimeError, match="a shape is wrong"):
        _options.run_guarded("simclr", run)
