"""What is public: each module lists it, and all of it is documented, annotated and as a typed program expects."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import typed_user
from torch import nn

import sslkernels
from sslkernels.ops.infonce.arguments import Options
from sslkernels.ops.infonce.clip import ClipOptions
from sslkernels.ops.infonce.info_nce import InfoNCEOptions
from sslkernels.ops.infonce.nt_xent import DecoupledOptions

MODULES = [
    importlib.import_module(name)
    for name in (
        "sslkernels",
        "sslkernels.nn",
        "sslkernels.ops",
        "sslkernels.distributed",
        "sslkernels.compat.dinov2",
        "sslkernels.compat.lightly",
        "sslkernels.compat.mae",
    )
]


def public_names(module: ModuleType) -> set[str]:
    """Names without an underscore of what a module defines, or a package collects."""
    own = "sslkernels" if hasattr(module, "__path__") else module.__name__
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith(own)
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_modules_list_what_is_public(module):
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), name
    if module.__name__ != "sslkernels.distributed":  # which has more for the ops
        assert public_names(module) == set(module.__all__)


def test_every_op_is_at_the_top():
    assert set(sslkernels.ops.__all__) <= set(sslkernels.__all__)


def functions_of(path: str, value: object) -> Iterator[tuple[str, object]]:
    """A public function, or the constructor and the public methods and properties of a class, those inherited too."""
    if not inspect.isclass(value):
        yield path, value
        return
    for base in value.__mro__:
        if not base.__module__.startswith("sslkernels"):
            continue
        for name, member in vars(base).items():
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            of_base = inspect.isfunction(member) and member.__module__ == base.__module__
            if of_base and (name in ("__init__", "__call__") or not name.startswith("_")):
                yield f"{path}.{name}", member


def test_signatures_are_annotated():
    functions = [
        function
        for module in MODULES
        for name in module.__all__
        for function in functions_of(f"{module.__name__}.{name}", getattr(module, name))
    ]
    assert len(functions) > 100
    for path, function in functions:
        signature = inspect.signature(function)
        bare = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.annotation is parameter.empty and name not in ("self", "cls", "_cls")
        ]
        assert not bare, f"{path}: {bare}"
        assert path.endswith("__init__") or signature.return_annotation is not signature.empty, path


@pytest.mark.parametrize(
    "function, options",
    [
        (sslkernels.nt_xent, Options),
        (sslkernels.decoupled_nt_xent, DecoupledOptions),
        (sslkernels.info_nce, InfoNCEOptions),
        (sslkernels.clip_loss, ClipOptions),
    ],
    ids=lambda argument: argument.__name__,
)
def test_overloads_know_every_option(function, options):
    parameters = inspect.signature(function).parameters.values()
    named = {
        parameter.name: parameter.annotation for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert named.pop("return_stats") == "bool"
    assert {name: annotation.__forward_arg__ for name, annotation in options.__annotations__.items()} == named


def test_typed_program_runs():
    tokens = torch.randn(3, 9, 4)
    assert typed_user.masks(tokens).shape == tokens.shape
    assert typed_user.losses(*torch.randn(2, 6, 4)).shape == ()
    assert typed_user.teacher(nn.Linear(2, 2)).step == 1
