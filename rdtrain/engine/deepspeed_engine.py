"""DeepSpeed ZeRO behind the engine interface; deepspeed_config.py says with which settings.

The optimizer is torch's AdamW but for the blocks that it leaves out, so no operator of DeepSpeed's is compiled at start.
"""

import datetime
import functools
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import PROCESS_GROUP_MINUTES, World, backend, describe_lone_process
from ..measurement import Place
from ..objectives import Loss
from ..optimization import OptimizerSettings, build_optimizer, set_learning_rate
from ..randomness import SampleRandom
from .base import Engine, Judge, MicroBatch, TrainingModule, differentiate, mean_loss
from .portable import Part, flat_part, gather, scatter

HOLDER = -1
"""A number that is no module's."""


def initialise_distributed(world: World) -> None:
    """Start the process group by DeepSpeed's own means."""
    describe_lone_process()
    if world.device.type == "cpu":
        # DeepSpeed would compile a shared-memory operator here that training never calls; a build killed half-way leaves a lock
        # on which every later run hangs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names that torch 2.13 is about to drop; a user can do nothing about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # we test ours
    timeout = datetime.timedelta(minutes=PROCESS_GROUP_MINUTES)
    deepspeed.init_distributed(backend(world.device), timeout=timeout, verbose=False)


