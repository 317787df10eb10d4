"""What an installation brings, how the extension is built, and what the build does where a tool is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from conftest import require_or_skip

import sslkernels
from sslkernels import _library

ROOT = Path(__file__).resolve().parent.parent

# compiles in a moment; the tests read the string out of the built library
MODULE = """
    #define PY_SSIZE_T_CLEAN
    #include <Python.h>
    #include "answer.h"
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "[answer " ANSWER "]", -1, 0, 0, 0, 0, 0};
    PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""

CUDA_SOURCE = """
    #include <cuda_runtime.h>
    #include <torch/csrc/inductor/aoti_torch/c/shim.h>
    #include <torch/csrc/stable/library.h>
    #include <torch/csrc/stable/ops.h>
    #include <torch/csrc/stable/tensor.h>

    extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

    __global__ void scale_kernel(const float* x, float* y, float factor, int64_t n) {
      int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
      if (i < n) y[i] = factor * x[i];
    }

    torch::stable::Tensor scale_cuda(const torch::stable::Tensor& x, double factor) {
      torch::stable::Tensor y = torch::stable::empty_like(x);
      void* stream = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
      const int64_t n = x.numel();
      scale_kernel<<<(n + 255) / 256, 256, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()),
          static_cast<float>(factor), n);
      return y;
    }

    STABLE_TORCH_LIBRARY(packaging_test, module) { module.def("scale(Tensor x, float factor) -> Tensor"); }
    STABLE_TORCH_LIBRARY_IMPL(packaging_test, CUDA, module) { module.impl("scale", TORCH_BOX(&scale_cuda)); }
"""


