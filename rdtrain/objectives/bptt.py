"""The baseline: backpropagation through the unrolled iterations, truncated as in Huginn (arXiv 2502.05171) or full.

The first `free_iterations` run without gradient, the last `trained_iterations` carry it. The prelude is trained through the
adapters of the latter.
"""

import torch
from torch import Tensor

from ..flops import forward_flops
from ..model.recurrent import ModelConfig, RecurrentDepthLM, initial_state
from ..randomness import SampleRandom
from .base import Loss, Objective, sum_and_count


class BackpropagationThroughTime(Objective):
    """Unrolled training at one fixed depth."""

    model_features = {}

    def __init__(self, free_iterations: int, trained_iterations: int, iterations: int):
        """iterations: K of inference, at which the held-out likelihood is taken."""
        self.free_iterations = free_iterations
        self.trained_iterations = trained_iterations
        self.iterations = iterations

    def __call__(self, model: RecurrentDepthLM, tokens: Tensor, random: SampleRandom) -> Loss:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        e = model.prelude(inputs)
        state = initial_state(random.uniform(inputs.shape[1], model.config.width)).to(e.dtype)
        with torch.no_grad():
            for _ in range(self.free_iterations):
                state = model.iterate(state, e)
        for _ in range(self.trained_iterations):
            state = model.iterate(state, e)
        losses = model.losses(state, targets)
        return Loss(losses.mean(), {"loss": sum_and_count(losses)})

    def next_token_logits(self, model: RecurrentDepthLM, inputs: Tensor, random: SampleRandom) -> Tensor:
        """All K iterations from a random state."""
        e = model.prelude(inputs)
        state = initial_state(random.uniform(inputs.shape[1], model.config.width)).to(e.dtype)
        for _ in range(self.iterations):
            state = model.iterate(state, e)
        return model.readout(state)

    def training_flops(self, config: ModelConfig, sequence_length: int) -> float:
        parts = forward_flops(config, sequence_length)
        trained = parts.prelude + self.trained_iterations * parts.iterate + parts.readout
        return 3 * trained + self.free_iterations * parts.iterate
