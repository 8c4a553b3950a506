#!/usr/bin/env bash
# The measurements of docs/results/performance.md, a stage at a time, on one GPU. A stage that is complete is left alone, and one that was
# stopped goes on with the configs that it has not measured; remove its folder to measure it again. rdtrain must be installed (or in
# PYTHONPATH); no data is needed.
#
#   bash launch/performance.sh large         850M (d 2560, 20 heads, MLP 8704, vocabulary 32,768), 8 x 2048 tokens: blocks, in bf16 and fp8,
#                                            with and without selective checkpointing of layers
#   bash launch/performance.sh truncated     850M, 4 x 2048: blocks against truncated BPTT
#   bash launch/performance.sh full          850M, 1 x 2048: blocks against full BPTT of 32
#   bash launch/performance.sh small         d 512, vocabulary 8192, 64 x 512: blocks and every baseline, with and without CUDA graphs where
#                                            these are possible
#   bash launch/performance.sh huginn        3.5B, Huginn's size, 1 x 4096: blocks, truncated and full BPTT, with and without checkpointing
#   bash launch/performance.sh batch         850M: the best batch
#   bash launch/performance.sh iterations    850M, 1 x 2048: how cost grows with K
#   bash launch/performance.sh layers        850M, 1 x 2048: with the core's layers
#   bash launch/performance.sh width         with the width, at the 850M model's proportions
#   bash launch/performance.sh length        850M: with the length of a sequence, to 16,384
#   bash launch/performance.sh profile       traces of small and large, and their ten costliest kernels
#   bash launch/performance.sh report [FILE] a page with the table and the plots' names, from what has been measured
# FOLDER (runs/performance) is where everything goes; SETTINGS are more overrides, OPTIONS more options of `rdtrain bench`, for every stage.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${FOLDER:-runs/performance}
rdtrain() { "${PYTHON:-python3}" -m rdtrain.cli "$@"; }

# bench CONFIG OVERRIDE... -- OPTION...: the measurement of this stage, in $folder/$stage.
bench() {
    local config=configs/$1.yaml overrides=() output=$folder/$stage; shift
    while [ "$1" != -- ]; do overrides+=("$1"); shift; done
    shift
    if grep -qs '"complete": true' "$output/bench.json"; then
        echo "$stage is complete; remove $output to measure it again"
        return
    fi
    mkdir -p "$output"
    { git describe --always --dirty 2> /dev/null || echo unknown; } > "$output/commit"
    rdtrain bench "$config" "${overrides[@]}" ${SETTINGS:-} "$@" --output "$output" --resume ${OPTIONS:-} | tee "$output/table.txt"
}
large=(--vocab-size 32768)
fp8=engine.precision=fp8 selective=objective.layer_checkpointing=selective
batch_of() { echo "batch.micro_sequences=$1 batch.global_sequences=$1"; }

stage=${1:-help}; shift || true
case $stage in
large)
    bench 1b -- "${large[@]}" --compare blocks "blocks $selective" "blocks $fp8" "blocks $fp8 $selective" ;;
truncated) bench 1b $(batch_of 4) -- "${large[@]}" --compare blocks truncated ;;
full) bench 1b $(batch_of 1) -- "${large[@]}" --compare blocks full ;;
small)
    bench 70m engine.cuda_graph=true -- --vocab-size 8192 --compare blocks one_pass truncated local "full batch.micro_sequences=32" \
        "blocks engine.cuda_graph=false" "one_pass engine.cuda_graph=false" ;;
huginn)
    bench 3.5b -- --vocab-size 65536 --steps 5 --warmup 2 --compare blocks truncated "truncated objective.activation_checkpointing=true" full \
        "full objective.activation_checkpointing=true" ;;
batch) bench 1b -- "${large[@]}" --steps 10 --warmup 3 --compare blocks "blocks $fp8" --sweep $(batch_of 4,8,16,24,32) ;;
iterations)
    bench 1b $(batch_of 1) -- "${large[@]}" --steps 8 --warmup 2 --compare blocks truncated full --sweep model.iterations=1,4,16,32,64 ;;
layers) bench 1b $(batch_of 1) -- "${large[@]}" --steps 8 --warmup 2 --compare blocks truncated --sweep model.core_layers=1,4,8,16 ;;
width)
    bench 1b $(batch_of 1) -- "${large[@]}" --steps 8 --warmup 2 --compare blocks truncated \
        --sweep model.width=640,1280,2560,3840 model.heads=5,10,20,30 model.mlp_width=2176,4352,8704,13056 ;;
length)
    bench 1b $(batch_of 1) -- "${large[@]}" --steps 8 --warmup 2 --compare blocks truncated \
        --sweep data.sequence_length=1024,2048,4096,8192,16384 ;;
profile)
    for stage in profile-small profile-large; do
        if [ $stage = profile-small ]; then config=70m vocabulary=8192; else config=1b vocabulary=32768; fi
        bench $config -- --vocab-size $vocabulary --steps 10 --profile "$folder/$stage"
    done ;;
