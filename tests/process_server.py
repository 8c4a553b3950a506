"""Starts the processes of tests by forking one that has imported what they need, which would take each of them seconds.

The fixture of that name in conftest.py talks to it. A request is a line of JSON: what to run, with which arguments, the environment of each
process, and how long it may take; the answer is one as well. All processes of a request run at the same time and write into the same two
files. As under a launcher, the first that fails ends the others and gives the exit code.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from typing import NoReturn

IMPORTED = (
    "rdtrain.train", "rdtrain.export", "rdtrain.engine.deepspeed_engine", "rdtrain.engine.fsdp_engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed's first engine imports it, and with it a part of torch's compiler
    "torch._inductor.compile_fx",  # the rest, for torch.compile
    "transformers.modeling_utils", "transformers.generation",
)


def serve() -> tuple[dict, dict] | None:
    """Answer requests until there are no more. In a process that was forked for one, returns the request and the process's environment."""
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as nothing:
            forked = []
            for environment in request["environments"]:
                process = os.fork()
                if process == 0:
                    os.setsid()  # so that it can be ended with all its children
                    for number, file in enumerate((nothing, out, err)):
                        os.dup2(file.fileno(), number)
                    return request, environment
                forked.append(process)
            answer = {"code": wait(forked, time.monotonic() + request["timeout"])}
            for name, file in (("out", out), ("err", err)):
                file.seek(0)
                answer[name] = file.read().decode(errors="replace")
        print(json.dumps(answer), flush=True)
    return None


def wait(processes: list[int], deadline: float) -> int | None:
    """The exit code of all: 0, or that of the first that failed, at which the others are asked to end; None where time ran out."""
    running, code = set(processes), 0
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            running.discard(process)
            if status and not code:
                code = os.waitstatus_to_exitcode(status)
                for other in running:
                    os.kill(other, signal.SIGTERM)
        elif time.monotonic() > deadline:
            for other in running:
                os.killpg(other, signal.SIGKILL)
                os.waitpid(other, 0)
            return None
        else:
            time.sleep(0.01)
    return code


def run(script: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """As `python SCRIPT ARGUMENTS` or, where it is no file, `python -m SCRIPT ARGUMENTS` would, and end with its exit code.

    Python would take everything down that was imported, for half a second, before it ends.
    """
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, code = [script, *arguments], 0
    try:
        if script.endswith(".py"):
            sys.path[0] = os.path.dirname(script)
            runpy.run_path(script, run_name="__main__")
        else:
            sys.path[0] = os.getcwd()
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for threads, as Python does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is there by now need not be searched again and again
    mine = serve()
    if mine is not None:
        run(mine[0]["script"], mine[0]["arguments"], mine[1])
