"""The decoder: a step over one position is the same as over many, shared caches are what they say, turns and rollback change nothing, rows
that have settled leave and do not disturb the others, and a captured step writes the same text."""

from types import SimpleNamespace

import pytest
import torch
from torch._inductor import compile_fx

from rdtrain.model import attention, recurrent
from rdtrain.model import cache as cache_module
from rdtrain.model import compiled as compiled_module
from rdtrain.model.adaptive import Exits
from rdtrain.model.cache import CachePlace, KeyValueCache, cache_of
from rdtrain.model.chain import DenoisingChain, UnrolledChain
from rdtrain.model.compiled import compiled_part, is_sum
from rdtrain.model.decoding import Decoder, cache_bytes
from rdtrain.model.noise import NoiseSchedule, NoiseSettings
from rdtrain.model.sampling import Sampling
from rdtrain.model.text_random import TextRandom

NOISE = NoiseSchedule(NoiseSettings())
PROMPT = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7], [1, 2, 3, 4, 5]])


def written(decoder, ids=PROMPT, seeds=1, length=8, **settings):
    return torch.stack(list(decoder.generate(ids, seeds, length, **settings)), dim=1)


def decoder(model, sampling=Sampling(), iterations=6, batch=3, capacity=70, **settings):  # noqa: B008
    return Decoder(model, NOISE, iterations, sampling, batch, capacity, **settings)


