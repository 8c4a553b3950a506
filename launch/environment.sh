# Sourced by the scripts of this folder, from the project's root. Makes .venv with rdtrain and everything it needs, once, in the
# exact versions of constraints.txt (a finished set-up leaves a stamp, so the next start takes no time), and defines `launch`.

# Python compiles what is imported and keeps it; where the environment forbids that, every process would compile again, for seconds.
unset PYTHONDONTWRITEBYTECODE
stamp=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat .venv/rdtrain-stamp 2>/dev/null)" != "$stamp" ]; then
    echo "installing rdtrain and what it needs into .venv, a few minutes"
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "rdtrain needs Python >= 3.11, and $python is $("$python" --version 2>&1): set PYTHON to a newer one" >&2
        exit 2
    }
    "$python" -m venv .venv
    # Python compiles what is imported, once: pip would compile all 18,000 files, which takes it more than a minute.
    .venv/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[test]"
    echo "$stamp" > .venv/rdtrain-stamp
fi
PATH="$PWD/.venv/bin:$PATH"

# launch CONFIG SETTINGS...: train a config of the quickstart on all GPUs (a power of two, one process each) or, where there is none,
# in two CPU processes that share the cores.
found_gpus=""
launch() {
    local gpus processes port
    gpus=${found_gpus:=$(python -c 'import torch; print(torch.cuda.device_count())')}
    processes=2
    if [ "$gpus" -gt 0 ]; then
        for processes in 16 8 4 2 1; do [ "$processes" -gt "$gpus" ] || break; done
    else
        export DS_ACCELERATOR=cpu OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
    fi
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    deepspeed --quiet --num_gpus "$processes" --master_port "$port" -- launch/train.py --config "$1" \
        batch.micro_sequences=$((16 / processes)) "${@:2}" ||
        return # a command of its own, before which the shell runs the caller's trap for Ctrl-C, if there is one
}
