"""The recurrent-depth language model: prelude, one core that is iterated, coda.

Shape and initialisation are Huginn's (Geiping et al. 2025, arXiv 2502.05171):

    e      = prelude(sqrt(d) * embed(ids))                once per token
    state  = core(adapter(concat(state, e)))              K times, the same weights, or B cores for K / B iterations each
    logits = head(norm(coda(norm(state))))                head tied to the embedding, one norm weight used twice

The three methods `prelude`, `iterate` and `readout` are the whole interface: every objective and the generator are written on
them, and the model knows nothing of any of these. A model built with `noise_conditioning` also takes a noise level into each core
and coda layer, as DiffusionBlocks needs it (arXiv 2506.14202).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import document_mask
from .cache import CacheSlot
from .checkpointing import LayerCheckpointing, every_nth
from .compiled import is_sum
from .layers import Conditioning, RMSNorm, RotaryTable, SandwichBlock, run_layers
from .linear_cross_entropy import evidence_logits, linear_cross_entropy, part_gradients, parts_of
from .weight_copies import WeightCopies

INITIAL_STATE_STD = math.sqrt(2 / 5)
CONDITIONING_WIDTH = 128
MOST_ITERATIONS = 65_536


@dataclass
class ModelSettings:
    """What a user chooses about the model.

    width: channels d of the residual stream, a multiple of 2 * heads.
    heads: attention heads.
    mlp_width: channels inside the gated MLP.
    prelude_layers, core_layers, coda_layers: layers of each part.
    iterations: K, how often the core runs per token at inference.
    blocks: B, cores with weights of their own, each of which serves K / B consecutive iterations; 1 is one core for all of them.
    rope_base: base of the rotary frequencies.
    norm_eps: epsilon of every RMSNorm.
    """

    width: int = 512
    heads: int = 8
    mlp_width: int = 1536
    prelude_layers: int = 2
    core_layers: int = 4
    coda_layers: int = 2
    iterations: int = 32
    blocks: int = 1
    rope_base: float = 50_000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        """ValueError, in one sentence, for a value or a combination that makes no model."""
        for name in ("width", "heads", "mlp_width", "prelude_layers", "core_layers", "coda_layers", "iterations", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, and it is {getattr(self, name)}")
        if self.iterations > MOST_ITERATIONS:
            raise ValueError(f"iterations must be at most {MOST_ITERATIONS}, and it is {self.iterations}")
        if self.iterations % self.blocks:
            raise ValueError(f"blocks must divide iterations, and {self.blocks} does not divide {self.iterations}")
        for name in ("rope_base", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, and it is {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 * heads (rotary pairs), and {self.width} is not one of {2 * self.heads}")

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    def checkpointed_layers(self, interval: int) -> list[range]:
        """The layers of prelude, core and coda, from 0 in each, that are checkpointed where every interval-th is. A pass runs one of
        several cores, so they count once, and their layers alike."""
        return every_nth(interval, (self.prelude_layers, self.core_layers, self.coda_layers))

    def block_of(self, iteration: int, iterations: int) -> int:
        """The block that runs an iteration, from 0, of so many: block b owns the b-th of B equal shares, block 0 the highest noise."""
        return iteration * self.blocks // iterations


@dataclass
class ModelConfig(ModelSettings):
    """A model in full: the settings, and what follows from the tokenizer and the objective.

    vocab_size: rows of the embedding.
    unused_tokens: how many of them, at the end, only make their number a round one: no text has these tokens, and none is drawn.
    noise_conditioning: whether core and coda layers take a noise level.
    posterior_readout: whether the logits of a denoising model are those of a prior, to which the evidence of its state is added.
    wiener_input: whether the core of a denoising model takes its state as the Wiener estimate of the target, or at unit variance.
    optional_state: whether a denoising model can leave its state out: the adapter's part for it starts at zero, and the coda takes what the
        core gives, without EDM's path around the core.
    self_conditioning: whether an iteration takes the expected embedding that the one before it ended with.
    core_readout: whether logits can also be read straight from the core's state.
    initial_state: what a model that is not a denoiser starts from: `normal`, a random state (see `initial_state`), or `zero`.
    document_mark: the id that begins a document, for a model whose positions attend to their own document alone; None where they attend
        to all before them. A generated text is one document.
    """

    vocab_size: int = 0
    unused_tokens: int = 0
    noise_conditioning: bool = False
    posterior_readout: bool = False
    wiener_input: bool = False
    optional_state: bool = False
    self_conditioning: bool = False
    core_readout: bool = False
    initial_state: Literal["normal", "zero"] = "normal"
    document_mark: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, and it is {self.vocab_size}")
        if not 0 <= self.unused_tokens < self.vocab_size:
            raise ValueError(f"unused_tokens must be at least 0 and below vocab_size={self.vocab_size}, and it is {self.unused_tokens}")
        if self.document_mark is not None and not 0 <= self.document_mark < self.vocab_size:
            raise ValueError(f"document_mark must be a token below vocab_size={self.vocab_size}, and it is {self.document_mark}")
        if self.initial_state not in ("normal", "zero"):
            raise ValueError(f"initial_state must be normal or zero, and it is {self.initial_state}")


class NoiseEmbedding(nn.Module):
    """Sine and cosine features of c_noise = ln(sigma) / 4, and two linear layers: [...] -> [..., CONDITIONING_WIDTH]."""

    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(CONDITIONING_WIDTH, CONDITIONING_WIDTH)
        self.linear2 = nn.Linear(CONDITIONING_WIDTH, CONDITIONING_WIDTH)

    def forward(self, c_noise: Tensor) -> Tensor:
        # c_noise spans about [-1.6, 1.1]: periods from 4 (the whole range) down to 1/16 tell all of it apart.
        exponent = torch.linspace(-2, 4, CONDITIONING_WIDTH // 2, device=c_noise.device, dtype=torch.float32)
        angle = 2 * math.pi * c_noise.float().unsqueeze(-1) * torch.exp2(exponent)
        features = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.linear1.weight.dtype)
        return F.silu(self.linear2(F.silu(self.linear1(features))))


class Core(nn.Module):
    """The adapter, and the layers that an iteration runs."""

    def __init__(self, config: ModelConfig, rotary: RotaryTable):
        super().__init__()
        self.rotary = rotary
        self.adapter = nn.Linear(2 * config.width, config.width, bias=False)
        self.layers = sandwich_blocks(config, config.core_layers, config.noise_conditioning)

    def forward(self, state: Tensor, e: Tensor, conditioning: Conditioning, cache: list[CacheSlot] | None,
                told: Tensor | None, mask: Tensor | None) -> Tensor:
        """state, e [B, T, d] -> the next state [B, T, d]; told: what self-conditioning adds to the adapter's output, [B, T, d]."""
        x = self.adapter(torch.cat((state.to(e.dtype), e), dim=-1))
        if told is not None:
            x = x + told
        return run_layers(self.rotary, self.layers, x, conditioning, cache, mask)


