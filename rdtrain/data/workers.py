"""Worker processes that take tasks one by one and end with the process that started them, however it ends.

Notable: workers are spawned, as the caller may run threads; each has a pipe of its own, whose other end closes when the worker
is killed, which is noticed and named. The kernel ends the workers of a main process that is killed, so that none writes on.
"""

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from ..errors import UserError

END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl


def run_tasks(workers: int, perform: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    """perform(task) for each task, in whatever order they end; tasks are taken as workers become free.

    workers: processes; with 1, or with a single task, everything happens in this one. perform and the tasks must be
    picklable, perform for example a `functools.partial` of a function of a module. An exception in a worker is raised here. UserError
    when a worker is killed.
    """
    tasks = iter(tasks)
    first = list(itertools.islice(tasks, 2))
    tasks = itertools.chain(first, tasks)
    if workers == 1 or len(first) < 2:
        yield from map(perform, tasks)
        return
    context = multiprocessing.get_context("spawn")
    processes, idle, busy = [], [], {}
    try:
        for task in tasks:
            if not idle and len(processes) < workers:
                connection, other = context.Pipe()
                process = context.Process(target=_serve, args=(other, perform), daemon=True)
                process.start()
                other.close()  # the worker's death must close the pipe
                processes.append(process)
                idle.append((connection, process))
            elif not idle:
                yield _result(busy, idle)
            connection, process = idle.pop()
            busy[connection] = process
            _send(connection, process, task)
        while busy:
            yield _result(busy, idle)
    finally:
        for connection in [*busy, *(connection for connection, _ in idle)]:
            connection.close()
        for process in processes:
            if any(process is other for other in busy.values()):
                process.terminate()  # its task will be done again
            process.join()


def _send(connection: Connection, process: multiprocessing.Process, task: Any) -> None:
    try:
        connection.send(task)
    except OSError:
        raise _death(process) from None


def _result(busy: dict[Connection, multiprocessing.Process], idle: list) -> Any:
    """What the next worker to finish gives; the worker is idle then."""
    connection = wait(list(busy))[0]
    try:
        value, error = connection.recv()
    except (EOFError, OSError):
        raise _death(busy[connection]) from None
    if error is not None:
        raise error
    idle.append((connection, busy.pop(connection)))
    return value


def _death(process: multiprocessing.Process) -> UserError:
    process.join()
    return UserError(f"a worker process ended with code {process.exitcode} (-9 is what a machine out of memory gives); start the same "
                     "command again to continue, with fewer --workers if memory is short")


def _serve(connection: Connection, perform: Callable[[Any], Any]) -> None:
    """The life of a worker."""
    if sys.platform == "linux":  # elsewhere it leaves after the task at hand
        ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:
            return  # it was killed before that call, and its task may wait in the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the main one ends the others
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = perform(task), None
        except Exception as error:
            if not isinstance(error, (UserError, OSError)):
                error.add_note(traceback.format_exc())  # the traceback itself does not travel
            answer = None, error
        try:
            connection.send(answer)
        except OSError:
            return
