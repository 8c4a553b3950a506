#!/usr/bin/env bash
# From text to text on this machine: corpus, tokenizer, shards, denoising blocks and the BPTT baseline at equal training FLOPs,
# a comparison, an export and generated text. Started again, it continues where it stopped.
#
#   bash launch/quickstart.sh                              the prose that the installed packages carry; two CPU processes, or all GPUs
#   bash launch/quickstart.sh --text book.txt more/*.gz    your own text (into runs/own-text)
#   bash launch/quickstart.sh --output DIR ...             another folder than runs/quickstart
#   bash launch/quickstart.sh ... -- section.key=value     settings for both runs, for example schedule.training_flops=1e12
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."

output="" text=() overrides=()
while [ $# -gt 0 ]; do
    case "$1" in
        --output) output=${2:?"--output needs a folder"}; shift 2 ;;
        --text) shift; while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do
            case "$1" in /*) text+=("$1") ;; *) text+=("$caller/$1") ;; esac
            shift
        done ;;
        --) shift; overrides=("$@"); break ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' launch/quickstart.sh; exit 0 ;;
        *) echo "quickstart: unknown argument '$1'; see --help" >&2; exit 2 ;;
    esac
done
if [ -z "$output" ]; then
    if [ ${#text[@]} -gt 0 ]; then output=runs/own-text; else output=runs/quickstart; fi
fi
trap 'exit 130' INT TERM
trap 'status=$?; [ "$status" = 0 ] || echo "quickstart: stopped with code $status; start the same command again to continue"' EXIT

started=$SECONDS times=""
stage() { # stage NAME: close the stage before and open the next
    [ -z "${current:-}" ] || times+="  $current: $((SECONDS - since)) s"$'\n'
    current=$1 since=$SECONDS
    [ -z "$1" ] || echo "== $1"
}

stage "set-up"
source launch/environment.sh

stage "corpus"
mkdir -p "$output"
if [ -e "$output/corpus" ] && [ "$(cat "$output/text" 2>/dev/null)" != "${text[*]-}" ]; then
    echo "quickstart: $output was made from other text ($(cat "$output/text" 2>/dev/null)): choose another --output" >&2
    exit 2
fi
echo "${text[*]-}" > "$output/text"
[ -e "$output/corpus" ] || rdtrain corpus "$output/corpus" ${text[@]+--text "${text[@]}"}

stage "tokenizer"
[ -e "$output/tokenizer" ] ||
    rdtrain tokenizer train "$output/corpus/train.jsonl" --output "$output/tokenizer" --vocab-size 2048

stage "shards"
for split in train validation; do
    [ -e "$output/shards/$split" ] ||
        rdtrain shard "$output/corpus/$split.jsonl" --tokenizer "$output/tokenizer" --output "$output/shards/$split"
done

train() { # train CONFIG NAME
    launch "$1" run.folder="$output/$2" data.train="$output/shards/train" data.validation="$output/shards/validation" \
        ${overrides[@]+"${overrides[@]}"}
}
stage "denoising blocks"
train configs/quickstart.yaml blocks

stage "truncated BPTT"
train configs/quickstart-bptt.yaml bptt

stage "comparison"
rdtrain compare "$output/blocks" "$output/bptt" --output "$output"

stage "export"
[ -e "$output/model" ] || rdtrain export "$output/blocks" --output "$output/model"

stage "generate"
rdtrain generate "$output/model" --prompt "Returns the" --max-new-tokens 60 --temperature 0.8

stage ""
cat <<END

== done in $((SECONDS - started)) s
$times
$output/corpus, tokenizer, shards   the text and its tokens
$output/blocks, bptt                the two runs: config, metrics.jsonl, checkpoints
$output/report.md, report.html      the comparison; nll-against-*.png are its plots
$output/model                       the exported model, which needs nothing of rdtrain

Try next (after: source .venv/bin/activate):
  rdtrain generate $output/model --prompt "The function" --iterations 8 --temperature 0.7
  rdtrain train --config configs/quickstart.yaml --print-config
  bash launch/quickstart.sh --text path/to/your/text    (files or folders; from about 200 kB on)
END
