"""An export through Hugging Face transformers: what its classes compute is what the model computes, for tokens, batches and text."""

import json
import math
import pickle
import re
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer, Trainer, TrainingArguments, pipeline

from rdtrain.model.generation import Sampling, TextGenerator, generate
from rdtrain.model.noise import NoiseSchedule, NoiseSettings
from rdtrain.model.recurrent import RecurrentDepthLM
from rdtrain.model.text_random import STATE, TextRandom

PROJECT = Path(__file__).parent.parent.parent
NOISE = NoiseSchedule(NoiseSettings())
GREEDY = {"do_sample": False, "max_new_tokens": 5, "num_iterations": 3, "eos_token_id": None}
PROMPTS = [[1, 14, 15, 92, 65, 35, 89], [1, 79, 32], [1, 38, 46, 26, 43]]


def padded(rows=PROMPTS, pad=2):
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])}


def test_every_row_of_a_padded_batch_is_what_our_own_generation_of_its_prompt_alone_gives(both):
    """Tokens and logits; rows in another order have their own noise still; the seed matters."""
    ours, _, model = both
    settings = {**GREEDY, "seed": [5, 6, 7], "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**padded(), **settings)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, settings["seed"])):
        alone = torch.cat(list(generate(ours, torch.tensor([prompt]), 5, 3, NOISE, Sampling(0.0), seed)))
        assert torch.equal(out.sequences[row, -5:], alone)
        single = model.generate(torch.tensor([prompt]), **settings | {"seed": seed})
        for together, apart in zip(out.logits, single.logits):
            torch.testing.assert_close(together[row], apart[0], rtol=1e-4, atol=1e-4)
    other = model.generate(**padded(PROMPTS[::-1]), **settings | {"seed": [7, 6, 5]})
    assert torch.equal(other.sequences[:, -5:], out.sequences[:, -5:].flip(0))
    as_tensor = model.generate(**padded(), **settings | {"seed": torch.tensor(settings["seed"])})
    of_numpy = model.generate(**padded(), **settings | {"seed": list(as_tensor.sequences.new_tensor(settings["seed"]).numpy())})
    assert torch.equal(as_tensor.sequences, out.sequences) and torch.equal(of_numpy.sequences, out.sequences)
    reseeded = model.generate(**padded(), **settings | {"seed": 8})
    assert (reseeded.logits[0] - out.logits[0]).abs().max() > 0.01


def test_settings_of_the_chain_reach_it_and_rows_with_an_exit_are_as_ours(denoiser):
    ours, _, model = denoiser
    chain = {"solver": "ancestral", "chain_temperature": 0.7, "chain_top_p": 0.9, "chain_readout": "core", "exit": "argmax",
             "exit_threshold": 2.0, "exit_minimum": 2, "caches": 2, "cache_order": "cyclic", "chain_top_k": 5}
    given = set(chain) | {"temperature", "top_k", "top_p", "min_p"}
    assert given == set(asdict(Sampling())), "forward must take every setting of a Sampling but those of the last draw"
    tokens = model.generate(torch.tensor(PROMPTS[:1]), **GREEDY | {"num_iterations": 6}, seed=4, **chain)[0, -5:]
    assert torch.equal(tokens, torch.cat(list(generate(ours, torch.tensor(PROMPTS[:1]), 5, 6, NOISE, Sampling(0.0, **chain), 4))))


def test_settings_that_the_generation_config_has_reach_the_chain_and_the_call_prevails(denoiser, load, tmp_path):
    model, prompt = load(denoiser[1]), torch.tensor(PROMPTS[:1])

    def cache(model, **settings):
        return model.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **settings).past_key_values

    asked = cache(model, num_iterations=3, seed=9, exit="argmax", caches=2)
    for name, value in {"num_iterations": 3, "seed": 9, "exit": "argmax", "caches": 2}.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    for one in (model, load(tmp_path)):
        found, other = cache(one), cache(one, num_iterations=2, exit="never", seed=8)
        assert (found.iterations, asdict(found.sampling), found._seeds) == (3, asdict(asked.sampling), asked._seeds)
        assert (other.iterations, asdict(other.sampling), other._seeds.tolist()) == (2, asdict(Sampling(caches=2)), [8])
    model.generation_config.exit_threshold = 2.0
    for exit, threshold in (("argmax", 2.0), ("never", None), ("kl", 0.001)):
        assert cache(model, exit=exit).sampling.exit_threshold == threshold, "a threshold is one of the exit beside it"
    model.generation_config.num_iterations = 0
    with pytest.raises(ValueError, match="num_iterations must be a whole number from 1"):
        cache(model)


