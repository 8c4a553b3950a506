#!/usr/bin/env bash
# The measurements of docs/results/performance.md, a stage at a time, on one GPU. A stage that is complete is left alone, and one that was
# stopped goes on with the configs that it has not measured; remove its folder to measure it again. rdtrain must be installed (or in
# PYTHONPATH); no data is needed.
#
#   bash launch/performance.sh large         850M (d 2560, 20 heads, MLP 8704, vocabulary 32,768), 8 x 2048 tokens: blocks, in bf16 and fp8,
#                                            and with layers checkpointed: in bf16 selectively, in fp8 every fourth
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
#   bash launch/performance.sh report [EARLIER.json]   tables, rows and plots of all that has been measured, and of the rows of another report
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
    rdtrain bench "$config" "${overrides[@]}" ${SETTINGS:-} "$@" --output "$output" --resume ${OPTIONS:-}
}
large=(--vocab-size 32768)
fp8=engine.precision=fp8 selective=objective.layer_checkpointing=selective
batch_of() { echo "batch.micro_sequences=$1 batch.global_sequences=$1"; }

stage=${1:-help}; shift || true
case $stage in
large)
    bench 1b -- "${large[@]}" --compare blocks "blocks $selective" "blocks $fp8" \
        "blocks $fp8 objective.layer_checkpointing=full objective.layer_checkpointing_interval=4" ;;
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
report) "${PYTHON:-python3}" -m rdtrain.bench.stages "$folder" "$@" ;;
*)
    sed -n '2,/^set/p' "$0" | sed '/^set/d; s/^# \{0,1\}//'
    [ "$stage" = help ] || exit 2 ;;
esac
