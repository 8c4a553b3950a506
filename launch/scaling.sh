#!/usr/bin/env bash
# Training on several GPUs of one machine, measured: what docs/results/scaling.md shows. Stage by stage, or all in one call; what is complete
# is left alone, and what was stopped goes on, so the same command is started again until it says that nothing is missing. rdtrain must be
# installed (or in PYTHONPATH), with pytest. On a machine without GPUs it rehearses itself with gloo (see COUNTS and SETTINGS).
#
#   bash launch/scaling.sh nccl            collectives: whether they are right, and how fast
#   bash launch/scaling.sh equality        the tests of tests/distributed that hold engines to a plain loop, on two GPUs
#   bash launch/scaling.sh losses          the same real steps under every layout, on one GPU and on all
#   bash launch/scaling.sh resume          a rank killed (SIGKILL), and the run gone on with on half as many GPUs under FSDP2
#   bash launch/scaling.sh measure         tokens/s, MFU, memory, messages: ZeRO-1, 2, 3, FSDP2 and block-parallel, blocks and truncated BPTT
#   bash launch/scaling.sh report [FILE]   the page, of what has been measured
#   bash launch/scaling.sh all             all of these in turn, past those that fail; the exit code is 1 where one of them has
#
# FOLDER (runs/scaling) is where everything goes; PYTHON (python3) runs it; SETTINGS are more overrides for every model.
# COUNTS: numbers of GPUs, or of processes on the CPU (1 2 4 8, as many as there are). MODELS: what `measure` takes, NAME=CONFIG:VOCABULARY.
# COMPILE (on): whether `measure` compiles where an engine can. STEPS (6): timed ones. SHARDS: a folder with train and validation shards
# (made of the installed packages' prose and the demo tokenizer). BUDGET: seconds from the start on after which `measure` begins no further
# measurement; one that runs may take 45 more. EQUALITY_SECONDS, STAGE_SECONDS: how long `equality`, and each other check, may take.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${FOLDER:-runs/scaling}
python=${PYTHON:-python3}
models=${MODELS:-857M=configs/1b.yaml:32768 3.5B=configs/3.5b.yaml:65536}
shards=${SHARDS:-$folder/shards}
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} TORCH_SYMM_MEM_DISABLE_MULTICAST=${TORCH_SYMM_MEM_DISABLE_MULTICAST:-1}
export KINETO_LOG_LEVEL=${KINETO_LOG_LEVEL:-6} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# limited SECONDS MODULE ...: a module of Python, ended with all its processes once they are over.
limited() { "$python" -m rdtrain.scaling.processes "$1" "$python" -m "${@:2}"; }

# several COUNT SECONDS MODULE ...: so many processes of a module; a single one without a launcher.
several() {
    if [ "$1" = 1 ]; then limited "${@:2}"; return; fi
    local port
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    limited "$2" torch.distributed.run --nproc-per-node "$1" --master-addr 127.0.0.1 --master-port "$port" -m "${@:3}"
}

look_around() { # how many GPUs there are, and on how many of what to run
    [ -z "${most:-}" ] || return 0
    gpus=0
    [ "${DS_ACCELERATOR:-}" = cpu ] || gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit 1
    if [ "$gpus" = 0 ]; then
        export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    fi
    counts=${COUNTS:-$(for count in 1 2 4 8; do [ "$count" -gt "$((gpus > 0 ? gpus : 2))" ] || echo "$count"; done)}
    most=1
    for count in $counts; do [ "$count" -le "$most" ] || most=$count; done
}

data() { # quickstart's, with the demo tokenizer
    [ -n "${SHARDS:-}" ] && return
    mkdir -p "$folder"
    [ -e "$folder/corpus" ] || "$python" -m rdtrain.cli corpus "$folder/corpus" || return
    for split in train validation; do
        [ -e "$shards/$split" ] ||
            "$python" -m rdtrain.cli shard "$folder/corpus/$split.jsonl" --tokenizer tokenizer --output "$shards/$split" || return
    done
}

nccl() {
    [ "$most" -gt 1 ] || { echo "one process sends nothing"; return; }
    [ -e "$folder/nccl/$most.json" ] && { echo "complete"; return; }
    several "$most" "${STAGE_SECONDS:-120}" rdtrain.scaling.collectives "$folder/nccl/$most.json" --megabytes $((gpus > 0 ? 256 : 4))
}

