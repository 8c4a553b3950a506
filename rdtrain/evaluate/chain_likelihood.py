"""What likelihood a denoising model's K iterations have: a bound on the NLL of the text that the ancestral chain writes.

The ancestral chain (model/solvers.py) is a latent-variable model of the next token x: its states z_1 ... z_K have known laws given x, so
the variational bound of diffusion models (Sohl-Dickstein et al. 2015, arXiv 1503.03585) holds for it,

    -ln p(x) <= 1 / (2 sigma_1^2) + E sum_{k < K} ln q(z_{k+1} | z_k, x) / p(z_{k+1} | z_k) + E -ln p(x | z_K),

with z_1 = y_x + sigma_1 eps, q the ancestral step, p(z_{k+1} | z_k) = sum over x' of p(x' | z_k) q(z_{k+1} | z_k, x'), and the first term
what pure noise for z_1 costs. The states of earlier positions are latent too, and stay what they were, as in the cache of generation. At
K = 1 the sum is empty and the bound is the held-out NLL. For a denoiser whose posteriors are Bayes' rule on its own p(x) it is the same at
every K, so that K iterations earn their cost in likelihood exactly where the bound falls below K = 1. No other number does this: the
cross-entropy of the last iteration alone means nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from ..model.denoiser import denoise
from ..model.generation import TextGenerator
from ..model.linear_cross_entropy import IGNORED
from ..model.recurrent import token_losses
from ..model.solvers import ancestral_step
from ..objectives.base import inputs_and_targets
from ..randomness import SampleRandom
from .likelihood import summary


def ancestral_nats(predict: Callable[[int, Tensor], Tensor], targets: Tensor, unit_embeddings: Tensor, levels: list[float],
                   normal: Callable[[], Tensor]) -> Tensor:
    """The bound's terms for each target, by one path of states: targets [B, T] -> nats [B, T].

    predict(k, z): logits [B, T, V] of iteration k, from 0, at z [B, T, d]; called in order. levels: as NoiseSchedule.levels gives them, K
    and a 0. unit_embeddings: [V, d]. normal(): standard normal numbers [B, T, d], new ones at each call.
    """
    y = unit_embeddings[targets]
    z = y + levels[0] * normal()
    nats = torch.full(targets.shape, 1 / (2 * levels[0] ** 2), dtype=z.dtype, device=z.device)
    for k, (sigma, sigma_next) in enumerate(zip(levels[:-1], levels[1:-1])):
        log_probability = predict(k, z).to(z.dtype).log_softmax(-1)
        z_next = ancestral_step(z, y, normal(), sigma, sigma_next)
        # ln q(z_next | z, x') = <z_next - r z, y_x'> / sigma_next^2 + what is the same for all x', since |y| = 1.
        evidence = (z_next - (sigma_next / sigma) ** 2 * z) @ unit_embeddings.T / sigma_next**2
        nats += evidence.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - (log_probability + evidence).logsumexp(-1)
        z = z_next
    return nats + token_losses(predict(len(levels) - 2, z), targets)


@torch.no_grad()
def likelihood_of_chain(generator: TextGenerator, iterations: list[int], tokens: Tensor, bytes_per_token: float, batch: int,
                        name: str = "") -> list[dict]:
    """The bound at each number of iterations, on sequences tokens [N, T + 1]: [{"iterations": K, "nll": ..., ...}] as HeldOut has it."""
    device = generator.model.embedding.weight.device
    bounds = []
    for count in tqdm(iterations, f"{name}: NLL bound against K", unit="K", disable=None):
        rows = []
        for start in range(0, len(tokens), batch):
            part = tokens[start : start + batch].to(device)
            bound = _bound(generator, count, part, SampleRandom("chain", range(start, start + len(part)), device))
            rows.append((bound, part[:, 1:]))
        bounds.append({"iterations": count, **vars(summary(rows, bytes_per_token))})
    return bounds


def _bound(generator: TextGenerator, iterations: int, tokens: Tensor, random: SampleRandom) -> Tensor:
    """Of K iterations, on sequences tokens [B, T + 1] -> [B, T], 0 for targets that are IGNORED."""
    model, noise = generator.model, generator.noise
    sigma_data, levels = noise.sigma_data(model.config.width), noise.levels(iterations)
    inputs, targets = inputs_and_targets(tokens)
    mask = model.document_mask(inputs)
    e, previous = model.prelude(inputs, None, mask), None

    def predict(k: int, z: Tensor) -> Tensor:
        nonlocal previous
        level = torch.full((len(z), 1), levels[k], device=z.device)
        logits = denoise(model, z, e, level, sigma_data, previous=previous, block=model.config.block_of(k, iterations), mask=mask)
        if model.config.self_conditioning:
            previous = model.expected_embedding(logits)
        return logits

    nats = ancestral_nats(
        predict, targets.clamp(min=0), model.unit_embeddings(), levels, lambda: random.normal(targets.shape[1], model.config.width)
    )
    return nats * (targets != IGNORED)
