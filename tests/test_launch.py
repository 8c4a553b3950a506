"""How processes learn their places: `torchrun`, `deepspeed` on two nodes and SLURM start real ones, and what cannot be right is refused.

SLURM is not here: its variables are, around real processes, and stand-ins for the two of its commands that launch/train.sbatch calls.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rdtrain.distributed import World, describe_lone_process
from rdtrain.errors import UserError
from rdtrain.metrics import read_metrics
from rdtrain.scaling.processes import free_port

PROJECT = Path(__file__).parent.parent
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
SRUN = """#!/usr/bin/env python3
import os, subprocess, sys
if "FAKE_SRUN_CODE" in os.environ:
    print(*sys.argv[1:])
    sys.exit(int(os.environ["FAKE_SRUN_CODE"]))
tasks = [
    subprocess.Popen(sys.argv[sys.argv.index("python"):], env=os.environ | {
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)})
    for task in range(int(os.environ["SLURM_NTASKS"]))
]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


def command(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")[1:]]


@pytest.fixture
def environment(monkeypatch):
    """A function that puts these variables in place of all that launchers and SLURM set."""

    def put(**values: object) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in NAMES:
                monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in NAMES:  # what the code sets is taken back too
        monkeypatch.setenv(name, "")
    return put


STEP = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_NODES": 2, "SLURM_NTASKS": 8, "SLURM_PROCID": 5, "SLURM_LOCALID": 1}
LAUNCHED = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "MASTER_ADDR": "host", "MASTER_PORT": 1}


def test_ranks_come_from_the_launcher_else_from_slurm_else_there_is_one(environment):
    def place():
        world = World.from_environment()
        return world.rank, world.size, world.local_rank

    environment(**LAUNCHED)
    assert place() == (5, 8, 1)
    environment(**STEP, MASTER_ADDR="host")
    assert place() == (5, 8, 1)
    # what torch and DeepSpeed read, for the same place again
    assert [os.environ[name] for name in NAMES] == ["5", "8", "1", "host", "29500"] and place() == (5, 8, 1)
    environment()
    assert place() == (0, 1, 0)
    environment(SLURM_JOB_ID=7, SLURM_NTASKS=1, SLURM_PROCID=0, SLURM_LOCALID=0)  # the script of a job of one task
    assert place() == (0, 1, 0)
    environment(SLURM_JOB_ID=7, SLURM_NTASKS=8)  # salloc, which starts no task
    assert place() == (0, 1, 0)
    environment(**{**LAUNCHED, "RANK": 1, "LOCAL_RANK": 0, "WORLD_SIZE": 2}, TORCHELASTIC_RUN_ID="x",  # its nodes in another order
                **{**STEP, "SLURM_NTASKS": 2, "SLURM_PROCID": 0, "SLURM_LOCALID": 0})
    assert place() == (1, 2, 0)


def test_a_lone_process_has_an_address_of_its_own_whatever_is_left_over(environment):
    environment(MASTER_ADDR="some-other-host", MASTER_PORT=1)
    describe_lone_process()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and os.environ["RANK"] == "0" and os.environ["MASTER_PORT"] != "1"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": 2}, "the environment has WORLD_SIZE and not RANK, LOCAL_RANK"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, "WORLD_SIZE=2 and no MASTER_ADDR"),
        ({**LAUNCHED, "RANK": 8}, "RANK=8"),
        ({**LAUNCHED, "RANK": "first"}, "RANK must be a whole number, and it is 'first'"),
        (STEP, "SLURM has started 8 tasks and MASTER_ADDR is not set"),
        ({"SLURM_NTASKS": 8, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "MASTER_ADDR": "host"}, "start the training in it with srun"),
        ({**STEP, **LAUNCHED, "RANK": 0, "LOCAL_RANK": 0}, "RANK=0 of WORLD_SIZE=8 disagrees with SLURM, for which this is task 5 of 8"),
        ({**STEP, **LAUNCHED, "RANK": 1, "WORLD_SIZE": 4}, "one launcher a node"),  # each task with a whole world of its own
        ({**STEP, **LAUNCHED, "SLURM_STEP_NUM_NODES": 1, "WORLD_SIZE": 64, "TORCHELASTIC_RUN_ID": "x"}, "one launcher a node"),
    ],
)
def test_variables_that_cannot_be_right_are_refused(environment, variables, words):
    environment(**variables)
    with pytest.raises(UserError) as error:
        World.from_environment()
    assert words in str(error.value) and not str(error.value).endswith(".")


