"""DiffusionBlocks: each of the K iterations is a denoising block, trained on its own, in a single pass (arXiv 2506.14202).

For each sequence (or each token): draw an iteration k, draw a noise level sigma in its interval, noise the targets, run prelude, core
and coda ONCE, take the cross-entropy of the next token. No iteration sees another, so there is nothing to unroll.

A model of B > 1 untied blocks is trained one block a step: the block is drawn first, for all ranks, and iterations within it. The
probabilities are such that iterations and noise levels are distributed as with one block.

Whatever the partition, the cross-entropy of each noise level is learned on the way (information.py): as a diagnostic, and to divide
the levels by where partition=equal_information.
"""

import torch
from torch import Tensor

from ..distributed import World
from ..flops import forward_flops
from ..model.denoiser import denoise_state, feedback
from ..model.information import InformationEstimate
from ..model.noise import NoiseSchedule, NoiseSettings, edm_weight
from ..model.recurrent import ModelConfig, RecurrentDepthLM, token_losses
from ..randomness import SampleRandom
from .base import Loss, Objective, ObjectiveSettings, sum_and_count

FOLD_INTERVAL = 16
"""Steps between two updates of the information curve: each waits once for the device and for all ranks."""


class DiffusionBlocks(Objective):
    """The denoising objective. A share of the states is trained from pure noise, which keeps next-token prediction sharp."""

    untied_blocks = True

    def __init__(self, settings: NoiseSettings, iterations: int, objective: ObjectiveSettings | None = None, blocks: int = 1):
        """objective: for feedback and core_readout; the defaults where None. blocks: B, which divides iterations, K."""
        objective = objective or ObjectiveSettings()
        self.settings = settings
        self.feedback_iterations = 0 if objective.feedback == "none" else objective.feedback_iterations
        self.core_readout = objective.core_readout
        self.model_fields = {
            "noise_conditioning": True, "feedback": objective.feedback, "core_readout": objective.core_readout
        }
        self.iterations = iterations
        self.blocks = blocks
        self.information = InformationEstimate(settings.sigma_min, settings.sigma_max)
        self._divide()

    def _divide(self) -> None:
        """Divide the noise levels into iterations, by the curve as it is now."""
        self.noise = NoiseSchedule(self.settings, self.information.curve)
        self._intervals = torch.tensor([self.noise.interval(k, self.iterations) for k in range(1, self.iterations + 1)])

    @property
    def block_probabilities(self) -> list[float]:
        """How often each block is drawn: the states at sigma_max are all block 0's, and the others are shared out evenly."""
        even = (1 - self.settings.share_at_sigma_max) / self.blocks
        return [self.settings.share_at_sigma_max + even] + [even] * (self.blocks - 1)

    def active_block(self, random: SampleRandom) -> int | None:
        if self.blocks == 1:
            return None
        return random.of_step().choices(range(self.blocks), self.block_probabilities)[0]

    def draw(self, random: SampleRandom, length: int) -> tuple[Tensor, Tensor]:
        """Iterations, counted from 0 and of the active block, int64, and noise levels, fp32: [B, 1], or with level_per=token [B, T],
        T being `length`."""
        block, served = self.active_block(random) or 0, self.iterations // self.blocks
        share = self.settings.share_at_sigma_max / self.block_probabilities[0] if block == 0 else 0.0
        uniform = random.uniform(length if self.settings.level_per == "token" else 1, 3)
        pure = uniform[..., 0] < share
        iteration = block * served + (uniform[..., 1] * served).long().clamp(max=served - 1)
        iteration = torch.where(pure, 0, iteration)
        self._intervals = self._intervals.to(iteration.device)
        low, high = self._intervals[iteration].unbind(-1)
        sigma = self.noise.distribution.sample(uniform[..., 2], low, high)
        return iteration, torch.where(pure, self.settings.sigma_max, sigma)

    def __call__(self, model: RecurrentDepthLM, tokens: Tensor, random: SampleRandom) -> Loss:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        iteration, sigma = self.draw(random, targets.shape[1])
        sigma_data = self.noise.sigma_data(model.config.width)
        eps = random.normal(targets.shape[1], model.config.width)
        z = model.unit_embedding(targets) + sigma.unsqueeze(-1) * eps
        e = model.prelude(inputs)
        block = self.active_block(random) or 0
        previous = self._feedback(model, z, e, sigma, random, block)
        state, conditioning = denoise_state(model, z, e, sigma, sigma_data, previous=previous, block=block)
        losses = model.losses(state, targets, conditioning)
        self.information.add(sigma, losses)
        weighted = losses * edm_weight(sigma, sigma_data) if self.settings.weighting == "edm" else losses
        by_level = losses.detach().sum_to_size(sigma.shape).flatten()
        zeros, counts = torch.zeros(self.iterations, device=tokens.device), torch.full_like(by_level, losses.numel() / sigma.numel())
        by_iteration = tuple(zeros.index_add(0, iteration.flatten(), values) for values in (by_level, counts))
        value = weighted.mean()
        if self.core_readout:
            value = value + token_losses(model.readout_from_core(state), targets).mean()
        return Loss(value, {"loss": sum_and_count(losses), "loss_by_iteration": by_iteration})

    @torch.no_grad()
    def _feedback(self, model: RecurrentDepthLM, z: Tensor, e: Tensor, sigma: Tensor, random: SampleRandom,
                  block: int) -> Tensor | None:
        """What each sequence is told of earlier iterations of a block at the same z, [B, T, d]; zeros for a sequence that is told nothing.

        Every second sample has one earlier iteration, every fourth two, and so on: by the sample's index, so that the shapes are
        the same at every step.
        """
        if not self.feedback_iterations:
            return None
        sigma_data = self.noise.sigma_data(model.config.width)
        told = torch.zeros_like(e)
        for n in range(self.feedback_iterations):
            rows = [row for row, index in enumerate(random.indices) if index % 2 ** (n + 1) == 0]
            if not rows:
                break
            rows = torch.tensor(rows, device=z.device)
            state, conditioning = denoise_state(model, z[rows], e[rows], sigma[rows], sigma_data, previous=told[rows], block=block)
            told = told.index_copy(0, rows, feedback(model, state, model.coda(state, conditioning)).to(told.dtype))
        return told

    def next_token_logits(self, model: RecurrentDepthLM, inputs: Tensor, random: SampleRandom, iterations: int = 1) -> Tensor:
        """From pure noise at sigma_max, which is block 0's: the honest next-token distribution of a denoising model.

        iterations: how many at sigma_max, each told of the one before; only a model with feedback gains by more than one.
        """
        sigma = torch.full((inputs.shape[0], 1), self.settings.sigma_max, device=inputs.device)
        z = self.settings.sigma_max * random.normal(inputs.shape[1], model.config.width)
        sigma_data = self.noise.sigma_data(model.config.width)
        e, previous = model.prelude(inputs), None
        for _ in range(iterations - 1):
            state, conditioning = denoise_state(model, z, e, sigma, sigma_data, previous=previous)
            previous = feedback(model, state, model.coda(state, conditioning))
        return model.readout(*denoise_state(model, z, e, sigma, sigma_data, previous=previous))

    def training_flops(self, config: ModelConfig, sequence_length: int) -> float:
        parts = forward_flops(config, sequence_length)
        condition = parts.condition * (sequence_length if self.settings.level_per == "token" else 1)
        return 3 * (parts.prelude + parts.iterate + parts.readout + condition)

    def after_step(self, step: int, world: World) -> None:
        """Every FOLD_INTERVAL steps the curve takes in what all ranks have seen since."""
        if step % FOLD_INTERVAL == 0:
            self.information.fold(world.sum(self.information.pending.to(world.device)))
            self._divide()

    def state(self, world: World) -> dict:
        return self.information.state(world.sum(self.information.pending.to(world.device, copy=True)))

    def load_state(self, state: dict, world: World) -> None:
        self.information.load_state(state, world.is_main)
        self._divide()
