"""The control without recurrence: an ordinary language model, which is prelude, core once from a state of zeros, and coda.

It has the layers of the other objectives' models and what one pass costs, so it shows what that compute buys without any iteration.
"""

import torch
from torch import Tensor

from ..errors import UserError
from ..flops import forward_flops
from ..model.recurrent import ModelConfig, RecurrentDepthLM
from ..randomness import SampleRandom
from .base import Loss, Objective, inputs_and_targets, sum_and_count


class OnePass(Objective):
    """Next-token prediction in one deterministic pass: no random number bears on the loss."""

    model_fields = {"initial_state": "zero"}

    def __init__(self, iterations: int):
        """iterations: the model's K. UserError when it is not 1."""
        if iterations != 1:
            raise UserError(f"objective.name=one_pass runs the core once, and model.iterations is {iterations}: set model.iterations=1")
        self.training_pass = self._training_pass

    def __call__(self, model: RecurrentDepthLM, tokens: Tensor, random: SampleRandom) -> Loss:
        value, losses = self.training_pass(model, tokens)
        return Loss(value, {"loss": sum_and_count(losses, inputs_and_targets(tokens)[1])})

    def _training_pass(self, model: RecurrentDepthLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = inputs_and_targets(tokens)
        mask = model.document_mask(inputs)
        e = model.prelude(inputs, None, mask)
        return model.loss(model.iterate(torch.zeros_like(e), e, mask=mask), targets, mask=mask)

    def next_token_logits(self, model: RecurrentDepthLM, inputs: Tensor, random: SampleRandom) -> Tensor:
        """The one iteration, from zeros."""
        mask = model.document_mask(inputs)
        e = model.prelude(inputs, None, mask)
        return model.readout(model.iterate(torch.zeros_like(e), e, mask=mask), mask=mask)

    def training_flops(self, config: ModelConfig, sequence_length: int) -> float:
        parts = forward_flops(config, sequence_length)
        return 3 * (parts.prelude + parts.iterate + parts.readout)
