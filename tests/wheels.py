"""Installs what `make wheel` has built as a user does and uses it there: `make test-wheel`; not a test of pytest's.

The source distribution holds what git tracks and nothing else, and the very same wheel comes of it. The wheel goes into
two environments that have nothing but torch and numpy: the torch that it was built against, which is linked from this
environment, and an older one, which is downloaded. In each of them everything public is imported, the C++ kernels serve
every op, and `sslkernels info` and `sslkernels verify` end well.

    python tests/wheels.py dist torch==2.13.0
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
GENERATED = ("PKG-INFO", "setup.cfg", "sslkernels.egg-info/")  # by setuptools, in a source distribution
FOR_DEVELOPERS = (".ci/", ".clang-format", ".editorconfig", ".gitignore", ".pre-commit-config.yaml")  # not in one
VERIFIED = ["--device", "cpu", "--dtype", "float32", "--backend", "cpp", "--op", "nt_xent", "--op", "masked_patch_loss"]

USE = """
import importlib, importlib.metadata, importlib.util, sys
import torch, sslkernels
assert sslkernels.__file__.startswith(sys.prefix), sslkernels.__file__
assert importlib.metadata.version("sslkernels") == sslkernels.__version__
for absent in ("rich", "pytest", "pybind11", "timm"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is not to be here"
for name in ("", ".nn", ".ops", ".distributed", ".compat.dinov2", ".compat.lightly", ".compat.mae"):
    module = importlib.import_module("sslkernels" + name)
    assert all(hasattr(module, public) for public in module.__all__), name
active = {op: devices["cpu"].active for op, devices in sslkernels.backends().items()}
assert set(active.values()) == {"cpp"}, active
print(f"torch {torch.__version__}: {len(active)} ops, the C++ kernels serve them all", flush=True)
"""


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """The output of a command that ends well, free of what this process would have it import."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**inherited, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{result.stdout}\nended with {result.returncode}")
    return result.stdout


def build_source(folder: Path) -> Path:
    """The source distribution, once it is known to hold what git tracks, and nothing else."""
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-W", "ignore", "-c", build)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in (member.name for member in file if member.isfile())}
    held = {name for name in held if not name.startswith(GENERATED)}
    tracked = set(run("git", "ls-files", "-z").rstrip("\0").split("\0"))
    expected = {name for name in tracked if not name.startswith(FOR_DEVELOPERS)}
    if held != expected:
        raise SystemExit(f"{archive.name} lacks {sorted(expected - held)} and has besides {sorted(held - expected)}")
    return archive


def build_wheel(source: Path, folder: Path) -> Path:
    """The wheel of a source distribution. What ninja has compiled here is not compiled again: sources are the same."""
    with tarfile.open(source) as file:
        file.extractall(folder)
    (unpacked,) = folder.iterdir()
    for objects in (ROOT / "build").glob("ext-*"):
        shutil.copytree(objects, unpacked / "build" / objects.name)
    run(*PIP, "wheel", "-q", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, unpacked)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_wheel(wheel: Path, again: Path) -> None:
    """The tag says what may load the extension, and another build of the same sources is the same."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if f"-{python}-{python}-" not in wheel.name:  # pybind11 has no limited API
        raise SystemExit(f"{wheel.name} is not for {python} alone, as its extension is")
    contents = [{info.filename: info.CRC for info in zipfile.ZipFile(path).infolist()} for path in (wheel, again)]
    names = contents[0].keys()
    if not any(name.startswith("sslkernels/_C.") for name in names) or "sslkernels/py.typed" not in names:
        raise SystemExit(f"{wheel.name} lacks the extension or py.typed: {sorted(names)}")
    if contents[0] != contents[1]:
        different = sorted(dict(contents[0].items() ^ contents[1].items()))
        raise SystemExit(f"the wheel of the source distribution is another one than {wheel.name}: {different}")


def environment(folder: Path) -> Path:
    """The Python of a new environment without any package, pip neither."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    return folder / "bin/python"


def linked(folder: Path, wheel: Path) -> Path:
    """An environment with the wheel and links to this one's torch and numpy: a copy would take gigabytes.

    pip writes through links, into what they point to: it is done before there are any.
    """
    python = environment(folder)
    run(*PIP, "--python", python, "install", "-q", "--no-index", "--no-deps", "--no-compile", wheel)
    target = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name in required("torch", "numpy"):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (target / top).exists():  # nvidia's packages share one
                (target / top).symlink_to(distribution.locate_file(top))
    return python


def required(*names: str) -> set[str]:
    """Distributions with all that they require here."""
    pending, found = [(name, frozenset()) for name in names], set()
    while pending:
        name, extras = pending.pop()
        if (name, extras) in found:
            continue
        found.add((name, extras))
        for requirement in map(Requirement, metadata.requires(name) or ()):
            asked = [{"extra": extra} for extra in extras or ("",)]
            if requirement.marker is None or any(map(requirement.marker.evaluate, asked)):
                pending.append((requirement.name, frozenset(requirement.extras)))
    return {name for name, _ in found}


def downloaded(folder: Path, wheel: Path, torch: str) -> Path:
    """An environment with another torch, as pip makes it."""
    python = environment(folder)
    run(*PIP, "--python", python, "install", "-q", "--no-compile", torch, wheel)
    return python


def check_use(python: Path, elsewhere: Path, **variables: str) -> str:
    """Use the wheel as its first user does, from a folder that has nothing to do with it."""
    program = python.with_name("sslkernels")
    said = run(python, "-c", USE, cwd=elsewhere, **variables)
    run(program, "info", cwd=elsewhere, **variables)
    verdict = run(program, "verify", *VERIFIED, cwd=elsewhere, **variables)
    return said + verdict.rstrip().splitlines()[-1]


def main(dist: str, old_torch: str) -> None:
    wheel = max(Path(dist).resolve().glob("sslkernels-*.whl"), key=lambda path: path.stat().st_mtime)
    with tempfile.TemporaryDirectory(prefix="sslkernels-wheels-") as name, ThreadPoolExecutor() as pool:
        folder = Path(name)
        folders = {part: folder / part for part in ("source", "again", "new", "old", "elsewhere")}
        for part in ("source", "again", "elsewhere"):
            folders[part].mkdir()
        started = time.monotonic()
        old = pool.submit(lambda: check_use(downloaded(folders["old"], wheel, old_torch), folders["elsewhere"]))
        source = build_source(folders["source"])
        check_wheel(wheel, build_wheel(source, folders["again"]))
        print(f"{source.name} holds what git tracks, and {wheel.name} comes of it", flush=True)
        alone = {"PYTHONDONTWRITEBYTECODE": "1"}  # nothing is to appear beside what is linked
        print(check_use(linked(folders["new"], wheel), folders["elsewhere"], **alone), flush=True)
        print(old.result(), flush=True)
        print(f"all in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
