"""Our models as `rdtrain evaluate` takes them: an exported folder, a run folder, or a checkpoint folder.

What a folder holds is read and checked first (`find_model`), its weights only when they are wanted (`Source.load`): with several
models and hours of sampling, a wrong path must be found at once.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import read_state
from ..errors import UserError, first_line
from ..export import exported_config, newest_checkpoint
from ..model.generation import TextGenerator
from ..model.noise import NoiseSettings
from ..model.recurrent import ModelConfig
from ..model.tokenizer import TOKENIZER_FILES, Tokenizer
from ..objectives import Objective, ObjectiveSettings, build_objective


@dataclass
class Source:
    """A trained model on disk.

    name: what reports call it. folder: holds the weights and the tokenizer. config: what its config.json says, or would
    say if it were exported.
    """

    name: str
    folder: Path
    config: dict

    @property
    def denoising(self) -> bool:
        """Whether its iterations are denoising blocks; unrolled ones otherwise."""
        return self.config["model"]["noise_conditioning"]

    @property
    def iterations(self) -> int:
        """K as it was trained."""
        return self.config["model"]["iterations"]

    def runs_at(self, iterations: int) -> bool:
        """Whether K may be so many: a model that is trained for one pass has no recurrence to repeat."""
        return self.denoising or self.iterations > 1 or iterations == 1

    def objective(self, iterations: int | None = None) -> Objective:
        """What says what a likelihood of this model is, at K iterations (as trained where None)."""
        settings, noise = ObjectiveSettings(**self.config["objective"]), NoiseSettings(**self.config["noise"])
        if settings.name == "bptt":  # its gradient and depth in training have no bearing on a likelihood, nor on which K are possible
            settings = ObjectiveSettings("bptt", gradient="full", depth="fixed")
        return build_objective(settings, noise, iterations or self.iterations, self.config["model"]["blocks"])

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer. UserError when it is missing, damaged, or another one."""
        try:
            tokenizer = Tokenizer(self.folder)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{self.folder} has lost its tokenizer ({error}): copy it there from the shards' folder") from None
        if tokenizer.hash != self.config["tokenizer_hash"]:
            raise UserError(f"the {tokenizer.file_name} in {self.folder} is not the one that the model was trained with: restore that one")
        return tokenizer

    def load(self, device: str | None) -> TextGenerator:
        """Model and tokenizer on a device (CUDA where there is one and None is given). UserError when a file is damaged."""
        with tempfile.TemporaryDirectory() as temporary:
            # A checkpoint is an export but for its config.json, so it is shown to the loader as one.
            view = Path(temporary)
            (view / "config.json").write_text(json.dumps(self.config))
            tokenizers = (file for name in TOKENIZER_FILES for file in self.folder.glob(name))
            for file in (*self.folder.glob("model*.safetensors*"), *tokenizers):
                (view / file.name).symlink_to(file.resolve())
            try:
                return TextGenerator.load(view, device)
            except (ValueError, OSError) as error:
                raise UserError(str(error).replace(str(view), str(self.folder))) from None


def is_ours(path: Path) -> bool:
    """Whether a folder is an rdtrain export, run or checkpoint, rather than somebody else's model."""
    if (path / "state.json").exists() or (path / "run.json").exists():
        return True
    try:
        return "tokenizer_hash" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def find_model(path: Path) -> Source:
    """The model of an exported folder, a run folder (its newest checkpoint) or a checkpoint folder. UserError when it is none."""
    if not is_ours(path):
        raise UserError(f"{path} is no model of rdtrain: give a run folder that has trained, a checkpoint or an exported folder")
    if (path / "config.json").exists():
        source = Source(path.resolve().name, path, json.loads((path / "config.json").read_text()))
    else:
        folder = newest_checkpoint(path)
        state = read_state(folder)
        source = Source(f"{state['name']} step {state['step']}", folder, exported_config(state))
    if not any(source.folder.glob("model*.safetensors")):
        raise UserError(f"{source.folder} has no model.safetensors: export the model again, or use another checkpoint")
    try:
        ModelConfig(**source.config["model"])
        source.objective()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is of another version of rdtrain ({first_line(error)}): train or export it again with this one") from None
    return source
