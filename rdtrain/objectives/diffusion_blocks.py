"""DiffusionBlocks: each of the K iterations is a denoising block, trained on its own, in a single pass (arXiv 2506.14202).

For each sequence: draw an iteration k, draw a noise level sigma in its interval, noise the targets, run prelude, core and coda
ONCE, take the cross-entropy of the next token. No iteration sees another, so there is nothing to unroll.

A model of B > 1 untied blocks is trained one block a step: the block is drawn first, for all ranks, and iterations within it. The
probabilities are such that iterations and noise levels are distributed as with one block.
"""

import torch
from torch import Tensor

from ..flops import forward_flops
from ..model.denoiser import denoise
from ..model.noise import EquiProbabilityPartition, LogNormalNoise, NoiseSettings
from ..model.recurrent import ModelConfig, RecurrentDepthLM
from ..randomness import SampleRandom
from .base import Loss, Objective, sum_and_count, token_losses


class DiffusionBlocks(Objective):
    """The denoising objective. A share of the sequences is trained from pure noise, which keeps next-token prediction sharp."""

    noise_conditioning = True
    untied_blocks = True

    def __init__(self, settings: NoiseSettings, iterations: int, blocks: int = 1):
        """blocks: B, which divides iterations, K."""
        self.settings = settings
        self.iterations = iterations
        self.blocks = blocks
        self.noise = LogNormalNoise(settings)
        partition = EquiProbabilityPartition(self.noise, iterations)
        self._intervals = torch.tensor([partition.interval(k) for k in range(1, iterations + 1)])

    @property
    def block_probabilities(self) -> list[float]:
        """How often each block is drawn: the sequences at sigma_max are all block 0's, and the others are shared out evenly."""
        even = (1 - self.settings.share_at_sigma_max) / self.blocks
        return [self.settings.share_at_sigma_max + even] + [even] * (self.blocks - 1)

    def active_block(self, random: SampleRandom) -> int | None:
        if self.blocks == 1:
            return None
        return random.of_step().choices(range(self.blocks), self.block_probabilities)[0]

    def draw(self, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """For each sequence its iteration, counted from 0 and one of the active block's, int64 [B], and its noise level, fp32 [B, 1]."""
        block, served = self.active_block(random) or 0, self.iterations // self.blocks
        share = self.settings.share_at_sigma_max / self.block_probabilities[0] if block == 0 else 0.0
        uniform = random.uniform(3)
        pure = uniform[:, 0] < share
        iteration = block * served + (uniform[:, 1] * served).long().clamp(max=served - 1)
        iteration = torch.where(pure, 0, iteration)
        low, high = self._intervals.to(iteration.device)[iteration].unbind(-1)
        sigma = torch.where(pure, self.settings.sigma_max, self.noise.sample(uniform[:, 2], low, high))
        return iteration, sigma.unsqueeze(-1)

    def __call__(self, model: RecurrentDepthLM, tokens: Tensor, random: SampleRandom) -> Loss:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        iteration, sigma = self.draw(random)
        eps = random.normal(targets.shape[1], model.config.width)
        z = model.unit_embedding(targets) + sigma.unsqueeze(-1) * eps
        logits = denoise(model, z, model.prelude(inputs), sigma, block=self.active_block(random) or 0)
        losses = token_losses(logits, targets).mean(1)
        zeros = torch.zeros(self.iterations, device=tokens.device)
        sums = zeros.index_add(0, iteration, losses.detach())
        counts = zeros.index_add(0, iteration, torch.ones_like(losses))
        return Loss(losses.mean(), {"loss": sum_and_count(losses), "loss_by_iteration": (sums, counts)})

    def next_token_logits(self, model: RecurrentDepthLM, inputs: Tensor, random: SampleRandom) -> Tensor:
        """One iteration from pure noise at sigma_max: the honest next-token distribution of a denoising model."""
        sigma = torch.full((inputs.shape[0], 1), self.settings.sigma_max, device=inputs.device)
        z = self.settings.sigma_max * random.normal(inputs.shape[1], model.config.width)
        return denoise(model, z, model.prelude(inputs), sigma)

    def training_flops(self, config: ModelConfig, sequence_length: int) -> float:
        parts = forward_flops(config, sequence_length)
        return 3 * (parts.prelude + parts.iterate + parts.readout + parts.condition)
