"""Forward-mode differentiation is refused rather than lost, and `torch.vmap` meets what it asks for, for every op.

Eager calls take a shorter way to an operator's gradient than anything that compiles, traces or transforms.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jacfwd, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sslkernels import block_mask, masked_patch_loss, nt_xent, patch_mask, random_masking, registry

REFUSED = r"^\w+: forward-mode differentiation is not supported; use backend='reference'$"
SPECS = [spec for spec in registry.ops() if spec.grad_args]
Z0, Z1 = torch.randn(2, 4, 3)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_tangent_is_an_error_and_none_gets_lost(spec):
    arguments = spec.tagged("verify")[0].make("cpu", torch.float32)
    numbers = {name: torch.as_tensor(value) for name, value in arguments.items() if isinstance(value, float)}
    arguments |= {name: value for name, value in numbers.items() if name in spec.grad_args}
    given = [name for name in spec.grad_args if isinstance(arguments[name], torch.Tensor)]
    refused = 0
    for name in given:

        def call(x, name=name, **options):
            return spec.function(**{**arguments, name: x, **options})

        point = (arguments[name],), (torch.ones_like(arguments[name]),)
        expected = jvp(lambda x, call=call: call(x, backend="reference"), *point)
        assert expected[1].ne(0).any()
        try:  # where PyTorch does what there is to do with an argument, it carries the tangent on
            torch.testing.assert_close(jvp(call, *point), expected)
        except RuntimeError as error:
            assert re.match(REFUSED, str(error))
            refused += 1
    assert refused


class Watcher(TorchDispatchMode):
    """Sees every operator, and does nothing about it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def nodes(result):
    """The names of what leads to the gradient of a result."""
    seen, left = {}, [result.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            left += [following for following, _ in node.next_functions]
    return set(seen.values())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_short_way_of_eager_calls_gives_the_bits_of_the_long_one(spec):
    def run():
        arguments = spec.tagged("verify")[0].make("cpu", torch.float32)
        leaves = [arguments[name].requires_grad_() for name in spec.grad_args
                  if isinstance(arguments[name], torch.Tensor) and arguments[name].is_floating_point()]  # fmt: skip
        results = spec.function(**arguments)
        loss = results if isinstance(results, torch.Tensor) else results[0]
        return loss, torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True)

    short, short_grads = run()
    with Watcher():
        long, long_grads = run()
    assert torch.equal(short, long)
    assert all(map(torch.equal, short_grads, long_grads))
    operators = {f"{name}Backward" for name in (*spec.torch_ops, *spec.other_ops)}
    assert operators & nodes(short)
    assert not operators & nodes(long)


def test_what_a_function_mode_does_to_arguments_has_a_gradient():
    class Tripled(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            ours = "sslkernels.random_masking_fwd" in str(func)
            return func(*((3 * args[0], *args[1:]) if ours else args), **(kwargs or {}))

    x = torch.ones(2, 4, 3, requires_grad=True)
    with Tripled():
        kept = random_masking(x, 0.5, seed=1)[0]
    assert kept.eq(3).all()
    (grad,) = torch.autograd.grad(kept.sum(), x)
    assert grad.max() == 3


def loss(z):
    return nt_xent(z, Z1)


def dual(function):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(Z0, torch.ones_like(Z0)))


def gradient_with_tangent():
    leaf = Z0.clone().requires_grad_()
    return dual(lambda z: torch.autograd.grad(loss(leaf), leaf, z.sum()))


BATCH = torch.stack([Z0, Z1])
TANGENTS = {
    "jacfwd": lambda: jacfwd(loss)(Z0),
    "dual": lambda: dual(loss),
    "no_grad": lambda: dual(torch.no_grad()(loss)),
    "of a temperature": lambda: dual(lambda z: nt_xent(Z0, Z1, temperature=z.sum())),
    "of a batch": lambda: jvp(lambda z: vmap(loss)(z).sum(), (BATCH,), (BATCH,)),
    "in a batch": lambda: vmap(lambda z: jvp(loss, (z,), (z,))[1])(BATCH),
    "of an outer transform": lambda: jvp(lambda a: jvp(lambda b: loss(a) * b.sum(), (Z0,), (Z0,))[1], (Z0,), (Z0,)),
    "of a gradient": gradient_with_tangent,
    "compiled": lambda: torch.compile(lambda z: jvp(loss, (z,), (z,))[1], backend="eager")(Z0),
}


@pytest.mark.parametrize("call", TANGENTS.values(), ids=TANGENTS)
def test_a_tangent_is_found_wherever_it_is(call):
    with pytest.raises(RuntimeError, match=r"forward-mode differentiation is not supported"):
        call()


def test_tangents_of_other_tensors_do_not_matter():
    def others(z):
        return z.sum() * loss(Z0) + loss(z.detach()) + random_masking(Z0[None], seed=1).x_kept.sum()

    _, tangent = jvp(others, (Z0,), (torch.ones_like(Z0),))
    torch.testing.assert_close(tangent, Z0.numel() * loss(Z0))
    scores = Z0[:2].repeat(1, 2)
    masks, _ = jvp(lambda z: patch_mask(2, 6, scores=z, num_keep=2).mask.float(), (scores,), (scores,))
    assert masks.sum() == 8


def test_gradients_of_several_losses_at_once():
    pred, images, mask = torch.randn(1, 4, 12, requires_grad=True), torch.randn(1, 3, 4, 4), torch.ones(1, 4)
    (expected,) = torch.autograd.grad(masked_patch_loss(pred, images, mask, 2), pred)
    value = masked_patch_loss(pred, images, mask, 2)
    (grads,) = torch.autograd.grad(value, pred, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(grads, torch.stack([expected, 2 * expected]))


DRAWING = {
    "random_masking": lambda x: random_masking(x).ids_keep,
    "patch_mask": lambda x: patch_mask(2, 40).ids_keep,
    "block_mask": lambda x: block_mask(2, 7),
}


@pytest.mark.parametrize("draw", DRAWING.values(), ids=DRAWING)
def test_a_seed_that_is_drawn_heeds_the_randomness_of_vmap(draw):
    x = torch.randn(3, 2, 40, 4)
    first, second, _ = vmap(draw, randomness="different")(x)
    assert not torch.equal(first, second)
    first, second, third = vmap(draw, randomness="same")(x)
    assert torch.equal(first, second) and torch.equal(first, third)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(draw)(x)
