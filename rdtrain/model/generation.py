"""Standard K-iteration inference: from a prompt to text, one token at a time, K iterations a token, with a key-value cache.

For a denoising model (arXiv 2506.14202) a new position starts as pure noise and is denoised by an Euler chain over K falling
levels; at each, D is the expected embedding under the readout's logits, and the last iteration's logits give the token. A position
of the prompt, whose next token is known, enters iteration k as that token's embedding noised to level k, all positions in one pass.
For an unrolled model a position starts from a random state and the core runs K times (Huginn, arXiv 2502.05171).

The cache keeps, for each (iteration, layer), keys and values as they were computed while the token was made. Without a cache the
same states are kept and everything else is computed anew at each token: slow, and a check on the cache.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .cache import KeyValueCache
from .denoiser import denoise
from .noise import EquiProbabilityPartition, LogNormalNoise, NoiseSettings, euler_step
from .recurrent import ModelConfig, RecurrentDepthLM, initial_state
from .tokenizer import Tokenizer


@dataclass
class Sampling:
    """How a token is drawn from the last iteration's logits.

    temperature: 0 is greedy. top_k: keep the k likeliest; 0 keeps all. top_p: keep the likeliest that make up this probability.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        """ValueError for settings that leave nothing to draw from."""
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature and top_k must not be negative and top_p must lie in (0, 1], and they are "
                f"{self.temperature}, {self.top_k} and {self.top_p}"
            )

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens [B] from logits [B, V]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k:
            smallest = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probability = ordered.softmax(-1)
            # A token stays when those before it do not yet make up top_p: the likeliest always does.
            dropped = probability.cumsum(-1) - probability >= self.top_p
            logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


class DenoisingChain:
    """Next-token logits of a denoising model. Call it with the prompt, then with each chosen token."""

    def __init__(self, model: RecurrentDepthLM, noise: NoiseSettings, iterations: int, cache: KeyValueCache | None,
                 generator: torch.Generator):
        levels = EquiProbabilityPartition(LogNormalNoise(noise), iterations).levels()
        self._steps = list(zip(levels, levels[1:]))
        self._model, self._cache, self._generator = model, cache, generator
        self._ids: Tensor | None = None  # without a cache: all tokens so far, and the states of each iteration
        self._states: list[Tensor | None] = [None] * iterations

    def __call__(self, ids: Tensor) -> Tensor:
        """New tokens [B, n], the next token of the last one being sought -> logits [B, V]."""
        model, cache = self._model, self._cache
        eps = torch.randn(*ids.shape, model.config.width, generator=self._generator, device=ids.device)
        known = model.unit_embedding(ids[:, 1:])
        if cache is None:
            ids = self._ids = _append(self._ids, ids)
        e = model.prelude(ids, cache and cache.prelude)
        z = self._steps[0][0] * eps[:, -1:]
        for k, (sigma, sigma_next) in enumerate(self._steps):
            state = torch.cat((known + sigma * eps[:, :-1], z), dim=1)
            if cache is None:
                state = self._states[k] = _append(self._states[k], state)
            level = torch.full((ids.shape[0], 1), sigma, device=ids.device)
            block = model.config.block_of(k, len(self._steps))
            logits = denoise(model, state, e, level, cache and cache.core[k], cache and cache.coda[k], block)[:, -1:]
            if sigma_next > 0:
                z = euler_step(z, model.expected_embedding(logits), sigma, sigma_next)
        return logits[:, 0]


class UnrolledChain:
    """Next-token logits of a model trained by backpropagation through time; called like DenoisingChain."""

    def __init__(self, model: RecurrentDepthLM, iterations: int, cache: KeyValueCache | None, generator: torch.Generator):
        self._model, self._iterations, self._cache, self._generator = model, iterations, cache, generator
        self._ids: Tensor | None = None
        self._start: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """New tokens [B, n] -> logits [B, V] of the one after them."""
        model, cache = self._model, self._cache
        uniform = torch.rand(*ids.shape, model.config.width, generator=self._generator, device=ids.device)
        state = initial_state(uniform.clamp(min=2**-25))
        if cache is None:
            ids = self._ids = _append(self._ids, ids)
            state = self._start = _append(self._start, state)
        e = model.prelude(ids, cache and cache.prelude)
        for k in range(self._iterations):
            state = model.iterate(state, e, None, cache and cache.core[k])
        return model.readout(state, None, cache and cache.coda[0])[:, -1]


