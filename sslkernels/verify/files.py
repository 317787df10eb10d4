"""The report of `sslkernels verify` for machines: JSON with every check, and JUnit's XML for a build server."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path

from sslkernels._files import replacing
from sslkernels.verify.checks import dtype_name
from sslkernels.verify.report import Outcome, group_by

UNPRINTABLE = re.compile("[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML cannot hold


def write_json(path: Path, outcome: Outcome, facts: dict) -> None:
    checks = [asdict(check) for check in outcome.checks]
    for check in checks:
        check["target"]["dtype"] = dtype_name(check["target"]["dtype"])
    report = {
        "environment": facts,
        "seconds": round(outcome.seconds, 1),
        "passed": outcome.passed,
        "failed": len(outcome.failed),
        "interrupted": outcome.interrupted,
        "not_run": [asdict(line) for line in outcome.not_run],
        "checks": checks,
    }
    with replacing(path) as file:
        file.write((json.dumps(_finite(report), indent=1, allow_nan=False) + "\n").encode())


def _finite(value):
    """JSON has no infinity and no NaN: there they are strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_junit(path: Path, outcome: Outcome, facts: dict) -> None:
    """A suite for each op on each backend, a test case for each check in each dtype; what did not run is skipped."""
    root = ET.Element("testsuites", name="sslkernels verify", time=f"{outcome.seconds:.1f}")
    for (op, place), members in group_by(outcome.checks, lambda check: (check.target.op, check.target.place)).items():
        suite = ET.SubElement(root, "testsuite", name=f"{op} on {place}")
        properties = ET.SubElement(suite, "properties")
        for name, value in facts.items():
            if isinstance(value, str):
                ET.SubElement(properties, "property", name=name, value=_printable(value))
        for (target, name), checks in group_by(members, lambda check: (check.target, check.name)).items():
            where = f"{op}.{place.replace(' ', '.')}.{dtype_name(target.dtype)}"
            case = ET.SubElement(suite, "testcase", classname=where, name=name)
            failed = [check for check in checks if not check.passed]
            if failed:
                failure = ET.SubElement(case, "failure", message=f"{len(failed)} of {len(checks)} cases failed")
                failure.text = _printable("\n".join(map(str, failed)))
    if outcome.not_run:
        suite = ET.SubElement(root, "testsuite", name="not run")
        for line in outcome.not_run:
            case = ET.SubElement(suite, "testcase", classname="not_run", name=_printable(line.what))
            ET.SubElement(case, "skipped", message=_printable(f"{line.reason} {' '.join(line.ops)}".strip()))
    for suite in (*root, root):
        for key, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
            suite.set(key, str(len(list(suite.iter(tag)))))
        suite.set("errors", "0")
    ET.indent(root, " ")
    with replacing(path) as file:
        ET.ElementTree(root).write(file, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    return UNPRINTABLE.sub("?", text)
