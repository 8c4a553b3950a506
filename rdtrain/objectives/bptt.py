"""The baseline: backpropagation through the unrolled iterations, truncated as in Huginn (arXiv 2502.05171), full, or local.

The depth of a step is fixed or drawn once for all of its micro-batches on all ranks. The first iterations run without gradient, the
last ones carry it. The prelude is trained through the adapters of the latter.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..flops import forward_flops, recomputed_in_layers
from ..model.recurrent import ModelConfig, RecurrentDepthLM, initial_state
from ..randomness import SampleRandom
from .base import Loss, Objective, ObjectiveSettings, inputs_and_targets, sum_and_count
from .depth import FixedDepth, PoissonDepth


class BackpropagationThroughTime(Objective):
    """Unrolled training from a random state."""

    model_fields = {}
    repeats_core = True

    def __init__(self, settings: ObjectiveSettings, iterations: int):
        """iterations: K of inference, at which the held-out likelihood is taken, and the depth or its mean in training.

        UserError for more trained iterations than a fixed depth has.
        """
        if settings.gradient == "truncated" and settings.depth == "fixed" and settings.trained_iterations > iterations:
            raise UserError(
                f"objective.trained_iterations={settings.trained_iterations} is more than the fixed depth model.iterations={iterations}: "
                "lower it, or set objective.gradient=full"
            )
        self.iterations = iterations
        self.depth = FixedDepth(iterations) if settings.depth == "fixed" else PoissonDepth(iterations)
        self.trained_limit = {"full": math.inf, "truncated": settings.trained_iterations, "local": 1}[settings.gradient]
        self.activation_checkpointing = settings.activation_checkpointing

    def __call__(self, model: RecurrentDepthLM, tokens: Tensor, random: SampleRandom) -> Loss:
        inputs, targets = inputs_and_targets(tokens)
        mask = model.document_mask(inputs)
        depth = self.depth.draw(random.of_step())
        trained = min(depth, self.trained_limit)
        e = model.prelude(inputs, None, mask)
        state = initial_state(random.uniform(inputs.shape[1], model.config.width)).to(e.dtype)
        copies = model.core_copies()
        with torch.no_grad():
            for _ in range(depth - trained):
                state = model.iterate(state, e, mask=mask, copies=copies)
        for _ in range(trained):
            if self.activation_checkpointing:
                # The core draws no random numbers, so there is no generator to wind back.
                options = {"use_reentrant": False, "preserve_rng_state": False}
                state = checkpoint(model.iterate, state, e, mask=mask, copies=copies, **options)
            else:
                state = model.iterate(state, e, mask=mask, copies=copies)
        value, losses = model.loss(state, targets, mask=mask)
        depth_metric = (torch.full((), float(depth), device=losses.device), torch.ones((), device=losses.device))
        return Loss(value, {"loss": sum_and_count(losses, targets), "depth": depth_metric})

    def shared_draw(self, random: SampleRandom) -> int:
        return self.depth.draw(random.of_step())

    def next_token_logits(self, model: RecurrentDepthLM, inputs: Tensor, random: SampleRandom) -> Tensor:
        """All K iterations from a random state."""
        mask = model.document_mask(inputs)
        e = model.prelude(inputs, None, mask)
        state = initial_state(random.uniform(inputs.shape[1], model.config.width)).to(e.dtype)
        copies = model.core_copies()
        for _ in range(self.iterations):
            state = model.iterate(state, e, mask=mask, copies=copies)
        return model.readout(state, mask=mask)

    def training_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """The mean over the depth's distribution, exact.

        These are the model's operations: what activation checkpointing computes a second time is not counted.
        """
        parts = forward_flops(config, sequence_length)
        trained = self.depth.mean_of_minimum(self.trained_limit)
        return 3 * (parts.prelude + trained * parts.iterate + parts.readout) + (self.depth.mean - trained) * parts.iterate

    def recomputed_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """With activation checkpointing each iteration that carries gradient runs forward twice."""
        trained = self.depth.mean_of_minimum(self.trained_limit)
        interval = self.layer_checkpointing_interval
        again = recomputed_in_layers(config, sequence_length, self.layer_checkpointing, interval, trained)
        if self.activation_checkpointing:
            parts = forward_flops(config, sequence_length)
            # What is left for an iteration's last layer, if checkpointed, is its input, where PyTorch stops: that will be computed again.
            last = self.layer_checkpointing == "full" and config.core_layers - 1 in config.checkpointed_layers(interval)[1]
            again += trained * (parts.iterate - (parts.layer if last else 0))
        return again
