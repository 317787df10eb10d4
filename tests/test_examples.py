"""The examples run, and their models with our ops are the models without them, given the same noise."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NOISE = torch.rand(4, 64, generator=torch.Generator().manual_seed(1))


def _names(path):
    """What an example defines."""
    if path.stem.startswith("transformers"):
        pytest.importorskip("transformers", minversion="5")
    return runpy.run_path(str(path))


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda path: path.stem)
def example(request):
    return _names(request.param)


def _loss(model):
    output = model(IMAGES, noise=NOISE)
    return output if torch.is_tensor(output) else output.loss


def test_loss_and_gradients_are_those_of_the_original(example):
    torch.manual_seed(0)
    model, fused = example["pair"]()
    losses = [_loss(either) for either in (model, fused)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    gradients = [{n: p.grad for n, p in either.named_parameters()} for either in (model, fused)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert sum(grad is not None for grad in gradients[0].values()) > 20


def test_an_example_says_that_both_agree(example, capsys):
    example["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].split()[-1] == lines[1].split()[-1]


def test_the_masks_of_transformers_follow_seed_and_samples():
    path = next(path for path in EXAMPLES if path.stem == "transformers_vit_mae")
    _, fused = _names(path)["pair"]()
    embeddings = fused.vit.embeddings
    embeddings.seed, embeddings.sample_ids = 3, torch.tensor([5, 1, 2, 0])
    first, again = fused(IMAGES).mask, fused(IMAGES).mask
    embeddings.sample_ids = embeddings.sample_ids[2:]
    assert torch.equal(first, again) and torch.equal(fused(IMAGES[2:]).mask, first[2:])
    embeddings.seed = 4
    assert not torch.equal(fused(IMAGES[2:]).mask, first[2:])