class DeepSpeedEngine(Engine):
    """ZeRO 0, 1, 2 or 3 over the default process group, which must stand."""

    def __init__(self, module: TrainingModule, optimizer: OptimizerSettings, config: dict):
        """config: of `deepspeed_config`."""
        self.facts = {"deepspeed_config": config}
        self.model = module.model
        self._stage = config["zero_optimization"]["stage"]
        self._optimizer = build_optimizer(self.model, optimizer)  # ZeRO puts its flat shards into the groups of this very object
        self.measurement = self._optimizer.measurement = module.measurement
        self._clipping = optimizer.gradient_clipping or float("inf")
        self._parameters = dict(self.model.named_parameters())
        self._shapes = {name: parameter.shape for name, parameter in self._parameters.items()}  # stage 3 leaves empty ones
        groups = {parameter: index for index, group in enumerate(self._optimizer.param_groups) for parameter in group["params"]}
        self._group = {name: groups[parameter] for name, parameter in self._parameters.items()}
        linear = F.linear
        self._engine, _, _, _ = deepspeed.initialize(model=module, optimizer=self._optimizer, config=config)
        self._linear, F.linear = F.linear, linear
        self._norm: float | Tensor = 0.0
        self._held = list(self.model.cores.parameters()) if self._stage == 3 and module.objective.repeats_core else []

    @contextmanager
    def _passes(self):
        """Around the passes: what stage 3 needs to be otherwise than elsewhere in the process.

        The core's weights are kept once they are gathered: an iteration would drop them, which the next one needs again. Stage 3 drops
        what no module is using, so one more user is noted for each. (Its own setting for weights to be left whole goes by size alone, and
        holds only while every step calls the same modules, which a drawn depth does not.) The optimizer's step drops all.

        Layers call stage 3's linear function, which keeps no gathered weight for the backward pass. DeepSpeed leaves it in PyTorch's
        place for good: engines after this one would call it too, and PyTorch 2.11 compiles it without the gradients of layers that have a
        bias (github.com/pytorch/pytorch/issues/180642).
        """
        linear, F.linear = F.linear, self._linear
        for parameter in self._held:
            parameter.ds_active_sub_modules.add(HOLDER)
        try:
            yield
        finally:
            F.linear = linear
            for parameter in self._held:
                parameter.ds_active_sub_modules.discard(HOLDER)

    def train_step(self, micro_batches: Iterable[MicroBatch], learning_rate: float, block: int | None = None,
                   judge: Judge | None = None) -> list[Loss]:
        self._optimizer.active_block = block
        set_learning_rate(self._engine.optimizer, learning_rate)
        idle = [core for index, core in enumerate(self.model.cores) if block is not None and index != block]
        if self._stage == 3:  # it would count an idle block's last gradient into the norm once more
            nn.ModuleList(idle).requires_grad_(False)
        losses = []
        if judge is not None:
            # ZeRO takes the norm inside its step, so its optimizer asks; it reads the norm itself, for a gradient that is not finite,
            # and then leaves its step out and nobody has asked.
            verdict = functools.cache(lambda: judge(mean_loss(losses), self._step_norm()))
            self._optimizer.must_skip = verdict
        with self._passes():
            for tokens, random in micro_batches:
                loss = Loss(*self._engine(tokens, random))
                self._engine.backward(loss.value)
                if self._stage == 0 and self._engine.is_gradient_accumulation_boundary():  # which reports no norm
                    self._norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
                losses.append(loss)
                self._engine.step()  # DeepSpeed counts micro-batches itself and updates at the last
        if judge is not None:
            verdict()
        nn.ModuleList(idle).requires_grad_(True)
        return losses

    @torch.no_grad()
    def held_out_nll(self, tokens: Tensor, random: SampleRandom) -> Tensor:
        with self._passes():
            return self._engine(tokens, random, held_out=True)

    def _pass_without_trace(self, tokens: Tensor, random: SampleRandom) -> None:
        """Of stages 0 to 2, past DeepSpeed: its hooks on the module start timers, and those on gradients count, add up and reduce them."""
        value, _ = self._engine.module.forward(tokens, random)
        differentiate(value, self.model)

    def weights(self) -> dict[str, Tensor]:
        main, whole = self._engine.global_rank == 0, {}
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):  # one at a time
                if main:
                    whole[name] = parameter.detach().cpu().contiguous()
                    if self._stage == 3:
                        whole[name] = whole[name].clone()
        return whole

    def close(self) -> None:
        """Nothing of the engine can be used any more."""
        engine, zero, parameters = self._engine, self._engine.optimizer, self._parameters.values()
        engine.destroy()
        # Hooks that DeepSpeed leaves in autograd's graphs keep it, out of the garbage collector's sight: what they keep must be empty.
        for thing in (zero, engine, self, *parameters):  # stage 3 keeps a rank's part as an attribute of an empty parameter
            vars(thing).clear()

    def _step_norm(self) -> float | Tensor:
        return self._norm if self._stage == 0 else self._engine.optimizer._global_grad_norm

    def gradient_norm(self) -> float:
        return float(self._step_norm())

    def snapshot(self) -> dict[str, Tensor]:
        self._create_state()
        return gather(self._parameters, self._shapes, self._part, self._engine.global_rank, self._engine.world_size, self._stage > 0)

    def restore(self, read: Callable[[str], Tensor]) -> None:
        zero = self._engine.optimizer
        self._create_state()
        if self._stage == 3:
            zero.checkpoint_event_prologue()  # drops what is gathered
        scatter(self._parameters, self._part, read)
        if self._stage in (1, 2):
            zero.update_lp_params()
        elif self._stage == 3:
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)  # the weights that it runs
            zero.checkpoint_event_epilogue()  # gathers the small ones that stay whole

    def _create_state(self) -> None:
        """Stage 3 fills in the groups only for the time of a step."""
        if self._stage == 3:
            self._engine.optimizer._set_fp32_optimizer_param_groups()
        self._optimizer.create_state()
        if self._stage == 3:
            self._engine.optimizer._clear_fp32_optimizer_param_groups()

    def _part(self, name: str) -> Part:
        """DeepSpeed's functions for this (safe_get_full_optimizer_state) know no state before the first step, and give all ranks all."""
        flat, first, start, elements = self._fragment(name)
        return flat_part(start, flat, self._optimizer.state[flat], first, elements)

    def _fragment(self, name: str) -> tuple[Tensor, int, int, int]:
        """This rank's elements of a parameter: the tensor that the optimizer steps, where they begin there, where in the parameter, and
        how many they are."""
        parameter, zero = self._parameters[name], self._engine.optimizer
        if self._stage == 0:
            return parameter, 0, 0, parameter.numel()
        if self._stage == 3:  # every parameter is divided among all ranks, the last of which may have less
            group, first, elements = zero.grad_position[zero.get_param_id(parameter)]
            flat, start = zero.fp32_partitioned_groups_flat[group], elements * self._engine.global_rank
            elements = max(0, min(elements, parameter.ds_numel - start))
        else:  # a group of parameters end to end is divided among the ranks
            flat, fragment = self._optimizer.param_groups[self._group[name]]["params"][0], parameter._hp_mapping
            first, start, elements = 0, 0, 0
            if fragment is not None:
                address = fragment.get_hp_fragment_address()
                first, start, elements = address.start, fragment.lp_fragment_address.start, address.numel
        return flat, first, start, elements

    def _places(self) -> Iterable[Place]:
        for name in self._parameters:
            flat, first, _, elements = self._fragment(name)
            yield name, flat, first, elements

    def _over_ranks(self, squares: Tensor) -> Tensor:
        if self._stage > 0:
            dist.all_reduce(squares)
        return squares
