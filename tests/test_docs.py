"""The documentation is of this version: its commands parse, its links lead somewhere, and the errors that it explains exist."""

import re
import shlex
from pathlib import Path

import pytest

from rdtrain.cli import build_parser
from rdtrain.config import load_config
from rdtrain.data.commands import join_action
from rdtrain.train import train

PROJECT = Path(__file__).parent.parent
PAGES = [PROJECT / "README.md", *(page for folder in ("docs", "configs", "tokenizer") for page in sorted((PROJECT / folder).rglob("*.md")))]

RUN_BY = {
    "bash launch/quickstart.sh": "test_quickstart.py::test_the_quickstart_continues_after_an_interrupt_and_ends_with_text",
    "source launch/environment.sh": "test_quickstart.py::test_the_quickstart_continues_after_an_interrupt_and_ends_with_text",
    "bash launch/scaling.sh": "test_scaling.py::test_a_short_rehearsal_measures_within_its_budget_and_reports",
    "sbatch --nodes=4 launch/train.sbatch": "test_launch.py::test_a_slurm_job_trains_on_its_tasks_and_speaks_once",
    "--no_ssh --node_rank NUMBER": "test_launch.py::test_torchrun_and_two_nodes_with_a_hostfile_compute_what_one_process_does",
    "torchrun": "test_launch.py::test_torchrun_and_two_nodes_with_a_hostfile_compute_what_one_process_does",
    "deepspeed": "distributed/test_zero.py::test_two_processes_give_the_losses_of_one_and_resume_bit_for_bit",
    "engine.name=block_parallel":
        "distributed/test_block_parallel.py::test_a_run_resumes_bit_for_bit_exports_one_model_and_goes_on_as_an_untied_run",
    "engines_process.py": "distributed/test_engines.py::test_losses_weights_and_resumed_runs_are_those_of_one_plain_process",
    "rdtrain corpus": "test_cli.py::test_text_to_shards_by_the_commands_alone",
    "rdtrain tokenizer train": "test_cli.py::test_text_to_shards_by_the_commands_alone",
    "rdtrain tokenizer import": "test_cli.py::test_text_to_shards_by_the_commands_alone",
    "rdtrain tokenizer benchmark": "data/test_tokenizer.py::test_the_benchmark_measures_each_tokenizer_on_the_same_text",
    "rdtrain shard": "test_cli.py::test_text_to_shards_by_the_commands_alone",
    "rdtrain shard copy": "data/test_storage.py::test_a_server_that_speaks_s3",
    "rdtrain shard benchmark": "data/test_sharding.py::test_the_benchmark_measures_the_command_beside_the_tokenizer",
    "rdtrain shard read-benchmark": "data/test_loader.py::test_the_benchmark_of_reading",
    "rdtrain train": "test_train.py::test_a_run_is_repeated_from_its_own_record",
    "--print-deepspeed-config": "test_dry_run.py::test_the_shown_deepspeed_configs_are_what_rdtrain_gives_deepspeed",
    "--dry-run": "test_dry_run.py::test_any_world_is_checked_and_costed_without_being_there",
    "rdtrain checkpoint verify": "test_checkpoint.py::test_a_damaged_checkpoint_is_passed_over_for_the_one_before",
    "rdtrain plan": "test_plan.py::test_the_command_writes_what_it_prints",
    "rdtrain watch": "test_terminal_view.py::test_a_finished_run_is_shown_as_it_ended",
    "rdtrain bench": "test_bench.py::test_a_sweep_with_shards_and_a_profile",
    "-m rdtrain.cli shard": "test_cli.py::test_text_to_shards_by_the_commands_alone",
    "-m rdtrain.cli bench": "test_scaling.py::test_a_short_rehearsal_measures_within_its_budget_and_reports",
    "rdtrain compare": "test_compare.py::test_the_report_says_what_the_runs_recorded",
    "rdtrain evaluate": "evaluate/test_command.py::test_two_runs_are_measured_and_their_samples_scored_again_elsewhere",
    "rdtrain export": "test_export.py::test_the_noise_levels_that_were_trained_travel_with_the_model",
    "rdtrain generate": "test_export.py::test_the_generate_command_passes_its_arguments_on",
    "--jsonl": "test_export.py::test_a_conversation_and_a_file_of_prompts_from_the_command_line",
    "python FOLDER": "test_export.py::test_it_generates_text_where_rdtrain_cannot_be_imported",
    "python my-model": "test_export.py::test_it_generates_text_where_rdtrain_cannot_be_imported",
    "python -m rdtrain.bench.generation": "test_generation_bench.py::test_cases_are_written_down_as_they_are_made_and_kept",
}
"""What a command of a page holds -> the test that runs the like, at a small size; of several the last counts. Those of the tutorial run as
they stand there (test_tutorial.py, which is slow)."""

