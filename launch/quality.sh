#!/usr/bin/env bash
# The experiments of docs/results/quality.md, a stage at a time, on one GPU. Each run goes on where it stopped when its stage is started
# again, and what is complete is left alone. rdtrain must be installed (or in PYTHONPATH).
#
#   bash launch/quality.sh data TRAIN VALIDATION TEACHER      a tokenizer of 8192 pieces and shards, of three sets of text that share no book
#   bash launch/quality.sh teacher                            a plain language model of the teacher's books, which will judge samples
#   bash launch/quality.sh rates STEPS ARM [ARM ...]          each arm at three learning rates, JOBS (3) runs at a time
#   bash launch/quality.sh ablations STEPS [NAME ...]         ours with one thing changed, JOBS runs at a time
#   bash launch/quality.sh arms SECONDS SEED ARM [ARM ...]    each arm for so many seconds of training, one at a time
#   bash launch/quality.sh report                             compares all that `arms` has made
#   bash launch/quality.sh likelihood RUN [RUN ...] [-- OPTION ...]   held-out NLL, and what K iterations are worth; options are its own
#   bash launch/quality.sh samples RUN [RUN ...] [-- OPTION ...]   text, by the teacher, which also gives MAUVE's features; likewise
# ARM: plain, truncated, full, local, paper, ours, each at the learning rate that `rates` has found. FOLDER (runs/quality) is where
# everything goes; SETTINGS are more overrides for every run; DEVICES ("0") are the GPUs that the runs of `rates` and `ablations` share.
# GRAPH: what the arms whose passes are the same in every step get (engine.cuda_graph=true); empty on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${FOLDER:-runs/quality}
rates=${RATES:-5e-4 1e-3 2e-3}
graph=${GRAPH-engine.cuda_graph=true}
rdtrain() { "${PYTHON:-python3}" -m rdtrain.cli "$@"; }

declare -A arm=(
    [plain]="objective.name=one_pass model.iterations=1 $graph"
    [truncated]="objective.name=bptt optimizer.learning_rate=1e-3"
    [full]="objective.name=bptt objective.gradient=full objective.depth=fixed batch.micro_sequences=32 optimizer.learning_rate=1e-3"
    [local]="objective.name=bptt objective.gradient=local optimizer.learning_rate=1e-3"
    [paper]="$graph"
    [ours]="$graph"
)
declare -A ablation=(
    [ours]=""
    [seed-2]="run.seed=2"
    [sigma-data-0.5]="noise.sigma_data=0.5"
    [paper-levels]="noise.p_mean=-1.2"
    [narrow-levels]="noise.p_std=0.8"
    [critical-levels]="noise.p_mean=-1.2 noise.p_std=0.6"
    [share-0]="noise.share_at_sigma_max=0.0"
    [share-0.3]="noise.share_at_sigma_max=0.3"
    [share-0.5]="noise.share_at_sigma_max=0.5"
    [share-0.7]="noise.share_at_sigma_max=0.7"
    [uniform]="noise.partition=uniform"
    [equal-information]="noise.partition=equal_information"
    [level-per-token]="noise.level_per=token"
    [edm-weight]="noise.weighting=edm"
    [no-overlap]="noise.overlap=0.0"
    [1-iteration]="model.iterations=1"
    [8-iterations]="model.iterations=8"
    [4-blocks]="model.blocks=4"
    [no-posterior-readout]="objective.posterior_readout=false objective.optional_state=false"
    [unit-variance-input]="objective.wiener_input=false"
    [state-around-the-core]="objective.optional_state=false"
    [state-around-the-core-seed-2]="objective.optional_state=false run.seed=2"
    [core-readout]="objective.core_readout=true"
    [self-conditioning]="objective.self_conditioning=true"
    [chain-states]="objective.chain_states=true"
    [embedding-scale-1]="optimizer.embedding_scale=1.0"
    [embedding-scale-2]="optimizer.embedding_scale=2.0"
    [embedding-scale-8]="optimizer.embedding_scale=8.0"
    [embedding-scale-16]="optimizer.embedding_scale=16.0"
)

# run NAME CONFIG OVERRIDE...: one run in $folder/NAME, its output in NAME.log.
run() {
    local name=$1 config=configs/$2.yaml; shift 2
    mkdir -p "$folder/$(dirname "$name")"
    if ! rdtrain train --config "$config" run.name="$name" run.folder="$folder/$name" data.train="$folder/shards/train" \
        data.validation="$folder/shards/validation" "$@" ${SETTINGS:-} > "$folder/$name.log" 2>&1; then
        echo "$name failed: $(tail -n 1 "$folder/$name.log")" >&2
        return 1
    fi
    echo "$(tr '\r' '\n' < "$folder/$name.log" | tail -n 1)"
}
config_of() { if [ "$1" = paper ]; then echo paper-70m; else echo 70m; fi; }

