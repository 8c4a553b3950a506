"""Processes that stages start: where torchrun listens, what an output ends with, and the end of all of them when time is over.

    python -m rdtrain.scaling.processes SECONDS COMMAND ...    runs a command, and ends it and all that it has started once they are over
"""

import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launcher(processes: int) -> list[str]:
    """The command that starts so many processes of a module, by torchrun."""
    place = ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *place, "-m"]


def end_tree(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()


def last_words(path: Path) -> str:
    """The line of an output that says best why it ended."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"rdtrain: |[A-Z]\w*(Error|Exception)\b", line) and "ChildFailedError" not in line]
    return (telling or lines or ["it said nothing"])[-1][:400]


def main() -> None:
    """The command's exit code, or 124 where it was ended."""
    seconds, command = float(sys.argv[1]), sys.argv[2:]
    process = subprocess.Popen(command)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"rdtrain: {' '.join(command[:6])} ... took more than {seconds:.0f} s and was ended", file=sys.stderr)
        code = 124
    finally:
        if process.poll() is None:
            end_tree(process)
    sys.exit(code)


if __name__ == "__main__":
    main()
