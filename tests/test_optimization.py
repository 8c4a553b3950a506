"""The learning rate's shape, and which parameters decay."""

import pytest

from rdtrain.optimization import OptimizerSettings, ScheduleSettings, build_optimizer, learning_rate, set_learning_rate


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_rate_rises_linearly_peaks_and_falls_to_its_end(decay):
    optimizer = OptimizerSettings(learning_rate=2.0)
    schedule = ScheduleSettings(steps=100, warmup_fraction=0.1, decay=decay, final_fraction=0.25)
    rates = [learning_rate(step, 100, optimizer, schedule) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == rates[10] == 2.0
    assert rates[100] == pytest.approx(2.0 if decay == "constant" else 0.5)
    assert rates[55] == pytest.approx({"cosine": 1.25, "linear": 1.25, "constant": 2.0}[decay])
    assert all(later <= before for before, later in zip(rates[10:], rates[11:]))


def test_a_run_without_warmup_starts_at_the_peak():
    schedule = ScheduleSettings(steps=1, warmup_fraction=0.0)
    assert learning_rate(0, 1, OptimizerSettings(learning_rate=3.0), schedule) == 3.0


def test_matrices_decay_and_vectors_do_not(build_model):
    model = build_model(noise_conditioning=True)
    embedding, matrices, vectors = build_optimizer(model, OptimizerSettings(weight_decay=0.3)).param_groups
    assert (embedding["weight_decay"], matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.3, 0.0)
    assert [id(p) for p in embedding["params"]] == [id(model.embedding.weight)]
    assert {id(p) for p in embedding["params"] + matrices["params"]} == {id(p) for p in model.parameters() if p.dim() == 2}
    assert 1 + len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_the_embedding_learns_at_a_multiple_of_the_rate(build_model):
    model = build_model(core_readout=True)
    optimizer = build_optimizer(model, OptimizerSettings(embedding_scale=3.0))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.75, 0.25, 0.25]
    assert optimizer.param_groups[0]["params"] == [model.embedding.weight]


@pytest.mark.parametrize(
    "settings",
    [
        dict(learning_rate=0.0), dict(beta1=1.0), dict(weight_decay=-1.0), dict(gradient_clipping=-1.0), dict(epsilon=0.0),
        dict(embedding_scale=0.0),
    ],
)
def test_impossible_optimizers_are_refused(settings):
    with pytest.raises(ValueError):
        OptimizerSettings(**settings)


def test_untied_blocks_have_groups_of_their_own_that_hold_every_parameter_once(build_model):
    model = build_model(noise_conditioning=True, blocks=2)
    groups = build_optimizer(model, OptimizerSettings(weight_decay=0.3)).param_groups
    of_parts = [(block, decay) for block in (None, 0, 1) for decay in (0.3, 0.0)]
    assert [(group["block"], group["weight_decay"]) for group in groups] == [(None, 0.3), *of_parts]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(parameter) for parameter in model.parameters()}
    for block, core in enumerate(model.cores):
        own = {id(parameter) for group in groups if group["block"] == block for parameter in group["params"]}
        assert own == {id(parameter) for parameter in core.parameters()}
