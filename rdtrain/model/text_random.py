"""Random numbers of generation: each a function of a text's seed, a position and a purpose, and of nothing else.

So what a text draws depends neither on the batch that it is generated in nor on its row there, and nothing has a state that would have to
be kept, or wound back, with the cache. All rows are drawn at once, by whole-number arithmetic on tensors: nothing waits for the device,
and a CUDA graph may hold it.

The numbers are those of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): the output with
index i of the generator that starts at s is mix(s + (i + 1) GOLDEN) modulo 2^64. A text's seed starts one; its output at a position
starts the next, whose output at a purpose starts the one whose outputs are used, two numbers from the halves of each.
"""

import math

import torch
from torch import Tensor


def _signed(word: int) -> int:
    return word - (word >> 63 << 64)


GOLDEN = _signed(0x9E3779B97F4A7C15)
MULTIPLIERS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)

# Purposes. An iteration that draws has two of its own, counted on from the last of these: one for its token and one for its noise.
STATE, TOKEN, ITERATION = 0, 1, 2


def _shifted(word: Tensor, bits: int) -> Tensor:
    return (word >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts the sign in


def output(start: Tensor, index: Tensor | int) -> Tensor:
    """SplitMix64's output with this index, from 0, of the generators at `start`: int64 of their broadcast shape."""
    step = (index + 1) * GOLDEN
    word = start + (_signed(step % 2**64) if isinstance(step, int) else step)
    word = (word ^ _shifted(word, 30)) * MULTIPLIERS[0]
    word = (word ^ _shifted(word, 27)) * MULTIPLIERS[1]
    return word ^ _shifted(word, 31)


class PositionRandom:
    """The random numbers of some positions, fp32 [B, n, count]: the same for the same purpose and count, however often asked for."""

    def __init__(self, starts: Tensor):
        """starts: int64 [B, n]."""
        self._starts = starts

    def normal(self, purpose: int, count: int) -> Tensor:
        """Standard normal numbers (Box and Muller 1958)."""
        high, low = self._halves(purpose, count)
        radius = ((high + 0.5) * 2**-32).log().mul(-2).sqrt()  # high + 0.5 may round to 2^32: then the radius is 0
        angle = low * (2 * math.pi * 2**-32)
        return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=-1)[..., :count]

    def uniform(self, purpose: int, count: int) -> Tensor:
        """Uniform numbers in (0, 1); the small ones are fine-grained, the largest is 1 - 2^-24."""
        return ((torch.cat(self._halves(purpose, count), dim=-1) + 0.5) * 2**-32).clamp(max=1 - 2**-24)[..., :count]

    def exponential(self, purpose: int, count: int) -> Tensor:
        """Exponential numbers of mean 1; never 0."""
        return self.uniform(purpose, count).neg_().log1p_().neg_()

    def last(self) -> "PositionRandom":
        """Of the last position alone."""
        return PositionRandom(self._starts[:, -1:])

    def rows(self, rows: Tensor) -> "PositionRandom":
        """Of some rows [R] alone."""
        return PositionRandom(self._starts[rows])

    def _halves(self, purpose: int, count: int) -> tuple[Tensor, Tensor]:
        words = output(
            output(self._starts, purpose).unsqueeze(-1), torch.arange((count + 1) // 2, device=self._starts.device)
        )
        return _shifted(words, 32).float(), (words & 0xFFFFFFFF).float()


class TextRandom:
    """The random numbers of a batch of texts. `seeds`, int64 [B], may be written to between texts."""

    def __init__(self, seeds: Tensor):
        self.seeds = seeds

    def at(self, positions: Tensor) -> PositionRandom:
        """positions: int64 [B or 1, n], each counted from its text's start."""
        return PositionRandom(output(self.seeds.unsqueeze(-1), positions))


def row_seeds(seed: int | list[int], rows: int) -> Tensor:
    """Seeds int64 [rows] on the CPU: those given, or whole numbers that count on from the one given, of which 64 bits count.

    ValueError when there are not as many as rows.
    """
    seeds = list(range(seed, seed + rows)) if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise ValueError(f"a batch of {rows} texts needs as many seeds, and {len(seeds)} are given: give each text one, or one for all")
    return torch.tensor([_signed(one % 2**64) for one in seeds])