def test_copies_of_a_prompt_have_noise_of_their_own_and_beams_have_not(denoiser):
    model = denoiser[2]
    torch.manual_seed(0)
    many = model.generate(**padded(), max_new_tokens=3, num_iterations=4, num_return_sequences=3, seed=3, temperature=0.01)
    for copy in range(3):
        alone = model.generate(torch.tensor(PROMPTS[1:2]), max_new_tokens=3, num_iterations=4, seed=3 + copy, temperature=0.01)
        assert torch.equal(many[3 + copy, -3:], alone[0, -3:])
    beams = model.generate(**padded(), **GREEDY, num_beams=3, seed=1)
    assert torch.equal(beams[1:2, -5:], model.generate(torch.tensor(PROMPTS[1:2]), **GREEDY, num_beams=3, seed=1)[:, -5:])
    transformers.set_seed(1)
    first = model.generate(**padded(), max_new_tokens=4, num_iterations=2, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    transformers.set_seed(1)
    assert torch.equal(first, model.generate(**padded(), max_new_tokens=4, num_iterations=2, top_p=0.9, min_p=0.01, repetition_penalty=1.1))


def test_the_cache_grows_goes_back_takes_other_rows_and_serves_several_turns(both):
    model = both[2]
    ids = torch.randint(3, 800, (2, 70), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=True, num_iterations=2, seed=[3, 4])
    cache, branch = whole.past_key_values, deepcopy(whole.past_key_values)
    following = model(ids[:, :1], past_key_values=cache).logits  # beyond the 64 positions that a cache begins with
    assert cache.get_seq_length() == 71 and branch.get_seq_length() == 70 and branch._model is model.model
    torch.testing.assert_close(model(ids[:, :1], past_key_values=branch).logits, following)
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(model(ids[[1, 0], :1], past_key_values=cache).logits, following.flip(0), rtol=1e-4, atol=1e-4)
    cache.batch_repeat_interleave(2)
    cache.crop(-1)
    torch.testing.assert_close(model(ids[[1, 1, 0, 0], :1], cache=cache).logits[1::2], following.flip(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="^the cache was started with 2 iterations"):
        model(ids[[1, 1, 0, 0], :1], past_key_values=cache, num_iterations=3)
    settings = GREEDY | {"return_dict_in_generate": True, "output_hidden_states": True, "seed": 0}
    one = model.generate(torch.tensor(PROMPTS[:1]), **settings | {"max_new_tokens": 10}).sequences
    first = model.generate(torch.tensor(PROMPTS[:1]), **settings)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, **settings)
    assert torch.equal(second.sequences, one)
    assert len(second.hidden_states) == 5 and all(len(token) == 4 for token in second.hidden_states)  # before and after 3 iterations


def test_texts_that_go_on_from_copies_of_a_cache_have_the_seeds_that_they_are_given(denoiser):
    model, ids = denoiser[2], torch.tensor(PROMPTS[:1])
    start = model(ids[:, :-1], use_cache=True, num_iterations=4, seed=5).past_key_values

    def logits(**settings):
        cache = deepcopy(start)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=2, output_logits=True, return_dict_in_generate=True, **settings)
        return out.logits[0], cache._seeds.tolist()

    kept, other = logits(do_sample=False), logits(do_sample=False, seed=6)
    assert kept[1] == [5] and other[1] == [6] and (kept[0] - other[0]).abs().max() > 0.01
    assert torch.equal(other[0], logits(do_sample=False, seed=6)[0]) and torch.equal(kept[0], logits(do_sample=False, seed=5)[0])
    assert logits(do_sample=True)[1] != logits(do_sample=True)[1] and start._seeds.tolist() == [5]
    by_hand = [model(ids[:, -1:], past_key_values=deepcopy(start), **seed).logits for seed in ({}, {"seed": 5}, {"seed": 6})]
    assert torch.equal(by_hand[0], by_hand[1]) and (by_hand[0] - by_hand[2]).abs().max() > 0.01


