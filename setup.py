"""Builds ``sslkernels/_C`` with ninja, which gives each source its own flags and rebuilds only what changed.

csrc/module.cpp, csrc/cpu/*.cpp   the baseline flags of the machine
csrc/cpu/isa/<isa>.cpp            the kernels once per instruction set; csrc/cpu/isa.cpp chooses one at run time
csrc/cuda/*.cu                    where nvcc is found, whatever build of torch is installed

Every source sees ``SSLKERNELS_HAVE_<ISA>`` (``SSLKERNELS_HAVE_AVX2``, ...) for each instruction set that is built.

    python setup.py build_ext --inplace     the extension, in the source tree
    python setup.py cuda_on_cpu             the CUDA kernels for the CPU, as a module that the tests import
    python setup.py sanitize                the C++ tests under AddressSanitizer + UBSan and under ThreadSanitizer

Environment: CXX, CXXFLAGS, CUDA_HOME, MAX_JOBS, and SSLKERNELS_WERROR=1 to make every warning an error.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pybind11
from ninja import ninja_syntax
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")  # ninja runs in ROOT, so that no source is named by an absolute path
CUDA_ON_CPU = Path("tests/cuda_on_cpu")
BUILD = Path("build")

# no floating-point exception is ever looked at: both sides of a choice may be computed, as vectors need it
STANDARD = ["-std=c++17", "-ffp-contract=fast", "-fno-trapping-math", "-Wall", "-Wextra"]
OPTIMIZED = ["-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
WERROR = os.environ.get("SSLKERNELS_WERROR") == "1"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
X86_ISAS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}

# 2.10 is the oldest torch whose stable ABI has everything csrc uses: the library runs on it and on every later one
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CUDA_ARCHS = ("80", "90", "100")

SANITIZERS = {"address": ["address", "undefined"], "thread": ["thread"]}
SANITIZER_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_init_order=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def find_cxx() -> list[str] | None:
    """The command of the C++ compiler, or None where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for command in map(shlex.split, names):
        if shutil.which(command[0]):
            return command
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which(str(Path(home, "bin", "nvcc")))) or shutil.which("nvcc")


def output_of(command: list[str]) -> str:
    """What a tool prints about itself."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(f"{shlex.join(command)} failed: {result.stderr.strip()}")
    return result.stdout


def isa_sources(cxx: list[str], warn) -> tuple[dict[Path, list[str]], list[str]]:
    """Each csrc/cpu/isa source with its flags, and the macros that tell every source which ones are there."""
    sources, macros = {CSRC / "cpu/isa/baseline.cpp": []}, []
    is_x86 = output_of([*cxx, "-dumpmachine"]).startswith("x86_64")
    for isa, flags in X86_ISAS.items() if is_x86 else ():
        probe = subprocess.run(
            [*cxx, *flags, "-x", "c++", "-c", "-o", os.devnull, "-"], input="", capture_output=True, text=True
        )
        if probe.returncode:
            warn(f"{shlex.join(cxx)} cannot compile for {isa}, which is left out: {probe.stderr.strip()}")
            continue
        sources[CSRC / f"cpu/isa/{isa}.cpp"] = flags
        macros.append(f"-DSSLKERNELS_HAVE_{isa.upper()}")
    return {source: flags for source, flags in sources.items() if (ROOT / source).exists()}, macros


def runs_here(flags: list[str]) -> bool:
    """Whether this processor has the instructions that flags of X86_ISAS ask for; yes where it does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    described = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "flags" not in described or all(
        flag[2:].replace("512bf16", "512_bf16").replace("-", "_") in described for flag in flags
    )


