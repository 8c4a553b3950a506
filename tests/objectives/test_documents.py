"""Documents that are kept apart in a packed window, and rows that are padded, train and score like each document alone.

The documents alone are run by a model that knows of neither, with the random numbers of the positions that they have in the window.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rdtrain.evaluate import chain_likelihood, likelihood
from rdtrain.model.attention import document_mask
from rdtrain.model.noise import NoiseSchedule, NoiseSettings
from rdtrain.objectives import ObjectiveSettings, build_objective

MARK, PADDING, T, CPU = 7, -100, 11, torch.device("cpu")
LENGTHS = [(3, 4, 4), (5, 6)]
"""The inputs of each document of two windows; the first window begins within a document."""

TRIALS = {"self_conditioning": True, "chain_states": True, "core_readout": True}
CASES = {
    "denoising": ({"name": "diffusion_blocks"}, {}),
    "earlier_iteration": ({"name": "diffusion_blocks", **TRIALS}, {"level_per": "token", "weighting": "edm"}),
    "truncated": ({"name": "bptt", "trained_iterations": 2, "activation_checkpointing": True}, {}),
    "local": ({"name": "bptt", "gradient": "local", "layer_checkpointing": "selective"}, {}),
    "full": ({"name": "bptt", "gradient": "full"}, {}),
    "one_pass": ({"name": "one_pass"}, {}),
}


class PartOfRow:
    """The random numbers of one sample's positions from `start` on, where the sample has T of them."""

    def __init__(self, whole, start):
        self.indices, self.of_step, self._whole, self._start = whole.indices, whole.of_step, whole, start

    def _part(self, draw, count, rest):
        if count == 1:  # of the whole sequence
            return draw(1, *rest)
        return draw(T, *rest)[:, self._start : self._start + count]

    def uniform(self, count, *rest):
        return self._part(self._whole.uniform, count, rest)

    def normal(self, count, *rest):
        return self._part(self._whole.normal, count, rest)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request, build_model):
    """An objective, a model that keeps documents apart, and one with the same weights that does not."""
    settings, noise = request.param
    iterations = 1 if settings["name"] == "one_pass" else 4
    objective = build_objective(ObjectiveSettings(**settings), NoiseSettings(**noise), iterations)
    models = [build_model(iterations=iterations, document_mark=mark, **objective.model_fields) for mark in (MARK, None)]
    for model in models:
        model.checkpoint_layers(objective.layer_checkpointing)
    return objective, *models


@pytest.fixture
def windows():
    """Packed windows int64 [2, T + 1], and of each document (row, its first position, its tokens and the target of the last)."""
    tokens = torch.randint(10, 50, (2, T + 1), generator=torch.Generator().manual_seed(1))
    documents = []
    for row, lengths in enumerate(LENGTHS):
        starts = np.cumsum((0, *lengths[:-1]))
        tokens[row, starts[1 - row :]] = MARK
        documents += [(row, start, tokens[row, start : start + length + 1]) for start, length in zip(starts, lengths)]
    return tokens, documents


def test_the_mask_is_that_of_a_slow_loop(windows):
    ids = windows[0][:, :-1]
    mask = document_mask(ids, MARK, torch.float32)
    assert mask.shape == (2, 1, T, T)
    for row in range(2):
        for query in range(T):
            for key in range(T):
                own = key <= query and not (ids[row, key + 1 : query + 1] == MARK).any()
                assert mask[row, 0, query, key] == (0 if own else -torch.inf)


def test_a_masked_window_trains_and_scores_like_each_document_alone(case, windows, random_of, gradients, assert_same_gradients):
    objective, masked, plain = case
    tokens, documents = windows
    indices = [4, 9]  # one with an earlier iteration and one without
    loss = objective(masked, tokens, random_of(indices))
    nll = objective.held_out_nll(masked, tokens, random_of(indices)).detach()
    values, found = 0.0, dict.fromkeys(dict(masked.named_parameters()), 0.0)
    for row, start, document in documents:
        def random(index=indices[row], start=start):
            return PartOfRow(random_of([index]), start)

        share = (len(document) - 1) / (2 * T)
        alone = objective(plain, document.unsqueeze(0), random()).value
        values += share * alone.item()
        found = {name: found[name] + share * gradient for name, gradient in gradients(plain, alone).items()}
        expected = objective.held_out_nll(plain, document.unsqueeze(0), random())[0].detach()
        torch.testing.assert_close(nll[row, start : start + len(document) - 1], expected, rtol=1e-5, atol=1e-5)
    assert loss.value.item() == pytest.approx(values, rel=1e-5)
    assert_same_gradients(gradients(masked, loss.value), found, 1e-4)
    assert abs(objective.held_out_nll(plain, tokens, random_of(indices)) - nll).max() > 1e-2


