"""What an objective is: it alone decides what a training step computes, and what the model's held-out likelihood means."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal

from torch import Tensor

from ..distributed import World
from ..flops import recomputed_in_layers
from ..model.checkpointing import LayerCheckpointing
from ..model.layers import SandwichBlock
from ..model.linear_cross_entropy import IGNORED
from ..model.recurrent import ModelConfig, RecurrentDepthLM, token_losses
from ..randomness import SampleRandom
from .cuda_graph import CapturedPass, TrainingPass


@dataclass
class ObjectiveSettings:
    """What is trained.

    name: `diffusion_blocks` (each iteration a denoiser, one pass), `bptt` (backpropagation through unrolled iterations) or `one_pass`
        (an ordinary language model, the control without recurrence: model.iterations=1).
    posterior_readout: diffusion_blocks only: the logits of an iteration are the network's plus the log-likelihood of its noised state, so
        that by Bayes' rule the network's alone need only be a prior.
    wiener_input: diffusion_blocks only: the core takes its noised state as the Wiener estimate of the target, which fades where the
        state is noise alone, and not at unit variance.
    optional_state: diffusion_blocks only: a network that starts out without its state, which the posterior readout takes into account in
        any case, and learns what else to make of it: the adapter's part for it starts at zero, and the coda takes the core's output
        alone, not EDM's c_skip z + c_out F.
    self_conditioning: diffusion_blocks only: an iteration also takes the estimate of the one before it (arXiv 2208.04202).
    chain_states: diffusion_blocks only: an iteration starts from the state that the model's own iteration before led to, not from a
        noised target. For both, every second sample goes through that iteration first, without gradient.
    core_readout: diffusion_blocks only: also train logits that are read straight from the core, for a cheaper chain.
    gradient: bptt only: which iterations carry gradient: `full` all, `truncated` the last few, `local` the last one alone.
    trained_iterations: gradient=truncated only: how many carry it at most; 8 in Huginn.
    depth: bptt only: iterations of a training step: `poisson`, drawn for each step from Huginn's log-normal Poisson distribution around
        model.iterations, or `fixed`, model.iterations.
    activation_checkpointing: bptt only: keep nothing of the inside of an iteration for the backward pass and compute it again there.
    layer_checkpointing: what each layer of prelude, core and coda keeps for the backward pass: `none` leaves it to PyTorch, `selective`
        the outputs of matrix products and attention, and computes all between them again, `full` its input alone. The same gradients.
    layer_checkpointing_interval: with another than `none`: every how many-th layer that holds for, the first of all and each so many after
        it, counted through prelude, core (of each block alike) and coda; 1 is all. Of the others PyTorch decides.
    """

    name: Literal["diffusion_blocks", "bptt", "one_pass"] = "diffusion_blocks"
    posterior_readout: bool = True
    wiener_input: bool = True
    optional_state: bool = True
    self_conditioning: bool = False
    chain_states: bool = False
    core_readout: bool = False
    gradient: Literal["full", "truncated", "local"] = "truncated"
    trained_iterations: int = 8
    depth: Literal["poisson", "fixed"] = "poisson"
    activation_checkpointing: bool = False
    layer_checkpointing: LayerCheckpointing = "none"
    layer_checkpointing_interval: int = 1

    def __post_init__(self):
        """ValueError, in one sentence, for an impossible count and for a setting that would have no effect."""
        for name in ("trained_iterations", "layer_checkpointing_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, and it is {getattr(self, name)}")
        of_all = ("name", "layer_checkpointing", "layer_checkpointing_interval")
        changed = [field.name for field in fields(self) if field.name not in of_all and getattr(self, field.name) != field.default]
        of_blocks = ("posterior_readout", "wiener_input", "optional_state", "self_conditioning", "chain_states", "core_readout")
        for name in changed:
            owner = "diffusion_blocks" if name in of_blocks else "bptt"
            if self.name != owner:
                raise ValueError(f"{name} belongs to name={owner}, and name is {self.name}: leave it out")
        if self.name == "diffusion_blocks" and self.optional_state and not self.posterior_readout:
            raise ValueError(
                "optional_state leaves what a state says of its target to posterior_readout, which is off: set optional_state=false as well"
            )
        if "trained_iterations" in changed and self.gradient != "truncated":
            raise ValueError(f"trained_iterations belongs to gradient=truncated, and gradient is {self.gradient}: leave it out")
        if self.layer_checkpointing_interval > 1 and self.layer_checkpointing == "none":
            raise ValueError(
                "layer_checkpointing_interval belongs to layer_checkpointing=selective or full, and that is none: leave it out"
            )
        if self.activation_checkpointing and self.layer_checkpointing == "selective":
            raise ValueError(
                "layer_checkpointing=selective keeps the products of every iteration, which activation_checkpointing is there to drop: "
                "choose one of them, or layer_checkpointing=full"
            )


Metrics = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sums, counts), detached tensors of one shape, `loss` among them; both are added over micro-batches and ranks before they
are divided."""


