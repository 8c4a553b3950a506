"""Random numbers that belong to a sample, not to a process.

Noise is a function of (seed, global index of the sample) alone. So the losses of a step do not depend on how many ranks share it,
and a resumed run draws what an uninterrupted one would have drawn, without any generator state to store.

torch's CPU generator takes 32 bits of a seed, so among some ten thousand samples two may share their noise; it does no harm.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class SampleRandom:
    """A stream of random numbers for each sample of a micro-batch."""

    def __init__(self, seed: int | str, indices: Sequence[int], device: torch.device):
        """indices: the global sample index of each of the B rows."""
        self.device = device
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
