"""`sslkernels info`: what is installed here, what serves every op, and why the rest is absent."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from importlib import metadata

import torch

import sslkernels
from sslkernels import _library
from sslkernels._table import print_table


def collect() -> dict:
    """Everything that `sslkernels info` prints, ready for JSON."""
    return {
        "sslkernels": sslkernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "no device",
        "extension": _extension(),
        "isa": _isa(),
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


def _triton() -> str:
    return _library.triton_error() or metadata.version("triton")


def _extension() -> str:
    if _library.extension is None:
        return _library.extension_error
    facts = ", ".join(f"{name} {value}" for name, value in sorted(_library.extension.build_info().items()))
    return f"loaded ({facts})"


def _isa() -> str:
    """The instruction set of the C++ kernels, and what chose it."""
    if _library.extension is None:
        return "none: the compiled extension is not loaded"
    chosen, supported = _library.extension.isa(), _library.extension.supported_isas()
    asked = os.environ.get("SSLKERNELS_ISA")
    reason = f"SSLKERNELS_ISA={asked}" if asked else "the best one that this processor has"
    return f"{chosen}: {reason} (of {', '.join(supported)})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show versions, the instruction set in use, and what serves every op on every device."
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    for name, value in facts.items():
        if name != "backends":
            print(f"{name:12}{value}")
    rows = [
        [op, device, backend["active"], "; ".join(f"no {name}: {why}" for name, why in backend["absent"].items())]
        for op, devices in facts["backends"].items()
        for device, backend in devices.items()
    ]
    print_table("Backends", ("op", "device", "active", "absent"), rows)
    return 0
