"""`sslkernels info`: what is installed here, what serves every op, and why the rest is absent."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

import sslkernels
from sslkernels import _library
from sslkernels._table import print_table

PACKAGES = ("numpy", "torchvision", "timm", "scikit-learn", "rich")  # what trainers and reports lean on
# what changes how this library, PyTorch or their runtimes compute, compile or find their parts
VARIABLES = ("ATEN_CPU_CAPABILITY", "CC", "CXX", "GLIBC_TUNABLES", "LD_LIBRARY_PATH", "LD_PRELOAD")
PREFIXES = (
    "SSLKERNELS_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "TRITON_", "CUDA_", "CUBLAS_", "NVIDIA_",
    "HIP_", "ROCR_", "NCCL_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_",
)  # fmt: skip


def collect() -> dict:
    """Everything that `sslkernels info` prints, ready for JSON."""
    return {
        "sslkernels": sslkernels.__version__,
        "installed": str(Path(sslkernels.__file__).parent),
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        "torch": torch.__version__,
        "triton": _triton(),
        "packages": ", ".join(_packages()) or "none of those that the trainers need",
        "system": _system(),
        "processor": processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": _cuda(),
        "extension": _extension(),
        "isa": _isa(),
        "matmul": f"float32 products at precision {torch.get_float32_matmul_precision()!r}",
        "environment": {name: value for name, value in sorted(os.environ.items()) if _matters(name)},
        "backends": {
            op: {device: asdict(backend) for device, backend in devices.items()}
            for op, devices in sslkernels.backends().items()
        },
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _matters(variable: str) -> bool:
    return variable in VARIABLES or variable.startswith(PREFIXES)


def _packages() -> Iterator[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    library = " ".join(platform.libc_ver()).strip()
    return ", ".join(filter(None, (name, f"kernel {platform.release()}", library, platform.machine())))


def _triton() -> str:
    if _library.triton_error():
        return f"none: {_library.triton_error()}"
    try:
        import triton
    except Exception as error:  # whatever its parts raise: that it is broken is what a report needs
        return f"none: it is installed but does not import ({type(error).__name__}: {' '.join(str(error).split())})"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return triton.__version__ + (" (TRITON_INTERPRET=1: kernels are interpreted)" if interpreted else "")


def _cuda() -> str:
    """The devices, or why there is none."""
    if torch.cuda.is_available():
        devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
        names = (f"{d.name} (sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB)" for d in devices)
        return f"{_toolkit()}: {', '.join(names)}{_driver()}"
    if not torch.backends.cuda.is_built():
        return "no device: this torch is built for CPUs alone"
    try:
        torch.cuda.init()
    except Exception as error:  # the reason is all that is wanted
        reason = str(error).partition(". ")[0]
    else:
        reason = "the driver shows none"
    return f"no device: {reason} ({_toolkit()})"


def _toolkit() -> str:
    return f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    return f"; {version.read_text().splitlines()[0]}" if version.exists() else ""


def _extension() -> str:
    if _library.extension is None:
        return f"none: {_library.extension_error}"
    facts = ", ".join(f"{name} {value}" for name, value in sorted(_library.extension.build_info().items()))
    return f"loaded from {_library.extension.__file__} ({facts})"


def _isa() -> str:
    """The instruction set of the C++ kernels, and what chose it."""
    if _library.extension is None:
        return "none: the compiled extension is not loaded"
    built, supported = _library.extension.built_isas(), _library.extension.supported_isas()
    try:
        chosen = _library.extension.isa()
    except RuntimeError as error:  # SSLKERNELS_ISA names none
        return f"none, and every kernel refuses to run: {error}"
    asked = os.environ.get("SSLKERNELS_ISA")
    reason = f"SSLKERNELS_ISA={asked}" if asked else "the fastest that was built and this processor has"
    beyond = [isa for isa in built if isa not in supported]
    lacking = f"; built too, but not on this processor: {', '.join(beyond)}" if beyond else ""
    return f"{chosen}: {reason} (it runs {', '.join(supported)}{lacking})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show versions, the machine, the instruction set in use, and what serves every op on every device, with the "
        "reason for all that is absent. A report of a bug needs nothing more."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    for name, value in facts.items():
        if name not in ("environment", "backends"):
            print(f"{name:12}{value}")
    for name, value in facts["environment"].items():
        print(f"{'environment':12}{name}={value}")
    _print_backends(facts["backends"])
    if not torch.cuda.is_available():
        print("under cuda: what would serve a GPU, which this machine lacks")
    return 0


def _print_backends(report: dict[str, dict[str, dict]]) -> None:
    devices = list(dict.fromkeys(device for by_device in report.values() for device in by_device))
    rows = [[op, *(_serving(by_device[device]) for device in devices)] for op, by_device in report.items()]
    print_table("What serves each op on each device; in brackets what backend= reaches besides", ("op", *devices), rows)
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for op, by_device in report.items():
        for device, backend in by_device.items():
            for name, why in backend["absent"].items():
                reasons.setdefault((name, device, why), []).append(op)
    for (name, device, why), ops in reasons.items():
        print(f"no {name} on {device}: {why} ({'all ops' if len(ops) == len(report) else ', '.join(ops)})")


def _serving(backend: dict) -> str:
    return backend["active"] + (f" ({', '.join(backend['besides'])})" if backend["besides"] else "")
