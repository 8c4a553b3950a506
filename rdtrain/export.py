"""From a checkpoint to a folder that generates text on its own.

    OUTPUT/
      config.json              model, noise levels, information curve, dtype, tokenizer hash, training facts
      generation_config.json   what transformers' `generate` does where it is told nothing else
      model.safetensors        the weights, or several files and an index
      tokenizer.model          the tokenizer, or tokenizer.json
      tokenizer_config.json    where transformers finds its class, or which its marks are
      *.py                     rdtrain/model, byte for byte: `python OUTPUT --prompt TEXT` runs it, and transformers 5 loads it
      README.md                what it is and how it was trained

The export is called done only when the folder's own code, loaded apart from rdtrain, has computed the same logits and tokens as the
training model, bit for bit, and, where transformers 5 is installed, its class for transformers the same tokens in fp32.
"""

import importlib.util
import json
import logging
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import load_weights, read_state, refuse_damaged
from .checkpoint_storage import checkpoint_folder, checkpoint_steps
from .data.output import output_folder
from .errors import UserError
from .metrics import read_metrics
from .model import generation, recurrent
from .model.exceptions import refusal_of_transformers
from .model.noise import NoiseSchedule
from .model.tokenizer import Tokenizer, tokenizer_file
from .model.weights import write_weights
from .objectives import Objective, ObjectiveSettings, build_objective
from .randomness import SampleRandom

MODEL_FILES = Path(recurrent.__file__).parent
SHARD_BYTES = 5e9


def export(source: Path, output: Path, overwrite: bool = False, shard_bytes: float = SHARD_BYTES) -> None:
    """Export a checkpoint folder, or the newest checkpoint of a run folder.

    shard_bytes: how large a file of weights may become before another is begun.
    Raises UserError when there is no checkpoint, when it is damaged or has diverged, or when `output` exists and overwrite is not set.
    """
    source = newest_checkpoint(source)
    state = read_state(source)
    model = recurrent.RecurrentDepthLM(recurrent.ModelConfig(**state["model"]))
    dtype = getattr(torch, state["precision"])
    load_weights(source, model.to(dtype))
    config = exported_config(state)
    with output_folder(output, "config.json", overwrite) as folder:
        write_folder(folder, config, model, tokenizer_file(source), shard_bytes)
        (folder / "README.md").write_text(_model_card(config, state, tokenizer_file(folder), _held_out(source, state["step"])))
        noise = NoiseSchedule.from_plain(config["noise"], config["information_curve"])
        settings, shape = ObjectiveSettings(**state["objective"]), model.config
        _verify(folder, source, model, noise, build_objective(settings, noise.settings, shape.iterations, shape.blocks))
    tried = "and its class for transformers the same tokens" if transformers_fits() else "and transformers 5 is not here to try its class"
    print(f"{output}: exported from {source}; its own code gives the training model's logits and tokens bit for bit, {tried}")


def write_folder(folder: Path, config: dict, model: recurrent.RecurrentDepthLM, tokenizer: Path, shard_bytes: float = SHARD_BYTES) -> None:
    """Write into an empty folder what a model needs to be loaded from there.

    config: as `exported_config` gives it. tokenizer: its file, by the name that it has in checkpoints.
    """
    for file in sorted(MODEL_FILES.glob("*.py")):
        shutil.copyfile(file, folder / file.name)
    write_weights(model.state_dict(), folder, shard_bytes)
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    for name, content in {"config.json": config, **_transformers_files(Tokenizer(folder))}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def newest_checkpoint(source: Path) -> Path:
    """A checkpoint folder itself, or the newest checkpoint of a run folder. UserError when there is none, or it is damaged."""
    if not (source / "state.json").exists():
        steps = checkpoint_steps(source)
        if not steps:
            raise UserError(f"{source} holds no checkpoint: give a run folder that has trained, or one of its checkpoints/step-* folders")
        source = checkpoint_folder(source, steps[-1])
    try:
        tokenizer = tokenizer_file(source).name
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"checkpoint {source} is damaged ({error}): use another checkpoint") from None
    refuse_damaged(source, ["state.json", "model.safetensors", tokenizer])
    return source


def exported_config(state: dict) -> dict:
    """What config.json says of the model of a checkpoint with this state."""
    return {
        "format": 1,
        "model_type": "recurrent_depth",
        "architectures": ["RecurrentDepthForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_rdtrain.RecurrentDepthConfig",
            "AutoModelForCausalLM": "modeling_rdtrain.RecurrentDepthForCausalLM",
        },
        "model": state["model"],
        "noise": state["noise"],
        "information_curve": state["objective_state"].get("information_curve"),
        "objective": state["objective"],
        "max_position_embeddings": state["config"]["data"]["sequence_length"],
        "dtype": state["precision"],
        "tokenizer_hash": state["tokenizer_hash"],
        "trained_steps": state["step"],
        "trained_tokens": state["step"] * state["tokens_per_step"],
    }


def _transformers_files(tokenizer: Tokenizer) -> dict[str, dict]:
    """The other files that transformers reads: name -> content."""
    marks = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    never = list(range(tokenizer.vocab_size - tokenizer.unused_tokens, tokenizer.vocab_size))
    generation_config = {**marks, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if tokenizer.file_name == "tokenizer.model":
        kind = {
            "tokenizer_class": "RecurrentDepthTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_rdtrain.RecurrentDepthTokenizer", None]},
        }
    else:  # transformers' own class, told to behave as ours does
        name = tokenizer.backend.name
        kind = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": name(tokenizer.bos_id), "eos_token": name(tokenizer.eos_id), "pad_token": name(tokenizer.eos_id),
            "extra_special_tokens": list(tokenizer.special_tokens), "split_special_tokens": True, "padding_side": "left",
            "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
        }
    return {
        "generation_config.json": generation_config | ({"suppress_tokens": never} if never else {}),
        "tokenizer_config.json": kind | {"tokenizer_hash": tokenizer.hash},
    }


