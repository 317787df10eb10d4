"""Results of a benchmark that nobody ran: contenders of known speed, for the tests of what is made of results."""

from __future__ import annotations

SPEEDS = {"lightly fp32": 8.0, "compile fp32": 3.0, "eager fp32": 5.0, "ours fp32": 1.0}  # times of ours


def results(*races: dict, **facts) -> dict:
    """What pytest-benchmark writes, as far as it is read; ``facts`` change what is known of the machine."""
    machine = {
        "processor": "a processor",
        "threads": 2,
        "cuda": "no device",
        "isa": "avx2: the best one that this processor has (built too: avx512, avx512_bf16)",
        "supported_isas": ["baseline", "avx2"],
        "has_bf16": False,
        "extension": "loaded",
        "python": "3.11.0",
        "versions": {"sslkernels": "0.1.0", "torch": "2.14.1", "lightly": "1.6.0", "timm": "not installed"},
        "settings": {"device": "cpu", "peers": None, "quick": False, "curves": True, "cuda-graphs": False},
    }
    return {
        "machine_info": {"sslkernels": machine | facts},
        "commit_info": {"id": "c0ffee", "dirty": False},
        "datetime": "2026-01-31T12:00:00",
        "benchmarks": [{"extra_info": race} for race in races],
    }


def race(op: str, case: str, milliseconds: float, direction="forward+backward", curve=None, speeds=None) -> dict:
    """One race, of which ours takes so many milliseconds and the others their multiple of it."""
    contenders = {}
    for label, speed in (speeds or SPEEDS).items():
        seconds = speed * milliseconds / 1e3
        quartiles = [0.98 * seconds, 1.03 * seconds]
        contenders[label] = {"median": seconds, "quartiles": quartiles, "samples": 9, "disturbed": 1}
        if direction != "forward":
            contenders[label]["extra_mib"] = 2.0 * speed
    return {
        "op": op,
        "case": case,
        "direction": direction,
        "whole": direction != "forward",
        "device": "cpu",
        "contenders": contenders,
        "rates": {"fma fp32": 100.0, "exp": 2e9, "copy": 20.0},
        "roofline": {"fp32": 0.8 * milliseconds / 1e3},
        "least_seconds": 0.8 * milliseconds / 1e3,
        "ratios": {f"over {label}": speed for label, speed in (speeds or SPEEDS).items() if "ours" not in label}
        | {"share of roofline fp32": 0.8},
        "curve": curve,
    }


def curve(op: str, size: str, values, speeds=None) -> list[dict]:
    """The points of a scaling curve, of which the time of ours grows as the square of the size."""
    return [
        race(
            op, f"{size}{value}", value**2 / 1e4, curve={"size": size, "rest": "D = 128", "value": value}, speeds=speeds
        )
        for value in values
    ]
