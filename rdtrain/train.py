"""The training loop: the one place where data, model, objective and engine meet.

It reads top to bottom: prepare data and objective, build the model, hand both to an engine, restore the last checkpoint, and step. What a
step computes is a function of (config, step): sample order, noise and learning rate hold no state of their own, and what an objective
learns beside the weights is in every checkpoint, so a run that was stopped goes on exactly where it was.
"""

import math
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from .checkpoint import Checkpointer, load_weights, read_state
from .checkpoint_storage import checkpoint_folder
from .config import Config
from .data.loader import rank_indices, read_ahead
from .data.rows import DocumentRows
from .distributed import World, agree, on_device, pinned
from .engine import Engine, build_engine, start_processes
from .errors import UserError, first_line
from .faults import StepJudge, too_many_skipped
from .hardware import model_flops_utilization
from .metrics import MetricLogger, MetricSums, slowest_rank
from .model.attention import attention_backend
from .model.recurrent import RecurrentDepthLM
from .objectives import Objective
from .optimization import learning_rate
from .preparation import Plan
from .randomness import SampleRandom
from .run_folder import PeakMemory, claimed, record_facts, start_facts
from .watch import AGAIN, Watch


def train(config: Config) -> int:
    """Train, or continue, the run of a config. Returns the exit code: 0 when it is complete, one of watch.EXIT_CODES when asked to stop.

    Every rank calls this. Raises UserError for anything that a user can mend.
    """
    world = World.from_environment()
    with Watch(Path(config.run.folder), config.faults.hang_seconds, world) as watch:
        try:
            return _train(config, world, watch)
        except (RuntimeError, UserError) as error:
            cause = error.__cause__ or error  # saving and loading make a UserError of whatever goes wrong
            if not (isinstance(cause, dist.DistError) or "gloo" in str(cause)):
                raise
            watch.end(
                f"rank {world.rank} lost another rank in {watch.doing} ({first_line(cause)}): see what that one said; {AGAIN}",
                watch.lost_rank_code, every_rank=True,
            )


