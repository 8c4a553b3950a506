"""A training pass as two CUDA graphs, its forward and its backward pass: the host starts each at once, and not some hundreds of kernels.

It is for passes that the host cannot start as fast as the GPU runs them. torch.cuda.make_graphed_callables does the same, but gives
autograd the very buffers that its graph will write to again; autograd may keep one as a parameter's gradient, which the next micro-batch
of the step would overwrite. Here gradients are copies.

Memory that a graph works in stays its own between replays, so the allocator counts it as reserved, not as allocated: `captured_bytes`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model.recurrent import RecurrentDepthLM

TrainingPass = Callable[..., tuple[Tensor, Tensor]]
"""(model, tensor, ...) -> the mean loss of a micro-batch, to differentiate, and each position's loss, detached."""

WARM_UP = 3
"""Passes before the capture, in which libraries allocate and choose kernels; what was not compiled before is compiled then."""


class CapturedPass:
    """A training pass, captured at its first call with gradient; from then on a call copies its tensors in and replays it.

    The pass may do nothing that depends on anything but its tensors, which have the same shapes in every call, and parameters, which stay
    where they are in memory: RuntimeError where they do not. Gradients of the parameters are the only ones.
    """

    any_captured = False
    """Whether this process has captured a pass."""

    def __init__(self, training_pass: TrainingPass):
        self._training_pass = training_pass
        self._inputs: tuple[Tensor, ...] = ()

    def __call__(self, model: RecurrentDepthLM, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return self._training_pass(model, *tensors)
        if not self._inputs:
            self._capture(model, tensors)
        for kept, tensor in zip(self._inputs, tensors, strict=True):
            if kept.shape != tensor.shape:
                raise RuntimeError(f"a captured pass takes tensors of shape {tuple(kept.shape)}, and one has {tuple(tensor.shape)}")
            kept.copy_(tensor)
        if [parameter.data_ptr() for parameter in self.parameters] != self._places:
            raise RuntimeError("a parameter has moved in memory since its pass was captured")
        return Replay.apply(self, *self.parameters)

    def _capture(self, model: RecurrentDepthLM, tensors: tuple[Tensor, ...]) -> None:
        CapturedPass.any_captured = True
        self._inputs = tuple(tensor.clone() for tensor in tensors)
        self.parameters = trained(model)
        self._places = [parameter.data_ptr() for parameter in self.parameters]
        # Replays read the table of rotary angles, which a longer sequence would replace: this view keeps it.
        self._angles = model.rotary(0, tensors[0].shape[1] - 1, tensors[0].device)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.seed = torch.ones((), device=tensors[0].device)
        dtype = torch.get_autocast_dtype("cuda")
        # The copies of weights that autocast would keep are made anew in each replay.
        with torch.autocast("cuda", dtype, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False), aliased(model) as aliases:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self._differentiate(self._training_pass(model, *self._inputs)[0], aliases)
            torch.cuda.current_stream().wait_stream(aside)
            torch.cuda.empty_cache()  # of what only the warm-up needed
            # Other threads may allocate pinned memory meanwhile.
            with torch.cuda.graph(self.forward_graph, capture_error_mode="thread_local"):
                value, losses = self._training_pass(model, *self._inputs)
            with torch.cuda.graph(self.backward_graph, pool=self.forward_graph.pool(), capture_error_mode="thread_local"):
                self.gradients = self._differentiate(value, aliases)
        self.value, self.losses = value.detach(), losses
        torch.cuda.reset_peak_memory_stats(tensors[0].device)  # what was allocated for the capture is `captured_bytes` from here on

    def _differentiate(self, value: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(value, parameters, self.seed, allow_unused=True)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that gradients are of."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def aliased(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Others in the place of the `trained` parameters of a model meanwhile, with the same memory, in the same order.

    Autograd waits for the stream on which it first met a parameter. DeepSpeed has it meet them all on the default stream, to hook into
    their gradients, and a capture must not wait for that one ("would make the legacy stream depend on a capturing blocking stream").
    """
    aliases = {parameter: nn.Parameter(parameter.detach()) for parameter in trained(model)}
    places = [(module, name, own) for module in model.modules() for name, own in module._parameters.items() if own in aliases]
    try:
        for module, name, own in places:
            module._parameters[name] = aliases[own]
        yield list(aliases.values())
    finally:
        for module, name, own in places:
            module._parameters[name] = own


class Replay(torch.autograd.Function):
    """The graphs of a CapturedPass, as one operation on the parameters."""

    @staticmethod
    def forward(ctx, captured: CapturedPass, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.captured = captured
        captured.forward_graph.replay()
        losses = captured.losses.clone()
        ctx.mark_non_differentiable(losses)
        return captured.value.clone(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, above: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        captured = ctx.captured
        captured.seed.copy_(above)
        captured.backward_graph.replay()
        return None, *(None if gradient is None else gradient.clone() for gradient in captured.gradients)


def captured_bytes(device: torch.device) -> int:
    """What CUDA graphs keep for their replays beyond what counts as allocated; 0 where no pass has been captured."""
    if not CapturedPass.any_captured:  # a snapshot of the allocator takes time, and runs ask wherever they log
        return 0
    pools = [segment for segment in torch.cuda.memory_snapshot() if segment["device"] == device.index]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in pools if segment["segment_pool_id"] != (0, 0))
