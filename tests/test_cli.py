"""The command line: what it prints, what it returns, and one clear line for every mistake."""

from __future__ import annotations

import argparse
import json
import platform
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch

import sslkernels
import sslkernels.trainers
from sslkernels import Backend, _library, bench, cli, info
from sslkernels._files import output_file


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with status 2 and one line on stderr, which is returned."""

    def fails(*argv):
        try:
            status = cli.main(list(argv))
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        assert status == 2
        assert captured.out == ""
        assert captured.err.count("\n") == 1, captured.err
        return captured.err

    return fails


def test_info_says_what_serves_every_op(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for fact in (sslkernels.__version__, torch.__version__, "nt_xent", sslkernels.backends()["nt_xent"]["cpu"].active):
        assert fact in text


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["threads"] == torch.get_num_threads()
    assert facts["backends"]["nt_xent"]["cpu"]["active"] == sslkernels.backends()["nt_xent"]["cpu"].active


def test_info_without_the_extension(monkeypatch):
    monkeypatch.setattr(_library, "extension", None)
    monkeypatch.setattr(_library, "extension_error", "no compiler was found")
    facts = info.collect()
    assert facts["extension"] == "none: no compiler was found"
    assert facts["isa"] == "none: the compiled extension is not loaded"


class Extension:
    __file__ = "/somewhere/_C.so"
    build_info = staticmethod(lambda: {"compiler": "12.2"})
    isa = staticmethod(lambda: "avx2")
    supported_isas = staticmethod(lambda: ["baseline", "avx2"])
    built_isas = staticmethod(lambda: ["baseline", "avx2", "avx512"])


def test_info_names_what_chose_the_instruction_set(monkeypatch):
    monkeypatch.setattr(_library, "extension", Extension)
    monkeypatch.setenv("SSLKERNELS_ISA", "avx2")
    runs = "(it runs baseline, avx2; built too, but not on this processor: avx512)"
    assert info.collect()["isa"] == f"avx2: SSLKERNELS_ISA=avx2 {runs}"
    monkeypatch.delenv("SSLKERNELS_ISA")
    facts = info.collect()
    assert facts["isa"] == f"avx2: the fastest that was built and this processor has {runs}"
    assert facts["extension"] == "loaded from /somewhere/_C.so (compiler 12.2)"


def test_info_survives_an_instruction_set_that_is_none(monkeypatch):
    def refuse():
        raise RuntimeError("SSLKERNELS_ISA must be one of baseline, got 'sse9'")

    monkeypatch.setattr(_library, "extension", Extension)
    monkeypatch.setattr(Extension, "isa", refuse)
    assert info.collect()["isa"] == (
        "none, and every kernel refuses to run: SSLKERNELS_ISA must be one of baseline, got 'sse9'"
    )


def test_info_tells_the_machine_and_what_changes_results(monkeypatch, capsys):
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    monkeypatch.setenv("AN_API_KEY", "secret")
    facts = info.collect()
    assert facts["environment"]["OMP_PROC_BIND"] == "close"
    assert facts["installed"] == str(Path(sslkernels.__file__).parent)
    assert platform.release() in facts["system"] and platform.machine() in facts["system"]
    assert facts["cpus"] >= 1 and "numpy" in facts["packages"] and "'highest'" in facts["matmul"]
    cli.main(["info"])
    text = capsys.readouterr().out
    assert "environment OMP_PROC_BIND=close\n" in text and "secret" not in text


@pytest.mark.parametrize(
    ("built", "expected"),
    ((False, "no device: this torch is built for CPUs alone"), (True, "no device: no driver was found (CUDA 13.0)")),
)
def test_info_says_why_there_is_no_gpu(monkeypatch, built, expected):
    def no_driver():
        raise RuntimeError("no driver was found. Install one")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert info.collect()["cuda"] == expected


def test_info_lists_the_gpus(monkeypatch):
    gpu = types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert "NVIDIA H100 (sm_90, 80 GiB), NVIDIA H100 (sm_90, 80 GiB)" in info.collect()["cuda"]


def test_info_says_what_is_wrong_with_triton(monkeypatch):
    monkeypatch.setattr(_library, "triton_error", lambda: "it is not installed")
    assert info._triton() == "none: it is not installed"
    monkeypatch.setattr(_library, "triton_error", lambda: "")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert info._triton().startswith("none: it is installed but does not import (ModuleNotFoundError")
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="9.9"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert info._triton() == "9.9 (TRITON_INTERPRET=1: kernels are interpreted)"


def test_info_gives_a_reason_for_all_that_is_absent(monkeypatch, capsys):
    lacking = {"cpp": "no compiler"}
    report = {
        "one": {"cpu": Backend("reference", lacking), "cuda": Backend("triton", {}, ("cuda",))},
        "two": {"cpu": Backend("reference", lacking), "cuda": Backend("cuda", {"triton": "none was written"})},
    }
    monkeypatch.setattr(sslkernels, "backends", lambda: report)
    cli.main(["info"])
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["one", "reference", "triton", "(cuda)"] in lines and ["two", "reference", "cuda"] in lines
    assert "\nno cpp on cpu: no compiler (all ops)\n" in text
    assert "\nno triton on cuda: none was written (two)\n" in text


def test_every_kernel_that_is_missing_has_a_reason():
    for op, devices in sslkernels.backends().items():
        for device, names in {"cpu": {"cpp"}, "cuda": {"cuda", "triton"}}.items():
            backend = devices[device]
            assert names == ({backend.active, *backend.besides, *backend.absent} - {"reference"}), op
            assert all(backend.absent.values())


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sslkernels {sslkernels.__version__}\n"


def test_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sslkernels", "info", "--json"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("sslkernels", run_name="__main__")
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("argv", "expected"),
    (
        ((), "COMMAND"),
        (("fly",), "'fly'"),
        (("info", "--yaml"), "--yaml"),
        (("verify", "--op", "nt_zent"), "'nt_zent'"),
        (("verify", "--dtype", "int8"), "'int8'"),
        (("verify", "--device", "tpu"), "'tpu'"),
        (("bench", "--device", "tpu"), "'tpu'"),
        (("bench", "--op", "nt_zent"), "'nt_zent'"),
        (("bench", "--peers", "lightly,solo"), "no peer 'solo'"),
        (("bench", "--seconds", "0"), "must be positive, got 0"),
        (("bench", "--compare", "one.json"), "--compare"),
        (("train",), "METHOD"),
        (("train", "nothing"), "no method 'nothing'"),
        (("info", "more"), "more"),
        (("verify", "--devi", "cpu"), "--devi"),
        (("verify", "--json", "/nowhere/at/all.json"), "/nowhere/at is not a folder"),
        (("verify", "--json", "/"), "/ is a folder"),
        (("verify", "--junit", "/dev/null"), "no regular file"),
    ),
)
def test_a_mistake_ends_in_one_line(fails, argv, expected):
    line = fails(*argv)
    assert line.startswith("sslkernels")
    assert expected in line


def test_a_file_that_cannot_be_written_is_told_before_the_work(monkeypatch, tmp_path):
    assert output_file(str(tmp_path / "new.json")) == tmp_path / "new.json"
    (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
    assert output_file(str(tmp_path / "link.json")) == tmp_path / "there.json"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(argparse.ArgumentTypeError, match="is not writable"):
        output_file(str(tmp_path / "new.json"))


def test_bench_needs_a_source_checkout(fails, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "BENCH", tmp_path)
    assert "run it from a source checkout" in fails("bench")


def test_bench_names_the_extra_that_is_missing(fails, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "matplotlib" else True)
    line = fails("bench")
    assert "matplotlib not installed" in line and "pip install 'sslkernels[bench]'" in line


def test_bench_on_a_missing_device(fails, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in fails("bench", "--device", "cuda")


def test_bench_names_a_peer_that_is_missing(fails, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert "info_nce_pytorch is not installed: pip install info-nce-pytorch" in fails(
        "bench", "--peers", "info_nce_pytorch"
    )


@pytest.mark.parametrize(
    "arguments, expected",
    (
        (("--cuda-graphs",), "--cuda-graphs needs --device cuda"),
        (("--docs", "no/such/folder"), "no directory no/such/folder"),
    ),
)
def test_bench_refuses_what_makes_no_sense(fails, monkeypatch, arguments, expected):
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    assert expected in fails("bench", *arguments)


@pytest.mark.parametrize(
    "arguments, expected",
    (
        ((), {"--device=cpu", "--seconds=2.0"}),
        (("--op", "info_nce", "--op", "ema"), {"--op=info_nce", "--op=info_nce_queue", "--op=ema_update_"}),
        (("--peers", "none", "--quick", "-k", "a or b"), {"--peers=", "--quick", "-k", "a or b"}),
        (("--docs", "."), {"--curves"}),
    ),
)
def test_bench_hands_its_arguments_to_pytest(monkeypatch, tmp_path, arguments, expected):
    calls = []
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    monkeypatch.setattr(
        bench.subprocess, "run", lambda command, **_: calls.append(command) or argparse.Namespace(returncode=0)
    )
    file = tmp_path / "results.json"
    assert cli.main(["bench", "--json", str(file), *arguments]) == 0
    races, report = calls
    assert expected <= set(races) and str(file) in races
    assert report[1:3] == [str(bench.BENCH / "report.py"), str(file)]
    assert report[3:] == (list(arguments) if "--docs" in arguments else [])


def test_bench_makes_no_table_of_a_race_that_failed(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    monkeypatch.setattr(
        bench.subprocess, "run", lambda command, **_: calls.append(command) or argparse.Namespace(returncode=1)
    )
    assert cli.main(["bench"]) == 1
    assert len(calls) == 1 and "no table was made" in capsys.readouterr().err


@pytest.fixture
def method(monkeypatch, tmp_path):
    """Installs a trainer of the given source under a name of its own, which is returned."""

    def method(source):
        (tmp_path / "toy.py").write_text(source)
        monkeypatch.setattr(sslkernels.trainers, "__path__", [*sslkernels.trainers.__path__, str(tmp_path)])
        monkeypatch.delitem(sys.modules, "sslkernels.trainers.toy", raising=False)
        return "toy"

    return method


ARGUMENTS = "def add_arguments(parser): parser.add_argument('--epochs', type=int, default=1)\n"


def test_train_hands_over_to_the_method(method, capsys):
    name = method(ARGUMENTS + "def main(args): print('epochs', args.epochs); return 3\n")
    assert cli.main(["train", name, "--epochs", "5"]) == 3
    assert capsys.readouterr().out == "epochs 5\n"


def test_train_reports_a_bad_argument_of_the_method(method, fails):
    name = method(ARGUMENTS + "def main(args): raise AssertionError\n")
    assert "--epochs: invalid int value: 'many'" in fails("train", name, "--epochs", "many")


@pytest.mark.parametrize("where", ("import no_such_package\n", "def main(args): import no_such_package\n"))
def test_train_names_the_extra_that_is_missing(method, fails, where):
    line = fails("train", method(ARGUMENTS + where))
    assert "no_such_package" in line
    assert "pip install 'sslkernels[train]'" in line


def test_train_does_not_hide_a_mistake_of_ours(method):
    name = method(ARGUMENTS + "import sslkernels.no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match=r"sslkernels\.no_such_module"):
        cli.main(["train", name])