@dataclass
class Loss:
    """value: the scalar to differentiate, the mean over all positions of the micro-batch, to which padding adds 0."""

    value: Tensor
    metrics: Metrics


class Objective(ABC):
    """One way to train a recurrent-depth model. Tokens are int64 [B, T + 1]; position i of T predicts token i + 1, unless that is padding
    (IGNORED). Of a model with a document_mark, positions attend to their own document alone: that of the token that they are given."""

    model_fields: dict[str, bool | str]
    """The fields of ModelConfig that follow from the objective, for example that its models take a noise level."""

    untied_blocks: bool = False
    """Whether it trains models with more than one block."""

    repeats_core: bool = False
    """Whether a step runs the core many times over: an engine that shards its weights gathers them once for all of these."""

    layer_checkpointing: LayerCheckpointing = "none"
    layer_checkpointing_interval: int = 1
    """Both as in ObjectiveSettings; who runs a model by this objective sets them there (`checkpoint_layers`)."""

    filled: float = 1.0
    """The mean share of a sequence's positions that have a target, by which losses are divided before they are differentiated: a constant
    of the data (data/rows.py), so that a step's loss does not depend on how its sequences are divided into micro-batches."""

    smallest_micro_batch: int = 1
    """Sequences that a micro-batch must have for its passes to be the same on every rank."""

    training_pass: TrainingPass | None = None
    """What of a micro-batch is computed with gradient, where every step does the same to tensors of the same shapes; else None."""

    @abstractmethod
    def __call__(self, model: RecurrentDepthLM, tokens: Tensor, random: SampleRandom) -> Loss:
        """The training loss of a micro-batch."""

    @abstractmethod
    def next_token_logits(self, model: RecurrentDepthLM, inputs: Tensor, random: SampleRandom) -> Tensor:
        """The model's next-token distribution as logits [B, T, V], from inputs [B, T] and noise, never from a target."""

    def compile(self, model: RecurrentDepthLM, apart: Collection[SandwichBlock] = ()) -> None:
        """Compile what a training step computes with this model. apart: layers to be compiled each by itself, as `compile_parts` says."""
        model.compile_parts(apart)

    def capture(self) -> None:
        """Have the training pass, of which there must be one, replayed as CUDA graphs once the model is where it stays."""
        self.training_pass = CapturedPass(self.training_pass)

    @abstractmethod
    def training_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """Operations per trained token, forward and backward."""

    def recomputed_flops(self, config: ModelConfig, sequence_length: int) -> float:
        """Operations per trained token that the backward pass makes once more, to save memory; `training_flops` leaves them out."""
        return recomputed_in_layers(config, sequence_length, self.layer_checkpointing, self.layer_checkpointing_interval)

    def active_block(self, random: SampleRandom) -> int | None:
        """The block that a step trains, the others standing idle: a function of (seed, step), the same for all its micro-batches on
        all ranks. None where nothing is idle, as when ranks `train_only` one each."""
        return None

    def train_only(self, block: int) -> float:
        """Train this block in every step on this rank, as other ranks train the others. Called once, where `untied_blocks` is true.

        Returns the weight of this rank's sequences, B p_b: they are 1 / B of all, and the objective means a share p_b of them for the
        block. What it adds up itself, metrics among it, it weighs so.
        """
        raise NotImplementedError

    def shared_draw(self, random: SampleRandom) -> int | None:
        """What all ranks must have drawn alike for a step: its block, or its depth."""
        return self.active_block(random)

    def before_step(self) -> None:  # noqa: B027 (most objectives learn nothing beside the weights)
        """Called by every rank before a step, which may be skipped: what it teaches beside the weights must then be taken back."""

    def after_step(self, step: int, world: World, skipped: Tensor | None = None) -> None:  # noqa: B027
        """Called by every rank once `step` steps are done: what is learned beside the weights is brought up to date here.

        skipped: a bool scalar on the device, whether nothing was to be learned from the last one; None where it counts.
        """

    def state(self, world: World) -> dict:
        """What a checkpoint must keep besides the weights, as plain numbers; the same on every rank. A collective call."""
        return {}

    def load_state(self, state: dict, world: World) -> None:  # noqa: B027
        """Restore what `state` returned."""

    def held_out_nll(self, model: RecurrentDepthLM, tokens: Tensor, random: SampleRandom) -> Tensor:
        """Negative log-likelihood in nats of each predicted token, fp32 [B, T], 0 where that is padding."""
        inputs, targets = inputs_and_targets(tokens)
        return token_losses(self.next_token_logits(model, inputs, random), targets)


def inputs_and_targets(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, T + 1] -> what positions are given and what they predict, [B, T] both.

    Padding stands at the end of a row, so no other position attends to it: it is given as token 0, and stays IGNORED as a target.
    """
    return tokens[:, :-1].clamp(min=0), tokens[:, 1:]


def sum_and_count(losses: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The metric of a tensor of losses, 0 where a target is IGNORED: their sum and the number of the others, which waits for no device."""
    return losses.detach().sum(), (targets != IGNORED).sum().float()