# known KIND NAME: stops with the names that there are when this is none of them.
known() {
    local -n names=$1
    [ -n "${names[$2]+there}" ] || { echo "there is no ${1} '$2': choose from ${!names[*]}" >&2; exit 2; }
}

# in_turn RUN...: a run in the background, as soon as fewer than JOBS are going on; all_done fails when one of them has.
started=() devices=(${DEVICES:-0})
in_turn() {
    while [ "$(jobs -pr | wc -l)" -ge "${JOBS:-3}" ]; do sleep 1; done
    CUDA_VISIBLE_DEVICES=${devices[${#started[@]} % ${#devices[@]}]} run "$@" &
    started+=($!)
}
all_done() { local failed=0 job; for job in "${started[@]}"; do wait "$job" || failed=1; done; return $failed; }

# step_seconds ARM: of a step with the GPU to itself, which the runs of `rates` do not have.
step_seconds() {
    run "speed/$1" "$(config_of "$1")" ${arm[$1]} schedule.steps=40 logging.interval=10 evaluation.sequences=8 > /dev/null
    "${PYTHON:-python3}" - "$folder/speed/$1/metrics.jsonl" <<'PYTHON'
import json, pathlib, statistics, sys
records = [json.loads(line) for line in pathlib.Path(sys.argv[1]).read_text().splitlines()]
print(statistics.median([record["step_seconds"] for record in records if "step_seconds" in record][1:]))
PYTHON
}

stage=${1:-help}; shift || true
case $stage in
data)
    [ $# -eq 3 ] || { echo "give three sets of text: TRAIN VALIDATION TEACHER" >&2; exit 2; }
    rdtrain tokenizer train "$1" --output "$folder/tokenizer" --vocab-size 8192
    for part in train validation teacher; do
        rdtrain shard "$1" --tokenizer "$folder/tokenizer" --output "$folder/shards/$part"; shift
    done ;;
teacher)
    run teacher 70m ${arm[plain]} schedule.steps=1200 data.train="$folder/shards/teacher"
    rdtrain export "$folder/teacher" --output "$folder/teacher-model" ;;
rates)
    steps=$1; shift
    for name in "$@"; do known arm "$name"; done
    for name in "$@"; do
        for rate in $rates; do
            in_turn "rates/$name-$rate" "$(config_of "$name")" ${arm[$name]} schedule.steps="$steps" optimizer.learning_rate="$rate"
        done
    done
    all_done ;;
ablations)
    steps=$1; shift
    [ $# -gt 0 ] || set -- "${!ablation[@]}"
    for name in "$@"; do known ablation "$name"; done
    for name in "$@"; do in_turn "ablations/$name" 70m ${ablation[$name]} schedule.steps="$steps"; done
    all_done ;;
arms)
    seconds=$1 seed=$2; shift 2
    for name in "$@"; do known arm "$name"; done
    for name in "$@"; do
        step=$(step_seconds "$name")
        steps=$(awk "BEGIN { print int($seconds / $step) }")
        run "arms/$name-$seconds-s-seed-$seed" "$(config_of "$name")" ${arm[$name]} schedule.steps="$steps" run.seed="$seed" \
            evaluation.interval=$((steps / 10)) optimizer.learning_rate_source=docs/results/quality.md
    done ;;
report)
    rdtrain compare "$folder"/arms/ours-*/ $(find "$folder/arms" -mindepth 1 -maxdepth 1 -type d ! -name 'ours-*' | sort) --output "$folder/report" ;;
likelihood | samples)
    runs=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do runs+=("$folder/$1"); shift; done
    [ $# -eq 0 ] || shift
    if [ $stage = likelihood ]; then
        options=(--skip samples)
    else
        options=(--skip likelihood --teacher "$folder/teacher-model" --mauve-features "$folder/teacher-model")
    fi
    rdtrain evaluate "${runs[@]}" --shards "$folder/shards/validation" "${options[@]}" "$@" ;;
*)
    sed -n '2,/^set/p' "$0" | sed '/^set/d; s/^# \{0,1\}//'
    [ "$stage" = help ] || exit 2 ;;
esac
