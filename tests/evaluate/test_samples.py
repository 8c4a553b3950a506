"""Prompts are spread over the documents and never leave one; samples are what the generator writes, and come back from their file."""

import numpy as np
import pytest

from rdtrain.data.shards import ShardReader
from rdtrain.errors import UserError
from rdtrain.evaluate.models import find_model
from rdtrain.evaluate.samples import choose_prompts, generate_samples, human_samples, read_samples, write_samples
from rdtrain.model.generation import Sampling


def test_prompts_lie_within_documents_and_are_spread_evenly(shards):
    reader = ShardReader(shards / "validation")
    windows = choose_prompts(reader, 40, 20, 30)
    tokens, edges = reader.read(0, len(reader)), reader.documents
    starts = [start for start in range(len(tokens) - 49) if (edges[np.searchsorted(edges, start, side="right")] - 1 >= start + 50)]
    assert windows.shape == (40, 50)
    expected = [starts[(2 * place + 1) * len(starts) // 80] for place in range(40)]
    assert all((window == tokens[start : start + 50]).all() for window, start in zip(windows, expected))
    eos = reader.manifest["eos_id"]
    assert not (windows == eos).any() and not (windows[:, 1:] == reader.manifest["bos_id"]).any()
    everything = choose_prompts(reader, len(starts), 20, 30)
    assert (everything == np.stack([tokens[start : start + 50] for start in starts])).all()
    with pytest.raises(UserError, match=f"room for {len(starts)} prompts of 20 tokens with 30 to follow"):
        choose_prompts(reader, len(starts) + 1, 20, 30)


def test_samples_are_what_the_generator_writes_up_to_the_documents_end(run, shards, tmp_path):
    source = find_model(run("run"))
    generator = source.load("cpu")
    tokenizer = generator.tokenizer
    windows = choose_prompts(ShardReader(shards / "validation"), 3, 6, 12)
    prompts = human_samples(tokenizer, windows, 6)
    sampling = Sampling(temperature=0)
    samples = generate_samples(generator, "m", prompts, 2, 2, sampling, batch=6, seed=0)
    assert [(one.prompt_number, one.number) for one in samples] == [(prompt, number) for prompt in range(3) for number in range(2)]
    for one in samples:
        assert one.prompt_ids + one.human_ids == windows[one.prompt_number].tolist() and len(one.continuation_ids) == 12
        assert tokenizer.decode(one.prompt_ids + one.continuation_ids) == one.prompt + one.continuation
        assert tokenizer.decode(windows[one.prompt_number].tolist()) == one.prompt + one.human
    again = generate_samples(generator, "m", prompts, 2, 2, sampling, batch=6, seed=0)
    assert again == samples
    one_by_one = generate_samples(generator, "m", prompts, 2, 2, Sampling(), batch=1, seed=0)
    assert one_by_one == generate_samples(generator, "m", prompts, 2, 2, Sampling(), batch=4, seed=0), "no text depends on its batch"
    assert one_by_one[0].continuation_ids != one_by_one[1].continuation_ids
    # Call any token that comes the mark of a document's end: the text stops before it.
    tokenizer.eos_id = samples[0].continuation_ids[4]
    ended = generate_samples(generator, "m", prompts, 2, 2, sampling, batch=6, seed=0)[0]
    stop = samples[0].continuation_ids.index(tokenizer.eos_id)
    assert ended.ended and ended.continuation_ids == samples[0].continuation_ids[:stop]
    assert samples[0].continuation.startswith(ended.continuation) and not samples[0].ended
    write_samples(samples, tmp_path / "a.jsonl")
    write_samples(again[:2], tmp_path / "b.jsonl")
    assert read_samples([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]) == [samples + again[:2]]
    (tmp_path / "b.jsonl").write_text('{"model": "m"}\n')
    with pytest.raises(UserError, match="is not a samples file"):
        read_samples([tmp_path / "b.jsonl"])
