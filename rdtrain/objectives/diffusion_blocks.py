"""DiffusionBlocks: each of the K iterations is a denoising block, trained on its own, in a single pass (arXiv 2506.14202).

For each sequence (or each token): draw an iteration k, draw a noise level sigma in its interval, noise the targets, run prelude, core
and coda ONCE, take the cross-entropy of the next token. No iteration sees another, so there is nothing to unroll.

A model of B > 1 untied blocks is trained one block a step: the block is drawn first, for all ranks, and iterations within it. The
probabilities are such that iterations and noise levels are distributed as with one block. Where groups of ranks train a block each
(`train_only`), every block has as many sequences, and they are weighted by these probabilities instead.

Whatever the partition, the cross-entropy of each noise level is learned on the way (information.py): as a diagnostic, and to divide
the levels by where partition=equal_information.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..distributed import World
from ..flops import forward_flops, recomputed_in_layers
from ..model.denoiser import denoise, denoise_state
from ..model.information import InformationEstimate
from ..model.layers import SandwichBlock
from ..model.linear_cross_entropy import IGNORED
from ..model.noise import NoiseSchedule, NoiseSettings, edm_weight
from ..model.recurrent import ModelConfig, RecurrentDepthLM
from ..model.solvers import euler_step
from ..randomness import SampleRandom
from .base import Loss, Objective, ObjectiveSettings, inputs_and_targets, sum_and_count

FOLD_INTERVAL = 16
"""Steps between two updates of the information curve: each waits once for the device and for all ranks."""


NOISE_BINS = 16
"""Parts of the noise levels, equally long in ln(sigma), whose losses are recorded."""


def noise_bins(sigma: Tensor, settings: NoiseSettings) -> Tensor:
    """The bins of noise levels of any shape, int64: bin i, from 0 on, begins at sigma_min (sigma_max / sigma_min)^(i / NOISE_BINS), and
    sigma_max itself is in the last."""
    first, last = math.log(settings.sigma_min), math.log(settings.sigma_max)
    return ((sigma.log() - first) * (NOISE_BINS / (last - first))).long().clamp(0, NOISE_BINS - 1)


class DiffusionBlocks(Objective):
    """The denoising objective. A share of the states is trained from pure noise, which keeps next-token prediction sharp."""

    untied_blocks = True

    def __init__(self, settings: NoiseSettings, iterations: int, objective: ObjectiveSettings | None = None, blocks: int = 1):
        """objective: for what belongs to diffusion_blocks there; the defaults where None. blocks: B, which divides iterations, K."""
        objective = objective or ObjectiveSettings()
        self.settings = settings
        self.self_conditioning, self.chain_states = objective.self_conditioning, objective.chain_states
        self.core_readout = objective.core_readout
        if self.self_conditioning or self.chain_states:
            self.smallest_micro_batch = 2  # every second sample goes through an earlier iteration
        features = ("posterior_readout", "wiener_input", "optional_state", "self_conditioning", "core_readout")
        self.model_fields = {"noise_conditioning": True} | {name: getattr(objective, name) for name in features}
        self.iterations = iterations
        self.blocks = blocks
        self._only_block: int | None = None
        self._weight = 1.0
        self.information = InformationEstimate(settings.sigma_min, settings.sigma_max)
        self._divide()
        self._denoise_state = denoise_state
        if blocks == 1 and not (self.self_conditioning or self.chain_states):
            self.training_pass = self._training_pass

    def compile(self, model: RecurrentDepthLM, apart: Collection[SandwichBlock] = ()) -> None:
        super().compile(model, apart)
        if self.blocks == 1 and not apart:  # of several, the cores alone share their compiled code
            self._denoise_state = torch.compile(denoise_state, dynamic=False, fullgraph=True)

    def _divide(self) -> None:
        """Divide the noise levels into iterations, by the curve as it is now."""
        self.noise = NoiseSchedule(self.settings, self.information.curve)
        self._intervals = torch.tensor(self.noise.intervals(self.iterations))

    @property
    def block_probabilities(self) -> list[float]:
        """How often each block is drawn: the states at sigma_max are all block 0's, and the others are shared out evenly."""
        even = (1 - self.settings.share_at_sigma_max) / self.blocks
        return [self.settings.share_at_sigma_max + even] + [even] * (self.blocks - 1)

    def active_block(self, random: SampleRandom) -> int | None:
        if self.blocks == 1 or self._only_block is not None:
            return None
        return random.of_step().choices(range(self.blocks), self.block_probabilities)[0]

    def train_only(self, block: int) -> float:
        self._only_block, self._weight = block, self.blocks * self.block_probabilities[block]
        return self._weight

    def _trained_block(self, random: SampleRandom) -> int:
        drawn = self.active_block(random)
        return drawn if drawn is not None else self._only_block or 0

    def draw(self, random: SampleRandom, length: int) -> tuple[Tensor, Tensor]:
        """Iterations, counted from 0 and of the trained block, int64, and noise levels, fp32: [B, 1], or with level_per=token [B, T],
        T being `length`."""
        block, served = self._trained_block(random), self.iterations // self.blocks
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
        _, targets = inputs_and_targets(tokens)
        counted = targets != IGNORED
        iteration, sigma = self.draw(random, targets.shape[1])
        eps = random.normal(targets.shape[1], model.config.width)
        if self.training_pass is not None:
            value, losses = self.training_pass(model, tokens, sigma, eps)
        else:
            rows = [row for row, index in enumerate(random.indices) if index % 2 == 0]
            value, losses = self._training_pass(model, tokens, sigma, eps, self._trained_block(random), iteration, rows)
        self.information.add(sigma, losses, self._weight, counted)
        by_level = losses.sum_to_size(sigma.shape).flatten()
        zeros, counts = torch.zeros(self.iterations, device=tokens.device), counted.float().sum_to_size(sigma.shape).flatten()
        by_iteration = tuple(zeros.index_add(0, iteration.flatten(), values) for values in (by_level, counts))
        bins = noise_bins(sigma, self.settings).flatten()
        by_noise_level = tuple(zeros.new_zeros(NOISE_BINS).index_add(0, bins, values) for values in (by_level, counts))
        metrics = {"loss": sum_and_count(losses, targets), "loss_by_iteration": by_iteration, "loss_by_noise_level": by_noise_level}
        if self._only_block is not None:
            metrics = {name: (self._weight * sums, self._weight * counts) for name, (sums, counts) in metrics.items()}
        return Loss(value, metrics)

    def _training_pass(self, model: RecurrentDepthLM, tokens: Tensor, sigma: Tensor, eps: Tensor, block: int = 0,
                       iteration: Tensor | None = None, rows: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """The loss at noise levels sigma, with noise eps [B, T, d], and each position's cross-entropy [B, T], detached. rows: of the batch,
        those that may go through an earlier iteration first; that and `iteration` matter with self_conditioning and chain_states alone."""
        inputs, targets = inputs_and_targets(tokens)
        mask, sigma_data = model.document_mask(inputs), self.noise.sigma_data(model.config.width)
        y = model.unit_embedding(targets.clamp(min=0))
        z, e = torch.addcmul(y, sigma.unsqueeze(-1), eps), model.prelude(inputs, None, mask)
        # Zeros, and not None, where no row is told anything: an engine of several ranks needs the same gradients on each.
        previous = torch.zeros_like(y) if self.self_conditioning else None
        if rows and (self.self_conditioning or self.chain_states):
            rows = torch.tensor(rows, device=z.device)
            parts = (None if part is None else part[rows] for part in (y, eps, e, iteration, sigma, mask))
            led_to, estimate = self._earlier_iteration(model, *parts, block)
            if self.chain_states:
                z = z.index_copy(0, rows, led_to)
            if self.self_conditioning:
                previous = previous.index_copy(0, rows, estimate)
        state, conditioning, evidence = self._denoise_state(model, z, e, sigma, sigma_data, previous=previous, block=block, mask=mask)
        weights = edm_weight(sigma, sigma_data).expand_as(targets) if self.settings.weighting == "edm" else None
        value, losses = model.loss(state, targets, conditioning, evidence, weights, mask)
        if self.core_readout:
            value = value + model.loss_from_core(state, targets, evidence)
        return value, losses

    @torch.no_grad()
    def _earlier_iteration(self, model: RecurrentDepthLM, y: Tensor, eps: Tensor, e: Tensor, iteration: Tensor, sigma: Tensor,
                           mask: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
        """Run rows through one iteration first: the states at sigma that it leads to, and its estimates of the target, [B, T, d] both.

        Self-conditioning alone looks twice at the same state; with chain_states the earlier iteration runs at its own level, and one
        Euler step leads from there to sigma.
        """
        before = self._level_before(iteration, sigma, block) if self.chain_states else sigma
        start = y + before.unsqueeze(-1) * eps
        sigma_data = self.noise.sigma_data(model.config.width)
        estimate = model.read_embedding(*denoise_state(model, start, e, before, sigma_data, block=block, mask=mask), mask)
        return euler_step(start, estimate, before.unsqueeze(-1), sigma.unsqueeze(-1)), estimate

    def _level_before(self, iteration: Tensor, sigma: Tensor, block: int) -> Tensor:
        """The level at the same place (in ln sigma) of the interval of the iteration before; the same level for a block's first."""
        first = block * self.iterations // self.blocks
        low, high = self._intervals[iteration].log().unbind(-1)
        low_before, high_before = self._intervals[(iteration - 1).clamp(min=first)].log().unbind(-1)
        before = low_before.lerp(high_before, (sigma.log() - low) / (high - low)).exp()
        return torch.where(iteration > first, before.maximum(sigma), sigma)

    def next_token_logits(self, model: RecurrentDepthLM, inputs: Tensor, random: SampleRandom) -> Tensor:
        """One iteration from pure noise at sigma_max, which is block 0's: the honest next-token distribution of a denoising model."""
        sigma = torch.full((inputs.shape[0], 1), self.settings.sigma_max, device=inputs.device)
        z = self.settings.sigma_max * random.normal(inputs.shape[1], model.config.width)
        mask = model.document_mask(inputs)
        return denoise(model, z, model.prelude(inputs, None, mask), sigma, self.noise.sigma_data(model.config.width), mask=mask)

    def training_flops(self, config: ModelConfig, sequence_length: int) -> float:
        parts = forward_flops(config, sequence_length)
        condition = parts.condition * (sequence_length if self.settings.level_per == "token" else 1)
        flops = 3 * (parts.prelude + parts.iterate + parts.readout + condition)
        if self.self_conditioning or self.chain_states:  # every second sequence, without gradient, and its expected embedding
            flops += (parts.iterate + parts.readout + condition + parts.head) / 2
        if self.self_conditioning:
            flops += 2 * 2 * config.width**2  # what the adapter is given needs no gradient
        if self.core_readout:
            flops += 3 * parts.head
        if config.posterior_readout:  # one more product with the embeddings for each readout, which has no backward pass
            flops += parts.head * (1 + self.core_readout + (self.self_conditioning or self.chain_states) / 2)
        return flops

    def recomputed_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """The earlier iteration, which carries no gradient, keeps nothing in any case."""
        levels = sequence_length if self.settings.level_per == "token" else 1
        return recomputed_in_layers(config, sequence_length, self.layer_checkpointing, self.layer_checkpointing_interval, levels=levels)

    def before_step(self) -> None:
        self.information.mark()

    def after_step(self, step: int, world: World, skipped: Tensor | None = None) -> None:
        """Every FOLD_INTERVAL steps the curve takes in what all ranks have seen since."""
        if skipped is not None:
            self.information.withdraw(skipped)
        if step % FOLD_INTERVAL == 0:
            self.information.fold(world.sum(self.information.pending.to(world.device)))
            self._divide()

    def state(self, world: World) -> dict:
        return self.information.state(world.sum(self.information.pending.to(world.device, copy=True)))

    def load_state(self, state: dict, world: World) -> None:
        self.information.load_state(state, world.is_main)
        self._divide()
