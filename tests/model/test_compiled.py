"""Proves that what compiled code makes of one position, in forms that a compiler for a GPU joins, is the same as what other code makes of
it. The forms are run as they stand here, as the rules that choose them want a GPU."""

import pytest
import torch

from rdtrain.model import chain, compiled, recurrent, solvers
from rdtrain.model.solvers import expected_target


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sums(monkeypatch):
    """Products of one position are sums on the CPU, too."""
    for module in (compiled, recurrent, solvers, chain):
        monkeypatch.setattr(module, "is_sum", lambda positions, weight: positions == 1)


@pytest.fixture
def compiling(sums, monkeypatch):
    """A function after whose call code takes itself to be compiled."""
    return lambda: monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize("cut", [False, True])
def test_the_expected_target_summed_in_parts_is_that_of_float64(compiling, cut):
    """Some tokens of a part, or all of them, may have no weight."""
    targets, logits = torch.nn.functional.normalize(draw(8192, 24).double(), dim=-1), 30 * draw(1, 1, 8192, seed=1).double()
    if cut:
        logits[..., 512:1024] = logits[..., 5000:] = -torch.inf
    compiling()
    found = expected_target(logits.float(), targets.float().t().contiguous().t())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), logits.softmax(-1) @ targets, rtol=1e-5, atol=1e-6)
