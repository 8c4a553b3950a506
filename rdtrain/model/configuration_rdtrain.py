"""The configuration of an exported model for Hugging Face transformers: what its config.json holds, checked.

`AutoConfig.from_pretrained(FOLDER, trust_remote_code=True)` loads it. This file, modeling_rdtrain.py,
chain_cache.py, transformers_outputs.py and tokenization_rdtrain.py are the only ones here that need transformers; no other imports them.
"""

from dataclasses import asdict

import torch
import transformers

from .exceptions import first_line, refusal_of_transformers

if refused := refusal_of_transformers(transformers.__version__, "model"):
    raise ImportError(refused)

from transformers import PretrainedConfig

from .description import FORMAT, check_format, checked_dtype, checked_model, checked_noise
from .noise import NoiseSchedule
from .recurrent import ModelConfig

# transformers before 5.10 takes along only files that are named in a line like these, and would miss the others before it is refused above.
_FILES = """
from .attention import
from .byte_level_tokenizer import
from .cache import
from .checkpointing import
from .compiled import
from .halves import
from .information import
from .layers import
from .linear_cross_entropy import
from .sentencepiece_tokenizer import
from .tokenizer import
from .weight_copies import
"""


class RecurrentDepthConfig(PretrainedConfig):
    """What an exported model is.

    model: the fields of ModelConfig. noise: those of NoiseSettings. information_curve: the points of the curve that the noise levels of
    some models are divided by, or None. max_position_embeddings: tokens of a training sequence; longer texts are possible, and none was
    seen. The rest of config.json, which says how the model was trained, is kept as it is.
    """

    model_type = "recurrent_depth"
    has_no_defaults_at_init = True

    def __init__(self, model: dict | None = None, noise: dict | None = None, information_curve: list[float] | None = None, **others):
        """ValueError, in one sentence, for values that make no model, or those of another version of this code."""
        try:
            check_format(others.get("format", FORMAT))
            dtype = others.get("dtype")
            if dtype is not None and not isinstance(dtype, torch.dtype):
                checked_dtype(dtype)
            length = others.get("max_position_embeddings", 1)
            if type(length) is not int or length < 1:
                raise ValueError(f"max_position_embeddings must be a whole number from 1 on, and it is {length!r}")
            described = checked_model({"vocab_size": 1} if model is None else model)
            checked_noise(noise, information_curve, described)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"config.json does not describe a model of this code ({first_line(error)}): export it again") from None
        self.model, self.noise, self.information_curve = asdict(described), noise or {}, information_curve
        # Sizes by the names that transformers knows are read from `model`, and not stored a second time.
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"):
            others.pop(name, None)
        super().__init__(**others)

    def model_config(self) -> ModelConfig:
        """Of the model inside."""
        return ModelConfig(**self.model)

    def noise_schedule(self) -> NoiseSchedule:
        """Its noise levels, which a model that is not a denoiser does not use."""
        return NoiseSchedule.from_plain(self.noise, self.information_curve)

    @property
    def num_iterations(self) -> int:
        """K, as it was trained: what generation runs where it is told nothing else."""
        return self.model["iterations"]

    @num_iterations.setter
    def num_iterations(self, iterations: int) -> None:
        raise ValueError("num_iterations of a configuration is what the model was trained with: set it in generation_config, or give it to "
                         "generate")

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.model["vocab_size"]

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        if size != self.model["vocab_size"]:  # new rows stand behind the unused ones, which are no longer the last
            self.model |= {"vocab_size": size, "unused_tokens": 0}

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.model["width"]

    @property
    def intermediate_size(self) -> int:
        """Width inside the gated MLP."""
        return self.model["mlp_width"]

    @property
    def num_attention_heads(self) -> int:
        """Attention heads."""
        return self.model["heads"]

    @property
    def num_hidden_layers(self) -> int:
        """Layers that have weights: those of the core count once, however often it is iterated, and once a block."""
        return self.model["prelude_layers"] + self.model["blocks"] * self.model["core_layers"] + self.model["coda_layers"]