def torch_directory() -> Path:
    """Where torch lies, without importing it: that takes longer than a rebuild."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise CompileError("sslkernels is built against torch: pip install 'torch>=2.10' first")
    return Path(spec.submodule_search_locations[0])


def sources_in(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / CSRC).glob(pattern))


@dataclass
class NinjaBuild:
    """The edges of one build.ninja; every output lies in ``directory``."""

    directory: Path
    rules: dict[str, dict[str, str]]
    edges: list[tuple[str, str, list[str], dict[str, str]]] = field(default_factory=list)

    def add(self, rule: str, output: str, inputs: list, flags: list[str] = ()) -> str:
        path = str(self.directory / output)
        self.edges.append((path, rule, [str(item) for item in inputs], {"flags": quote(flags)}))
        return path

    def compile(self, rule: str, source: Path, flags: list[str] = ()) -> str:
        return self.add(rule, f"{source}.o", [source], flags)

    def run(self) -> None:
        """Write build.ninja and bring every output up to date."""
        directory = ROOT / self.directory
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "build.ninja", "w", encoding="utf-8") as file:
            writer = ninja_syntax.Writer(file, width=sys.maxsize)
            writer.variable("builddir", str(self.directory))  # ninja's log, hence what it knows, belongs to this build
            for name, rule in self.rules.items():
                writer.rule(name, **rule)
            for output, rule, inputs, variables in self.edges:
                writer.build(output, rule, inputs, variables=variables)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [sys.executable, "-m", "ninja", "-f", str(self.directory / "build.ninja"), *jobs]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise CompileError(f"the build in {self.directory} failed; the compiler's messages are above")


def quote(words: list[str]) -> str:
    """Words of a command line as ninja wants them: quoted for the shell, then $ doubled."""
    return shlex.join(map(str, words)).replace("$", "$$")


def compile_rule(command: list[str]) -> dict[str, str]:
    # -MD, unlike -MMD, follows the headers of torch too: another torch in the same place means a rebuild
    command = f"{quote(command)} $flags -MD -MF $out.d -c $in -o $out"
    return {"command": command, "depfile": "$out.d", "deps": "gcc", "description": "compile $in"}


def link_rule(command: list[str], libraries: list[str]) -> dict[str, str]:
    return {"command": f"{quote(command)} $flags $in -o $out {quote(libraries)}", "description": "link $out"}


class BuildExtension(build_ext):
    """Builds the one extension, or says why there will be none."""

    def run(self) -> None:
        reason = self.why_not()
        if reason:
            self.warn(
                f"{reason}: sslkernels is installed without its compiled kernels and runs on Triton or plain PyTorch"
            )
            self.extensions = []
        super().run()

    def why_not(self) -> str:
        if sys.platform != "linux":
            return "the extension is built on Linux only"
        if find_cxx() is None:
            return f"no C++ compiler found ({os.environ.get('CXX') or 'g++'})"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            return "Python.h not found (Debian has it in python3-dev)"
        return ""

    def build_extension(self, extension: Extension) -> None:
        cxx, torch = find_cxx(), torch_directory()
        isas, macros = isa_sources(cxx, self.warn)
        # pybind11's own before torch's copy of it, which in some releases refuses to be included under TORCH_TARGET
        includes = [pybind11.get_include(), torch / "include", sysconfig.get_path("include")]
        headers = [word for path in includes for word in ("-isystem", path)]
        common = [*macros, TORCH_TARGET, f"-I{CSRC}", *headers]
        user = shlex.split(os.environ.get("CXXFLAGS", ""))
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        rules = {
            "cxx": compile_rule([*cxx, *STANDARD, *OPTIMIZED, *werror_flags(), *common, *user]),
            "link": link_rule([*cxx, "-shared", "-Wl,--exclude-libs,ALL"], libraries),
        }
        directory = BUILD / f"ext-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        ninja = NinjaBuild(directory, rules)
        objects = self.add_cuda(ninja, cxx, [*common, "-DUSE_CUDA"], libraries)
        has_cuda = ["-DSSLKERNELS_HAVE_CUDA"] if objects else []
        objects += [ninja.compile("cxx", source, has_cuda) for source in sources_in("*.cpp")]
        objects += [ninja.compile("cxx", source) for source in sources_in("cpu/*.cpp")]
        objects += [ninja.compile("cxx", source, flags) for source, flags in isas.items()]
        library = ninja.add("link", Path(self.get_ext_filename(extension.name)).name, objects)
        ninja.run()
        target = self.get_ext_fullpath(extension.name)
        self.mkpath(os.path.dirname(target))
        self.copy_file(str(ROOT / library), target)

    def add_cuda(self, ninja: NinjaBuild, cxx: list[str], common: list[str], libraries: list[str]) -> list[str]:
        """The objects of csrc/cuda. nvcc then links too: it knows where its static runtime lies."""
        sources, nvcc = sources_in("cuda/*.cu"), find_nvcc()
        if not sources:
            return []
        if nvcc is None:
            self.warn("nvcc not found (CUDA_HOME or PATH): the CUDA kernels are left out")
            return []
        known = output_of([nvcc, "--list-gpu-code"]).split()
        archs = [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known]
        missing = [f"sm_{arch}" for arch in CUDA_ARCHS if arch not in archs]
        if missing:
            self.warn(f"{nvcc} cannot compile for {', '.join(missing)}, which is left out")
        if not archs:
            return []
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # later GPUs compile this one
        flags = ["-O3", "-DNDEBUG", "-std=c++17", "-Xptxas=-v,-warn-spills", "--expt-relaxed-constexpr"]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", *(["-Werror=all-warnings"] if WERROR else [])]
        command = [nvcc, f"-ccbin={shutil.which(cxx[-1]) or cxx[-1]}", *gencode]
        ninja.rules["nvcc"] = compile_rule([*command, *flags, *common])
        link = [*command, "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL"]
        ninja.rules["link"] = link_rule(link, libraries)
        return [ninja.compile("nvcc", source) for source in sources]


def sanitizer_flags(name: str) -> list[str]:
    flags = [f"-fsanitize={','.join(SANITIZERS[name])}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    return ["-O1", "-g1", "-pthread", *flags]  # -g1: a report names files and lines


def werror_flags() -> list[str]:
    return ["-Werror"] if WERROR else []


def cuda_on_cpu_compiler(cxx: list[str]) -> list[str]:
    # what nvcc takes in its stride: one type's memory read as another, and its own pragmas
    dialect = ["-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    return [*cxx, *STANDARD, *werror_flags(), *dialect, f"-I{CSRC}", f"-I{CUDA_ON_CPU}"]


def build_cuda_on_cpu_programs(cxx: list[str], sanitizer: str) -> list[str]:
    """Every tests/cuda_on_cpu/*_test.cpp under a sanitizer."""
    # they run for seconds and compile for a minute, which optimising would make three
    compiler = [*cuda_on_cpu_compiler(cxx), *sanitizer_flags(sanitizer), "-O0"]
    rules = {"cxx": compile_rule(compiler), "link": link_rule(compiler, [])}
    ninja = NinjaBuild(BUILD / f"cuda_on_cpu-{sanitizer}", rules)
    tests = sorted(path.relative_to(ROOT) for path in (ROOT / CUDA_ON_CPU).glob("*_test.cpp"))
    programs = [ninja.add("link", test.stem, [ninja.compile("cxx", test)]) for test in tests]
    ninja.run()
    return programs


class CudaOnCpu(Command):
    """Builds the CUDA kernels for the CPU: the tests' Python module, or their programs under a sanitizer."""

    description = "build the CUDA kernels for the CPU, for the tests"
    user_options: ClassVar[list[tuple]] = [("sanitizer=", None, "build the test programs under 'address' or 'thread'")]

    def initialize_options(self) -> None:
        self.sanitizer = None

    def finalize_options(self) -> None:
        if self.sanitizer not in (None, *SANITIZERS):
            raise OptionError(f"--sanitizer is one of {', '.join(SANITIZERS)}")

    def run(self) -> None:
        cxx = find_cxx()
        if cxx is None:
            raise CompileError("the CUDA kernels are compiled for the CPU by a C++ compiler, and there is none")
        if self.sanitizer:
            build_cuda_on_cpu_programs(cxx, self.sanitizer)
            return
        headers = [
            word for path in (pybind11.get_include(), sysconfig.get_path("include")) for word in ("-isystem", path)
        ]
        compiler = [*cuda_on_cpu_compiler(cxx), "-Og", "-g1", "-fPIC", "-fvisibility=hidden", *headers]
        rules = {"cxx": compile_rule(compiler), "link": link_rule([*cxx, "-shared"], [])}
        ninja = NinjaBuild(BUILD / "cuda_on_cpu", rules)
        # checked, but without UBSan's runtime: ubsan_handlers.cpp turns a violation into an exception
        checks = ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]
        kernels = sorted(path.relative_to(ROOT) for path in (ROOT / CUDA_ON_CPU).glob("*bindings.cpp"))
        objects = [ninja.compile("cxx", source, checks) for source in kernels]
        objects.append(ninja.compile("cxx", CUDA_ON_CPU / "ubsan_handlers.cpp"))
        ninja.add("link", "cuda_on_cpu_kernels.so", objects)
        ninja.run()


class Sanitize(Command):
    """Builds and runs every tests/cpp/*.cpp with the kernels, without torch, under each set of sanitizers.

    The same goes for every tests/cuda_on_cpu/*_test.cpp, which runs CUDA kernels on the CPU.
    """

    description = "run the C++ tests under AddressSanitizer + UBSan and under ThreadSanitizer"
    user_options: ClassVar[list[tuple]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        cxx = find_cxx()
        if cxx is None:
            raise CompileError("make sanitize needs a C++ compiler with the sanitizers' libraries")
        programs = [
            program
            for name in SANITIZERS
            for program in [*self.build(cxx, name), *build_cuda_on_cpu_programs(cxx, name)]
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # most have one thread
            for program, result in zip(programs, pool.map(self.run_program, programs), strict=True):
                print(f"--- {program}\n{result.stdout}", end="", flush=True)
                if result.returncode:
                    raise CompileError(f"{program} failed")
        print(f"{len(programs)} passed, 0 failed")

    @staticmethod
    def run_program(program: str) -> subprocess.CompletedProcess:
        # ThreadSanitizer's shadow memory wants the addresses that randomisation may take
        fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
        environment = {**SANITIZER_ENVIRONMENT, **os.environ}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run([*fixed, str(ROOT / program)], cwd=ROOT, env=environment, **streams)

    def build(self, cxx: list[str], name: str) -> list[str]:
        isas, _ = isa_sources(cxx, self.warn)
        isas = {source: flags for source, flags in isas.items() if runs_here(flags)}  # a sanitizer sees what runs
        macros = [f"-DSSLKERNELS_HAVE_{source.stem.upper()}" for source in isas]
        compiler = [*cxx, *STANDARD, *werror_flags(), *sanitizer_flags(name), *macros, f"-I{CSRC}"]
        ninja = NinjaBuild(BUILD / f"sanitize-{name}", {"cxx": compile_rule(compiler), "link": link_rule(compiler, [])})
        kernels = [ninja.compile("cxx", source, flags) for source, flags in isas.items()]
        kernels.append(ninja.compile("cxx", CSRC / "cpu/isa.cpp"))
        tests = sorted(path.relative_to(ROOT) for path in (ROOT / "tests/cpp").glob("*.cpp"))
        if not tests:
            raise CompileError("tests/cpp holds no program to run")
        programs = [ninja.add("link", test.stem, [ninja.compile("cxx", test), *kernels]) for test in tests]
        ninja.run()
        return programs


setup(
    ext_modules=[Extension("sslkernels._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "cuda_on_cpu": CudaOnCpu, "sanitize": Sanitize},
)
