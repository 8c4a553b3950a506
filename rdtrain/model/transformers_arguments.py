"""What callers of the class for transformers give it, read and checked: seeds, masks, samplers' settings, labels. Needs torch alone."""

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .description import fits
from .sampling import Sampling

CHAIN_SETTINGS = {field.name: field.type for field in fields(Sampling) if field.name not in ("temperature", "top_k", "top_p", "min_p")}
"""What of a Sampling `forward` takes, and of which type: the rest is done by transformers' samplers."""


def seed_list(seed, rows: int) -> list[int]:
    """One for each row from one for all, or from a list, whose length is not looked at; of torch's and numpy's whole numbers too.

    ValueError for anything else.
    """
    given = _plain(seed)
    given = [given] * rows if isinstance(given, int) else given
    seeds = [_plain(one) for one in given] if isinstance(given, list | tuple | range) else [None]
    if not all(isinstance(one, int) for one in seeds):
        raise ValueError(f"seed must be a whole number or a list of them, and it is {seed!r}")
    return seeds


def generation_seeds(seed, config, prompts: int) -> list[int]:
    """One for each row that `generate` makes of so many prompts. ValueError as `seed_list` has it.

    Where no seed is given, sampling draws seeds from torch's own generator and greedy search takes 0. Copies of one prompt, but for the
    beams of a search, count on from its seed: they would all be the same text.
    """
    if seed is None:
        seed = torch.randint(2**62, (prompts,)).tolist() if config.do_sample else 0
    seeds, copies = seed_list(seed, prompts), 1 if config.num_beams > 1 else config.num_return_sequences
    if len(seeds) != prompts:  # for each row already, or refused where it has to be one for each
        return seeds
    return [one + copy for one in seeds for copy in range(copies) for _ in range(config.num_beams)]


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else value


def chain_sampling(given: dict) -> Sampling:
    """The Sampling of settings by name. ValueError, in one sentence, for values that are none, also of another type."""
    given = {name: _plain(value) for name, value in given.items()}
    for name, value in given.items():
        if not fits(value, CHAIN_SETTINGS[name]):
            kind = {int: "a whole number", str: "a name"}.get(CHAIN_SETTINGS[name], "a number")
            raise ValueError(f"{name} must be {kind}, and it is {value!r}")
    return Sampling(**given)


def fill_in(given: dict, config, own) -> None:
    """Adds to what `forward` is given what a generation_config says of the chain, its iterations and its seed.

    `generate` moves arguments there that the config has already, and leaves those alone that only the config has. own: the config of the
    model, before that: its threshold is one of its own exit, and not of another one that is asked for.
    """
    for name in (*CHAIN_SETTINGS, "num_iterations", "seed"):
        if given.get(name) is None and getattr(config, name, None) is not None:
            given[name] = getattr(config, name)
    if given.get("exit") != getattr(own, "exit", None) and given.get("exit_threshold") == getattr(own, "exit_threshold", None):
        given.pop("exit_threshold", None)


def refuse_what_does_not_go(config, given: dict) -> None:
    """ValueError, in one sentence, for what `generate` offers and this model cannot do. given: what it hands on to `forward`."""
    if config.use_cache is False or config.cache_implementation is not None:
        raise ValueError("this model generates with a cache of its own: leave use_cache and cache_implementation as they are")
    if config.prefill_chunk_size is not None:  # the last token of each piece would be denoised, as if its next were unknown
        raise ValueError("this model reads a prompt in one pass: leave out prefill_chunk_size")
    if config.guidance_scale not in (None, 1):  # its second pass is told neither the iterations and settings of the chain nor the seed
        raise ValueError("this model cannot be guided by a second prompt, whose chain would be another one: leave out guidance_scale")
    if given.get("output_iteration_logits"):
        raise ValueError("generate gives out no iteration_logits: ask forward for them, or leave out output_iteration_logits")


def drawing_settings(config) -> dict[str, float]:
    """What transformers' samplers are told, as a `Sampling` names it, for the iterations before the last, which they do not see."""
    if config.do_sample:
        given = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p}
        return {name: value for name, value in given.items() if value is not None}
    return {"temperature": 0.0} if config.num_beams == 1 else {}


def padding_columns(mask: Tensor | None, shape: torch.Size, scored: bool) -> Tensor | None:
    """The columns [B] at the left of each row that are padding, None where there are none.

    shape: of the input_ids. ValueError for a mask of another one, with holes or an empty row, and, but for a text that is scored, padding
    at the right.
    """
    if mask is None:
        return None
    if mask.shape != shape:
        raise ValueError(f"attention_mask must be {list(shape)}, as input_ids are, and it is {list(mask.shape)}")
    shown, length = mask.bool(), shape[1]
    if bool(shown.all()):
        return None
    widths = (shown.cumsum(1) == 0).sum(1)
    column = torch.arange(length, device=mask.device)
    stop = widths + shown.sum(1) if scored else torch.full_like(widths, length)
    if not bool((shown == ((column >= widths.unsqueeze(1)) & (column < stop.unsqueeze(1)))).all()) or int(widths.max()) == length:
        raise ValueError("attention_mask must hide columns at the left of a row alone, and not all of them: set padding_side='left'")
    return widths if bool(widths.any()) else None


def mean_loss(logits: Tensor, labels: Tensor, mask: Tensor | None, count: Tensor | int | None) -> Tensor:
    """Cross-entropy in nats of labels [B, T] from logits [B, T, V] of the positions before them, over those that are not -100.

    A row's first token has none before it, whether the row begins with it or with padding.
    """
    targets = labels[:, 1:] if mask is None else labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten().long(), ignore_index=-100, reduction="sum")
    return losses / ((targets != -100).sum() if count is None else count)
