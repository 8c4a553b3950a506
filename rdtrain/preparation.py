"""What a run is made of: its data, model and objective, as its config, the shards and the world say.

Everything that can be wrong with them is found here, before an engine starts. The dry run, `rdtrain plan` and the benchmarks ask for it
too, without training.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .checkpoint import refuse_other_model
from .checkpoint_storage import checkpoint_steps
from .config import Config
from .data.loader import Loader
from .data.mixture import MixtureLoader, open_loader
from .data.rows import DocumentRows
from .data.shards import ShardReader
from .distributed import World
from .engine import refuse_float8
from .errors import UserError
from .evaluation import Evaluator
from .metrics import refuse_missing
from .model.attention import refuse_head_width
from .model.recurrent import ModelConfig
from .objectives import Objective, build_objective


@dataclass
class Plan:
    """What follows from a config, its data and the world. Making one finds everything that can be wrong, before the engine starts."""

    objective: Objective
    model: ModelConfig
    loader: Loader | MixtureLoader | DocumentRows
    evaluator: Evaluator
    tokenizer: dict[str, bytes]
    tokenizer_hash: str
    validation_hash: str
    accumulation: int
    tokens_per_step: int
    flops_per_step: float
    total_steps: int

    @classmethod
    def make(cls, config: Config, world: World) -> "Plan":
        """Opens the shards. UserError for anything that does not fit together."""
        refuse_missing(config.logging)
        length = config.data.sequence_length
        loader = open_loader(config.data.train, config.data.mixture, config.data.rows, length, config.run.seed)
        shards = loader.reader
        validation = ShardReader(config.data.validation, tokenizer_hash=shards.manifest["tokenizer_hash"])
        objective, model = objective_and_model(config, world, shards.vocab_size, shards.manifest["bos_id"])
        model = replace(model, unused_tokens=shards.manifest.get("unused_tokens", 0))
        if config.checkpoint.start_from and not checkpoint_steps(Path(config.run.folder)):  # a run that goes on has no need of it
            refuse_other_model(Path(config.checkpoint.start_from), model, shards.manifest["tokenizer_hash"])
        if isinstance(loader, DocumentRows):
            objective.filled = loader.filled
        positions_per_step = config.batch.global_sequences * length
        flops_per_step = objective.training_flops(model, length) * positions_per_step
        return cls(
            objective=objective,
            model=model,
            loader=loader,
            evaluator=Evaluator(
                validation, length, config.evaluation, config.batch.micro_sequences, world,
                ranks=world.size // config.engine.groups(config.model.blocks), rows=config.data.rows,
            ),
            tokenizer={shards.tokenizer_name: shards.read_file(shards.tokenizer_name)},
            tokenizer_hash=shards.manifest["tokenizer_hash"],
            validation_hash=validation.content_hash,
            accumulation=config.batch.accumulation(world.size),
            tokens_per_step=round(positions_per_step * objective.filled),
            flops_per_step=flops_per_step,
            total_steps=config.schedule.steps or max(1, int(config.schedule.training_flops / flops_per_step)),
        )


def objective_and_model(config: Config, world: World, vocab_size: int, bos_id: int) -> tuple[Objective, ModelConfig]:
    """What a config trains, and how, with so many tokens in its vocabulary, of which bos_id begins a document. UserError for settings that
    do not fit together."""
    objective = build_objective(config.objective, config.noise, config.model.iterations, config.model.blocks)
    _refuse_impossible(config, objective, world)
    if config.engine.name == "block_parallel":
        _refuse_uneven_groups(config, objective, world)
    mark = bos_id if config.data.document_masking else None
    return objective, ModelConfig(**asdict(config.model), vocab_size=vocab_size, document_mark=mark, **objective.model_fields)


def _refuse_impossible(config: Config, objective: Objective, world: World) -> None:
    """UserError where the engine runs in one process and there are several, or in a precision that the device has not, the objective
    cannot train one block and leave the others, the ranks' micro-batches would go separate ways, or no fast kernel of attention takes the
    heads."""
    try:
        refuse_head_width(world.device, config.engine.dtype(world.device), config.model.head_width, config.data.document_masking)
    except ValueError as error:
        raise UserError(f"'model' is impossible on CUDA: {error}") from None
    if config.engine.cuda_graph and (world.device.type != "cuda" or objective.training_pass is None):
        raise UserError(
            "engine.cuda_graph is for CUDA devices, and for a pass that is the same in every step, of diffusion_blocks with one block and "
            f"without self_conditioning and chain_states or of one_pass; here objective.name={config.objective.name} is to train on "
            f"{world.device.type}: leave it off"
        )
    if config.engine.precision == "fp8":
        refuse_float8(world.device, config.model)
    if config.engine.name == "torch" and world.size > 1:
        raise UserError(
            f"engine.name=torch runs in one process, and there are {world.size}: use engine.name=deepspeed or engine.name=fsdp"
        )
    if config.model.blocks > 1 and not objective.untied_blocks:
        raise UserError(
            f"objective.name={config.objective.name} trains one core for all iterations, and model.blocks is {config.model.blocks}: "
            "set model.blocks=1, or objective.name=diffusion_blocks"
        )
    if config.batch.micro_sequences < objective.smallest_micro_batch and config.engine.gathers_weights:
        raise UserError(
            f"batch.micro_sequences={config.batch.micro_sequences} gives some ranks no sample for the earlier iteration of "
            f"self_conditioning and chain_states, for which others would wait: use at least {objective.smallest_micro_batch}, or "
            "engine.name=deepspeed with zero_stage 0 to 2"
        )


def _refuse_uneven_groups(config: Config, objective: Objective, world: World) -> None:
    """UserError where block-parallel training has no blocks, or cannot give each as many ranks and the same kinds of sequences."""
    blocks = config.model.blocks
    if blocks == 1:
        raise UserError(
            "engine.name=block_parallel trains each untied block on ranks of its own, and model.blocks is 1: set model.blocks, or another "
            "engine.name"
        )
    if world.size % blocks:
        raise UserError(
            f"engine.name=block_parallel gives each of model.blocks={blocks} as many ranks, and {blocks} does not divide {world.size}: "
            f"start a multiple of {blocks} processes, or set another engine.name"
        )
    if config.batch.global_sequences // blocks % objective.smallest_micro_batch:
        raise UserError(
            f"batch.global_sequences={config.batch.global_sequences} would give some of model.blocks={blocks} more samples with an earlier "
            f"iteration (self_conditioning, chain_states) than others: use a multiple of {2 * blocks}"
        )