@pytest.mark.parametrize("denoising", [True, False])
def test_a_step_over_one_position_equals_the_plain_pass_exactly(build_model, monkeypatch, denoising):
    """The plain pass appends to the cache and attends to what is filled; the step attends to a fixed number of columns under a mask."""
    model, begin = build_model(denoising, posterior_readout=denoising), CachePlace.begin

    def plain(place, rotary, count):
        begin(place, rotary, count)
        place.one_position, place.mask = False, None

    def logits(begin):
        monkeypatch.setattr(CachePlace, "begin", begin)
        cache, random = KeyValueCache(model.config, 4, 4, 3, 70, model.embedding.weight), TextRandom(torch.arange(3))
        make = (DenoisingChain, (model, NOISE)) if denoising else (UnrolledChain, (model,))
        chain = make[0](*make[1], 4, Sampling(), cache, random)
        with torch.inference_mode():
            return torch.stack([chain(PROMPT), *(chain(PROMPT[:, place : place + 1]) for place in range(4))])

    torch.testing.assert_close(logits(begin), logits(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("denoising", [True, False])
def test_a_row_is_the_same_alone_in_a_batch_and_behind_padding(build_model, denoising):
    model = build_model(denoising)
    together = written(decoder(model), seeds=[7, 8, 9])
    for row in range(3):
        alone = written(decoder(model, batch=1), PROMPT[row : row + 1], [7 + row])
        assert torch.equal(alone[0], together[row])
    padded = torch.cat((torch.tensor([[0, 0], [11, 12], [0, 13]]), PROMPT), dim=1)
    behind = written(decoder(model), padded, [7, 8, 9], padding=[2, 0, 1])
    assert torch.equal(behind[0], together[0])
    one = torch.cat((torch.tensor([[13]]), PROMPT[2:]), dim=1)
    assert torch.equal(behind[2], written(decoder(model, batch=1), one, [9])[0])
    assert not torch.equal(together[0], written(decoder(model), seeds=[8, 8, 9])[0])


@pytest.mark.parametrize("exit", ["never", "argmax"])
def test_masks_that_are_made_once_a_token_for_all_layers_hide_the_same(build_model, monkeypatch, exit):
    model, kinds = build_model(True), []
    attend = attention.F.scaled_dot_product_attention

    def seen(*args, attn_mask=None, **how):
        kinds.append(None if attn_mask is None else attn_mask.dtype)
        return attend(*args, attn_mask=attn_mask, **how)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", seen)
    plain = written(decoder(model, Sampling(exit=exit)), padding=[2, 0, 1])
    assert set(kinds) == {torch.bool}
    for module in (attention, cache_module):  # as if this were a GPU, and half precision
        monkeypatch.setattr(module, "half_precision", lambda device, dtype: True)
    kinds.clear()
    assert torch.equal(written(decoder(model, Sampling(exit=exit)), padding=[2, 0, 1]), plain)
    assert set(kinds) == {torch.float32}


@pytest.mark.parametrize("denoising", [True, False])
def test_compiled_steps_write_the_same_and_their_parts_are_compiled_once_for_all_iterations(build_model, monkeypatch, denoising):
    model, graphs = build_model(denoising, posterior_readout=denoising), []

    def traced(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled_module, "_with_sums", traced)
    torch._dynamo.reset()
    compiled_part.cache_clear()
    try:
        for exit in ("never", "argmax"):
            sampling = Sampling(exit=exit)
            plain = written(decoder(model, sampling), padding=[2, 0, 1])
            assert torch.equal(written(decoder(model, sampling, compiled=True), padding=[2, 0, 1]), plain)
            if exit == "never":
                assert len(graphs) == 4  # prelude, iteration and head; the mean of the targets, or the coda
    finally:
        compiled_part.cache_clear()


def test_products_of_one_position_are_sums_in_compiled_code_where_the_weight_is_small(build_model, monkeypatch):
    def on(device, numbers):
        return SimpleNamespace(device=torch.device(device), numel=lambda: numbers)

    assert is_sum(1, on("cuda", 2**22)) and not is_sum(1, on("cuda", 2**22 + 1))
    assert not is_sum(2, on("cuda", 9)) and not is_sum(1, on("cpu", 9))
    table, model, seen = {}, build_model(True, posterior_readout=True), []

    def compile_by(graph, inputs, decompositions, config_patches):
        assert config_patches == {"deterministic": True}
        table.update(decompositions)
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", compile_by)
    compiled_part.cache_clear()
    try:
        compiled_part(torch.square)(torch.ones(2))
    finally:
        compiled_part.cache_clear()
    for module in (compiled_module, recurrent):
        monkeypatch.setattr(module, "is_sum", lambda positions, weight: seen.append(positions) or positions == 1)
    one, other = torch.randn(1, 5), torch.randn(5, 7)
    torch.testing.assert_close(table[torch.ops.aten.mm.default](one, other), one @ other)
    hidden, evidence = torch.randn(2, 1, 1, model.config.width)
    with torch.no_grad():
        expected = model.head(hidden, evidence)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        torch.testing.assert_close(model.head(hidden, evidence), expected)
    assert seen == [1, 1]


def test_turns_that_reuse_the_cache_and_rollback_equal_starting_anew(build_model):
    model, turn = build_model(True), torch.tensor([[20, 21], [22, 23], [24, 25]])
    kept = decoder(model)
    first = written(kept)
    assert kept.length == 5 + 7  # the last token was not handed in
    kept.truncate(5)
    again = written(kept, first[:, :1], length=7)
    # What was generated and then taken back is gone: its first token stands as a text's own now, where noise and next token are the same.
    assert torch.equal(again, first[:, 1:])
    kept.truncate(4)
    assert torch.equal(written(kept, PROMPT[:, 4:]), first)
    kept.truncate(0)
    assert torch.equal(written(kept), first)
    second = written(kept, torch.cat((first[:, -1:], turn), dim=1), length=3)
    assert second.shape == (3, 3) and kept.length == 5 + 8 + 2 + 2
    with pytest.raises(ValueError, match="^the cache holds 17 positions and cannot be cut to 18"):
        kept.truncate(18)


def test_iterations_share_caches_as_they_say(build_model):
    assert [cache_of(k, 8, 4, "adjacent") for k in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [cache_of(k, 8, 3, "cyclic") for k in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]
    model = build_model(True)
    full, half = (cache_bytes(model, 8, Sampling(caches=caches), 70) for caches in (0, 4))
    layer = 2 * 70 * 32 * 4  # keys and values of 70 positions in fp32; 1 prelude, 2 core and 1 coda layers
    assert (full, half) == (layer * (1 + 8 * 3), layer * (1 + 4 * 3))
    own = written(decoder(model))
    assert torch.equal(own, written(decoder(model, Sampling(caches=6)))) and torch.equal(own, written(decoder(model, Sampling(caches=9))))
    assert not torch.equal(own, written(decoder(model, Sampling(caches=1)), length=40)[:, :8])
    # What a group leaves is what its last iteration wrote: with one cache, what stands in the last of as many as there are iterations.
    cut = [KeyValueCache(model.config, 6, 6, 3, 70, model.embedding.weight, caches) for caches in (0, 1)]
    for cache in cut:
        with torch.inference_mode():
            DenoisingChain(model, NOISE, 6, Sampling(), cache, TextRandom(torch.arange(3)))(PROMPT)
    assert torch.equal(cut[0].core[5][0].keys, cut[1].core[0][0].keys) and cut[1].core[0] is cut[1].core[5]


class Scripted:
    """A rule that ends rows where it is told to: row b at its token n after iterations[n][b]."""

    def __init__(self, monkeypatch, iterations):
        tokens = iter(iterations)

        class Told(Exits):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                self.ends = torch.tensor(next(tokens))

            def settled(self, logits, iteration):
                return self.ends[self.rows] == iteration + 1

        monkeypatch.setattr("rdtrain.model.chain.Exits", Told)


@pytest.mark.parametrize("fields, sampling", [
    (dict(noise_conditioning=True), dict()), (dict(noise_conditioning=True, self_conditioning=True), dict(solver="multistep")),
    (dict(noise_conditioning=True, core_readout=True, posterior_readout=True), dict(solver="ancestral", chain_readout="core")),
    (dict(), dict()), (dict(noise_conditioning=True), dict(caches=2, cache_order="cyclic")),
])
def test_a_row_that_has_settled_is_the_one_that_would_have_left_alone(build_model, monkeypatch, fields, sampling):
    """Batches whose rows leave at different iterations against each row by itself, over several tokens and so the filled cache."""
    model, sampling = build_model(**fields), Sampling(exit="kl", **sampling)
    ends = [[6, 2, 3], [1, 4, 6], [5, 5, 1], [2, 6, 2]]
    Scripted(monkeypatch, ends)
    together = decoder(model, sampling)
    tokens = written(together, length=5, seeds=[4, 5, 6])
    assert [used.tolist() for used in together.iterations_used] == [[6, 6, 6], *ends]  # the prompt's pass has no exit
    for row in range(3):
        Scripted(monkeypatch, [[one[row]] for one in ends])
        alone = decoder(model, sampling, batch=1)
        assert torch.equal(written(alone, PROMPT[row : row + 1], [4 + row], 5)[0], tokens[row])
        for one, other in zip(together.cache._stores, alone.cache._stores):
            torch.testing.assert_close(one[0][:, :, :, row], other[0][:, :, :, 0], rtol=0, atol=1e-5)


def test_what_was_left_out_stands_in_the_cache_as_the_last_iteration_left_it(build_model, monkeypatch):
    model = build_model(True)
    Scripted(monkeypatch, [[2, 5, 6]])
    one = decoder(model, Sampling(exit="kl"))
    written(one, length=2)
    for part in (one.cache.core, one.cache.coda):
        for k in range(6):
            for row, end in enumerate((2, 5, 6)):
                keys = part[k][0].keys[row, :, 5]
                assert keys.abs().max() > 0 and torch.equal(keys, part[min(k, end - 1)][0].keys[row, :, 5])
    never = decoder(model)
    written(never, length=2)
    assert torch.equal(never.cache.core[1][0].keys[:, :, :6], one.cache.core[1][0].keys[:, :, :6])


def test_rows_settle_by_entropy_divergence_and_the_likeliest_token():
    path = torch.tensor([[[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], [[0.4, 0.5, 0.1], [0.5, 0.31, 0.19]], [[0.01, 0.98, 0.01], [0.5, 0.31, 0.19]]])
    p = path.double()
    entropy, divergence = -(p * p.log()).sum(-1), (p[1:] * (p[1:] / p[:-1]).log()).sum(-1)

    def settled(minimum=1, **settings):
        exits = Exits(Sampling(exit_minimum=minimum, **settings), 2, 3, torch.device("cpu"))
        return [exits.settled(probability.log() + 5, k).tolist() for k, probability in enumerate(path)]

    assert settled(exit="entropy", exit_threshold=0.2) == (entropy < 0.2).tolist() == [[False, False], [False, False], [True, False]]
    assert settled(exit="kl", exit_threshold=1e-3)[1:] == (divergence < 1e-3).tolist() == [[False, True], [False, True]]
    assert settled(exit="kl")[0] == [False, False] and settled(3, exit="kl")[1] == [False, False]
    assert settled(exit="argmax", exit_threshold=2) == [[False, False], [False, True], [True, True]]


def test_rows_settle_by_what_is_left_where_tokens_are_cut_off(build_model):
    """By a posterior readout each iteration's logits are of a prior cut as the sampling says: -inf for all other tokens."""
    none = -torch.inf
    path = torch.tensor([[[0.0, none, 0.0]], [[3.0, none, none]], [[5.0, none, none]], [[0.0, 1.0, none]]])

    def settled(kind):
        exits = Exits(Sampling(exit=kind), 1, 3, torch.device("cpu"))
        return [exits.settled(logits, k).tolist() for k, logits in enumerate(path)]

    assert settled("entropy") == [[False], [True], [True], [False]] and settled("kl") == [[False], [False], [True], [False]]
    one = decoder(build_model(True, posterior_readout=True), Sampling(top_k=5, exit="entropy", exit_threshold=2.0))
    written(one, length=3)
    assert all((used == 1).all() for used in one.iterations_used[1:]), "five tokens have an entropy of 1.6 at most"


def test_a_token_whose_iterations_end_early_has_the_prior_of_a_last_iteration(build_model):
    """As it is, for transformers' samplers, which sharpen it themselves. The first iteration is the same at any temperature."""
    model = build_model(True, posterior_readout=True)

    def logits(temperature):
        one = decoder(model, Sampling(temperature, exit="entropy", exit_threshold=99.0))._chain
        one.shapes_last = False
        with torch.inference_mode():
            one(PROMPT[:, :1])  # a prompt, which has no exit
            return one(PROMPT[:, 1:2])

    torch.testing.assert_close(logits(0.3), logits(1.0))


def test_bad_requests_of_a_decoder_are_refused_in_one_sentence(build_model):
    model = build_model(True)
    for match, call in (
        ("holds: shorten it", lambda: written(decoder(model, capacity=11))),
        ("^token 59 is outside the vocabulary of 50: ", lambda: written(decoder(model), PROMPT + 24)),
        ("^exit and caches need the key-value cache: ", lambda: decoder(model, Sampling(caches=1), use_cache=False)),
        ("^a step can be captured on CUDA", lambda: decoder(model, capture=True)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert written(decoder(model, capacity=12)).shape == (3, 8)


def test_generation_ends_once_all_rows_have(build_model):
    model = build_model(True)
    tokens = written(decoder(model, iterations=1, capacity=60), length=50)
    common = set(tokens[0, :30].tolist()) & set(tokens[1, :30].tolist()) & set(tokens[2, :30].tolist())
    stop = min(common, key=lambda token: max((row == token).nonzero()[0].item() for row in tokens))
    last = max((row == stop).nonzero()[0].item() for row in tokens)
    ended = written(decoder(model, iterations=1, capacity=60), length=50, stop=stop)
    assert ended.shape[1] == min(50, 16 * (last // 16 + 1)) and torch.equal(ended, tokens[:, : ended.shape[1]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("denoising, solver", [(True, "euler"), (True, "ancestral"), (False, "euler")])
def test_a_captured_step_writes_the_same_text(build_model, denoising, solver):
    """Over batches, a rollback, and a cache of more columns than one step's view."""
    model, ids = build_model(denoising).cuda(), PROMPT.cuda()
    plain, captured = (decoder(model, Sampling(solver=solver), capacity=150, capture=capture) for capture in (False, True))
    for seeds in (1, 5):
        for one in (plain, captured):
            one.truncate(0)
        first, second = (written(one, ids, seeds, 100) for one in (plain, captured))
        assert torch.equal(first, second)
    captured.truncate(30)
    assert torch.equal(written(captured, second[:, 25:26], 5, 10), second[:, 26:36])
    assert len(captured._steps) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("capture", [False, True])
def test_a_token_waits_for_no_device(build_model, capture):
    one = decoder(build_model(True).cuda(), capture=capture)
    steps = one.generate(PROMPT.cuda(), 1, 8)
    for _ in range(3):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