def transformers_fits() -> bool:
    """Whether transformers is installed, in the version that an export can be loaded with."""
    try:
        return refusal_of_transformers(version("transformers"), "model") is None
    except PackageNotFoundError:
        return False


def _verify(folder: Path, source: Path, model: recurrent.RecurrentDepthLM, noise: NoiseSchedule, objective: Objective) -> None:
    """AssertionError when the folder's own code and files do not compute what the training model does: logits and a continuation.

    UserError when the training model, of the checkpoint `source`, computes NaN, which equals nothing.
    """
    theirs = load_exported(folder)
    exported = theirs.TextGenerator.load(folder, device="cpu")
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [objective.next_token_logits(one, ids, SampleRandom(0, range(2), ids.device)) for one in (model, exported.model)]
    if logits[0].isnan().any():
        raise UserError(
            f"the model of {source} computes NaN in place of logits, as its training has diverged: export an earlier checkpoint, or "
            "train again with a lower optimizer.learning_rate"
        )
    assert torch.equal(*logits), f"the exported model in {folder} computes other logits than the training model"
    iterations = max(2, model.config.blocks)  # so that every block runs
    continuations = [
        torch.stack(list(code.generate(one, ids, 4, iterations, levels, code.Sampling(0.0), seed=[0, 0])), dim=1)
        for code, one, levels in ((generation, model, noise), (theirs, exported.model, exported.noise))
    ]
    assert torch.equal(*continuations), f"the exported model in {folder} continues a prompt otherwise than the training model"
    if transformers_fits():  # in fp32: its cache has room for other positions, over which attention in bf16 rounds otherwise
        whole = theirs.generate(exported.model.float(), ids, 4, iterations, exported.noise, theirs.Sampling(0.0), seed=[0, 0])
        continuation = _continued_by_transformers(folder, ids, iterations)
        expected = torch.stack(list(whole), dim=1)
        assert torch.equal(continuation, expected), (
            f"the class for transformers in {folder} continues a prompt by {continuation.tolist()}, and its own code by {expected.tolist()}"
        )
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def _continued_by_transformers(folder: Path, ids: Tensor, iterations: int) -> Tensor:
    """Four tokens [B, 4] after ids [B, T], by the folder's class for transformers in fp32, greedily."""
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is installed, which has much to say of itself
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    modeling = importlib.import_module("rdtrain_exported.modeling_rdtrain")  # `load_exported` has made the package
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model = modeling.RecurrentDepthForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if shown:
        transformers_logging.enable_progress_bar()
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=4, max_new_tokens=4, do_sample=False, num_iterations=iterations, seed=0,
        eos_token_id=None, pad_token_id=0,
    )
    return tokens[:, ids.shape[1] :]


def load_exported(folder: Path):
    """The `generation` module of an exported folder, as a package of its own that knows nothing of rdtrain."""
    name = "rdtrain_exported"
    for loaded in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[loaded]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{name}.generation")


def _held_out(source: Path, step: int) -> tuple[int, float] | None:
    """(step, held-out NLL in nats a token) of a run's last evaluation up to a step, but for that before training.

    None where there is none, or the checkpoint lies in no run's folder.
    """
    metrics = source.parent.parent / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    found = [(one["step"], one["validation_nll"]) for one in records if one.get("validation_nll") is not None and 0 < one["step"] <= step]
    return found[-1] if found else None


def _training_facts(config: dict, state: dict, held_out: tuple[int, float] | None) -> str:
    """Rows of a table: what it was trained on, how, with what, and how far it came."""
    run, tokens = state["config"], config["trained_tokens"]
    facts = {
        "steps": f"{config['trained_steps']:,} of {state['total_steps']:,}",
        "tokens": f"{tokens:,}, in {run['batch']['global_sequences']:,} sequences of {run['data']['sequence_length']:,} a step",
        "training FLOPs": f"{tokens * state['training_flops_per_token']:.3g}",
        "held-out NLL": "" if held_out is None else f"{held_out[1]:.4f} nats a token, at step {held_out[0]:,}",
        "learning rate": f"{run['optimizer']['learning_rate']:g} at its peak, warmup, {run['schedule']['decay']} decay",
        "engine": f"{run['engine']['name']}, {state['ranks']} x {state['machine']}, {config['dtype']}",
        "software": f"rdtrain {state['versions']['rdtrain']}, commit {state['commit'] or 'unknown'}, torch {state['versions']['torch']}",
    }
    return "\n".join(f"| {name} | {fact} |" for name, fact in facts.items() if fact)


def _model_card(config: dict, state: dict, tokenizer: Path, held_out: tuple[int, float] | None) -> str:
    library = "tokenizers" if tokenizer.suffix == ".json" else "sentencepiece"
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

| training | |
| --- | --- |
{_training_facts(config, state, held_out)}

    python FOLDER --prompt "Once" --max-new-tokens 100 --iterations {model['iterations']}

needs torch, safetensors and {library}; `python FOLDER --help` lists the settings. With transformers 5:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
    inputs = tokenizer("Once", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=100, num_iterations={model['iterations']}, seed=0)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
"""
