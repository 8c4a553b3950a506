"""Random numbers that belong to a sample, not to a process.

Noise is a function of (seed, global index of the sample) alone. So the losses of a step do not depend on how many ranks share it,
and a resumed run draws what an uninterrupted one would have drawn, without any generator state to store.

What a whole step shares (an unrolled model's depth, the block that is trained) is a function of (seed, step), the same on every rank.

torch's CPU generator takes 32 bits of a seed, so among some ten thousand samples two may share their noise; it does no harm.
"""

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor


class SampleRandom:
    """A stream of random numbers for each sample of a micro-batch."""

    def __init__(self, seed: int | str, indices: Sequence[int], device: torch.device, step: int = 0):
        """indices: the global sample index of each of the B rows; step: the optimizer step that they belong to, from 0."""
        self.device = device
        self.indices = list(indices)
        self._seed, self._step = seed, step
        self._generators = []
        for index in indices:
            digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
            generator = torch.Generator(device)
            generator.manual_seed(int.from_bytes(digest, "little") >> 1)
            self._generators.append(generator)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in (0, 1), fp32 [B, *shape]; 0 itself never comes, so an inverse distribution function may follow."""
        rows = [torch.rand(shape, generator=generator, device=self.device) for generator in self._generators]
        return torch.stack(rows).clamp(min=2**-25)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, fp32 [B, *shape]."""
        return torch.stack([torch.randn(shape, generator=generator, device=self.device) for generator in self._generators])

    def of_step(self) -> random.Random:
        """A generator, always at its start, that depends on (seed, step) alone: for draws that all ranks must share."""
        return random.Random(f"{self._seed}/step/{self._step}")
