"""What an engine does: it owns the model's weights, their gradients and the optimizer, and steps them together.

An engine is handed a plain module and an objective, and knows nothing of data, schedules or metrics. Which engine runs is a
setting, and the losses do not depend on it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line
from ..measurement import GRADIENT, NAMES, UPDATE, WEIGHT, Measurement, Place, part_of
from ..model.recurrent import RecurrentDepthLM
from ..objectives import Loss, Metrics, Objective
from ..randomness import SampleRandom

MicroBatch = tuple[Tensor, SampleRandom]
"""Tokens [B, T + 1] on the engine's device, and the random numbers of their samples."""

Judge = Callable[[Tensor, Tensor | float], Tensor]
"""Says from this rank's loss of a step and the global gradient norm whether the step must change nothing: a bool scalar. Collective."""


@dataclass
class EngineSettings:
    """How the model is run and sharded.

    name: `deepspeed` (ZeRO, any number of ranks), `fsdp` (torch's fully_shard, any number of ranks), `block_parallel` (untied blocks,
        each on ranks of its own, a multiple of model.blocks) or `torch` (one process of plain PyTorch, the reference).
    zero_stage: deepspeed only: 0 shards nothing, 1 the optimizer state, 2 the gradients as well, 3 the weights as well, as fsdp does.
    offload_optimizer: deepspeed with zero_stage 1 to 3 only: optimizer state and master weights in the memory of the CPU, which then
        makes the optimizer's step.
    compile: compile prelude, core, coda and loss with torch.compile before training starts; under fsdp the layers that it shards, each by
        itself. zero_stage=3 cannot.
    cuda_graph: CUDA and compile only: have the GPU run the passes of a micro-batch as CUDA graphs, which the host starts at once. For a
        step that waits for the host (`rdtrain bench` says so); takes room for one more copy of the gradients. For diffusion_blocks of one
        block, without self_conditioning and chain_states, and one_pass; under name=torch and deepspeed with zero_stage 0 to 2.
    precision: `bf16`, `fp32`, or `auto`: bf16 on CUDA and fp32 on CPU. The optimizer works in fp32 in any case. In bf16, ZeRO 1 to 3 and
        fsdp run bf16 copies of the fp32 weights; the others run the fp32 weights under torch.autocast. `fp8` is bf16 with the products of
        the layers in fp8, by torchao: CUDA and compile only.
    """

    name: Literal["deepspeed", "fsdp", "block_parallel", "torch"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    compile: bool = False
    cuda_graph: bool = False
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"

    def __post_init__(self):
        """ValueError for an engine that cannot compile, for what needs compiled code, and where there is no optimizer state to move."""
        if self.compile and self.name == "deepspeed" and self.zero_stage == 3:
            raise ValueError(
                "compile cannot go with zero_stage=3, which gathers weights inside of what would be compiled: use zero_stage 0 to 2, or "
                "name=fsdp, or leave compile off"
            )
        if self.cuda_graph and (not self.compile or self.name not in ("torch", "deepspeed")):
            raise ValueError(
                "cuda_graph captures what compile makes, under name=torch, and deepspeed with zero_stage 0 to 2: set compile=true and one "
                "of these, or leave cuda_graph off"
            )
        if self.precision == "fp8" and not self.compile:
            raise ValueError(
                "precision=fp8 scales and rounds in compiled code, and is slower than bf16 without: set compile=true, or use bf16"
            )
        if self.offload_optimizer and (self.name != "deepspeed" or self.zero_stage == 0):
            raise ValueError("offload_optimizer works with name=deepspeed and zero_stage 1 to 3 alone: use these or leave it off")

    @property
    def gathers_weights(self) -> bool:
        """Whether a pass gathers weights from all ranks, so that all must make the same passes."""
        return self.name == "fsdp" or (self.name == "deepspeed" and self.zero_stage == 3)

    def groups(self, blocks: int) -> int:
        """How many equal groups the ranks form, each of which holds a core of its own: as many as blocks, or one that holds all."""
        return blocks if self.name == "block_parallel" else 1

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that the precision means on this device, of all but fp8's products."""
        bf16 = self.precision in ("bf16", "fp8") or (self.precision == "auto" and device.type == "cuda")
        return torch.bfloat16 if bf16 else torch.float32


class TrainingModule(nn.Module):
    """Model and objective as one module with all passes behind its forward, so that an engine's hooks see every one."""

    def __init__(self, model: RecurrentDepthLM, objective: Objective, autocast: torch.dtype = torch.float32):
        """autocast: what torch.autocast computes in; fp32 for none of it."""
        super().__init__()
        self.model = model
        self.objective = objective
        model.checkpoint_layers(objective.layer_checkpointing, objective.layer_checkpointing_interval)
        self.measurement = Measurement()
        self._autocast = torch.autocast(model.embedding.weight.device.type, autocast, enabled=autocast != torch.float32)

    def forward(self, tokens: Tensor, random: SampleRandom, held_out: bool = False) -> tuple[Tensor, Metrics] | Tensor:
        """The parts of a training Loss, as a plain tuple: engines look for tensors in what comes out, and do not look into other
        classes. The value is divided by `Objective.filled`. With held_out the negative log-likelihood of each predicted token, fp32
        [B, T]."""
        if held_out:
            with self._autocast:
                return self.objective.held_out_nll(self.model, tokens, random)
        with self._autocast, self.measurement.forward_pass(tokens.device):
            loss = self.objective(self.model, tokens, random)
            return loss.value / self.objective.filled, loss.metrics


def differentiate(value: Tensor, model: nn.Module) -> None:
    """A backward pass for its time alone: gradients are dropped, and nobody hears of them, as no hook on their accumulation is called."""
    torch.autograd.grad(value, [parameter for parameter in model.parameters() if parameter.requires_grad], allow_unused=True)


def mean_loss(losses: list[Loss]) -> Tensor:
    """The loss of a rank's micro-batches, detached."""
    return torch.stack([loss.value.detach() for loss in losses]).mean()


class Engine(ABC):
    """Weights, gradients and optimizer of one rank. What is called collective, all ranks call, and equally often."""

    model: RecurrentDepthLM
    """The live model; a sharding engine leaves only a part of its weights here."""

    facts: dict = {}
    """What a record of the run should say of the engine, for example the config that it was given."""

    measurement: Measurement
    """The training module's and the optimizer's."""

    _clipping: float
    """Largest global norm of the gradient; infinity for none."""

    @abstractmethod
    def train_step(self, micro_batches: Iterable[MicroBatch], learning_rate: float, block: int | None = None,
                   judge: Judge | None = None) -> list[Loss]:
        """One optimizer step over this rank's micro-batches; all are weighted alike. Returns their losses. Collective.

        block: the one that is trained, of a model with several; the others stay as they are. None where there is one.
        judge: asked once, before weights and optimizer state change; where it says so, they stay as they were.
        """

    @abstractmethod
    def held_out_nll(self, tokens: Tensor, random: SampleRandom) -> Tensor:
        """The objective's negative log-likelihood of tokens [B, T + 1], without gradient: nats, fp32 [B, T]. Collective."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The whole model's weights by name, on rank 0; nothing on the others. Collective."""

    def warm_up(self, tokens: Tensor, random: SampleRandom) -> None:
        """Run a forward and backward pass that changes no weight, gradient or state of the engine, so that a first use that costs time is
        over. Between steps; collective. UserError where the model is to be compiled and this machine cannot."""
        try:
            self._pass_without_trace(tokens, random)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise UserError(f"torch.compile failed ({first_line(error)}): install a C++ compiler, or set engine.compile=false") from error

    @abstractmethod
    def _pass_without_trace(self, tokens: Tensor, random: SampleRandom) -> None:
        """The passes of `warm_up`."""

    def close(self) -> None:  # noqa: B027 (most engines keep nothing alive)
        """Let go of what would keep this engine's memory in use after its last reference."""

    @abstractmethod
    def gradient_norm(self) -> float:
        """The global gradient norm of the last step, before clipping."""

    def measure_step(self) -> None:
        """Have the next step measured, for `norms_by_part` and `measurement.pass_seconds`."""
        self.measurement.begin(self._places())

    def norms_by_part(self, skipped: bool = False) -> dict[str, dict[str, float | None]]:
        """Of the step that was measured last, for each part of the model (measurement.PARTS) that has parameters; collective.

        gradient_norm_by_part: as `gradient_norm`, whose square is the sum of their squares. update_size_by_part: the norm of what the step
        added to the weights as a share of their norm after it (the ratio of CS231n's notes, about 1e-3 where a rate is good). Of untied
        blocks the core is what the step trained. skipped: that the step changed nothing. None where a number is not known or not finite.
        """
        squares, norm = self.measurement.squares(self.model.embedding.weight.device), self.gradient_norm()
        parts = sorted({part_of(name) for name, _ in self.model.named_parameters()}, key=NAMES.index)
        gradients, updates = dict.fromkeys(parts), dict.fromkeys(parts)
        if squares is not None and math.isfinite(norm):
            unclipped = max(1.0, (norm + 1e-6) / self._clipping)  # as torch's clip_grad_norm_, and DeepSpeed, have divided them
            for part, row in zip(NAMES, self._over_ranks(squares).tolist()):
                if part in parts:
                    gradients[part] = unclipped * math.sqrt(row[GRADIENT])
                    if not skipped and row[WEIGHT] and math.isfinite(row[UPDATE] / row[WEIGHT]):  # weights of 1e20 have squares beyond fp32
                        updates[part] = math.sqrt(row[UPDATE] / row[WEIGHT])
        return {"gradient_norm_by_part": gradients, "update_size_by_part": updates}

    @abstractmethod
    def _places(self) -> Iterable[Place]:
        """Where the optimizer finds this rank's elements of each parameter."""

    @abstractmethod
    def _over_ranks(self, squares: Tensor) -> Tensor:
        """Those of the whole model, from a rank's `Measurement.squares`. Collective."""

    @abstractmethod
    def snapshot(self) -> dict[str, Tensor]:
        """This rank's share of the run's weights and optimizer state: whole fp32 tensors on the CPU, copies that training does not change
        any more. Names are `weight/PARAMETER`, `exp_avg/PARAMETER`, `exp_avg_sq/PARAMETER`, `step/PARAMETER`; each name comes from exactly
        one rank, and the names of one parameter from the same one. Collective."""

    @abstractmethod
    def restore(self, read: Callable[[str], Tensor]) -> None:
        """Restore what all ranks' snapshots held, on any engine and number of ranks; read gives a whole tensor by name. Collective.

        On the engine and ranks that made them the run goes on to the bit. UserError where this engine cannot keep what they hold.
        """
