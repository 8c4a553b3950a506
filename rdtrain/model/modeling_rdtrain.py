"""The exported model for Hugging Face transformers: RecurrentDepthLM and its K-iteration chain behind `generate` and `forward`.

`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` loads it. The model, the chain, its solvers and its cache are those
of the files beside this one. `forward` answers two questions:

- without a cache, how likely a text is: logits of all positions in one pass from pure noise (K iterations of an unrolled model), which
  are honest next-token distributions, and with labels their mean cross-entropy;
- with one (`use_cache=True`, or a `cache`), what comes next: the last of K iterations' logits for the last position alone, from
  which `generate` draws with whatever samplers it is given. (Temperature, top-k, top-p and min-p also act on the priors of the iterations
  before: what those have settled no later sampler can change.)

All noise is a function of a sequence's seed and its own positions: a padded batch gives what each prompt alone gives.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from .cache import CachePlace
from .chain_cache import RecurrentDepthCache, check_kind
from .configuration_rdtrain import RecurrentDepthConfig
from .denoiser import denoise_state
from .description import check_files_beside
from .recurrent import MOST_ITERATIONS, RecurrentDepthLM, initial_state
from .sampling import Sampling
from .solvers import euler_step
from .text_random import STATE, PositionRandom, TextRandom, row_seeds
from .transformers_arguments import (
    CHAIN_SETTINGS,
    chain_sampling,
    drawing_settings,
    fill_in,
    generation_seeds,
    mean_loss,
    padding_columns,
    refuse_what_does_not_go,
    seed_list,
)
from .transformers_outputs import CACHE, RecurrentDepthOutput, RecurrentDepthStep
from .weights import not_whole, refuse_changed

# Drawn outside of compiled code: a C++ compiler takes whole numbers never to overflow, as these do, and so computes others (torch 2.13).
# Here, and not where they are defined, as torch's own compiler takes time to load and nothing else compiles them.
PositionRandom._halves = torch.compiler.disable(PositionRandom._halves)


class UncachedSlot:
    """Stands where a layer expects a slot of a cache, and keeps nothing: through it the layers learn of padding."""

    def __init__(self, place: CachePlace):
        self.place = place

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The new ones alone."""
        return keys, values


