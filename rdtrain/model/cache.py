"""Key and value cache of K-iteration inference: one slot for each (iteration, layer).

A recurrent-depth model visits its core K times per token, and a token at iteration k attends to the past as it stood at iteration
k. So the core (and, for denoising models, the coda, which also runs at every iteration) owns K times as many slots as it has
layers. Slots are allocated whole at the start: generation never reallocates.
"""

import torch
from torch import Tensor


class CacheSlot:
    """Keys and values of one layer at one iteration: two tensors [B, H, capacity, D], of which `length` positions are filled."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.length = keys, values, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, H, T, D] of new positions; return all filled keys and values. ValueError when the capacity is exceeded."""
        stop = self.length + keys.shape[2]
        if stop > self.keys.shape[2]:
            raise ValueError(f"the key-value cache holds {self.keys.shape[2]} positions, and {stop} were asked of it")
        self.keys[:, :, self.length : stop] = keys
        self.values[:, :, self.length : stop] = values
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class KeyValueCache:
    """All slots of one generation.

    `prelude[layer]`, `core[iteration][layer]` and `coda[iteration][layer]` are what `RecurrentDepthLM.prelude`, `iterate` and
    `readout` take as their `cache`. `coda_iterations` is K for a denoising model, whose coda runs at every iteration, and 1
    for a model that reads out once.
    """

    def __init__(self, config, iterations: int, coda_iterations: int, batch: int, capacity: int, like: Tensor):
        """config: ModelConfig; `like` gives device and dtype."""
        per_token = iterations * config.core_layers + coda_iterations * config.coda_layers + config.prelude_layers
        shape = (per_token, 2, batch, config.heads, capacity, config.head_width)
        slots = iter([CacheSlot(keys, values) for keys, values in torch.zeros(shape, device=like.device, dtype=like.dtype)])
        self.prelude = [next(slots) for _ in range(config.prelude_layers)]
        self.core = [[next(slots) for _ in range(config.core_layers)] for _ in range(iterations)]
        self.coda = [[next(slots) for _ in range(config.coda_layers)] for _ in range(coda_iterations)]
