"""What the tests share: a tiny model, tiny shards made from real text, and the commands as a user would start them."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rdtrain.config import Config
from rdtrain.data.docstrings import docstrings
from rdtrain.data.sharding import write_shards
from rdtrain.data.tokenizer_training import train_tokenizer
from rdtrain.metrics import read_metrics
from rdtrain.model.recurrent import ModelConfig, RecurrentDepthLM
from rdtrain.model.tokenizer import Tokenizer
from rdtrain.scaling.processes import free_port
from rdtrain.train import train

PROJECT = Path(__file__).parent.parent
MODULES = ("argparse", "datetime", "_pydecimal", "difflib", "inspect", "random", "shutil", "statistics", "subprocess", "textwrap")
LONGEST = (
    "test_quickstart.py", "distributed/test_engines.py", "distributed/test_faults.py", "distributed/test_snapshots.py",
    "distributed/test_blocks.py", "distributed/test_block_parallel.py", "distributed/test_zero.py", "test_launch.py",
    "distributed/test_estimate.py", "test_export.py", "test_experiment.py", "test_scaling.py",
)
"""Files by the time that they take, the longest first."""
TINY = dict(width=32, heads=4, mlp_width=48, prelude_layers=1, core_layers=2, coda_layers=1, iterations=4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first. Of two workers each begins with a half of the tests and takes from the end of the other's, so one has
    those of many processes and the other those of one for most of the time, and none is left alone with a test of minutes."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported by now, a million objects, the garbage collector need not search again and again: a sixth of all time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model_code_folder(tmp_path_factory):
    """Where transformers copies the code of exported models to: one folder for all tests of a process, which imports it as one package."""
    import transformers

    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
        patch.setattr(sys, "path", [*sys.path, modules])
        transformers.utils.logging.disable_progress_bar()
        yield modules


@pytest.fixture(scope="session")
def perturb():
    """Moves the parameters that start at zero or one, and enlarges the small output maps, so that none of them can hide."""

    @torch.no_grad()
    def change(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            if "norm" in name or name.endswith(".bias") or "modulation" in name or name in ("estimate_adapter.weight", "core_scale"):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            elif name.endswith("output.weight"):
                parameter *= 4
            elif name.endswith(".adapter.weight") and module.config.optional_state:  # whose part starts at zero
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return module

    return change


@pytest.fixture(scope="session")
def build_model(perturb):
    """A factory of tiny models, the same for the same arguments; `perturbed` applies `perturb`."""

    def build(noise_conditioning: bool = False, perturbed: bool = True, seed: int = 0, **changes) -> RecurrentDepthLM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            settings = {**TINY, "vocab_size": 50, "noise_conditioning": noise_conditioning, **changes}
            model = RecurrentDepthLM(ModelConfig(**settings))
        return perturb(model, seed) if perturbed else model

    return build


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """English documents: the docstrings of some modules, without the few carriage returns that text files would not give back."""
    folder = Path(sysconfig.get_path("stdlib"))
    return ["\n\n".join(docstrings(folder / f"{module}.py")).replace("\r", "") for module in MODULES]


@pytest.fixture(scope="session")
def text_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts as files."""
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def tokenizer(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of 800 pieces, trained on the texts."""
    return train_tokenizer([text_folder], tmp_path_factory.mktemp("tokenizer") / "small", 800)


@pytest.fixture(scope="session")
def byte_level_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` of Hugging Face's library writes it, with a tokenizer of GPT-2's kind of 700 pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|begin|>", "<|end|>", "<|user|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    folder = tmp_path_factory.mktemp("byte-level") / "theirs"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shards(text_folder: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train and validation shards of the texts."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards([text_folder / f"{number}.txt" for number in range(8)], tokenizer, folder / "train")
    write_shards([text_folder / "8.txt", text_folder / "9.txt"], tokenizer, folder / "validation")
    return folder


@pytest.fixture
def tiny_config(shards: Path, tmp_path: Path):
    """A factory: writes the config of a tiny run in `tmp_path / run` and returns the file; sections given are merged over it."""

    def write(run: str = "run", **sections) -> Path:
        tree = {
            "run": {"name": run, "folder": str(tmp_path / run), "seed": 7},
            "data": {"train": str(shards / "train"), "validation": str(shards / "validation"), "sequence_length": 16},
            "model": TINY,
            "objective": {"name": "diffusion_blocks"},
            "batch": {"global_sequences": 8, "micro_sequences": 2},
            "optimizer": {"learning_rate": 0.01},
            "schedule": {"steps": 8},
            "engine": {"name": "torch"},
            "evaluation": {"interval": 4, "sequences": 8},
            "checkpoint": {"interval": 4},
            "logging": {"interval": 1},
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        path = tmp_path / f"{run}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def start(command: list[str], timeout: float, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a session of its own, so that a hang can be ended with all its children."""
    process = subprocess.Popen(
        command, cwd=PROJECT, env=os.environ | environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{command} did not end in {timeout} s:\n{out}\n{err}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="session")
def process_server():
    """Run a script or module of Python in CPU processes, as many as environments are given, forked from one that has imported rdtrain,
    DeepSpeed and torch (process_server.py)."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "tests/process_server.py"], cwd=PROJECT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def run(script: str, arguments: tuple, timeout: float, environments: list[dict[str, str]]) -> subprocess.CompletedProcess:
        cpu = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        request = {
            "script": script, "arguments": list(map(str, arguments)), "timeout": timeout,
            "environments": [cpu | each for each in environments],
        }
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())
        if answer["code"] is None:
            pytest.fail(f"{script} {request['arguments']} did not end in {timeout} s:\n{answer['out']}\n{answer['err']}")
        return subprocess.CompletedProcess([script, *request["arguments"]], answer["code"], answer["out"], answer["err"])

    yield run
    server.communicate()


@pytest.fixture
def rdtrain(process_server):
    """Run `rdtrain ARGUMENTS` as a user would; in a process that Python starts anew where `forked` is False."""

    def run(*arguments: object, timeout: float = 600, forked: bool = True) -> subprocess.CompletedProcess:
        if forked:
            return process_server("rdtrain.cli", arguments, timeout, [{}])
        return start([sys.executable, "-m", "rdtrain.cli", *map(str, arguments)], timeout, DS_ACCELERATOR="cpu")

    return run


@pytest.fixture
def alone(process_server):
    """Run `python FOLDER ARGUMENTS` of an exported model where `import rdtrain` fails, in a process that starts in no time, as torch is
    there already; `rdtrain generate` starts one anew."""
    return lambda folder, *arguments: process_server("tests/alone.py", (folder, *arguments), 600, [{}])


@pytest.fixture
def deepspeed(process_server):
    """Run `deepspeed launch/train.py ARGUMENTS` on a number of processes: for what the launcher has a part in. On the CPU the command
    itself is forked, and starts the others anew."""

    def run(*arguments: object, processes: int = 2, timeout: float = 600, script: str = "launch/train.py", cpu: bool = True):
        words = ["--num_gpus", str(processes), "--master_port", str(free_port()), "--", script, *map(str, arguments)]
        if cpu:
            return process_server("deepspeed.launcher.runner", tuple(words), timeout, [{}])
        return start([str(Path(sys.executable).parent / "deepspeed"), *words], timeout, OMP_NUM_THREADS="1")

    return run


@pytest.fixture
def ranks(process_server, deepspeed):
    """Run launch/train.py, or another script, as a number of ranks, with no launcher around them. With `gpus`, on as many GPUs, by the
    launcher, where there are so many, and where the environment has RDTRAIN_TEST_GPUS nowhere else."""

    def run(*arguments: object, number: int = 2, timeout: float = 600, script: str = "launch/train.py", gpus: bool = False):
        if gpus and torch.cuda.device_count() >= number:
            return deepspeed(*arguments, processes=number, timeout=timeout, script=script, cpu=False)
        if gpus and "RDTRAIN_TEST_GPUS" in os.environ:
            pytest.fail(f"RDTRAIN_TEST_GPUS is set, and there are {torch.cuda.device_count()} GPUs for {number} processes")
        world = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return process_server(script, arguments, timeout, [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)])

    return run


@pytest.fixture
def assert_resumes_bit_for_bit():
    """Check that a finished run, its last checkpoint (folder `last`) taken away and its config trained again, ends with the same
    weights after the same losses and gradient norms."""

    def check(config: Config, last: Path) -> None:
        metrics = last.parent.parent / "metrics.jsonl"
        weights, records = load_file(last / "model.safetensors"), read_metrics(metrics)
        shutil.rmtree(last)
        assert train(config) == 0
        again = load_file(last / "model.safetensors")
        assert again.keys() == weights.keys() and all(again[name].equal(weights[name]) for name in weights)
        whole, resumed = (
            [(record["step"], record["loss"], record["gradient_norm"]) for record in run[1:]] for run in (records, read_metrics(metrics))
        )
        assert whole == resumed

    return check


@pytest.fixture
def refused():
    """Check that a finished command refused its input: exit code 2 and one sentence, without a traceback, that holds the words."""

    def check(result: subprocess.CompletedProcess, *words: str) -> None:
        sentences = [line for line in result.stderr.splitlines() if line.startswith("rdtrain: ")]
        assert result.returncode == 2, result.stderr
        assert len(sentences) == 1 and "Traceback" not in result.stderr, result.stderr
        for word in words:
            assert word in sentences[0]

    return check