@pytest.fixture
def project(tmp_path):
    """The project in a path with a space, its csrc replaced by a module that compiles in seconds."""
    directory = tmp_path / "a copy"
    directory.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    write(directory / "README.md", "")
    shutil.copytree(ROOT / "sslkernels", directory / "sslkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    write(directory / "csrc/module.cpp", MODULE)
    write(directory / "csrc/answer.h", '#define ANSWER "1"\n')
    for isa in ("baseline", "avx2", "avx512", "avx512_bf16", "amx"):
        write(directory / f"csrc/cpu/isa/{isa}.cpp", f"namespace sslkernels::{isa} {{ int f() {{ return 1; }} }}\n")
    return directory


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def run(directory: Path, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """This Python in ``directory``; its output, the errors included, in ``stdout``."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or result.returncode == 0, result.stdout
    return result


def build(directory: Path, **options) -> str:
    return run(directory, "setup.py", "build_ext", "--inplace", **options).stdout


def built(directory: Path) -> str:
    """The docstring of the module in the built library."""
    (library,) = (directory / "sslkernels").glob("_C.*.so")
    return re.search(rb"\[answer \d\]", library.read_bytes()).group().decode()


def compiled_in(directory: Path) -> set[str]:
    """The instruction sets that the sources are told of."""
    (ninja,) = directory.glob("build/ext-*/build.ninja")
    return set(re.findall(r"-DSSLKERNELS_HAVE_(\w+)", ninja.read_text()))


def require_cxx() -> None:
    require_or_skip(shutil.which("g++"), "g++ is not installed")


def fake_cxx(directory: Path, case: str) -> str:
    """A compiler that answers as the shell's ``case "$*"`` clauses say, and otherwise is g++."""
    path = directory / "fake-g++"
    path.write_text(f'#!/bin/sh\ncase "$*" in {case} esac\nexec g++ "$@"\n')
    path.chmod(0o755)
    return f"'{path}'"


def metadata(directory: Path):
    code = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    name = run(directory, "-W", "ignore", "-c", code).stdout.split()[-1]
    return HeaderParser().parsestr((directory / name / "METADATA").read_text())


def test_installation_brings_torch_and_numpy_only(project):
    requirements = metadata(project).get_all("Requires-Dist")
    plain = {re.match(r"[\w-]+", line).group() for line in requirements if "extra ==" not in line}
    assert plain == {"torch", "numpy"}


def test_extras(project):
    assert {"train", "test", "bench", "docs"} <= set(metadata(project).get_all("Provides-Extra"))


def test_version_has_one_home(project):
    init = project / "sslkernels/__init__.py"
    init.write_text(init.read_text().replace(sslkernels.__version__, "12.34"))
    assert metadata(project)["Version"] == "12.34"


def test_source_distribution_holds_the_sources(project):
    run(project, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')")
    (archive,) = (project / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {str(path.relative_to(project)) for path in (project / "csrc").rglob("*.*")}
    assert sources | {"setup.py", "LICENSE"} <= names


@pytest.mark.parametrize("environment", [{"CXX": "/nonexistent/g++"}, {"CXX": "", "PATH": "/nonexistent"}])
def test_without_compiler_installs_without_extension(project, environment):
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    output = run(project, "-c", code, **environment).stdout
    (wheel,) = (project / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"sslkernels/ops/infonce/op.py", "sslkernels/py.typed"} <= set(names)
    assert not [name for name in names if name.endswith(".so")]
    assert "no C++ compiler found" in output


def test_compiler_that_fails_is_an_error(project):
    require_cxx()
    write(project / "csrc/answer.h", "#error seeded\n")
    result = run(project, "setup.py", "build_ext", "--inplace", check=False)
    assert result.returncode != 0
    assert "#error seeded" in result.stdout


def test_only_what_changed_is_rebuilt(project):
    require_cxx()
    assert "compile csrc/module.cpp" in build(project)
    assert built(project) == "[answer 1]"
    assert "compile" not in build(project)
    write(project / "csrc/answer.h", '#define ANSWER "2"\n')
    output = build(project)
    assert "compile csrc/module.cpp" in output
    assert "isa/baseline.cpp" not in output
    assert built(project) == "[answer 2]"


def test_instruction_set_the_compiler_lacks_is_left_out(project):
    require_cxx()
    lacking = fake_cxx(project, '*-mavx512bf16*) echo "unrecognized option -mavx512bf16" >&2; exit 1;;')
    machine = subprocess.run(["g++", "-dumpmachine"], capture_output=True, text=True).stdout
    require_or_skip(machine.startswith("x86_64"), f"g++ compiles for {machine}")
    output = build(project, CXX=lacking)
    assert "cannot compile for avx512_bf16, which is left out" in output
    assert "avx512_bf16.cpp" not in output
    assert compiled_in(project) == {"AVX2", "AVX512"}


def test_other_machines_get_the_baseline_only(project):
    require_cxx()
    other = fake_cxx(project, "*-dumpmachine*) echo aarch64-linux-gnu; exit;;")
    output = build(project, CXX=other)
    assert "isa/baseline.cpp" in output
    assert "isa/avx2.cpp" not in output
    assert compiled_in(project) == set()


def test_warnings_are_errors_on_request(project):
    require_cxx()
    write(project / "csrc/cpu/warns.cpp", "int f(int unused) { return 1; }\n")
    assert "unused parameter" in build(project, SSLKERNELS_WERROR="0")
    result = run(project, "setup.py", "build_ext", check=False, SSLKERNELS_WERROR="1")
    assert result.returncode != 0
    assert "-Werror" in result.stdout


def test_cuda_sources_are_compiled_for_every_architecture(project):
    """Whatever build of torch is installed; the library loads where torch has no CUDA."""
    require_cxx()
    require_or_skip(shutil.which("nvcc"), "nvcc is not installed")
    triton = pytest.importorskip("triton", reason="triton, whose cuobjdump reads the library, is not installed")
    write(project / "csrc/cuda/scale.cu", CUDA_SOURCE)
    build(project, SSLKERNELS_WERROR="1")
    (library,) = (project / "sslkernels").glob("_C.*.so")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listing = subprocess.run([cuobjdump, "--list-elf", library], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"sm_\d+", listing)) == {"sm_80", "sm_90", "sm_100"}
    program = """
        import torch, sslkernels._C
        assert torch._C._dispatch_has_kernel_for_dispatch_key("packaging_test::scale", "CUDA")
    """
    run(project.parent, "-c", textwrap.dedent(program), PYTHONPATH=str(project))


def test_no_kernel_of_one_instruction_set_can_stand_in_for_another():
    """A function defined outside its instruction set's namespace may be merged with the baseline's copy by the linker.

    Then a processor without, say, AVX-512 would meet its instructions in ``std::max``.
    """
    objects = sorted(ROOT.glob("build/ext-*/csrc/cpu/isa/*.o"))
    require_or_skip(objects and shutil.which("nm"), "the extension has not been built in this tree, or nm is missing")
    leaks = []
    for path in objects:
        isa = path.name.split(".")[0]
        listing = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        functions = re.findall(r"^\S+ [TWi] (\S+)$", listing, re.MULTILINE)
        assert functions, f"{path.name} defines nothing"
        leaks += [f"{path.name}: {name}" for name in functions if f"{len(isa)}{isa}" not in name]
    assert not leaks


def test_the_compiled_kernels_serve_the_cpu():
    require_or_skip(_library.extension is not None, _library.extension_error)
    assert {report["cpu"].active for report in sslkernels.backends().values()} == {"cpp"}


@pytest.mark.parametrize(
    "ci, outcome",
    [("", "1 passed, 4 skipped, 1 xfailed"), ("true", "2 failed, 1 passed, 1 skipped, 1 xfailed, 1 error")],
)
def test_ci_allows_a_skip_for_missing_hardware_only(tmp_path, ci, outcome):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = hardware: as in pyproject.toml\n")
    write(
        tmp_path / "test_skips.py",
        """
        import pytest
        from conftest import require_or_skip

        def test_requires(): require_or_skip(False, "a tool is missing")
        def test_has_what_it_requires(): require_or_skip(True, "")
        def test_skips(): pytest.skip("a reason")
        @pytest.mark.skip
        def test_marked(): pass
        @pytest.mark.hardware
        def test_gpu(): pytest.skip("no GPU")
        @pytest.mark.xfail
        def test_known(): assert False
        """,
    )
    assert outcome in run(tmp_path, "-m", "pytest", check=False, CI=ci).stdout