def test_a_padded_row_trains_and_scores_like_the_document_alone(case, windows, random_of, gradients, assert_same_gradients):
    objective, _, plain = case
    document = windows[1][4][2]
    rows = torch.full((1, T + 1), PADDING)
    rows[0, : len(document)] = document
    targets, noise = len(document) - 1, getattr(objective, "information", None)
    loss = objective(plain, rows, random_of([4]))
    counted = noise and noise.pending.clone()
    alone = objective(plain, document.unsqueeze(0), PartOfRow(random_of([4]), 0))
    assert loss.value.item() * T / targets == pytest.approx(alone.value.item(), rel=1e-5)
    padded = {name: gradient * T / targets for name, gradient in gradients(plain, loss.value).items()}
    assert_same_gradients(padded, gradients(plain, alone.value), 1e-4)
    for name, sums_and_counts in alone.metrics.items():
        torch.testing.assert_close(loss.metrics[name], sums_and_counts, rtol=1e-5, atol=1e-5)
    if noise:
        added = noise.pending - counted
        assert added[1].equal(counted[1]) and added[1].sum() == targets * 2**20 and (added[0] - counted[0]).abs().max() < 2**20 * 1e-4
    nll = objective.held_out_nll(plain, rows, random_of([4]))[0]
    expected = objective.held_out_nll(plain, document.unsqueeze(0), PartOfRow(random_of([4]), 0))[0]
    torch.testing.assert_close(nll[:targets], expected, rtol=1e-5, atol=1e-5)
    assert (nll[targets:] == 0).all()


def test_a_denoising_chains_bound_and_curve_are_those_of_each_document_alone(build_model, windows, random_of, monkeypatch):
    fields = {"noise_conditioning": True, "posterior_readout": True, "self_conditioning": True}
    masked, plain = (
        SimpleNamespace(model=build_model(document_mark=mark, **fields), noise=NoiseSchedule(NoiseSettings())) for mark in (MARK, None)
    )
    tokens, documents = windows
    padded = torch.full((len(documents), T + 1), PADDING)
    alone, curves = [], []
    with torch.no_grad():
        bound = chain_likelihood._bound(masked, 3, tokens, random_of([4, 9]))
        for number, (row, start, document) in enumerate(documents):
            padded[number, : len(document)] = document
            random = PartOfRow(random_of([(4, 9)[row]]), start)
            alone.append(chain_likelihood._bound(plain, 3, document.unsqueeze(0), random)[0])
            torch.testing.assert_close(bound[row, start : start + len(document) - 1], alone[-1], rtol=1e-5, atol=1e-4)

    class SameNoise:
        """Of a position, whatever row it is in, so that padded rows and those alone can be told the same."""

        def __init__(self, seed, indices, device):
            self._rows = len(indices)

        def normal(self, count, width):
            numbers = torch.randn(T, width, generator=torch.Generator().manual_seed(3))
            return numbers[:count].expand(self._rows, count, width)

    monkeypatch.setattr(likelihood, "SampleRandom", SameNoise)
    together = likelihood.cross_entropy_by_sigma(plain, padded, 2, 3)
    for _, _, document in documents:
        curve = likelihood.cross_entropy_by_sigma(plain, document.unsqueeze(0), 1, 3)
        curves.append([(len(document) - 1) * point["cross_entropy"] for point in curve])
    expected = np.sum(curves, axis=0) / sum(len(document) - 1 for _, _, document in documents)
    np.testing.assert_allclose([point["cross_entropy"] for point in together], expected, rtol=1e-5)


def test_the_error_of_a_likelihood_is_that_of_a_ratio():
    counts, generator = torch.tensor([2, 5, 3, 5]), torch.Generator().manual_seed(0)
    targets = torch.where(torch.arange(5) < counts.unsqueeze(1), 1, PADDING)
    nll = torch.rand(4, 5, generator=generator) * (targets >= 0)
    found = likelihood.summary([(nll[:3], targets[:3]), (nll[3:], targets[3:])], 2.0)
    mean = nll.sum().item() / 15
    residuals = [row.sum().item() - mean * count for row, count in zip(nll, counts.tolist())]
    assert found.nll == pytest.approx(mean)
    assert found.standard_error == pytest.approx((sum(r * r for r in residuals) / 3 * 4) ** 0.5 / 15)


def test_positions_that_begin_anew_in_each_document_change_nothing(build_model, windows, random_of):
    objective = build_objective(ObjectiveSettings(), NoiseSettings(), 4)
    tokens, differences = windows[0][:1], []
    for mark in (MARK, None):
        model = build_model(document_mark=mark, **objective.model_fields)
        before, table = objective.next_token_logits(model, tokens[:, :-1], random_of([1])), model.rotary
        places = torch.tensor([place for length in LENGTHS[0] for place in range(length)])

        def reset(start, stop, device, table=table, places=places):
            return tuple(values[places] for values in table(start, stop, device))

        model.rotary = model.cores[0].rotary = reset
        differences.append((objective.next_token_logits(model, tokens[:, :-1], random_of([1])) - before).abs().max().item())
    assert differences[0] < 1e-5 and differences[1] > 1e-3