def _append(before: Tensor | None, new: Tensor) -> Tensor:
    return new if before is None else torch.cat((before, new), dim=1)


@torch.inference_mode()
def generate(model: RecurrentDepthLM, ids: Tensor, max_new_tokens: int, iterations: int, noise: NoiseSettings, sampling: Sampling,
             seed: int, use_cache: bool = True) -> Iterator[Tensor]:
    """Yield the tokens [B] that follow ids [B, T >= 1], one step at a time.

    iterations: K. noise: the levels of a denoising model; unused by an unrolled one. seed: of the noise and of sampling.
    ValueError, in one sentence, for an empty prompt, K < 1 or a negative length.
    """
    if ids.shape[1] < 1 or iterations < 1 or max_new_tokens < 0:
        raise ValueError(
            "generation needs a prompt of at least one token, at least one iteration and no negative length, and was given "
            f"{ids.shape[1]}, {iterations} and {max_new_tokens}"
        )
    denoising = model.config.noise_conditioning
    generator = torch.Generator(ids.device).manual_seed(seed)
    cache = None
    if use_cache:
        capacity = ids.shape[1] + max_new_tokens
        cache = KeyValueCache(
            model.config, iterations, iterations if denoising else 1, ids.shape[0], capacity, model.embedding.weight
        )
    if denoising:
        chain = DenoisingChain(model, noise, iterations, cache, generator)
    else:
        chain = UnrolledChain(model, iterations, cache, generator)
    for _ in range(max_new_tokens):
        chosen = sampling.draw(chain(ids), generator)
        yield chosen
        ids = chosen.unsqueeze(1)


class TextGenerator:
    """An exported folder, loaded: model, tokenizer and the K that it was trained for."""

    def __init__(self, model: RecurrentDepthLM, noise: NoiseSettings, tokenizer: Tokenizer):
        self.model, self.noise, self.tokenizer = model, noise, tokenizer
        self.iterations = model.config.iterations

    @classmethod
    def load(cls, folder: Path, device: str | None = None) -> "TextGenerator":
        """Read config.json, model.safetensors and tokenizer.model onto a device (CUDA where there is one).

        ValueError, in one sentence, when a file is missing or damaged or there is no such device.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):
            raise ValueError(f"there is no device {device} here: choose cpu, or leave the choice to the program") from None
        try:
            config = json.loads((folder / "config.json").read_text())
            model = RecurrentDepthLM(ModelConfig(**config["model"]))
            model.load_state_dict(load_file(folder / "model.safetensors"))
            noise = NoiseSettings(**config["noise"])
            dtype = getattr(torch, config["dtype"])
        except (OSError, KeyError, TypeError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{folder} is not a whole exported model ({reason}): export it again") from None
        tokenizer = Tokenizer(folder / "tokenizer.model")
        if tokenizer.hash != config["tokenizer_hash"]:
            raise ValueError(f"the tokenizer in {folder} is not the one that the model was trained with: export it again")
        return cls(model.to(device, dtype).requires_grad_(False), noise, tokenizer)

    def stream(self, prompt: str, max_new_tokens: int, iterations: int | None = None, sampling: Sampling | None = None, seed: int = 0,
               use_cache: bool = True) -> Iterator[str]:
        """Yield the continuation of a prompt, a piece of text for each token (empty while a character is incomplete).

        Ends early where the model ends the document. iterations: K, as trained where None.
        """
        device = self.model.embedding.weight.device
        ids = torch.tensor([self.tokenizer.encode(prompt, bos=True)], device=device)
        tokens, shown = [], 0
        iterations = self.iterations if iterations is None else iterations
        steps = generate(self.model, ids, max_new_tokens, iterations, self.noise, sampling or Sampling(), seed, use_cache)
        for number, chosen in enumerate(steps, start=1):
            if chosen.item() == self.tokenizer.eos_id:
                return
            tokens.append(chosen.item())
            text = self.tokenizer.decode(tokens)
            if number < max_new_tokens:
                text = text.rstrip("\ufffd")  # bytes of a character that is not complete yet
            yield text[shown:]
            shown = max(shown, len(text))