def _train(config: Config, world: World, watch: Watch) -> int:
    plan = Plan.make(config, world)
    with claimed(config, world) as folder:
        start_processes(config.engine, world)
        checkpoints = Checkpointer(folder, config.checkpoint, plan.tokenizer, world)
        saved = checkpoints.newest_whole()
        before = {} if saved is None else read_state(checkpoint_folder(folder, saved))
        reached = config.schedule.until_nll is not None and before.get("reached_nll")
        if before and (reached or saved >= plan.total_steps) and not before.get("unfinished_record"):
            if world.is_main:
                print(f"{folder} is complete at step {saved}; nothing to do")
            return 0
        memory = PeakMemory(world.device)
        torch.manual_seed(config.run.seed)
        model = RecurrentDepthLM(plan.model)
        if config.checkpoint.start_from and saved is None:
            load_weights(Path(config.checkpoint.start_from), model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        engine = build_engine(
            config.engine, model, plan.objective, config.optimizer, config.batch.micro_sequences, plan.accumulation, world
        )
        if config.engine.compile:  # before the clock starts
            watch.work("compiling")
            indices = range(config.batch.micro_sequences)
            untouched = plan.objective.state(world)
            engine.warm_up(on_device(plan.loader.batch(indices), world.device), SampleRandom(config.run.seed, indices, world.device))
            plan.objective.load_state(untouched, world)
        zeros = {"step": 0, "tokens": 0, "training_flops": 0.0, "seconds": 0.0}
        state = {"step": 0, "seconds": 0.0, "unfinished_record": zeros}
        if saved is not None:
            watch.work("loading the checkpoint")
            state = checkpoints.load(saved, engine, plan.tokenizer_hash)
            plan.objective.load_state(state["objective_state"], world)
        dtype = config.engine.dtype(world.device)
        facts = {
            "name": config.run.name,
            "parameters": parameters,
            "model": asdict(plan.model),
            "objective": asdict(config.objective),
            "noise": asdict(config.noise),
            "tokenizer_hash": plan.tokenizer_hash,
            "validation_hash": plan.validation_hash,
            "total_steps": plan.total_steps,
            "until_nll": config.schedule.until_nll,
            "tokens_per_step": plan.tokens_per_step,
            "training_flops_per_token": plan.flops_per_step / plan.tokens_per_step,
            "ranks": world.size,
            "device": world.device.type,
            "precision": str(dtype).removeprefix("torch."),
            "attention": attention_backend(
                world.device, dtype, config.model.head_width, config.data.sequence_length, config.data.document_masking
            ),
            **engine.facts,
            **start_facts(world.device.type),
        }
        if world.is_main:
            record_facts(folder, facts)
            print(
                f"{config.run.name}: {parameters / 1e6:.2f}M parameters, {plan.total_steps} steps of {plan.tokens_per_step} tokens, "
                f"{plan.flops_per_step / plan.tokens_per_step / 1e6:.1f} MFLOPs a token, {world.size} x {world.device.type} "
                f"{facts['precision']}, attention by {facts['attention']}"
                + (f", continuing from step {saved}" if saved is not None else "")
            )
            if isinstance(plan.loader, DocumentRows):
                print(plan.loader)
        facts["config"] = asdict(config)
        return _train_steps(config, plan, engine, world, watch, checkpoints, memory, facts, state)


def run_step(engine: Engine, objective: Objective, batch: list[tuple[range, Tensor]], rate: float, of_step: SampleRandom, seed: int,
             step: int, world: World, judge: StepJudge, sums: MetricSums) -> None:
    """Step number `step`, counted from 0, at a learning rate: the next one of an engine and its objective. Collective.

    batch: this rank's micro-batches, the numbers of their samples and int64 tokens [B, T + 1] on the CPU. of_step: the random numbers that
    the step shares. The verdict on it is noted in judge, and its metrics are added to sums.
    """
    micro_batches = ((on_device(tokens, world.device), SampleRandom(seed, share, world.device, step)) for share, tokens in batch)
    block = objective.active_block(of_step)
    judge.block = block or 0
    objective.before_step()
    for loss in engine.train_step(micro_batches, rate, block, judge):
        sums.add(loss.metrics, judge.skipped)
    judge.note(step + 1, rate)
    objective.after_step(step + 1, world, judge.skipped)


def _train_steps(config: Config, plan: Plan, engine: Engine, world: World, watch: Watch, checkpoints: Checkpointer, memory: PeakMemory,
                 facts: dict, state: dict) -> int:
    """The loop, from the state of a checkpoint on, or of the start; `facts` go into every checkpoint."""
    folder, seed = Path(config.run.folder), config.run.seed
    batch, schedule, groups = config.batch, config.schedule, config.engine.groups(config.model.blocks)
    step, seconds = state["step"], state["seconds"]
    judge = StepJudge(config.faults, config.model.blocks, world, state.get("judge"))
    settings = config.result_settings() | {"data": None}  # machines may have the same data in different places
    mixture = plan.loader.mixture
    if mixture:
        mixture.continue_from(state.get("mixture", []), step * batch.global_sequences)
    phases = mixture and mixture.phases
    identity = repr((settings, plan.total_steps, plan.tokenizer_hash, plan.loader.samples_per_epoch, phases))
    logger = MetricLogger(folder, config.logging, facts["config"], config.run.name, world,
                          resume_step=step - bool(state.get("unfinished_record")))  # that record is still to be written

    def shares(step: int, rank: int = world.rank) -> list[range]:
        return rank_indices(step, batch.global_sequences, world.size, rank, batch.micro_sequences, groups)

    def stop_now() -> int:
        """The exit code to stop with, where all ranks wait for each other anyway; 0 for none."""
        return agree(world, f"what follows step {step}", step, watch.stop_code)()

    def stop_evaluating() -> bool:
        nonlocal asked
        before, asked = asked, agree(world, f"the evaluation of step {step}", step, watch.stop_code)
        return before is not None and before() > 0

    def reached(record: dict) -> bool:
        """Whether the run ends with this evaluation."""
        return schedule.until_nll is not None and record["validation_nll"] <= schedule.until_nll

    def save(unfinished_record: dict | None, ended: bool) -> None:
        watch.work(f"the checkpoint of step {step}")
        beside = {
            "objective_state": plan.objective.state(world), "judge": judge.state(), "mixture": phases,
            "unfinished_record": unfinished_record, "reached_nll": ended,
        }
        checkpoints.save({"step": step, "seconds": seconds} | facts | beside, engine)

    ended = False
    if state.get("unfinished_record"):
        watch.work(f"the evaluation of step {step}")
        record = state["unfinished_record"] | plan.evaluator(engine)
        logger.log(record)
        ended = step > 0 and (step == plan.total_steps or reached(record))
        if ended:
            save(None, ended)
    batches = read_ahead(
        lambda step: [(share, pinned(plan.loader.batch(share), world.device)) for share in shares(step)], step, plan.total_steps
    )
    sums, logged_step, logged_seconds, waited, due = MetricSums(), step, seconds, 0.0, False
    progress = tqdm(total=plan.total_steps, initial=step, desc=config.run.name, unit="step", disable=not world.is_main, mininterval=1)
    with closing(logger), progress, checkpoints, closing(batches):
        while step < plan.total_steps and not ended:
            started = time.perf_counter()
            watch.work(f"step {step + 1}")
            watch.worth_saving = True
            rate = learning_rate(step, plan.total_steps, config.optimizer, schedule)
            of_step = SampleRandom(seed, (), world.device, step)
            shared = (identity, step, rate, shares(step, 0), plan.objective.shared_draw(of_step), judge.total)
            answer = agree(world, f"step {step + 1}", shared, watch.stop_code)
            asked_for = time.perf_counter()
            try:
                read = next(batches)
            except UserError as error:
                error.everywhere = False  # a rank reads samples of its own
                raise
            waited += time.perf_counter() - asked_for
            last = step + 1 == plan.total_steps
            evaluate = last or (step + 1) % config.evaluation.interval == 0
            due = due or (step + 1) % config.checkpoint.interval == 0
            log = due or evaluate or (step + 1) % config.logging.interval == 0
            if log:
                engine.measure_step()
            run_step(engine, plan.objective, read, rate, of_step, seed, step, world, judge, sums)
            step += 1
            checkpoints.after_step()
            stop = answer()
            log = log or stop > 0
            if log and world.device.type == "cuda":
                torch.cuda.synchronize()
            skipped_steps = judge.read(last_too=log)  # waits for the step before where the device is the slower one
            seconds += time.perf_counter() - started
            progress.update()
            for skipped in skipped_steps:
                progress.write(
                    f"step {skipped.step} skipped: loss {skipped.loss:.4g}, gradient norm {skipped.gradient_norm:.4g}", file=sys.stderr
                )
            if len(judge.row) >= config.faults.stop_after_skipped:
                raise too_many_skipped(judge.row, config, world)
            record = unfinished = None
            if log:
                gradient_norm = engine.gradient_norm()
                steps = step - logged_step
                step_seconds, waited_seconds = (seconds - logged_seconds) / steps, waited / steps
                pass_seconds = engine.measurement.pass_seconds()
                logged_step, logged_seconds, waited = step, seconds, 0.0
                record = {
                    "step": step,
                    "tokens": step * plan.tokens_per_step,
                    "epochs": plan.loader.epochs(step * batch.global_sequences),
                    "training_flops": step * plan.flops_per_step,
                    "seconds": seconds,
                    **sums.means(world),
                    "learning_rate": rate,
                    "gradient_norm": gradient_norm if math.isfinite(gradient_norm) else None,
                    **engine.norms_by_part(skipped=bool(judge.row)),
                    "skipped_steps": judge.total,
                    "step_seconds": step_seconds,
                    "data_wait_seconds": world.maximum(waited_seconds),
                    "forward_seconds": None if pass_seconds is None else world.maximum(pass_seconds),
                    "tokens_per_second": plan.tokens_per_step / step_seconds,
                    "mfu": model_flops_utilization(plan.flops_per_step / step_seconds, facts),
                    **slowest_rank(None if config.engine.gathers_weights else pass_seconds, waited_seconds, world),
                    "peak_memory_bytes": int(world.maximum(memory.bytes())),
                }
                engine.measurement.end()
                if evaluate:
                    watch.work(f"the evaluation of step {step}")
                    asked = None
                    held_out = None if stop else plan.evaluator(engine, stop_evaluating)
                    unfinished = record if held_out is None else None
                    record |= held_out or {}
                    last = last or (held_out is not None and reached(record))
                    progress.set_postfix({key: f"{record[key]:.3f}" for key in ("loss", "validation_nll") if record.get(key) is not None})
                    stop = stop or stop_now()
                if not unfinished:
                    logger.log(record)
            # While steps are being skipped there are no new weights, and older checkpoints must not make room for them.
            if stop or last or (due and not judge.row):
                ended = last and not unfinished
                save(unfinished, ended)
                due = False
                stop = stop or stop_now()
            if stop and (unfinished or not last):
                checkpoints.finish()
                if world.is_main:
                    progress.close()
                    print(f"stopped at step {step} with a checkpoint; {AGAIN}", flush=True)
                return stop
    if world.is_main:
        print(f"{config.run.name}: {step} steps, held-out NLL {record['validation_nll']:.4f}, in {folder}")
    return 0
