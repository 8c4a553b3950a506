"""From a checkpoint to a folder that generates text on its own.

    OUTPUT/
      config.json         model, noise levels, information curve, dtype, tokenizer hash, training facts
      model.safetensors   the weights
      tokenizer.model     the tokenizer
      *.py                rdtrain/model, byte for byte: `python OUTPUT --prompt TEXT` runs it
      README.md           what it is and how it was trained

The export is called done only when the folder's own code, loaded apart from rdtrain, has computed the same logits and tokens as the
training model, bit for bit.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch

from .checkpoint import load_weights, read_state, refuse_damaged
from .checkpoint_storage import checkpoint_folder, checkpoint_steps
from .data.output import output_folder
from .errors import UserError
from .model import generation, recurrent
from .model.noise import NoiseSchedule
from .objectives import Objective, ObjectiveSettings, build_objective
from .randomness import SampleRandom

MODEL_FILES = Path(recurrent.__file__).parent


def export(source: Path, output: Path, overwrite: bool = False) -> None:
    """Export a checkpoint folder, or the newest checkpoint of a run folder.

    Raises UserError when there is no checkpoint, when it is damaged, or when `output` exists and overwrite is not set.
    """
    source = newest_checkpoint(source)
    state = read_state(source)
    model = recurrent.RecurrentDepthLM(recurrent.ModelConfig(**state["model"]))
    dtype = getattr(torch, state["precision"])
    load_weights(source, model.to(dtype))
    with output_folder(output, "config.json", overwrite) as folder:
        for file in sorted(MODEL_FILES.glob("*.py")):
            shutil.copyfile(file, folder / file.name)
        for name in ("model.safetensors", "tokenizer.model"):
            shutil.copyfile(source / name, folder / name)
        config = exported_config(state)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "README.md").write_text(_model_card(config, state))
        noise = NoiseSchedule.from_plain(config["noise"], config["information_curve"])
        settings, shape = ObjectiveSettings(**state["objective"]), model.config
        _verify(folder, model, noise, build_objective(settings, noise.settings, shape.iterations, shape.blocks))
    print(f"{output}: exported from {source}; its own code gives the training model's logits and tokens bit for bit")


def newest_checkpoint(source: Path) -> Path:
    """A checkpoint folder itself, or the newest checkpoint of a run folder. UserError when there is none, or it is damaged."""
    if not (source / "state.json").exists():
        steps = checkpoint_steps(source)
        if not steps:
            raise UserError(f"{source} holds no checkpoint: give a run folder that has trained, or one of its checkpoints/step-* folders")
        source = checkpoint_folder(source, steps[-1])
    refuse_damaged(source, ["state.json", "model.safetensors", "tokenizer.model"])
    return source


def exported_config(state: dict) -> dict:
    """What config.json says of the model of a checkpoint with this state."""
    return {
        "format": 1,
        "model": state["model"],
        "noise": state["noise"],
        "information_curve": state["objective_state"].get("information_curve"),
        "objective": state["objective"],
        "dtype": state["precision"],
        "tokenizer_hash": state["tokenizer_hash"],
        "trained_steps": state["step"],
        "trained_tokens": state["step"] * state["tokens_per_step"],
    }


def _verify(folder: Path, model: recurrent.RecurrentDepthLM, noise: NoiseSchedule, objective: Objective) -> None:
    """AssertionError when the folder's own code and files do not compute what the training model does: logits and a continuation."""
    theirs = load_exported(folder)
    exported = theirs.TextGenerator.load(folder, device="cpu")
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [objective.next_token_logits(one, ids, SampleRandom(0, range(2), ids.device)) for one in (model, exported.model)]
    assert torch.equal(*logits), f"the exported model in {folder} computes other logits than the training model"
    iterations = max(2, model.config.blocks)  # so that every block runs
    continuations = [
        torch.stack(list(code.generate(one, ids, 4, iterations, levels, code.Sampling(0.0), seed=0)))
        for code, one, levels in ((generation, model, noise), (theirs, exported.model, exported.noise))
    ]
    assert torch.equal(*continuations), f"the exported model in {folder} continues a prompt otherwise than the training model"
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def load_exported(folder: Path):
    """The `generation` module of an exported folder, as a package of its own that knows nothing of rdtrain."""
    name = "rdtrain_exported"
    for loaded in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[loaded]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{name}.generation")


def _model_card(config: dict, state: dict) -> str:
    model, objective = config["model"], config["objective"]
    if objective["name"] == "diffusion_blocks":
        trained = "Each iteration was trained on its own as a denoising block, in a single pass (DiffusionBlocks, arXiv 2506.14202)."
    elif objective["name"] == "one_pass":
        trained = "It was trained as an ordinary language model, in one pass from a state of zeros."
    else:
        last = {"full": "all", "truncated": f"the last {objective['trained_iterations']}", "local": "the last"}[objective["gradient"]]
        depth = {
            "fixed": f"{model['iterations']} iterations",
            "poisson": f"a number of iterations drawn for each step (Huginn's log-normal Poisson around {model['iterations']})",
        }[objective["depth"]]
        trained = f"It was trained by backpropagation through {last} of {depth}."
    untied = f", as {model['blocks']} untied blocks for equal shares of them" if model["blocks"] > 1 else ""
    return f"""# {state['name']}

A recurrent-depth language model made with rdtrain: {model['prelude_layers']} prelude, {model['core_layers']} core and
{model['coda_layers']} coda layers of width {model['width']}, {state['parameters']:,} parameters, vocabulary {model['vocab_size']:,};
the core runs K = {model['iterations']} times a token{untied}. {trained}

Trained for {config['trained_steps']:,} steps, {config['trained_tokens']:,} tokens, in {config['dtype']}.

    python FOLDER --prompt "Once" --max-new-tokens 100 --iterations {model['iterations']}

needs torch, safetensors and sentencepiece; `python FOLDER --help` lists the settings.
"""