def start_together(commands: list[list[str]], environments: list[dict]) -> None:
    """Run commands at the same time; all must succeed."""
    processes = [
        subprocess.Popen(each, cwd=PROJECT, env=os.environ | CPU | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for each, variables in zip(commands, environments)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)


def test_torchrun_and_two_nodes_with_a_hostfile_compute_what_one_process_does(tiny_config, tmp_path, rdtrain):
    """As docs/launching.md has it; the two nodes are two launchers on this machine, of one process each, which no ssh joins."""
    settings = {"schedule": {"steps": 4}}
    assert rdtrain("train", "--config", tiny_config("one", **settings)).returncode == 0
    torchrun = [command("torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), "launch/train.py"]
    start_together([[*torchrun, "--config", str(tiny_config("torchrun", **settings, engine={"name": "fsdp"}))]], [{}])
    hostfile = tmp_path / "hostfile"
    example = (PROJECT / "launch/hostfile.example").read_text()
    assert "node-0 slots=8\nnode-1 slots=8" in example
    hostfile.write_text(example.replace("slots=8", "slots=1"))
    config, port = tiny_config("nodes", **settings, engine={"name": "deepspeed"}), free_port()
    nodes = [
        [command("deepspeed"), "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node), "--master_addr", "127.0.0.1",
         "--master_port", str(port), "--", "launch/train.py", "--config", str(config)]
        for node in range(2)
    ]
    start_together(nodes, [{}, {}])
    for run in ("torchrun", "nodes"):
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def sbatch(folder: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess, Path]:
    """Run launch/train.sbatch as the script of a job of two tasks; returns the result and the file of its calls to requeue."""
    binaries = folder / "venv/bin"
    if not binaries.exists():
        binaries.mkdir(parents=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("activate", f'PATH="{binaries}:{Path(sys.executable).parent}:$PATH"')):
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "node-0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    result = subprocess.run(
        ["bash", "launch/train.sbatch", *arguments], cwd=PROJECT, text=True, capture_output=True, timeout=600,
        env=os.environ | CPU | job | {"VENV": str(folder / "venv"), "REQUEUED": str(folder / "requeued")} | variables,
    )
    return result, folder / "requeued"


def test_a_slurm_job_trains_on_its_tasks_and_speaks_once(tiny_config, tmp_path, rdtrain, refused):
    settings = {"schedule": {"steps": 4}}
    assert rdtrain("train", "--config", tiny_config("one", **settings)).returncode == 0
    result, requeued = sbatch(tmp_path, "--config", str(tiny_config("job", **settings, engine={"name": "deepspeed"})))
    assert result.returncode == 0 and "2 x cpu" in result.stdout, result.stderr
    assert losses(tmp_path / "job") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert not requeued.exists()
    refused(sbatch(tmp_path, "--config", "nowhere.yaml")[0], "config nowhere.yaml does not exist")


def test_a_slurm_job_is_requeued_when_its_ranks_have_saved_before_the_end_and_only_then(tmp_path):
    for code in ("0", "2", "137"):
        result, requeued = sbatch(tmp_path, FAKE_SRUN_CODE=code)
        assert result.returncode == int(code) and not requeued.exists()
    result, requeued = sbatch(tmp_path, FAKE_SRUN_CODE="75", SLURM_JOB_ID="4711", SLURM_CPUS_PER_TASK="6")
    assert "--cpus-per-task=6 " in result.stdout  # which srun does not take over from the job by itself
    assert result.returncode == 75 and requeued.read_text() == "requeue 4711\n"
    directives = [line for line in (PROJECT / "launch/train.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=USR1@120" in directives and "#SBATCH --requeue" in directives
