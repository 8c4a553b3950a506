"""Standard K-iteration inference: from a prompt to text, one token at a time, K iterations a token, with a key-value cache.

`generate` works on token ids, in batches of prompts of one length, and TextGenerator on text, from an exported folder. What an
iteration does is in chain.py, how its levels are stepped through in solvers.py, how a token is drawn in sampling.py, and what is kept from
token to token in decoding.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from .decoding import Decoder
from .description import check_format, checked_dtype, checked_model, checked_noise
from .exceptions import first_line
from .noise import NoiseSchedule
from .recurrent import RecurrentDepthLM
from .sampling import Sampling
from .tokenizer import Tokenizer
from .weights import read_weights


def generate(model: RecurrentDepthLM, ids: Tensor, max_new_tokens: int, iterations: int, noise: NoiseSchedule, sampling: Sampling,
             seed: int | list[int], use_cache: bool = True) -> Iterator[Tensor]:
    """Yield the tokens [B] that follow ids [B, T >= 1], one step at a time; a Decoder does the same for several batches or turns.

    iterations: K, whatever the model was trained for. noise: the levels of a denoising model; unused by an unrolled one, as are
    sampling's solver and chain_*. seed: of the noise and of sampling of the first row, the others count on from it; or one for each. What
    a row draws depends on its seed alone.
    ValueError, in one sentence, for an empty prompt, K < 1, a negative length and token ids out of range.
    """
    decoder = Decoder(model, noise, iterations, sampling, ids.shape[0], ids.shape[1] + max(max_new_tokens, 0), use_cache)
    yield from decoder.generate(ids, seed, max_new_tokens)


class TextGenerator:
    """An exported folder, loaded: model, tokenizer and the K that it was trained for. compiled: as its decoders take it."""

    compiled = False

    def __init__(self, model: RecurrentDepthLM, noise: NoiseSchedule, tokenizer: Tokenizer):
        self.model, self.noise, self.tokenizer = model, noise, tokenizer
        self.iterations = model.config.iterations

    @classmethod
    def load(cls, folder: Path, device: str | None = None) -> "TextGenerator":
        """Read config.json, the weights and the tokenizer onto a device (CUDA where there is one).

        ValueError, in one sentence, when a file is missing or damaged or there is no such device.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):
            raise ValueError(f"there is no device {device} here: choose cpu, or leave the choice to the program") from None
        try:
            config = json.loads((folder / "config.json").read_text())
            check_format(config["format"])
            shape, dtype = checked_model(config["model"]), checked_dtype(config["dtype"])
            noise, tokenizer_hash = checked_noise(config["noise"], config["information_curve"], shape), config["tokenizer_hash"]
            model = RecurrentDepthLM(shape)
            model.load_state_dict(read_weights(folder))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} is not a whole exported model ({first_line(error)}): export it again") from None
        tokenizer = Tokenizer(folder)
        if tokenizer.hash != tokenizer_hash:
            raise ValueError(f"the tokenizer in {folder} is not the one that the model was trained with: export it again")
        return cls(model.to(device, dtype).requires_grad_(False), noise, tokenizer)

    def decoder(self, batch: int, capacity: int, iterations: int | None = None, sampling: Sampling | None = None,
                use_cache: bool = True) -> Decoder:
        """A decoder of the model. iterations: K, as trained where None. ValueError for settings that it cannot run with."""
        sampling = sampling or Sampling()
        if sampling.changes_the_chain and not self.model.config.noise_conditioning:
            raise ValueError(
                "solver and chain_* are settings of a denoising model, and this one was trained by "
                "backpropagation through time: leave them out"
            )
        iterations = self.iterations if iterations is None else iterations
        return Decoder(self.model, self.noise, iterations, sampling, batch, capacity, use_cache, compiled=self.compiled)

    def write(self, decoder: Decoder, ids: list[int], seed: int, max_new_tokens: int) -> Iterator[tuple[int, str]]:
        """Yield the tokens that follow ids, which follow what a decoder of one row holds, each with the text that it completes.

        The text is empty while a character is incomplete. Ends early where the model ends the document.
        """
        tokens, shown = [], 0
        for number, chosen in enumerate(decoder.generate(torch.tensor([ids]), seed, max_new_tokens), start=1):
            token = chosen.item()
            if token == self.tokenizer.eos_id:
                return
            tokens.append(token)
            text = self.tokenizer.decode(tokens)
            if number < max_new_tokens:
                text = text.rstrip("\ufffd")  # bytes of a character that is not complete yet
            yield token, text[shown:]
            shown = max(shown, len(text))

    def stream(self, prompt: str, max_new_tokens: int, iterations: int | None = None, sampling: Sampling | None = None, seed: int = 0,
               use_cache: bool = True) -> Iterator[str]:
        """Yield the continuation of a prompt, a piece of text for each token (empty while a character is incomplete).

        Ends early where the model ends the document. iterations: K, as trained where None. ValueError for settings of the chain
        when the model has none, and for a prompt that UTF-8 cannot hold.
        """
        ids = self.tokenizer.encode(prompt, bos=True)
        decoder = self.decoder(1, len(ids) + max(max_new_tokens, 0), iterations, sampling, use_cache)
        for _, text in self.write(decoder, ids, seed, max_new_tokens):
            yield text
