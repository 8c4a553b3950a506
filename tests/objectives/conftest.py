"""Tokens, the random numbers of samples, and gradients by name."""

import pytest
import torch

from rdtrain.model.recurrent import RecurrentDepthLM
from rdtrain.objectives import ObjectiveSettings
from rdtrain.objectives.bptt import BackpropagationThroughTime
from rdtrain.randomness import SampleRandom


@pytest.fixture
def tokens() -> torch.Tensor:
    """Six sequences of eight inputs and their targets: int64 [6, 9]."""
    return torch.randint(0, 50, (6, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def random_of():
    """A factory of fresh SampleRandoms: the same numbers at each call with the same indices."""
    return lambda indices, seed=5, step=0: SampleRandom(seed, indices, torch.device("cpu"), step)


@pytest.fixture
def fixed_depth():
    """A factory of BPTT at a fixed depth whose last `trained` iterations carry gradient."""
    return lambda depth, trained, **settings: BackpropagationThroughTime(
        ObjectiveSettings("bptt", trained_iterations=trained, depth="fixed", **settings), depth
    )


@pytest.fixture
def gradients():
    """The gradient of a loss for every parameter, by name; zeros where there is none."""

    def compute(model: RecurrentDepthLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        names, parameters = zip(*model.named_parameters())
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return dict(zip(names, found))

    return compute


@pytest.fixture
def assert_same_gradients():
    """Compares two results of `gradients`, each tensor to within a small part of its own size."""

    def compare(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert value.abs().max() > 0, f"{name} has a gradient"
            difference = (actual[name] - value).abs().max() / value.abs().max()
            assert difference < tolerance, f"{name}: {difference:.2e}"

    return compare
