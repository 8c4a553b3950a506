"""DiffusionBlocks: each of the K iterations is a denoising block, trained on its own, in a single pass (arXiv 2506.14202).

For each sequence: draw an iteration k, draw a noise level sigma in its interval, noise the targets, run prelude, core and coda
ONCE, take the cross-entropy of the next token. No iteration sees another, so there is nothing to unroll.
"""

import torch
from torch import Tensor

from ..flops import forward_flops
from ..model.denoiser import denoise_state, feedback
from ..model.noise import EquiProbabilityPartition, LogNormalNoise, NoiseSettings
from ..model.recurrent import ModelConfig, RecurrentDepthLM, token_losses
from ..randomness import SampleRandom
from .base import Loss, Objective, ObjectiveSettings, sum_and_count


class DiffusionBlocks(Objective):
    """The denoising objective. A share of the sequences is trained from pure noise, which keeps next-token prediction sharp."""

    def __init__(self, settings: NoiseSettings, iterations: int, objective: ObjectiveSettings | None = None):
        """objective: for feedback and core_readout; the defaults where None."""
        objective = objective or ObjectiveSettings()
        self.settings = settings
        self.feedback_iterations = 0 if objective.feedback == "none" else objective.feedback_iterations
        self.core_readout = objective.core_readout
        self.model_fields = {
            "noise_conditioning": True, "feedback": objective.feedback, "core_readout": objective.core_readout
        }
        self.iterations = iterations
        self.noise = LogNormalNoise(settings)
        partition = EquiProbabilityPartition(self.noise, iterations)
        self._intervals = torch.tensor([partition.interval(k) for k in range(1, iterations + 1)])

    def draw(self, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """For each sequence its iteration, counted from 0, int64 [B], and its noise level, fp32 [B, 1]."""
        uniform = random.uniform(3)
        pure = uniform[:, 0] < self.settings.share_at_sigma_max
        iteration = (uniform[:, 1] * self.iterations).long().clamp(max=self.iterations - 1)
        iteration = torch.where(pure, 0, iteration)
        low, high = self._intervals.to(iteration.device)[iteration].unbind(-1)
        sigma = torch.where(pure, self.settings.sigma_max, self.noise.sample(uniform[:, 2], low, high))
        return iteration, sigma.unsqueeze(-1)

    def __call__(self, model: RecurrentDepthLM, tokens: Tensor, random: SampleRandom) -> Loss:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        iteration, sigma = self.draw(random)
        eps = random.normal(targets.shape[1], model.config.width)
        z = model.unit_embedding(targets) + sigma.unsqueeze(-1) * eps
        e = model.prelude(inputs)
        previous = self._feedback(model, z, e, sigma, random)
        state, conditioning = denoise_state(model, z, e, sigma, previous=previous)
        losses = model.losses(state, targets, conditioning).mean(1)
        value = losses.mean()
        if self.core_readout:
            value = value + token_losses(model.readout_from_core(state), targets).mean()
        zeros = torch.zeros(self.iterations, device=tokens.device)
        sums = zeros.index_add(0, iteration, losses.detach())
        counts = zeros.index_add(0, iteration, torch.ones_like(losses))
        return Loss(value, {"loss": sum_and_count(losses), "loss_by_iteration": (sums, counts)})

    @torch.no_grad()
    def _feedback(self, model: RecurrentDepthLM, z: Tensor, e: Tensor, sigma: Tensor, random: SampleRandom) -> Tensor | None:
        """What each sequence is told of earlier iterations at the same z, [B, T, d]; zeros for a sequence that is told nothing.

        Every second sample has one earlier iteration, every fourth two, and so on: by the sample's index, so that the shapes are
        the same at every step.
        """
        if not self.feedback_iterations:
            return None
        told = torch.zeros_like(e)
        for n in range(self.feedback_iterations):
            rows = [row for row, index in enumerate(random.indices) if index % 2 ** (n + 1) == 0]
            if not rows:
                break
            rows = torch.tensor(rows, device=z.device)
            state, conditioning = denoise_state(model, z[rows], e[rows], sigma[rows], previous=told[rows])
            told = told.index_copy(0, rows, feedback(model, state, conditioning).to(told.dtype))
        return told

    def next_token_logits(self, model: RecurrentDepthLM, inputs: Tensor, random: SampleRandom, iterations: int = 1) -> Tensor:
        """From pure noise at sigma_max: the honest next-token distribution of a denoising model.

        iterations: how many at sigma_max, each told of the one before; only a model with feedback gains by more than one.
        """
        sigma = torch.full((inputs.shape[0], 1), self.settings.sigma_max, device=inputs.device)
        z = self.settings.sigma_max * random.normal(inputs.shape[1], model.config.width)
        e, previous = model.prelude(inputs), None
        for _ in range(iterations - 1):
            previous = feedback(model, *denoise_state(model, z, e, sigma, previous=previous))
        return model.readout(*denoise_state(model, z, e, sigma, previous=previous))

    def training_flops(self, config: ModelConfig, sequence_length: int) -> float:
        parts = forward_flops(config, sequence_length)
        return 3 * (parts.prelude + parts.iterate + parts.readout + parts.condition)
