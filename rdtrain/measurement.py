"""What is looked at inside of a step that will be logged: norms of each part of the model, and the time of the forward passes.

Norms are taken by the optimizer, which sees the same under every engine: fp32 weights, averaged and clipped gradients, and Adam's moments,
whole or a rank's fragments of them. An engine says which elements belong to which parameter, and how squares add up over ranks. Nothing
waits for the device before the numbers are read, and no more memory is needed than one copy of one parameter, or fragment, at a time.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

PARTS = {
    "embedding": "embedding", "prelude_layers": "prelude", "cores": "core", "coda_layers": "coda", "final_norm": "coda",
    "core_norm": "coda", "core_scale": "coda", "noise_embedding": "conditioning", "estimate_adapter": "conditioning",
}
"""The first word of a parameter's name -> its part. Conditioning is what tells core and coda of the noise level and of the estimate
before."""

NAMES = tuple(dict.fromkeys(PARTS.values()))
"""The parts, in the order of rows."""

GRADIENT, UPDATE, WEIGHT = range(3)
"""Columns: whose squares are summed."""

Place = tuple[str, Tensor, int, int]
"""A parameter's name, the tensor that the optimizer steps, and which of its elements are the parameter's: the first and their number."""


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return PARTS[name.split(".", 1)[0]]


class Measurement:
    """Of one step of one rank, between `begin` and the next one; at other steps nothing is done."""

    def __init__(self):
        self.wanted = self._stepped = False
        self._fragments: dict[Tensor, list[tuple[int, int, int]]] = {}
        self._squares: list[tuple[int, int, Tensor]] = []
        self._passes: list[tuple] = []

    def begin(self, places: Iterable[Place]) -> None:
        """Measure the step that comes. places: of all parameters that this rank has elements of."""
        self._fragments = {}
        for name, tensor, first, elements in places:
            if elements:
                self._fragments.setdefault(tensor, []).append((NAMES.index(part_of(name)), first, elements))
        self.wanted, self._stepped, self._squares, self._passes = True, False, [], []

    @torch.no_grad()
    def add_gradients(self, groups: list[dict]) -> None:
        """The gradients that an optimizer is about to step these groups by."""
        self._stepped = True
        for tensor in self._of(groups):
            gradient = _flat(tensor.grad)
            for row, first, elements in self._fragments.get(tensor, ()):
                self._add(row, GRADIENT, gradient.narrow(0, first, elements))

    @torch.no_grad()
    def add_updates(self, groups: list[dict], state: dict[Tensor, dict[str, Tensor]]) -> None:
        """What AdamW has just done to these groups, computed once more from what it leaves, since nobody keeps the weights before it:

            w_before - w = (rate * m_hat / (sqrt(v_hat) + epsilon) + rate * decay * w) / (1 - rate * decay)
        """
        for group in groups:
            rate, (beta1, beta2), shrunk = group["lr"], group["betas"], group["lr"] * group["weight_decay"]
            for tensor in self._of([group]):
                of_it, step = state[tensor], state[tensor]["step"].double()
                scale, correction = rate / (1 - beta1**step), (1 - beta2**step).sqrt()
                for row, first, elements in self._fragments.get(tensor, ()):
                    weight, mean, square = (
                        _flat(each).narrow(0, first, elements) for each in (tensor.detach(), of_it["exp_avg"], of_it["exp_avg_sq"])
                    )
                    denominator = square.sqrt().div_(correction).add_(group["eps"])
                    update = torch.div(mean, denominator, out=denominator).mul_(scale).add_(weight, alpha=shrunk).div_(1 - shrunk)
                    self._add(row, UPDATE, update)
                    self._add(row, WEIGHT, weight)

    def _of(self, groups: list[dict]) -> list[Tensor]:
        """What a step of these groups changes: without a gradient it passes a tensor by."""
        return [tensor for group in groups for tensor in group["params"] if tensor.grad is not None] if self.wanted else []

    def _add(self, row: int, column: int, values: Tensor) -> None:
        self._squares.append((row, column, torch.linalg.vector_norm(values).double().square()))

    def squares(self, device: torch.device) -> Tensor | None:
        """This rank's sums of squares, fp64 [parts, columns]; None where the step was not measured, or was left out before the optimizer
        was asked."""
        if not (self.wanted and self._stepped):
            return None
        total = torch.zeros(len(NAMES), 3, dtype=torch.float64, device=device)
        if not self._squares:  # all elements are other ranks'
            return total
        rows, columns, values = zip(*self._squares)
        where = torch.tensor(rows, device=device), torch.tensor(columns, device=device)
        return total.index_put(where, torch.stack(values).to(device), accumulate=True)

    @contextmanager
    def forward_pass(self, device: torch.device) -> Iterator[None]:
        """Time what is inside, on the device where that is CUDA."""
        if not self.wanted:
            yield
        elif device.type == "cuda":
            ends = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            ends[0].record()
            yield
            ends[1].record()
            self._passes.append(ends)
        else:
            started = time.perf_counter()
            yield
            self._passes.append((time.perf_counter() - started,))

    def pass_seconds(self) -> float | None:
        """Of all forward passes of the step, which must be over; None where they were not timed."""
        if not self.wanted:
            return None
        return sum(1e-3 * ends[0].elapsed_time(ends[1]) if len(ends) == 2 else ends[0] for ends in self._passes)

    def end(self) -> None:
        """Measure no further step, and forget this one."""
        self.wanted, self._fragments, self._squares, self._passes = False, {}, [], []


def _flat(tensor: Tensor) -> Tensor:
    """The elements that are here of a tensor, or of a rank's part of it."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).reshape(-1)
