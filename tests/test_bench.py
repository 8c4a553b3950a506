"""rdtrain bench: what it says of time, FLOPs and memory, held to what is known otherwise; on the CPU."""

import dataclasses
import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import rdtrain.bench.command as command
from rdtrain.bench.arms import cases
from rdtrain.bench.command import BenchSettings, bench
from rdtrain.bench.measure import Effort, _fill_in_rates, on_paper, step_flops
from rdtrain.bench.report import Point, plot_sweep, tables
from rdtrain.bench.stages import collect, page, plot_stages
from rdtrain.bench.trace import covered, lengths
from rdtrain.config import load_config, override
from rdtrain.distributed import World
from rdtrain.errors import UserError
from rdtrain.hardware import peak_flops
from rdtrain.model.recurrent import RecurrentDepthLM
from rdtrain.preparation import objective_and_model
from rdtrain.randomness import SampleRandom

CPU = torch.device("cpu")
EFFORT = Effort(warmup=1, steps=3)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def config(tiny_config):
    """A tiny run of denoising blocks whose shards are nowhere."""
    path = tiny_config(
        data={"train": "nowhere"}, batch={"global_sequences": 8, "micro_sequences": 8}, optimizer={"learning_rate": 0.01},
        model={"width": 64, "mlp_width": 160, "iterations": 6},
    )
    return load_config(path)