NOT_RUN = {
    "python tests/browser.py": "it needs Chromium; test_html_page.py takes the like, where there is one",
    "git clone": "the place of the repository is the reader's",
    "bash launch/test.sh": "it runs these tests",
    "bash launch/learning_rates.sh": "it trains the quickstart ten times, more than half an hour on two cores",
    "bash launch/quality.sh": "it needs a GPU, for minutes to hours a stage",
    "bash launch/performance.sh": "it needs a GPU, for minutes a stage; what it runs is `rdtrain bench`",
    "--launcher pdsh": "it needs pdsh and ssh",
    "pip install": "launch/environment.sh has installed what the tests need",
    "pip list": "it shows packages, and is pip's own",
    ".venv/bin/activate": "launch/environment.sh does as much",
    "wandb sync": "it needs an account of wandb",
    "wandb login": "it needs an account of wandb",
    "tensorboard --logdir": "it serves until it is stopped; test_metrics.py reads the files as it does",
}
"""The same, after those above, for commands that no test runs -> why not."""

PROGRAMS = "rdtrain|bash|source|git|python|pip|torchrun|deepspeed|sbatch|wandb|tensorboard|for"
STARTS = re.compile(rf'(?:[A-Z_\d]+=(?:"[^"]*"|\S*) )*(?:{PROGRAMS}) ')


def commands(page: Path) -> list[str]:
    """The `rdtrain` commands of a page's indented or fenced blocks, without remarks."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines() if line.startswith("   ")]
    fenced = [line.strip() for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    found = [re.split(r"\s+#|\s{3,}", line)[0] for line in [*lines, *fenced] if line.startswith("rdtrain ")]
    return [command for command in found if not re.match(r"rdtrain [a-z]+ *(VERB|,|`)", command)]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_this_version_takes(page, capsys):
    parser = build_parser()
    for command in commands(page):
        words = [word for word in shlex.split(re.sub(r"\[[^\]]*\]", "", command))[1:] if word != "..."]
        try:
            arguments = parser.parse_args(join_action(words))
        except SystemExit:
            pytest.fail(f"{page.name}: {command}\n{capsys.readouterr().err}")
        overrides = [word for word in getattr(arguments, "overrides", []) if "=" in word]
        if overrides:
            load_config(None, overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_command_of_a_page_is_run_by_a_test_or_it_is_said_why_not(page):
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    lines = [re.split(r"\s+#", line.strip().removeprefix("$ "))[0] for line in text.splitlines() if line.startswith("   ")]
    in_prose = [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```|^#.*?$", "", text, flags=re.M | re.S))]
    for command in [words for words in [*lines, *in_prose] if STARTS.match(words)]:
        assert any(words in command for words in [*RUN_BY, *NOT_RUN]), f"{page.name}: {command}"


def test_the_tests_that_are_said_to_run_commands_exist():
    for test in RUN_BY.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (PROJECT / "tests" / file).read_text(), test


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_of_a_page_lead_somewhere(page):
    prose = "\n".join(line for line in page.read_text().splitlines() if not line.startswith("    "))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            names = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in names, f"{page.name}: {target}"


def test_explained_errors_are_those_of_the_code():
    """Each error of docs/troubleshooting.md that is quoted as ours, up to its changing parts."""
    sources = "".join(file.read_text() for file in sorted((PROJECT / "rdtrain").rglob("*.py")))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # sentences go over several lines
    page = (PROJECT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^### `(.*)`$", page, re.M)
    assert len(quoted) > 20
    for sentence in quoted:
        for part in sentence.split("..."):
            assert part.strip() in sources, sentence


def test_the_drawing_of_a_runs_folder_has_what_a_run_writes_and_nothing_else(tiny_config, tmp_path):
    page = (PROJECT / "docs/architecture.md").read_text().partition("## A run's folder\n")[2].partition("\nStarting the same")[0]
    drawn, folders = {}, []
    for indent, name, remark in re.findall(r"^    ( *)(\S.*?) {2,}(.*)$", page, re.M):
        if len(indent) > 6:  # a remark that goes on
            continue
        folders = folders[:len(indent) // 2]
        for each in name.split(", "):
            drawn["".join(folders) + each] = remark
        if name.endswith("/"):
            folders.append(name)
    seldom = {name.rstrip("/") for name, remark in drawn.items() if remark.startswith("only ")}
    assert seldom == {"wandb", "wandb-id", "tensorboard", "stacks-rank-1.txt", "skipped_steps.json"}
    assert train(load_config(tiny_config())) == 0
    run = tmp_path / "run"
    written = {str(path.relative_to(run)) + "/" * path.is_dir() for path in run.rglob("*")}
    assert {re.sub(r"step-\d+", "step-00000431", name) for name in written} == {name for name in drawn if name.rstrip("/") not in seldom}