def written_out(ours, prompt, seed, iterations):
    """Logits [T, V] of a text's positions, from the formulas: one pass at sigma_max, or K iterations from a random state."""
    width, table = ours.config.width, ours.embedding.weight.double()
    random_numbers = TextRandom(torch.tensor([seed])).at(torch.arange(len(prompt)).unsqueeze(0))
    e = ours.prelude(torch.tensor([prompt]))
    if not ours.config.noise_conditioning:
        edge = math.erf(3 / math.sqrt(2))
        state = math.sqrt(4 / 5) * torch.erfinv((2 * random_numbers.uniform(STATE, width) - 1) * edge)
        for _ in range(iterations):
            state = ours.iterate(state, e)
        return ours.readout(state)[0].double()
    z, sd = 80.0 * random_numbers.normal(STATE, width).double(), 1 / math.sqrt(width)
    condition = ours.condition(torch.full((1, 1), math.log(80.0) / 4))
    keep = sd**2 / (80.0**2 + sd**2)
    prior = ours.head(ours.coda(ours.iterate((keep * z / sd).float(), e, condition), condition)).double()
    return (prior + z / 80.0**2 @ (table / table.norm(dim=-1, keepdim=True)).T)[0]


def test_a_text_is_scored_by_its_honest_likelihood_whatever_its_padding(both):
    ours, _, model = both
    batch = padded()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, 2:4] = -100
    scored = model(**batch, labels=labels, seed=[5, 6, 7])
    total, count = 0.0, 0
    for row, prompt in enumerate(PROMPTS):
        logits = written_out(ours, prompt, 5 + row, 4)
        torch.testing.assert_close(scored.logits[row, -len(prompt) :].double(), logits, rtol=1e-3, atol=1e-3)
        log_probability = logits.log_softmax(-1)
        for position in range(1, len(prompt)):
            if row > 0 or position not in (2, 3):
                total, count = total - log_probability[position - 1, prompt[position]].item(), count + 1
    assert scored.loss.item() == pytest.approx(total / count, rel=1e-4)
    halved = model(**batch, labels=labels, seed=[5, 6, 7], num_items_in_batch=2 * count).loss
    assert halved.item() == pytest.approx(total / count / 2, rel=1e-4)
    assert torch.equal(model(**batch, labels=labels.int(), seed=[5, 6, 7]).loss, scored.loss)
    last = model(**batch, seed=[5, 6, 7], logits_to_keep=1).logits
    torch.testing.assert_close(last, scored.logits[:, -1:])
    right = {"input_ids": torch.tensor([PROMPTS[1] + [2, 2]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]]), "seed": 6}
    torch.testing.assert_close(model(**right).logits[0, :3], scored.logits[1, -3:], rtol=1e-4, atol=1e-4)


def test_documents_are_kept_apart_in_a_text_that_is_scored_by_a_model_that_was_trained_so(write, load):
    texts = torch.tensor([[5, 20, 21, 22, 5, 30, 31], [5, 23, 24, 25, 5, 30, 31]])
    for mark in (5, None):
        model = load(write(document_mark=mark)[1])
        alike = model(input_ids=texts, seed=3).logits
        assert torch.equal(alike[0, 4:], alike[1, 4:]) == (mark is not None) and not torch.equal(alike[0, :4], alike[1, :4])
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]]).expand(2, -1)
        padded = model(input_ids=torch.nn.functional.pad(texts, (2, 0), value=2), attention_mask=mask, seed=3).logits[:, 2:]
        torch.testing.assert_close(padded, alike, rtol=1e-4, atol=1e-4)