def test_arms_one_after_another_with_their_memory_and_one_that_does_not_fit(config, tmp_path, on_cpu, monkeypatch):
    arms = ["blocks", "full model.mlp_width=10000000000000", "full", "truncated objective.activation_checkpointing=true"]
    settings = BenchSettings(EFFORT, arms, vocab_size=300, output=tmp_path / "out")
    text = bench(config, settings)
    living = [thing for thing in gc.get_objects() if type(thing) is RecurrentDepthLM and thing.config.vocab_size == 300]
    assert not living  # what an arm leaves behind is another's memory
    report = json.loads((tmp_path / "out/bench.json").read_text())
    blocks, none, full, truncated = report["measurements"]
    assert report["complete"] and "allocate memory" in none["out_of_memory"] and "out of memory" in text
    for row in (blocks, full, truncated):
        n, memory = row["parameters"], row["memory"]
        assert memory["weights"] == memory["gradients"] == 4 * n and not row["skipped_steps"]
        assert 8 * n <= memory["optimizer_state"] <= 8 * n + 4 * 200  # and a step count for each parameter
        assert memory["peak"] == pytest.approx(12 * n + memory["passes"], rel=0.01)
        assert memory["peak"] == pytest.approx(row["estimate"]["peak"], rel=0.1 if row is not truncated else 0.2)
        assert memory["passes"] == pytest.approx(row["estimate"]["passes"], rel=0.1 if row is not truncated else 0.3)
        assert row["tokens_per_second"] == pytest.approx(8 * 16 / row["step_seconds"]["median"])
        assert row["model_flops_per_second"] == pytest.approx(row["model_flops"] / row["step_seconds"]["median"])
        assert row["mfu"] is row["busy_seconds"] is row["memory"]["reserved"] is None
    assert full["hardware_flops"] == full["model_flops"] > blocks["model_flops"] and truncated["hardware_flops"] > truncated["model_flops"]
    assert truncated["objective"]["trained_iterations"] == 6 and truncated["objective"]["depth"] == "fixed"  # min(8, K)
    times = [line.split()[-1] for line in text.splitlines() if line.startswith("full  ")]
    assert float(times[0]) == pytest.approx(blocks["tokens_per_second"] / full["tokens_per_second"], abs=0.006)
    assert float(times[1]) == pytest.approx(full["memory"]["peak"] / blocks["memory"]["peak"], abs=0.006)

    stage = page(collect(tmp_path))
    assert "bash launch/performance.sh out" in stage
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in stage.splitlines() if line.startswith("|")]
    of_arm = {name: found for name, *found in cells}
    assert float(of_arm["full"][-2]) == pytest.approx(float(times[0]), abs=0.02)
    assert of_arm["full model.mlp_width=10000000000000"][2] == "out of memory"
    assert of_arm["blocks"][1] == "8 x 16" and of_arm["blocks"][6] == "-"
    assert float(of_arm["blocks"][2]) == pytest.approx(1e3 * blocks["step_seconds"]["median"], abs=0.06)

    first = {row["commit"] for row in collect(tmp_path)}
    later = report["facts"] | {"commit": "a later one", "started": "2099-01-01T00:00:00+0000"}
    monkeypatch.setattr(command, "start_facts", lambda device: later)
    monkeypatch.setattr(command, "measure", None)  # which is not called again
    assert bench(config, dataclasses.replace(settings, resume=True)) == text
    assert {row["commit"] for row in collect(tmp_path)} == first == {report["facts"]["commit"]}
    assert {row["day"] for row in collect(tmp_path)} == {report["facts"]["started"][:10]}
    with pytest.raises(UserError, match="with other options"):
        bench(config, dataclasses.replace(settings, resume=True, effort=Effort(warmup=1, steps=4)))
    with pytest.raises(UserError, match="with other options"):
        bench(override(config, ["noise.level_per=token"]), dataclasses.replace(settings, resume=True))
    (tmp_path / "folder/bench.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"bench.json cannot be read \(Is a directory\)"):
        bench(config, dataclasses.replace(settings, resume=True, output=tmp_path / "folder"))
    (tmp_path / "folder/bench.json").rmdir()
    (tmp_path / "out/bench.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read .*: remove it, and measure that stage again"):
        collect(tmp_path)
    with pytest.raises(UserError, match="nothing has been measured in"):
        collect(tmp_path / "out")


def test_a_sweep_with_shards_and_a_profile(tiny_config, tmp_path, rdtrain):
    options = ("--tokens", "shards", "--steps", 2, "--warmup", 1, "--output", tmp_path / "out", "--profile", tmp_path / "traces")
    sweep = ("--sweep", "batch.micro_sequences=1,2", "batch.global_sequences=1,4")
    result = rdtrain("bench", tiny_config(), "model.width=16", *options, *sweep)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "out/bench.json").read_text())["measurements"]
    assert [(row["value"], row["accumulation"], row["tokens_per_step"]) for row in rows] == [("1", 1, 16), ("2", 2, 64)]
    assert all(len(row["kernels"]) == 10 and row["model"]["vocab_size"] == 800 for row in rows)
    assert sum(kernel["share"] for kernel in rows[0]["kernels"]) <= 1 and rows[0]["kernels"][0]["name"] in result.stdout
    assert (tmp_path / "out/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "traces").glob("*.json.gz"))) == 2
    first = collect(tmp_path)
    assert [(row["value"], row["swept"]) for row in first] == [("1", "batch.micro_sequences"), ("2", "batch.micro_sequences")]
    earlier = tmp_path / "performance.json"
    others = [{**first[0], "commit": "an earlier one"}, {**first[1], "value": "4"}, {**first[0], "stage": "other", "swept": None}]
    earlier.write_text(json.dumps(others))
    rows = collect(tmp_path, earlier)
    assert rows == [others[0], others[1], *first, others[2]]
    earlier.write_text(json.dumps(rows))
    assert collect(tmp_path, earlier) == rows  # none twice
    assert plot_stages(rows, tmp_path) == [tmp_path / "out.png"] and (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    others = [first[0], {**first[0], "arm": "full", "value": "2"}, {**first[0], "arm": "full"}]
    times = [line.split("|")[-3:-1] for line in page(others).splitlines()[-3:]]
    assert [time.strip() for time, _ in times] == ["1.00", "", "1.00"]  # of the first arm alone, which has no 2
    earlier.write_text("[{}]")
    with pytest.raises(UserError, match="performance.json cannot be read .*: give another"):
        collect(tmp_path, earlier)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings", [["objective.trained_iterations=3"], ["objective.gradient=full", "objective.activation_checkpointing=true"]]
)
def test_flops_are_of_the_depths_that_the_steps_draw(settings, config, build_model):
    settings = ["objective.name=bptt", "model.core_layers=1", "batch.global_sequences=4", "batch.micro_sequences=4", *settings]
    config = override(config, settings)
    objective, model_config = objective_and_model(config, World(0, 1, 0, CPU), 50, 1)
    model = build_model(**dataclasses.asdict(model_config))
    tokens, said, counted = torch.randint(50, (4, 17)), [], []
    for step, depth in ((0, 2), (2, 5), (4, 10)):
        random = SampleRandom(config.run.seed, range(4), CPU, step)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            objective(model, tokens, random).value.backward()
        counted.append(counter.get_total_flops())
        said.append(sum(step_flops(config, objective, model_config, step)))
        assert objective.shared_draw(random) == depth
    assert said == counted


def test_what_cannot_be_measured_is_refused(config, on_cpu, tmp_path):
    for settings, words in [
        ({}, "the number of tokens in the vocabulary is not known, as .*or give --vocab-size"),
        ({"vocab_size": 9, "compare": ["bptt"]}, "knows no arm 'bptt': choose from blocks"),
        ({"vocab_size": 9, "sweep": ["model.width"]}, "--sweep model.width is not of the form"),
        ({"vocab_size": 9, "sweep": ["model.width=8,16", "model.heads=2"]}, "unequal numbers of values"),
        ({"vocab_size": 9, "compare": [" "]}, "knows no arm '': choose from blocks"),
        ({"vocab_size": 9, "sweep": ["model.width=8,16", "model.width=16,8"]}, "has a key twice"),
        ({"vocab_size": 9, "sweep": ["model.iterations=1,2"], "compare": ["full model.iterations=4"]}, "override of the arm 'full model.i"),
        ({"vocab_size": 9, "sweep": ["model.blocks=1,2"], "compare": ["full"]}, "set model.blocks=1"),
    ]:
        with pytest.raises(UserError, match=words):
            bench(config, BenchSettings(EFFORT, **settings))
    for wrong in ({"effort": Effort(steps=0)}, {"vocab_size": 0}, {"vocab_size": 9, "effort": Effort(shards=True)}, {"resume": True}):
        with pytest.raises(UserError):
            BenchSettings(**wrong)


def test_shards_that_a_case_cannot_read_are_refused_before_the_first_runs(tiny_config, on_cpu, monkeypatch):
    monkeypatch.setattr(command, "measure", lambda *arguments: pytest.fail("a case has run"))
    with pytest.raises(UserError, match="fewer than one window of 99999999"):
        bench(load_config(tiny_config()), BenchSettings(Effort(shards=True), sweep=["data.sequence_length=16,99999999"]))


@pytest.mark.parametrize("option", ["output", "profile"])
def test_a_folder_that_takes_no_file_is_refused_before_the_first_runs(option, config, on_cpu, monkeypatch):
    monkeypatch.setattr(command, "measure", lambda *arguments: pytest.fail("a case has run"))
    effort = dataclasses.replace(EFFORT, profile=Path("/proc") if option == "profile" else None)
    with pytest.raises(UserError, match=f"cannot be written to /proc .*: choose another --{option}"):
        bench(config, BenchSettings(effort, vocab_size=300, output=Path("/proc") if option == "output" else None))


def test_what_is_said_below_the_tables_is_of_all_rows(config):
    world = World(0, 1, 0, CPU)
    known = on_paper(cases(config, ["blocks"], ["model.iterations=6"])[0], world, 50, EFFORT)
    none = dataclasses.replace(known, device="NVIDIA H200", precision="bfloat16", attention="SDPA cudnn", out_of_memory="no room")
    ran = dataclasses.replace(none, attention="SDPA efficient", out_of_memory=None, memory={"peak": 1}, skipped_steps=1)
    _fill_in_rates(ran, [0.5], [(1e12, 1e12)], world)
    text = tables([none, ran], "model.iterations")
    assert "bfloat16, attention by SDPA cudnn; bfloat16, attention by SDPA efficient." in text and "shares of 989.4 TFLOP/s" in text
    assert "blocks, model.iterations=6: out of memory: no room" in text and "not finite: blocks, model.iterations=6." in text
    assert "MFU and HFU" not in tables([none], None)


def test_a_plot_that_the_disk_refuses_is_one_sentence(tmp_path):
    points = [Point("blocks", "1", 1e-6, 2e9), Point("blocks", "2", None, None)]
    plot_sweep(points, "model.iterations", tmp_path / "whole.png")
    assert (tmp_path / "whole.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="folder.png cannot be written .*start the same command again"):
        plot_sweep(points, "model.iterations", tmp_path / "folder.png")
    assert {path.name for path in tmp_path.iterdir()} == {"whole.png", "folder.png"}


def test_baselines_of_a_config_keep_all_but_its_objective(config):
    others = ["objective.posterior_readout=false", "objective.optional_state=false", "objective.self_conditioning=true"]
    config = override(config, ["model.blocks=2", *others])
    found = {case.arm: case.config for case in cases(config, ["blocks", "local", "one_pass"], [])}
    assert found["blocks"] == config and cases(config, [], [])[0].config == config
    assert found["local"].objective.gradient == "local" and found["local"].model.iterations == 6 and found["one_pass"].model.iterations == 1
    assert all(found[arm].batch == config.batch and found[arm].model.blocks == 1 for arm in ("local", "one_pass"))


def test_the_length_of_a_union_of_intervals():
    random = np.random.default_rng(0)
    starts = random.integers(0, 500, 60)
    intervals = [(int(start), int(start + length)) for start, length in zip(starts, random.integers(0, 30, 60))]
    assert covered(intervals) == len({second for start, end in intervals for second in range(start, end)})


def test_messages_are_exposed_where_no_other_kernel_runs():
    assert lengths([("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 0, 10), ("gemm", 4, 6), ("Memcpy DtoD", 8, 12)]) == (12, 10, 8)
    assert lengths([("gemm", 0, 5)]) == (5, 0, 0) and lengths([]) == (0, 0, 0)
    random = np.random.default_rng(1)
    names = ["ncclDevKernel_ReduceScatter", "ncclDevKernel_AllGather", "gemm", "flash", "Memset (Device)", "Memcpy HtoD (Pinned)"]
    ran = [(names[kind], int(start), int(start + length))
           for kind, start, length in zip(random.integers(0, 6, 80), random.integers(0, 900, 80), random.integers(0, 30, 80))]
    at = [{name for name, start, end in ran if start <= moment < end} for moment in range(1000)]
    messages = [any("nccl" in name for name in running) for running in at]
    alone = [here and not running & {"gemm", "flash"} for here, running in zip(messages, at)]
    assert lengths(ran) == (sum(map(bool, at)), sum(messages), sum(alone)) and 0 < sum(alone) < sum(messages)


def test_a_budget_leaves_measurements_to_the_next_start(config, tmp_path, on_cpu):
    settings = BenchSettings(EFFORT, ["blocks", "one_pass", "truncated"], vocab_size=300, output=tmp_path / "out", budget=0)
    for made in (1, 2, 3):  # one a start
        text = bench(config, dataclasses.replace(settings, resume=True))
        report = json.loads((tmp_path / "out/bench.json").read_text())
        assert len(report["measurements"]) == made and report["complete"] == (made == 3)
        assert (f"{3 - made} measurements were left" in text) == (made < 3)
    with pytest.raises(UserError, match="--budget leaves measurements to a later --resume"):
        BenchSettings(EFFORT, budget=1)


def test_what_a_folder_holds_stays_there_whatever_becomes_of_a_resumed_comparison(config, tmp_path, on_cpu, monkeypatch):
    def values():
        return [row["value"] for row in json.loads((tmp_path / "out/bench.json").read_text())["measurements"]]

    def resumed(sweep, made):
        monkeypatch.setattr(command, "measure", made)
        return bench(config, BenchSettings(EFFORT, ["blocks"], [sweep], vocab_size=300, output=tmp_path / "out", resume=True))

    def ended(*arguments):
        raise RuntimeError("the device is gone")

    measured = command.measure
    resumed("model.iterations=1,4", measured)
    with pytest.raises(RuntimeError, match="the device is gone"):
        resumed("model.iterations=1,2,4", ended)
    assert values() == ["1", "4"]
    resumed("model.iterations=2", measured)
    assert values() == ["2", "1", "4"]
    text = resumed("model.iterations=1,2,4", ended)
    assert values() == ["1", "2", "4"] and "iterations=4" in text


def test_peaks_are_of_the_right_device():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA GH200 480GB") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H200 NVL") == peak_flops("NVIDIA H100 NVL") == 835.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA GB200") == 2500e12 and peak_flops("NVIDIA B200") == 2250e12
    assert peak_flops("NVIDIA L40S") == 362e12 and peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("cpu") is peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is peak_flops("Tesla V100-SXM2-16GB") is None
