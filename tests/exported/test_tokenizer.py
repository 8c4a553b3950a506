"""An export's tokenizer, as transformers loads it, against ours."""

import random
import shutil
from copy import deepcopy
from pathlib import Path

from transformers import AutoTokenizer

PROJECT = Path(__file__).parent.parent.parent


def test_the_tokenizer_gives_the_ids_and_the_text_of_ours(hf_tokenizer, tokenizer):
    draw = random.Random(0)
    parts = ["<s>", "</s>", "<unk>", "<0x0A>", "\u2581", " ", "  ", "\n", "\r\n", "\t", "the", "e\u0301", "\U0001f600", "\0", "\x85", "12"]
    for _ in range(300):
        text = "".join(draw.choice(parts) if draw.random() < 0.6 else chr(draw.choice((draw.randrange(1, 0xD800),
                       draw.randrange(0xE000, 0x11000)))) for _ in range(draw.randrange(12)))
        ids = tokenizer.encode(text, bos=True)
        assert hf_tokenizer(text).input_ids == ids and hf_tokenizer(text, add_special_tokens=False).input_ids == ids[1:]
        assert hf_tokenizer.decode(ids, skip_special_tokens=True) == text
        any_ids = [draw.randrange(300 if draw.random() < 0.7 else tokenizer.vocab_size) for _ in range(draw.randrange(12))]
        assert hf_tokenizer.decode(any_ids, skip_special_tokens=True) == tokenizer.decode(any_ids)
    assert hf_tokenizer.decode([1, *tokenizer.encode("a b"), 2]) == "<s>a b</s>"
    assert (hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id, hf_tokenizer.pad_token_id) == (tokenizer.bos_id, tokenizer.eos_id, 2)
    assert hf_tokenizer(["a", "the function"], padding=True).attention_mask[0][0] == 0
    assert hf_tokenizer("<s>", add_special_tokens=False, split_special_tokens=False).input_ids == [1]


def test_text_that_was_added_as_a_token_is_one(hf_tokenizer, tokenizer, tmp_path):
    adding = deepcopy(hf_tokenizer)
    assert adding.add_tokens(["<new>", "<new>er"]) == 2
    adding.save_pretrained(tmp_path)
    shutil.copytree(PROJECT / "rdtrain/model", tmp_path, dirs_exist_ok=True)
    for one in (adding, AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)):
        assert one("a<new> <s><new>er").input_ids == [1, *tokenizer.encode("a"), 800, *tokenizer.encode(" <s>"), 801]
        assert one.decode(one("a<new> <s><new>er").input_ids, skip_special_tokens=True) == "a<new> <s><new>er"
