"""Held-out likelihood of a model, and, of a denoising one, its cross-entropy against the noise level.

The likelihood is the objective's honest one: one iteration from pure noise for a denoising model, all K iterations for an unrolled
one. The curve against sigma is a diagnostic, not a likelihood: there the state holds the noised target, which below some level
gives the token away.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from ..evaluation import held_out_nll
from ..model.denoiser import denoise
from ..model.generation import TextGenerator
from ..model.linear_cross_entropy import IGNORED
from ..model.recurrent import RecurrentDepthLM, token_losses
from ..objectives import Objective
from ..objectives.base import inputs_and_targets
from ..randomness import SampleRandom
from .models import Source


@dataclass
class HeldOut:
    """Nats per token with the standard error over sequences (None of one), and bits per byte."""

    nll: float
    standard_error: float | None
    bits_per_byte: float


def measure_likelihood(model: RecurrentDepthLM, objective: Objective, tokens: Tensor, bytes_per_token: float, batch: int) -> HeldOut:
    """Held-out likelihood on sequences tokens [N, T + 1], `batch` at a time, with the noise of training's own evaluations."""
    device = model.embedding.weight.device
    rows = held_out_nll(partial(objective.held_out_nll, model), tokens, range(len(tokens)), batch, device)
    return summary(rows, bytes_per_token)


def summary(rows: Iterable[tuple[Tensor, Tensor]], bytes_per_token: float) -> HeldOut:
    """Of the nats and targets [B, T] of so many batches, nats being 0 where a target is IGNORED.

    The error is that of a ratio, all nats over all targets, whose sequences differ in both.
    """
    parts = [torch.stack((nll.double().sum(1), (targets != IGNORED).sum(1).double())).cpu() for nll, targets in rows]
    nats, counts = torch.cat(parts, dim=1)
    nll = (nats.sum() / counts.sum()).item()
    error = (nats - nll * counts).std().item() * math.sqrt(len(nats)) / counts.sum().item() if len(nats) > 1 else None
    return HeldOut(nll, error, nll / math.log(2) / bytes_per_token)


def likelihood_by_iterations(source: Source, model: RecurrentDepthLM, iterations: list[int], tokens: Tensor, bytes_per_token: float,
                             batch: int) -> list[dict]:
    """An unrolled model's held-out likelihood after each number of iterations: [{"iterations": K, "nll": ..., ...}]."""
    progress = tqdm(iterations, f"{source.name}: NLL against K", unit="K", disable=None)
    return [
        {"iterations": k, **vars(measure_likelihood(model, source.objective(k), tokens, bytes_per_token, batch))} for k in progress
    ]


def sigma_grid(sigma_min: float, sigma_max: float, levels: int) -> list[float]:
    """So many noise levels from the highest to the lowest, evenly spaced in ln sigma."""
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), levels, dtype=torch.float64).exp().tolist()


@torch.no_grad()
def cross_entropy_by_sigma(generator: TextGenerator, tokens: Tensor, batch: int, levels: int, name: str = "") -> list[dict]:
    """Cross-entropy of one iteration on the noised targets, every position at the same level: [{"sigma": ..., "cross_entropy": ...}].

    The same noise at every level, so that the curve is as smooth as the model. In nats per token.
    """
    model, noise = generator.model, generator.noise
    ends, sigma_data = (noise.settings.sigma_min, noise.settings.sigma_max), noise.sigma_data(model.config.width)
    block_edges = noise.edges(model.config.blocks)[1:-1]
    device = model.embedding.weight.device
    curve = []
    for sigma in tqdm(sigma_grid(*ends, levels), f"{name}: cross-entropy", unit="sigma", disable=None):
        total, block = 0.0, sum(sigma <= edge for edge in block_edges)
        for start in range(0, len(tokens), batch):
            rows = tokens[start : start + batch].to(device)
            inputs, targets = inputs_and_targets(rows)
            mask = model.document_mask(inputs)
            random = SampleRandom("sigma", range(start, start + len(rows)), device)
            eps = random.normal(targets.shape[1], model.config.width)
            level = torch.full((len(rows), 1), sigma, device=device)
            z = model.unit_embedding(targets.clamp(min=0)) + sigma * eps
            logits = denoise(model, z, model.prelude(inputs, None, mask), level, sigma_data, block=block, mask=mask)
            total += token_losses(logits, targets).double().sum().item()
        curve.append({"sigma": sigma, "cross_entropy": total / (tokens[:, 1:] != IGNORED).sum().item()})
    return curve
