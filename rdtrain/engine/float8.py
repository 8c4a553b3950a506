"""Products of the layers in fp8 (e4m3, and e5m2 for gradients), by torchao: `engine.precision=fp8`.

Of every linear map in prelude, core and coda, and of the core's adapter, the forward product and both of the backward pass take fp8 inputs,
each scaled by its largest number just before (dynamic scales, none of which a checkpoint would have to keep), and give bf16. What is small
or sensitive stays as it is in bf16: noise level, norms, attention, embedding and cross-entropy. Weights stay what they were, fp32 ones or
an engine's bf16 copies, under the same names, so checkpoints and exports know nothing of fp8.
"""

from dataclasses import replace

import torch
from torch import nn

from ..errors import UserError
from ..model.layers import Attention, GatedMLP
from ..model.recurrent import Core, ModelSettings, RecurrentDepthLM

RECIPE = "tensorwise"
"""torchao's name for one scale a tensor, which costs least."""

MULTIPLE = 16
"""What the sizes of fp8 products must be multiples of."""


def refuse_float8(device: torch.device, settings: ModelSettings) -> None:
    """UserError where such products are impossible: no torchao, a device that has none, or sizes that do not fit."""
    if device.type != "cuda":
        raise UserError(f"engine.precision=fp8 is for CUDA devices, and this is to run on {device.type}: use bf16 or fp32")
    for name in ("width", "mlp_width"):
        if getattr(settings, name) % MULTIPLE:
            raise UserError(
                f"engine.precision=fp8 needs sizes that are multiples of {MULTIPLE}, and model.{name} is {getattr(settings, name)}: change "
                "it, or use bf16"
            )
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise UserError(f"engine.precision=fp8 needs compute capability 8.9 or more, and {torch.cuda.get_device_name()} has less: use bf16")
    _torchao()


def multiplied_in_float8(model: RecurrentDepthLM) -> list[nn.Linear]:
    """The linear maps whose products are in fp8."""
    holders = [module for module in model.modules() if isinstance(module, (Attention, GatedMLP, Core))]
    return [module for holder in holders for module in holder.children() if isinstance(module, nn.Linear)]


def use_float8(model: RecurrentDepthLM, emulate: bool = False) -> None:
    """Put torchao's linear maps in the place of the layers' own, around the same weights; before the model is compiled or sharded.

    emulate: round to fp8, but multiply in the dtype that there was before, as any device can: for tests. UserError without torchao.
    """
    float8 = _torchao()
    maps = {id(module) for module in multiplied_in_float8(model)}
    config = float8.Float8LinearConfig.from_recipe_name(RECIPE)
    config = replace(config, emulate=emulate, pad_inner_dim=True)  # a micro-batch may have any number of positions
    float8.convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: id(module) in maps)


def _torchao():
    try:
        from torchao import float8
    except ImportError as error:
        raise UserError(f"engine.precision=fp8 needs torchao ({error}): pip install 'rdtrain[fp8]', or use bf16") from None
    return float8