equality() { # side by side on GPUs, which they hardly fill; one after another on a CPU
    [ -e "$folder/equality/complete" ] && { echo "complete"; return; }
    mkdir -p "$folder/equality"
    local all=tests/distributed code=0 test name
    local tests=${TESTS:-$all/test_block_parallel.py::test_losses_weights_messages_and_memory_are_those_of_a_slow_loop \
        $all/test_blocks.py $all/test_engines.py $all/test_estimate.py \
        $all/test_snapshots.py::test_every_engine_gives_and_takes_the_same_snapshot}
    [ "$gpus" = 0 ] || export RDTRAIN_TEST_GPUS=1
    for test in $tests; do
        name=$folder/equality/$(basename "${test%%::*}" .py)
        [ -e "$name.complete" ] && continue
        {
            OMP_NUM_THREADS=1 limited "${EQUALITY_SECONDS:-900}" pytest -v -p no:cacheprovider -p no:xdist --basetemp "$name" "$test" \
                > "$name.output" 2>&1 && touch "$name.complete"
        } &
        [ "$gpus" != 0 ] || wait "$!"
    done
    wait
    for test in $tests; do
        name=$folder/equality/$(basename "${test%%::*}" .py)
        grep -aE '^tests/.* (PASSED|FAILED|ERROR)|^E  |^=+ .* in ' "$name.output" | cut -c 1-300
        [ -e "$name.complete" ] || { code=1; tail -n 1 "$name.output"; }
    done
    [ "$code" = 1 ] || touch "$folder/equality/complete"
    return "$code"
}

losses() {
    local code=0 count config=(configs/70m.yaml data.train="$shards/train" batch.global_sequences=16 batch.micro_sequences=8)
    data || return
    for count in $(printf '%s\n' 1 2 "$most" | sort -un); do
        [ "$count" -le "$most" ] || continue
        [ -e "$folder/losses/$count.json" ] && { echo "$count: complete"; continue; }
        local layouts=(ZeRO-1 ZeRO-2 FSDP2 ZeRO-3)
        [ "$count" -gt 1 ] || layouts=("plain fp32" plain ZeRO-1 FSDP2)
        mkdir -p "$folder/losses"
        several "$count" "${STAGE_SECONDS:-240}" rdtrain.scaling.losses "${config[@]}" ${SETTINGS:-} --layouts "${layouts[@]}" \
            --steps "${LOSS_STEPS:-30}" --output "$folder/losses/$count.json" > "$folder/losses/$count.output" 2>&1 ||
            { code=1; tail -n 5 "$folder/losses/$count.output"; }
    done
    return "$code"
}

resume() {
    grep -qs '"equal": true' "$folder/resume/resume.json" && { echo "complete"; return; }
    data || return
    rm -rf "$folder/resume"
    limited "${STAGE_SECONDS:-400}" rdtrain.scaling.resume configs/quickstart.yaml evaluation.sequences=16 ${SETTINGS:-} --shards "$shards" \
        --ranks "$most" --steps "${RESUME_STEPS:-200}" --output "$folder/resume/resume.json"
}

measure() {
    local left=1000000000
    [ -z "${BUDGET:-}" ] || left=$((BUDGET - SECONDS))
    "$python" -m rdtrain.scaling.measure ${SETTINGS:-} --models $models --counts $counts --output "$folder/measure" --budget "$left" \
        --steps "${STEPS:-6}" "$([ "${COMPILE:-on}" = on ] && echo --compile || echo --no-compile)"
}

report() { "$python" -m rdtrain.scaling.report "$folder" "${1:-$folder/scaling.md}"; }

stage=${1:-help}
shift || true
case $stage in
nccl | equality | losses | resume | measure | report)
    look_around
    "$stage" "$@" ;;
all)
    look_around
    mkdir -p "$folder"
    data > "$folder/data.output" 2>&1 & # while others run
    making=$! failed=()
    for stage in nccl equality losses resume measure report; do
        echo "== $stage ($SECONDS s)"
        case $stage in losses | resume) wait "$making" || cat "$folder/data.output" ;; esac
        "$stage" || failed+=("$stage")
    done
    echo "== done in $SECONDS s${failed[*]:+; not complete: ${failed[*]}}"
    [ ${#failed[@]} = 0 ] ;;
*)
    sed -n '2,/^set/p' "$0" | sed '/^set/d; s/^# \{0,1\}//'
    [ "$stage" = help ] || exit 2 ;;
esac
