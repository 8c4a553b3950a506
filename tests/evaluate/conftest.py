"""A tiny random GPT-2 with a tokenizer of its own, saved as a user's teacher would be, and tiny trained runs."""

import pytest
import torch

from rdtrain.config import load_config
from rdtrain.train import train


@pytest.fixture(scope="session")
def gpt2(texts, tmp_path_factory):
    """The folder. Its byte-level tokenizer has other pieces than ours, and its tokens do span the boundaries of ours."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder = tmp_path_factory.mktemp("teacher") / "gpt2"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")
    fast.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(fast), n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=0,
                            eos_token_id=0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tiny_config, tmp_path):
    """A factory: the folder of a tiny run that has trained for 4 steps."""

    def make(name: str, **sections):
        config = load_config(tiny_config(name, schedule={"steps": 4}, **sections))
        assert train(config) == 0
        return tmp_path / name

    return make
