#!/usr/bin/env bash
# Chooses the quickstart's learning rates: trains both arms at several, for the budget of configs/quickstart.yaml, on the shards that
# quickstart.sh has made, and compares them. docs/results/quickstart.md holds the result; about a quarter of an hour on two cores.
#
#   bash launch/learning_rates.sh [RATE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

[ $# -gt 0 ] || set -- 1e-3 2e-3 4e-3 8e-3 1.6e-2
folder=runs/quickstart/learning-rates
runs=()
for arm in quickstart quickstart-bptt; do
    for rate in "$@"; do
        runs+=("$folder/$arm-$rate")
        launch "configs/$arm.yaml" run.name="$arm at $rate" run.folder="${runs[-1]}" optimizer.learning_rate="$rate"
    done
done
rdtrain compare "${runs[@]}" --output "$folder"