class RecurrentDepthForCausalLM(PreTrainedModel, GenerationMixin):
    """A recurrent-depth language model, trained as denoising blocks, by backpropagation through time or in one pass."""

    config_class = RecurrentDepthConfig
    base_model_prefix = "model"  # files hold the names of RecurrentDepthLM, which is `self.model`
    main_input_name = "input_ids"
    _no_split_modules = ["RecurrentDepthLM"]
    _supports_sdpa = True
    _is_stateful = True  # its cache cannot check the tokens that another model proposes
    accepts_loss_kwargs = True  # Trainer looks here whether to give num_items_in_batch

    def __init__(self, config: RecurrentDepthConfig):
        super().__init__(config)
        self.model = RecurrentDepthLM(config.model_config())
        self.noise = config.noise_schedule()
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: RecurrentDepthLM has initialised itself, and weights that are missing in a file are refused."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *arguments, output_loading_info: bool = False, **settings):
        """As transformers has it, but that weights are read from safetensors alone: other files would be unpickled.

        ValueError, in one sentence, for weights that are not whole, or not all of this model's.
        """
        if pretrained_model_name_or_path is not None:
            folder = Path(pretrained_model_name_or_path, settings.get("subfolder") or "")
            refuse_changed(folder)
            if folder.is_dir():
                check_files_beside(folder)
                pretrained_model_name_or_path = Path(pretrained_model_name_or_path).absolute()  # `save_pretrained` copies from there
        try:
            model, found = super().from_pretrained(
                pretrained_model_name_or_path, *arguments, output_loading_info=True, **settings | {"use_safetensors": True}
            )
        except (SafetensorError, OSError) as error:
            raise ValueError(not_whole(pretrained_model_name_or_path, error)) from None
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(f"the weights in {pretrained_model_name_or_path} are not of the shapes that its config.json gives: export the "
                             "model again") from None
        wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[kind]]
        if wrong:
            raise ValueError(f"the weights in {pretrained_model_name_or_path} are not those of its config.json, beginning with {wrong[0]}: "
                             "export the model again")
        return (model, found) if output_loading_info else model

    def save_pretrained(self, save_directory, *arguments, state_dict: dict[str, Tensor] | None = None, **settings):
        """As transformers has it, with the names that RecurrentDepthLM gives its weights, and with all files of code that an export has."""
        state = self.state_dict() if state_dict is None else state_dict
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        # transformers takes along what this file imports; the folder that it was loaded from has the program as well.
        origin, target = self.config.name_or_path if self.is_remote_code() else "", Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for file in Path(origin).glob("*.py") if origin else ():
            if not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)
        super().save_pretrained(save_directory, *arguments, state_dict=state, **settings)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.model.embedding

    def set_input_embeddings(self, value: torch.nn.Embedding) -> None:
        self.model.embedding = value
        if value.num_embeddings != self.model.config.vocab_size:  # new rows stand behind the unused ones
            self.model.config.vocab_size, self.model.config.unused_tokens = value.num_embeddings, 0

    def get_output_embeddings(self) -> None:
        """None: the head multiplies with the embedding's own weight."""

    @property
    def denoising(self) -> bool:
        """Whether its iterations are denoising blocks; unrolled ones otherwise."""
        return self.model.config.noise_conditioning

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: RecurrentDepthCache | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, num_iterations: int | None = None,
        seed: int | list[int] | None = None, solver: str | None = None, chain_temperature: float | None = None,
        chain_top_p: float | None = None, chain_top_k: int | None = None, chain_readout: str | None = None, exit: str | None = None,
        exit_threshold: float | None = None, exit_minimum: int | None = None, caches: int | None = None, cache_order: str | None = None,
        output_hidden_states: bool | None = None, output_iteration_logits: bool | None = None, logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None, return_dict: bool | None = None, inputs_embeds: None = None,
        output_attentions: bool | None = None, cache: RecurrentDepthCache | None = None,
    ) -> RecurrentDepthOutput | tuple:
        """input_ids [B, T] -> logits; see the top of this file for what they are with and without a cache.

        attention_mask: [B, T] and, with a cache, [B, past + T]; 0 at the left is padding, and at the right of a text that is scored.
        labels: as input_ids, -100 where a token does not count; each is predicted from those before it. num_iterations: K, as trained where
        None. seed: of the noise: one for all sequences (0 where None) or one for each; a cache goes on with those it has where None.
        solver ... cache_order: the chain's, as in `Sampling`. logits_to_keep: the last so many positions, or all where 0, of a text that is
        scored. num_items_in_batch: what the sum of cross-entropies is divided by; the number of labels where None.
        cache: what past_key_values is called by transformers from 5.24 on; either may be given. inputs_embeds, output_attentions: refused;
        peft gives them in any case.
        A text that is scored may hold several documents, each begun by bos, which a model that was trained so keeps apart.
        ValueError, in one sentence, for token ids out of range, no tokens, and settings that do not go together.
        """
        if inputs_embeds is not None or output_attentions:
            raise ValueError("this model reads input_ids and gives out no attentions: leave out inputs_embeds and output_attentions")
        self._check_ids(input_ids)
        given = {name: value for name, value in locals().items() if name in CHAIN_SETTINGS and value is not None}
        sampling = chain_sampling(given)
        if sampling.changes_the_chain and not self.denoising:
            raise ValueError("solver and chain_* are settings of a denoising model, and this one is not: leave them out")
        cache = past_key_values if cache is None else cache
        chained = cache is not None or bool(use_cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        wanted = bool(output_hidden_states), bool(output_iteration_logits)
        if chained:
            if labels is not None:
                raise ValueError("labels are for a text that is scored, without a cache: leave out use_cache and the cache")
            output = self._next(input_ids, attention_mask, cache, num_iterations, seed, sampling if given else None, wanted)
        else:
            if given:
                raise ValueError(f"{sorted(given)[0]} is a setting of generation: use it with use_cache=True")
            output = self._score(input_ids, attention_mask, num_iterations, seed, logits_to_keep if labels is None else 0, wanted)
            if labels is not None:
                if labels.shape != input_ids.shape:
                    raise ValueError(f"labels must be {list(input_ids.shape)}, as input_ids are, and they are {list(labels.shape)}")
                self._check_ids(labels.masked_fill(labels == -100, 0), "labels")
                output.loss = mean_loss(output.logits, labels, attention_mask, num_items_in_batch)
                output.logits = output.logits[:, -logits_to_keep:]
        return output.to_tuple() if return_dict is False else output

    def _check_ids(self, ids: Tensor, name: str = "input_ids") -> None:
        if ids.ndim != 2 or ids.numel() < 1:
            raise ValueError(f"{name} must be [batch, tokens] with at least one token, and they are {list(ids.shape)}: begin with bos")
        if ids.is_floating_point():
            raise ValueError(f"{name} must be whole numbers, and they are {ids.dtype}: encode with the model's own tokenizer")
        if torch.compiler.is_compiling() or ids.shape[1] == 1 and ids.is_cuda:  # a token that was just generated: asking would wait
            return
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary of {self.config.vocab_size}: encode with "
                             "its own tokenizer")

    def _iterations(self, asked: int | None) -> int:
        if asked is not None and not (hasattr(asked, "__index__") and 1 <= asked <= MOST_ITERATIONS):
            raise ValueError(f"num_iterations must be a whole number from 1 to {MOST_ITERATIONS}, and it is {asked!r}")
        return asked or self.config.num_iterations

    def _seeds(self, seed: int | list[int] | None, ids: Tensor) -> Tensor:
        return row_seeds(seed_list(0 if seed is None else seed, len(ids)), len(ids)).to(ids.device)

    def _next(self, ids: Tensor, mask: Tensor | None, cache: RecurrentDepthCache | None, iterations: int | None,
              seed: int | list[int] | None, sampling: Sampling | None, wanted: tuple[bool, bool]) -> RecurrentDepthOutput:
        cache = RecurrentDepthCache() if cache is None else cache
        check_kind(cache)
        if not cache.started:
            padding = padding_columns(mask, ids.shape, scored=False)
            cache.start(self.model, self.noise, self._iterations(iterations), sampling or Sampling(), self._seeds(seed, ids), padding)
        else:
            cache.check(self.model, iterations, sampling, len(ids))
            if seed is not None:
                cache.seed_with(self._seeds(seed, ids))
            if mask is not None and not (torch.compiler.is_compiling() or ids.shape[1] == 1 and ids.is_cuda):  # as in `_check_ids`
                cache.check_mask(mask, ids.shape[1])
        states, logits = [], []

        def observe(state: Tensor, read: Tensor | None) -> None:
            if wanted[0]:
                states.append(state)
            if wanted[1] and read is not None:
                logits.append(read)

        if any(wanted) and cache.sampling.exit != "never":
            raise ValueError("the iterations of rows that end apart cannot be given out together: leave out exit, or the outputs")
        if wanted[1] and not self.denoising:
            raise ValueError("an unrolled model reads out once for each token of a chain: ask for iteration_logits without a cache")
        last = cache.logits(ids, observe if any(wanted) else None)
        if wanted[0] and self.denoising:
            states.append(last.float().softmax(-1).unsqueeze(1) @ self.model.unit_embeddings())
        return RecurrentDepthOutput(
            logits=last.unsqueeze(1), hidden_states=tuple(states) if wanted[0] else None,
            iteration_logits=tuple(logits) if wanted[1] else None, iterations_used=cache.iterations_used, **{CACHE: cache},
        )

    def _score(self, ids: Tensor, mask: Tensor | None, iterations: int | None, seed: int | list[int] | None, keep: int,
               wanted: tuple[bool, bool]) -> RecurrentDepthOutput:
        if self.denoising and iterations not in (None, 1):
            raise ValueError("a denoising model scores a text in one pass from pure noise, and its further iterations are for generation: "
                             "leave num_iterations out, or set use_cache=True")
        iterations = 1 if self.denoising else self._iterations(iterations)
        model, documents = self.model, self.model.document_mask(ids)
        slots, random = self._uncached(ids, mask, seed, documents)
        prelude, core, coda = (slots and slots * n for n in
                               (model.config.prelude_layers, model.config.core_layers, model.config.coda_layers))
        e = model.prelude(ids, prelude, documents)
        state, conditioning, evidence = self._initial(random, e), None, None
        states, logits = [state], []
        for k in range(iterations):
            if self.denoising:
                sigma = torch.full((1, 1), self.noise.levels(1)[0], device=ids.device)
                state, conditioning, evidence = denoise_state(model, state, e, sigma, self._sigma_data, core, mask=documents)
            else:
                state = model.iterate(state, e, None, core, mask=documents)
            states.append(state)
            if wanted[1] or k + 1 == iterations:
                hidden = model.coda(state, conditioning, coda, documents)[:, -keep:]
                logits.append(model.head(hidden, evidence if evidence is None else evidence[:, -keep:]))
        return RecurrentDepthOutput(
            logits=logits[-1], hidden_states=tuple(states) if wanted[0] else None, iteration_logits=tuple(logits) if wanted[1] else None
        )

    @property
    def _sigma_data(self) -> float:
        return self.noise.sigma_data(self.model.config.width)

    def _uncached(self, ids: Tensor, mask: Tensor | None, seed: int | list[int] | None,
                  documents: Tensor | None = None) -> tuple[list | None, PositionRandom]:
        """A slot that knows of padding, and of documents, in a list, or None where there is none; and the positions' random numbers."""
        padding, slots = padding_columns(mask, ids.shape, scored=True), None
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        if padding is not None:
            place = CachePlace(ids.shape[1], ids.device)
            place.padding = padding
            place.begin(self.model.rotary, ids.shape[1])
            place.mask = place.mask if documents is None else place.mask & (documents == 0)
            positions, slots = place.positions, [UncachedSlot(place)]
        return slots, TextRandom(self._seeds(seed, ids)).at(positions.expand(ids.shape))

    def _initial(self, random: PositionRandom, e: Tensor) -> Tensor:
        if self.denoising:
            return self.noise.levels(1)[0] * random.normal(STATE, self.config.hidden_size)
        if self.model.config.initial_state == "zero":
            return torch.zeros_like(e)
        return initial_state(random.uniform(STATE, self.config.hidden_size))

    def embed_inputs(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] -> e [B, T, d], which every iteration is given."""
        self._check_ids(input_ids)
        return self.model.prelude(input_ids)

    def initial_state(self, input_ids: Tensor, seed: int | list[int] | None = None) -> Tensor:
        """The states [B, T, d] that positions start from: pure noise at sigma_max, or an unrolled model's random state or zeros."""
        _, random = self._uncached(input_ids, None, seed)
        return self._initial(random, torch.zeros(*input_ids.shape, self.config.hidden_size, device=input_ids.device))

    def with_known_targets(self, state: Tensor, input_ids: Tensor, iteration: int, num_iterations: int | None = None,
                           seed: int | list[int] | None = None) -> Tensor:
        """States [B, T, d] for an iteration, from 0, of so many: of all positions but the last their next tokens', noised to its level.

        ValueError for an unrolled model, and for an iteration that there is not.
        """
        if not self.denoising:
            raise ValueError("with_known_targets is of a denoising model, and this one is not: leave it out")
        _, random = self._uncached(input_ids, None, seed)
        iterations = self._iterations(num_iterations)
        _check_iteration(iteration, iterations)
        sigma = self.noise.levels(iterations)[iteration]
        known = self.model.unit_embedding(input_ids[:, 1:]) + sigma * random.normal(STATE, self.config.hidden_size)[:, :-1]
        return torch.cat((known, state[:, -1:]), dim=1)

    def iterate_one_step(self, state: Tensor, e: Tensor, iteration: int, num_iterations: int | None = None,
                         previous: Tensor | None = None) -> RecurrentDepthStep:
        """One iteration, from 0, of so many, by hand, on all positions: states and e [B, T, d].

        A denoising model takes Euler's step to the next iteration's level. previous: the estimate of the iteration before, for a
        model with self-conditioning. ValueError for an iteration that there is not.
        """
        iterations, model = self._iterations(num_iterations), self.model
        _check_iteration(iteration, iterations)
        if not self.denoising:
            state = model.iterate(state, e)
            logits = model.readout(state)
            return RecurrentDepthStep(state=state, logits=logits, estimate=model.expected_embedding(logits))
        levels = self.noise.levels(iterations)
        sigma = torch.full((1, 1), levels[iteration], device=state.device)
        block = model.config.block_of(iteration, iterations)
        hidden, conditioning, evidence = denoise_state(model, state, e, sigma, self._sigma_data, None, previous, block)
        logits = model.readout(hidden, conditioning, None, evidence)
        estimate = model.expected_embedding(logits)
        return RecurrentDepthStep(state=euler_step(state, estimate, *levels[iteration : iteration + 2]), logits=logits, estimate=estimate)

    def prepare_inputs_for_generation(self, input_ids: Tensor, tokenizer=None, seed=None, **kwargs) -> dict:  # it looks for `kwargs`
        """As transformers has it, without the tokenizer that `generate` is given to end texts at strings, and without a seed after the
        first step, when the cache has it. ValueError for a text that does not go beyond the cache: transformers would go on all the same.
        """
        new, given = kwargs.get("next_sequence_length"), input_ids.shape[1]
        if new is not None and new < 1:
            raise ValueError(f"the cache holds {given - new} positions, and a text of {given} tokens is to go on: give those that it holds "
                             "and at least one more, or crop it")
        first = kwargs.get("is_first_iteration", True)
        return super().prepare_inputs_for_generation(input_ids, **kwargs) | ({"seed": seed} if first else {})

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, generation_mode, batch_size: int,
                                      max_cache_length: int) -> None:
        """Called by `generate`: settings that its config has, a cache with room for all that is to come, and a seed for each sequence.

        Greedy search that is given none goes on with those of the cache.
        """
        refuse_what_does_not_go(generation_config, model_kwargs)
        fill_in(model_kwargs, generation_config, self.generation_config)
        cache = model_kwargs.get(CACHE)
        if cache is None:
            cache = model_kwargs[CACHE] = RecurrentDepthCache(capacity=max_cache_length)
        else:
            check_kind(cache)
            cache._is_user_defined = True  # as transformers marks it
        cache.draw_with(**drawing_settings(generation_config))
        seed = model_kwargs.get("seed")
        if not cache.started or seed is not None or generation_config.do_sample:
            model_kwargs["seed"] = generation_seeds(seed, generation_config, batch_size)


def _check_iteration(iteration: int, iterations: int) -> None:
    if not (hasattr(iteration, "__index__") and 0 <= iteration < iterations):
        raise ValueError(f"iteration must be one of 0 to {iterations - 1}, and it is {iteration}")