def working_dtype(weight: Tensor) -> torch.dtype:
    """What the residual stream is kept in: the dtype of autocast where that is on, else the weights'.

    Every sublayer's sum is normalised again, so that the stream never grows beyond what bf16 resolves.
    """
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def sandwich_blocks(config: ModelConfig, count: int, conditioned: bool) -> nn.ModuleList:
    """So many layers of a model, which take a noise level or not."""
    width = CONDITIONING_WIDTH if conditioned else None
    return nn.ModuleList(SandwichBlock(config.width, config.heads, config.mlp_width, config.norm_eps, width) for _ in range(count))


class RecurrentDepthLM(nn.Module):
    """The model. B is batch, T positions, d width, V vocabulary."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.rotary = RotaryTable(config.head_width, config.rope_base)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.prelude_layers = sandwich_blocks(config, config.prelude_layers, conditioned=False)
        self.cores = nn.ModuleList(Core(config, self.rotary) for _ in range(config.blocks))
        self.coda_layers = sandwich_blocks(config, config.coda_layers, conditioned=config.noise_conditioning)
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.noise_embedding = NoiseEmbedding() if config.noise_conditioning else None
        self.estimate_adapter = nn.Linear(config.width, config.width, bias=False) if config.self_conditioning else None
        self.core_norm = RMSNorm(config.width, config.norm_eps) if config.core_readout else None
        self.core_scale = nn.Parameter(torch.ones(1)) if config.core_readout else None
        self._part_gradients = part_gradients
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Huginn's initialisation: std sqrt(2 / 5d), and that over sqrt(2 L) for the outputs of attention and MLP.

        L counts unrolled layers: prelude + coda + core * iterations. Every normal is truncated at three standard deviations.
        The linear maps of the noise level start at zero, so that conditioning is the identity at first.
        """
        config = self.config
        std = math.sqrt(2 / (5 * config.width))
        depth = config.prelude_layers + config.coda_layers + config.core_layers * config.iterations
        for name, parameter in self.named_parameters():
            if name == "core_scale" or "norm" in name.rsplit(".", 2)[-2]:
                continue  # these stay at one
            if ".modulation." in name or name.endswith(".bias") or name == "estimate_adapter.weight":
                parameter.zero_()
            elif name.startswith("noise_embedding."):
                nn.init.normal_(parameter, std=CONDITIONING_WIDTH**-0.5)
            else:
                scale = 1 / math.sqrt(2 * depth) if name.endswith(".output.weight") else 1.0
                nn.init.trunc_normal_(parameter, std=std * scale, a=-3 * std * scale, b=3 * std * scale)
        if config.optional_state:
            for core in self.cores:
                core.adapter.weight[:, : config.width].zero_()

    @torch.no_grad()
    def document_mask(self, ids: Tensor) -> Tensor | None:
        """The mask [B, 1, T, T] that `prelude`, `iterate` and `coda` take for inputs [B, T], all the same one, so that it is made once;
        None where positions attend to all before them."""
        if self.config.document_mark is None:
            return None
        return document_mask(ids, self.config.document_mark, working_dtype(self.embedding.weight))

    def prelude(self, ids: Tensor, cache: list[CacheSlot] | None = None, mask: Tensor | None = None) -> Tensor:
        """Token ids [B, T] -> e [B, T, d], which every iteration is given. mask: `document_mask`, where there is no cache."""
        if cache is None:
            self.rotary(0, ids.shape[1], ids.device)  # all parts use the same positions, and this one runs first
        return self._prelude(ids, cache, mask)

    def _prelude(self, ids: Tensor, cache: list[CacheSlot] | None, mask: Tensor | None) -> Tensor:
        x = self.embedding(ids) * math.sqrt(self.config.width)
        x = x.to(working_dtype(x))
        return run_layers(self.rotary, self.prelude_layers, x, None, cache, mask)

    def core_copies(self, block: int = 0) -> WeightCopies | None:
        """Copies of a block's core for `iterate`, in a pass that runs it many times over; None where nothing casts its weights, without
        autocast, and where fp8's maps are in the place of the linear ones, which round the weights themselves."""
        core, adapter = self.cores[block], self.cores[block].adapter
        dtype = working_dtype(adapter.weight)
        return None if dtype == adapter.weight.dtype or type(adapter) is not nn.Linear else WeightCopies(core, dtype)

    def iterate(self, state: Tensor, e: Tensor, conditioning: Conditioning = None,
                cache: list[CacheSlot] | None = None, previous: Tensor | None = None, block: int = 0,
                mask: Tensor | None = None, copies: WeightCopies | None = None) -> Tensor:
        """One iteration of the core, or of that of a block: state and e [B, T, d] -> the next state [B, T, d].

        previous: the expected embedding that the iteration before ended with, [B, T, d], for a model with self-conditioning; None is
        the same as zeros. mask: as `prelude` takes it. copies: the block's `core_copies`.
        """
        told = None
        if previous is not None:  # in units of the target's standard deviation
            told = self.estimate_adapter((math.sqrt(self.config.width) * previous).to(e.dtype))
        core = self.cores[block] if copies is None else copies
        return core(state, e, conditioning, cache, told, mask)

    def coda(self, state: Tensor, conditioning: Conditioning = None, cache: list[CacheSlot] | None = None,
             mask: Tensor | None = None) -> Tensor:
        """The coda: state [B, T, d] -> [B, T, d], normalised, as `head` takes it. mask: as `prelude` takes it."""
        x = self.final_norm(state.to(working_dtype(self.embedding.weight)))
        return self.final_norm(run_layers(self.rotary, self.coda_layers, x, conditioning, cache, mask))

    def head(self, hidden: Tensor, evidence: Tensor | None = None, inverse_lengths: Tensor | None = None,
             shape: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """[B, T, d] as `coda` gives it -> logits [B, T, V] of the next token.

        evidence: z / sigma^2 [B, T, d] of a denoising model with posterior_readout. Its product with the unit embeddings, which is
        ln N(z; y_x, sigma^2) but for what all tokens x share, is added, so that by Bayes' rule the rest need only be a prior.
        inverse_lengths: `inverse_lengths()` where the caller keeps them. shape: what to make of that prior's logits first.
        """
        weight = self.embedding.weight
        if evidence is None:
            logits = F.linear(hidden, weight)
            return logits if shape is None else shape(logits)
        lengths = self.inverse_lengths() if inverse_lengths is None else inverse_lengths
        if torch.is_grad_enabled():  # to the prior's alone: the evidence is known, not learned
            logits, known = F.linear(hidden, weight), evidence_logits(evidence, weight.detach(), lengths)
        elif torch.compiler.is_compiling() and is_sum(hidden.numel() // hidden.shape[-1], weight):  # and both sums read it together
            logits, known = F.linear(hidden, weight), F.linear(evidence.to(hidden.dtype), weight).float() * lengths
        else:  # one product for both: of few positions it takes as long as reading the weights
            logits, known = F.linear(torch.stack((hidden, evidence.to(hidden.dtype))), weight)
            known = known.float() * lengths
        return (logits if shape is None else shape(logits)).float() + known

    @torch.no_grad()
    def inverse_lengths(self) -> Tensor:
        """One over the length of each embedding, fp32 [V]."""
        return 1 / self.embedding.weight.float().norm(dim=-1).clamp_min(1e-12)

    def readout(self, state: Tensor, conditioning: Tensor | None = None, cache: list[CacheSlot] | None = None,
                evidence: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Coda and head: state [B, T, d] -> logits [B, T, V] of the next token."""
        return self.head(self.coda(state, conditioning, cache, mask), evidence)

    def readout_from_core(self, state: Tensor, evidence: Tensor | None = None, inverse_lengths: Tensor | None = None,
                          shape: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits [B, T, V] read straight from the core's state [B, T, d]: a norm of its own, a learned scale, the tied embedding."""
        return self.head(self._core_hidden(state), evidence, inverse_lengths, shape)

    def _core_hidden(self, state: Tensor) -> Tensor:
        return self.core_scale * self.core_norm(state.to(self.embedding.weight.dtype))

    def loss(self, state: Tensor, targets: Tensor, conditioning: Tensor | None = None, evidence: Tensor | None = None,
             weights: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the readout in nats, without its logits ever being there for all positions.

        state [B, T, d], targets [B, T] -> the mean over positions, to differentiate, and each position's, fp32 [B, T], detached; both 0 at
        targets that are IGNORED. weights: fp32 [B, T], what each position counts in the mean; None is one for all. mask: as `prelude`
        takes it.
        """
        return self._head_loss(self.coda(state, conditioning, None, mask), targets, evidence, weights)

    def loss_from_core(self, state: Tensor, targets: Tensor, evidence: Tensor | None = None) -> Tensor:
        """The mean cross-entropy of `readout_from_core`, as in `loss`."""
        return self._head_loss(self._core_hidden(state), targets, evidence)[0]

    def _head_loss(self, hidden: Tensor, targets: Tensor, evidence: Tensor | None, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight, lengths = self.embedding.weight, None if evidence is None else self.inverse_lengths()
        return linear_cross_entropy(hidden, weight, targets, weights, evidence, lengths, working_dtype(weight), self._part_gradients)

    def checkpoint_layers(self, how: LayerCheckpointing, interval: int = 1) -> None:
        """What passes with gradient keep of each layer of prelude, core and coda, or of every interval-th (`checkpointed_layers`)."""
        cores = [core.layers for core in self.cores if isinstance(core, Core)]  # without stand-ins for cores on other ranks
        prelude, core, coda = self.config.checkpointed_layers(interval)
        chosen = [(self.prelude_layers, prelude), *((layers, core) for layers in cores), (self.coda_layers, coda)]
        for layers, indices in chosen:
            for index, layer in enumerate(layers):
                layer.checkpointing = how if index in indices else "none"

    def compile_parts(self, apart: Collection[SandwichBlock] = ()) -> None:
        """Compile the parts that training calls, each once for all depths and blocks; parameters keep their names.

        apart: layers that an engine has hooks around, which cannot be compiled: each is compiled by itself, inside of its hooks, and a part
        that holds such layers is not.
        """
        holders = [(self, "_prelude", self.prelude_layers), (self, "coda", self.coda_layers)]
        # Weights are inputs of compiled code, so cores share theirs, and layers do. A stand-in for a core on other ranks is never called.
        holders += [(core, "forward", core.layers) for core in self.cores if isinstance(core, Core)]
        parts = [(holder, name) for holder, name, layers in holders if set(apart).isdisjoint(layers)]
        if (self, "coda") not in parts:
            parts.append((self.final_norm, "forward"))
        parts += [(self, name) for name in ("unit_embedding", "inverse_lengths", "_part_gradients")]
        for owner, name in [*parts, *((layer, "forward") for layer in apart)]:
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False, fullgraph=True))

    def condition(self, c_noise: Tensor) -> Tensor:
        """c_noise = ln(sigma) / 4, [B, 1] or [B, T], in fp32 -> the `conditioning` of `iterate` and `readout`."""
        return self.noise_embedding(c_noise)

    def unit_embedding(self, ids: Tensor) -> Tensor:
        """The denoising target of tokens [...]: their embeddings, scaled to length one, in fp32 [..., d]."""
        return F.normalize(self.embedding(ids).float(), dim=-1)

    def unit_embeddings(self) -> Tensor:
        """The targets of all tokens, fp32 [V, d]."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def expected_embedding(self, logits: Tensor, unit: Tensor | None = None) -> Tensor:
        """softmax(logits) @ unit embeddings: [..., V] -> fp32 [..., d], by a product in the dtype of autocast where that is on.

        unit: `unit_embeddings`, where they are there already, in the dtype that the product is to be taken in elsewhere.
        """
        unit = self.unit_embeddings() if unit is None else unit
        return (logits.float().softmax(-1).to(unit.dtype) @ unit).float()

    @torch.no_grad()
    def read_embedding(self, state: Tensor, conditioning: Tensor | None, evidence: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """The expected embedding of the readout, fp32 [B, T, d], a part of the positions at a time, as `loss` takes them; no gradient."""
        hidden, unit = self.coda(state, conditioning, None, mask), self.unit_embeddings()
        rows, evidence = hidden.flatten(0, 1), None if evidence is None else evidence.flatten(0, 1)
        parts = [
            self.expected_embedding(self.head(rows[part], None if evidence is None else evidence[part]), unit)
            for part in parts_of(len(rows), self.config.vocab_size)
        ]
        return torch.cat(parts).view(hidden.shape)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each position, 0 where its target is IGNORED: logits [B, T, V], targets [B, T] -> fp32 [B, T]."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def initial_state(uniform: Tensor) -> Tensor:
    """The random recurrent state before the first iteration of a model with initial_state=normal.

    Uniform numbers in (0, 1) of any shape -> normal ones of standard deviation sqrt(2/5), truncated at three of them (Huginn's
    `like-init`), by the inverse of the truncated distribution function.
    """
    edge = math.erf(3 / math.sqrt(2))
    return INITIAL_STATE_STD * math.sqrt(2) * torch.erfinv((2 * uniform - 1) * edge)