def test_a_gradient_step_on_labels_lowers_the_loss_with_tokens_that_were_added(both, load):
    model = load(both[1]).train()
    model.resize_token_embeddings(804)
    batch = padded()
    batch["input_ids"][0, 1] = 803
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(5):
        losses.append(model(**batch, labels=batch["input_ids"]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1


def test_latents_and_distributions_of_iterations_are_those_of_steps_by_hand(both):
    _, _, model = both
    ids, wanted = torch.tensor(PROMPTS[:1]), {"output_hidden_states": True, "output_iteration_logits": True, "seed": 7}
    if model.denoising:
        out = model(ids, use_cache=True, num_iterations=4, **wanted)
    else:
        out = model(ids, num_iterations=4, **wanted)
    assert len(out.hidden_states) == 5 and len(out.iteration_logits) == 4
    e, state = model.embed_inputs(ids), model.initial_state(ids, seed=7)
    for iteration in range(4):
        torch.testing.assert_close(out.hidden_states[iteration][:, -1], state[:, -1], rtol=1e-3, atol=1e-3)
        if model.denoising:
            state = model.with_known_targets(state, ids, iteration, 4, seed=7)
        step = model.iterate_one_step(state, e, iteration, 4)
        torch.testing.assert_close(out.iteration_logits[iteration][:, -1], step.logits[:, -1], rtol=1e-3, atol=1e-3)
        state = step.state
    torch.testing.assert_close(out.hidden_states[4][:, -1], state[:, -1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out.logits[:, -1], step.logits[:, -1], rtol=1e-3, atol=1e-3)


def test_saved_and_pickled_models_are_the_same_and_run_as_exports_do(both, load, hf_tokenizer, tmp_path):
    ours, _, model = both
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    hf_tokenizer.save_pretrained(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    assert {file.name for file in (PROJECT / "rdtrain/model").glob("*.py")} <= {file.name for file in (tmp_path / "again").iterdir()}
    again = load(tmp_path / "again"), pickle.loads(pickle.dumps(model)), TextGenerator.load(tmp_path / "again", "cpu").model
    for other in again:
        inner = other if isinstance(other, RecurrentDepthLM) else other.model
        for (name, ours_), (theirs_name, theirs) in zip(ours.state_dict().items(), inner.state_dict().items(), strict=True):
            assert name == theirs_name and torch.equal(ours_, theirs)
    assert torch.equal(again[0].generate(**padded(), **GREEDY, seed=1), model.generate(**padded(), **GREEDY, seed=1))
    assert AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)("a\n  b").input_ids == hf_tokenizer("a\n  b").input_ids
    assert pickle.loads(pickle.dumps(hf_tokenizer))("a\n  b").input_ids == hf_tokenizer("a\n  b").input_ids


def test_what_was_loaded_by_a_relative_name_is_saved_from_another_folder(denoiser, load, tmp_path, monkeypatch):
    monkeypatch.chdir(denoiser[1].parent)
    parts = load(denoiser[1].name), AutoTokenizer.from_pretrained(denoiser[1].name, trust_remote_code=True)
    monkeypatch.chdir(tmp_path)
    for part in parts:
        part.save_pretrained(tmp_path / "again")
    assert {file.name for file in denoiser[1].iterdir()} <= {file.name for file in (tmp_path / "again").iterdir()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(denoiser, load, dtype):
    model = load(denoiser[1], dtype=dtype)
    assert model.dtype == dtype
    logits = model(**padded()).logits
    torch.testing.assert_close(logits.float(), denoiser[2](**padded()).logits, rtol=0.1, atol=0.3)
    ids = torch.tensor(PROMPTS[:1])
    torch.testing.assert_close(torch.compile(model, backend="eager")(ids).logits, model(ids).logits)
    finite = model.generate(**padded(), **GREEDY | {"num_iterations": 64}, return_dict_in_generate=True, output_logits=True)
    assert all(one.isfinite().all() for one in finite.logits)
    with torch.autocast("cpu", dtype):
        cast = denoiser[2].generate(**padded(), **GREEDY, return_dict_in_generate=True, output_logits=True)
    whole = denoiser[2].generate(**padded(), **GREEDY, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(cast.logits[0], whole.logits[0], rtol=0.1, atol=0.3)


@pytest.mark.slow
def test_a_compiled_forward_gives_what_the_plain_one_does(denoiser):
    model, ids = denoiser[2], torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        states = [call(ids, seed=5) for call in (torch.compile(model.initial_state), model.initial_state)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-3)
    compiled = deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    for count in (2, 70):  # caches of two sizes
        settings = GREEDY | {"num_iterations": 1, "max_new_tokens": count}
        assert torch.equal(compiled.generate(ids, **settings), model.generate(ids, **settings))
    torch._dynamo.reset()


def test_lm_eval_gives_the_models_likelihood_and_chooses_by_it(both, tokenizer, tmp_path, monkeypatch):
    """lm-evaluation-harness itself (pip install rdtrain[lm-eval]), offline, on two tasks of local files."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    ours, folder, _ = both
    texts = ["Returns the value of the name.", "The function takes a list of numbers.", "An error is raised."]
    choices = [["name.", "file of a list.", "error"], ["numbers.", "x.", "the"], ["raised.", "raised again", "so"]]
    write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    heads = [text.rpartition(" ")[0] for text in texts]
    write_lines(tmp_path / "choices.jsonl", [{"head": head, "choices": of_it, "answer": 1} for head, of_it in zip(heads, choices)])
    for name, lines in {
        "texts": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: bits_per_byte}]',
        "choices": 'output_type: multiple_choice\ndoc_to_text: "{{head}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
                   "metric_list: [{metric: acc}]",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/{name}.jsonl}}}}\n"
            f"test_split: test\n{lines}\n"
        )
    model = HFLM(str(folder), device="cpu", batch_size=2, max_length=64, trust_remote_code=True, add_bos_token=False)
    found = lm_eval.simple_evaluate(model, tasks=["local_texts", "local_choices"], task_manager=TaskManager(include_path=str(tmp_path)),
                                    bootstrap_iters=0)["results"]

    def nats(ids, start):
        """Of the tokens from `start` on."""
        log_probability = written_out(ours, ids, 0, 4).log_softmax(-1)
        return -sum(log_probability[place - 1, ids[place]].item() for place in range(start, len(ids)))

    total = sum(nats(tokenizer.encode(text, bos=True), 1) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert found["local_texts"]["bits_per_byte,none"] == pytest.approx(total / size / math.log(2), rel=1e-4)
    right = 0
    for head, of_it in zip(heads, choices):
        costs = [nats(tokenizer.encode(f"{head} {choice}"), len(tokenizer.encode(head))) for choice in of_it]
        right += costs.index(min(costs)) == 1
    assert found["local_choices"]["acc,none"] == pytest.approx(right / 3)


def test_a_device_map_of_one_device_loads_the_same_weights(both, load):
    pytest.importorskip("accelerate")
    for where in ("cpu", {"": "cpu"}, "auto"):
        mapped = load(both[1], device_map=where)
        assert all(torch.equal(one, other) for one, other in zip(mapped.parameters(), both[2].parameters(), strict=True))
        assert torch.equal(mapped.generate(**padded(), **GREEDY, seed=1), both[2].generate(**padded(), **GREEDY, seed=1))


def test_transformers_trainer_trains_an_adapter_of_peft_which_can_be_merged(denoiser, load, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(denoiser[1]), peft.LoraConfig(target_modules=["query_key_value", "output"], task_type="CAUSAL_LM"))
    ids = torch.arange(24).view(4, 6)
    labels = ids.masked_fill(ids > 20, -100)
    rows = [{"input_ids": one, "labels": its} for one, its in zip(ids, labels, strict=True)]
    told = TrainingArguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2, learning_rate=0.05,
                             logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model=model, args=told, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[2] < losses[0]
    whole = load(denoiser[1])(ids, labels=labels).loss.item()
    assert losses[0] == pytest.approx(whole, rel=1e-5)  # the mean of all labels of a step, whatever its micro-batches
    tokens = model.generate(**padded(), **GREEDY, seed=1)
    assert torch.equal(model.merge_and_unload().generate(**padded(), **GREEDY, seed=1), tokens)


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_texts_end_where_stopping_criteria_say(both, hf_tokenizer):
    """At a length that a criterion of the user's own gives, and behind a string: each a beginning of the text without them."""
    model, ids = both[2], torch.tensor(PROMPTS[:1])
    settings = {"max_new_tokens": 12, "do_sample": False, "num_iterations": 2, "seed": 3, "eos_token_id": None}
    whole = model.generate(ids, **settings)[0]

    class AtLength(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= ids.shape[1] + 4)

    assert torch.equal(model.generate(ids, **settings, stopping_criteria=[AtLength()])[0], whole[: ids.shape[1] + 4])
    texts = [hf_tokenizer.decode(whole[ids.shape[1] : ids.shape[1] + count]) for count in range(1, 13)]
    end = next(text[-1] for text in texts if text[-1:].strip())
    first = next(count for count, text in enumerate(texts, start=1) if end in text)
    ended = model.generate(ids, **settings, stop_strings=[end], tokenizer=hf_tokenizer)[0]
    assert torch.equal(ended, whole[: ids.shape[1] + first])


def test_a_pipeline_writes_text_and_the_snippets_of_the_documentation_run(denoiser, hf_tokenizer, tmp_path, monkeypatch, capsys):
    ours, folder, model = denoiser
    text = pipeline("text-generation", model=model, tokenizer=hf_tokenizer)("The", **GREEDY, seed=2)[0]["generated_text"]
    ids = torch.tensor([hf_tokenizer("The").input_ids])
    assert text == hf_tokenizer.decode(torch.cat((ids[0], *generate(ours, ids, 5, 3, NOISE, Sampling(0.0), 2))), skip_special_tokens=True)
    monkeypatch.chdir(tmp_path)
    Path("my-model").symlink_to(folder)
    names: dict = {}
    for snippet in re.findall("```python\n(.*?)```", (PROJECT / "docs/generation.md").read_text(), re.S):
        exec(snippet, names)
    assert names["second"].shape[1] == names["first"].sequences.shape[1] + 4
    assert all(float(line.removeprefix("tensor(").split(")")[0].split(",")[0]) < 1e-3 for line in capsys.readouterr().out.splitlines()[-4:])