report)
    "${PYTHON:-python3}" - "$folder" "${1:-$folder/performance.md}" <<'PYTHON'
import json, pathlib, sys

folder, page = map(pathlib.Path, sys.argv[1:])
stages = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/bench.json"))}
if not stages:
    sys.exit(f"nothing has been measured in {folder}: start with `bash launch/performance.sh large`")


def row(stage, arm):
    """The measurement of an arm, or of the only one; None where there is none, or it ran out of memory."""
    found = [row for row in stages.get(stage, {"measurements": []})["measurements"] if arm in (None, row["arm"])]
    return found[0] if found and not found[0]["out_of_memory"] else None


def speed(row):
    share = "" if row["mfu"] is None else f" ({100 * row['mfu']:.0f}%)"
    return f"{row['model_flops_per_second'] / 1e12:.0f} TFLOP/s{share}, {row['memory']['peak'] / 2**30:.1f} GiB"


def tokens(row):
    return f"{row['tokens_per_second'] / 1e6:.2f}M tokens/s"


def ratios(stage, other):
    blocks, other = row(stage, "blocks"), row(stage, other)
    if blocks is None or other is None:
        return None
    time = other["step_seconds"]["typical"] / blocks["step_seconds"]["typical"]
    return f"{time:.1f} in step time, {other['memory']['peak'] / blocks['memory']['peak']:.1f} in peak memory"


def one(show, stage, arm=None):
    return show(row(stage, arm)) if row(stage, arm) else None


def best(arm):
    rows = [row for row in stages.get("batch", {"measurements": []})["measurements"] if row["arm"] == arm and not row["out_of_memory"]]
    if not rows:
        return None
    found = max(rows, key=lambda row: row["model_flops_per_second"])
    return f"{speed(found)}, at {found['value']} x {found['sequence_length']}"


def named(arm):
    return arm.replace("engine.precision=", "").replace("objective.layer_checkpointing=", "")


cases = [
    (f"850M, 8 x 2048, {named(arm)}", "498 TFLOP/s, 25.9 GiB", ">= 560 TFLOP/s, <= 20 GiB", one(speed, "large", arm))
    for arm in [row["arm"] for row in stages.get("large", {"measurements": []})["measurements"]]
]
cases += [
    ("850M, best batch, blocks", "-", ">= 600 TFLOP/s", best("blocks")),
    ("850M, best batch, blocks fp8", "-", ">= 600 TFLOP/s", best("blocks engine.precision=fp8")),
    ("850M, 4 x 2048, truncated BPTT 24 + 8", "472 TFLOP/s, 46.5 GiB", ">= 520 TFLOP/s", one(speed, "truncated", "truncated")),
    ("truncated BPTT against blocks, 4 x 2048", "7.7 in step time", ">= 8.0", ratios("truncated", "truncated")),
    ("full BPTT of 32 against blocks, 1 x 2048", "13.3 and 4.5", ">= 14 and >= 5", ratios("full", "full")),
    ("d 512, 64 x 512, blocks", "1.00M tokens/s", ">= 1.4M tokens/s", one(tokens, "small", "blocks")),
    ("3.5B, 1 x 4096, blocks", "-", ">= 45% MFU", one(speed, "huginn", "blocks")),
]
for found in stages.get("huginn", {"measurements": []})["measurements"][1:]:
    cases.append((f"3.5B, 1 x 4096, {found['arm']}", "-", "-", "out of memory" if found["out_of_memory"] else speed(found)))
lines = ["# Speed and memory on one GPU", "", "| case | prototype | bar | measured |", "| --- | --- | --- | --- |"]
lines += [f"| {case} | {prototype} | {bar} | {found or 'not measured'} |" for case, prototype, bar, found in cases]
lines += ["", "Step time and FLOPs are of the same steps; rdtrain's FLOPs count attention in full and no recomputation.", ""]
for stage, report in stages.items():
    facts, commit = report["facts"], folder / stage / "commit"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if name in ("rdtrain", "torch") and version)
    at = commit.read_text().strip() if commit.exists() else "unknown"
    lines += [f"## {stage}", "", f"    bash launch/performance.sh {stage.split('-')[0]}", ""]
    lines += [f"{facts['started'][:10]}, commit {at}, {facts['machine']}, {versions}.", ""]
    table = folder / stage / "table.txt"
    if report["complete"] and table.exists():
        lines += ["    " + line if line else "" for line in table.read_text().splitlines()] + [""]
    else:
        lines += [f"Not complete: {len(report['measurements'])} measurements.", ""]
    if (folder / stage / "sweep.png").exists():
        lines += [f"The plot is {folder / stage / 'sweep.png'}.", ""]
page.parent.mkdir(parents=True, exist_ok=True)
page.write_text("\n".join(lines))
print(page)
PYTHON
    ;;
*)
    sed -n '2,/^set/p' "$0" | sed '/^set/d; s/^# \{0,1\}//'
    [ "$stage" = help ] || exit 2 ;;
esac
