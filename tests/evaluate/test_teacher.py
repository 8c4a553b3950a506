"""A teacher's NLL against a loop over single tokens, whose probabilities come from whole passes over growing prefixes."""

from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
import torch

from rdtrain.errors import UserError
from rdtrain.evaluate.models import find_model
from rdtrain.evaluate.reference import Passage, load_reference
from rdtrain.evaluate.samples import texts_of
from rdtrain.evaluate.teacher import ratio_of_sums
from rdtrain.model.denoiser import denoise
from rdtrain.model.recurrent import initial_state
from rdtrain.randomness import SampleRandom

CPU = torch.device("cpu")


@pytest.fixture
def passages(tokenizer):
    """Cut at tokens of ours: inside words, after spaces, inside a character, and with nothing before or after the cut."""
    text = "The function returns\n\n  the naïve  result 😀 of a call."
    ids = tokenizer.encode(text)
    parts = [(ids[:cut], ids[cut:]) for cut in range(1, len(ids) + 1)]
    return [Passage(*texts_of(tokenizer, before, after), tuple(before), tuple(after), tokenizer.hash) for before, after in parts]


def test_prompt_and_continuation_are_the_text_wherever_it_is_cut(passages):
    assert {passage.prompt + passage.continuation for passage in passages} == {passages[0].prompt + passages[0].continuation}
    assert all("\ufffd" not in passage.prompt + passage.continuation for passage in passages)
    assert passages[-1].continuation == ""


def test_a_hugging_face_teachers_nll_is_that_of_the_tokens_that_end_in_the_continuation(gpt2, passages):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model, tokenizer = GPT2LMHeadModel.from_pretrained(gpt2).eval(), AutoTokenizer.from_pretrained(gpt2)
    scores = load_reference(gpt2, CPU, head=True).nll(passages, batch=3, description="")
    spanning = 0
    for passage, (nll, count) in zip(passages, scores):
        ids = tokenizer(passage.prompt + passage.continuation)["input_ids"]
        # Byte-level tokens are bytes, so where each ends can be counted without any tokenizer's own account of it.
        pieces = [sum(len(piece) for piece in tokenizer.convert_ids_to_tokens(ids[: place + 1])) for place in range(len(ids))]
        boundary = len(passage.prompt.encode())
        counted = [place for place in range(1, len(ids)) if pieces[place] > boundary]
        spanning += boundary not in pieces
        expected = 0.0
        with torch.no_grad():
            for place in counted:
                logits = model(torch.tensor([ids[:place]])).logits[0, -1].double()
                expected -= logits.log_softmax(-1)[ids[place]].item()
        assert count == len(counted) and nll == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert spanning and scores[-1] == (0.0, 0)


@pytest.mark.parametrize("name", ["diffusion_blocks", "bptt"])
def test_a_teacher_of_ours_reads_its_own_tokens_as_they_were_written(name, run, passages):
    folder = run("teacher", objective={"name": name})
    source = find_model(folder)
    model = source.load("cpu").model
    scores = load_reference(folder, CPU, head=True).nll(passages, batch=4, description="")
    # Noise is drawn for a whole row: that of the padded batch.
    length = len(passages[0].prompt_ids) + len(passages[0].continuation_ids) - 1
    for index, (passage, (nll, count)) in enumerate(zip(passages, scores)):
        ids = [*passage.prompt_ids, *passage.continuation_ids]
        assert count == len(passage.continuation_ids)
        expected = _slow_nll(source.denoising, model, ids, len(passage.prompt_ids), SampleRandom("reference", [index], CPU), length)
        assert nll == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_teacher_of_ours_reads_other_text_by_bytes(run, passages):
    folder = run("teacher")
    teacher, tokenizer = load_reference(folder, CPU, head=True), find_model(folder).tokenizer()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.file))
    others = [replace(passage, prompt_ids=(), continuation_ids=(), tokenizer_hash="another") for passage in passages]
    scores = teacher.nll(others, batch=4, description="")
    for other, (nll, count) in zip(others, scores):
        ids, counted = teacher.encode(other)
        assert ids[0] == tokenizer.bos_id and tokenizer.decode(ids) == other.prompt + other.continuation
        sizes = [1 if pieces.is_byte(token) else len(pieces.id_to_piece(token).replace("\u2581", " ").encode()) for token in ids[1:]]
        assert sum(sizes) == len((other.prompt + other.continuation).encode())
        ends = [sum(sizes[:place]) for place in range(len(ids))]
        assert counted == [end > len(other.prompt.encode()) for end in ends]
        assert count == sum(counted) and nll >= 0


def _slow_nll(denoising, model, ids, prompt_tokens, random, length) -> float:
    """Position by position, by the definition: from pure noise for a denoiser, four iterations from a random state for the others."""
    width, total = model.config.width, 0.0
    noise = random.normal(length, width) if denoising else random.uniform(length, width)
    for place in range(prompt_tokens, len(ids)):
        e = model.prelude(torch.tensor([ids[:place]]))
        if denoising:
            logits = denoise(model, 80.0 * noise[:, :place], e, torch.tensor([[80.0]]), width**-0.5)
        else:
            state = initial_state(noise[:, :place])
            for _ in range(4):
                state = model.iterate(state, e)
            logits = model.readout(state)
        total -= logits[0, -1].double().log_softmax(-1)[ids[place]].item()
    return total


def test_the_standard_error_is_that_of_a_bootstrap_over_prompts():
    draw = np.random.default_rng(0)
    sizes = draw.integers(20, 60, 400).astype(float)
    amounts = sizes * draw.normal(3, 1, 400)
    ratio, error = ratio_of_sums(list(amounts), list(sizes))
    picks = draw.integers(0, 400, (2000, 400))
    resampled = amounts[picks].sum(1) / sizes[picks].sum(1)
    assert ratio == pytest.approx(amounts.sum() / sizes.sum()) and error == pytest.approx(resampled.std(), rel=0.1)
    assert ratio_of_sums([0.0], [0]) == (None, None) and ratio_of_sums([6.0], [2]) == (3.0, None)


def test_a_judge_that_cannot_be_one_is_refused(gpt2, tmp_path, tokenizer):
    long = Passage("word " * 100, "end", (), (), tokenizer.hash)
    with pytest.raises(UserError, match="reads 64 at most"):
        load_reference(gpt2, CPU, head=True).nll([long], 1, "")
    with pytest.raises(UserError, match="does not load as a Hugging Face model"):
        load_reference(tmp_path, CPU, head=True)
