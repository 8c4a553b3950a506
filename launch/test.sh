#!/usr/bin/env bash
# Set-up and tests: `bash launch/test.sh`, with any arguments of pytest (`-m slow` for the long campaigns).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
# One thread a process: the tests start two workers and processes of their own.
OMP_NUM_THREADS=1 exec python -m pytest -n 2 --dist worksteal "$@"
