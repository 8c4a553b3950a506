"""What watches a rank from beside its work: signals that ask it to stop, and a clock that notices when it hangs.

Both are one thread's, because the main thread may be inside a library (a compiler, a collective that waits for a dead rank) for as long
as that likes, and Python runs signal handlers in the main thread only. The interpreter writes the number of each signal into a socket at
once (`signal.set_wakeup_fd`), from which this thread reads. faulthandler's own thread, which needs no interpreter, stands behind it for
a library that does not even let other threads run.
"""

import faulthandler
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import NoReturn

import psutil

from .distributed import World

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
"""What a run that was asked to stop exits with. 128 + the signal, as a shell counts, for the two that mean stop; SIGUSR1, a scheduler's
warning that time is nearly up, means go on later, and 75 is EX_TEMPFAIL of sysexits.h: try again. So a job script can tell `scancel` (143)
from a job to be requeued, and neither looks like a process that the signal killed before it had saved (138)."""

HUNG = 124
"""Exit code of a process that its watchdog ends, as `timeout` has it."""

SECOND_INTERRUPT = 2.0
"""Seconds after which another SIGINT is a second Ctrl-C: a launcher may pass the first one on to ranks that have it from the terminal."""

TICK = 1.0
"""Seconds between two looks at the clock."""

AGAIN = "start the same command again to continue"


class Watch:
    """A context in which SIGINT, SIGTERM and SIGUSR1 ask the rank to stop, and in which it may not hang. For the main thread.

    Attributes: stop_code, 0 until the rank is signalled, then the exit code of its first signal; worth_saving, whether the process has
    begun a step of its own: where it has not, a signal ends it at once; doing, the name of its present work.
    """

    def __init__(self, folder: Path, hang_seconds: float, world: World):
        """folder: the run's, where stacks are written. hang_seconds: how long one piece of work may take, 0 for no limit."""
        self.stop_code = 0
        self.worth_saving = False
        self._folder, self._world, self._limit = folder, world, hang_seconds
        self.doing, self._since, self._reported = "start", time.monotonic(), False
        self._interrupted_at: float | None = None
        self._launchers = _launchers()

    @property
    def lost_rank_code(self) -> int:
        """What to exit with where another rank is lost: as that rank does, if both hung in this work and it was only the first to end."""
        return self.stop_code or (HUNG if self._reported else 1)

    def work(self, name: str) -> None:
        """What the rank does from now on; the clock starts anew."""
        self.doing, self._since, self._reported = name, time.monotonic(), False

    def __enter__(self) -> "Watch":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._handlers = {number: signal.signal(number, lambda number, frame: None) for number in EXIT_CODES}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="rdtrain-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._writer.send(b"\0")  # no signal's number
        self._thread.join()
        self._reader.close()
        self._writer.close()
        if self._limit:
            faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], TICK)
            numbers = self._reader.recv(4096) if ready else b""
            for number in numbers:
                if number in EXIT_CODES:
                    self._receive(number)
            if 0 in numbers:
                return
            if not self.stop_code and not all(map(_alive, self._launchers)):
                self._receive(signal.SIGTERM)  # nobody is left to pass a signal on, or to look at an exit code
            if self._limit:
                self._look_at_the_clock()

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at > SECOND_INTERRUPT:
                self.end(f"stopped at once by a second interrupt; {AGAIN} from the last checkpoint", EXIT_CODES[number])
            self._interrupted_at = self._interrupted_at or now
        self.stop_code = self.stop_code or EXIT_CODES[number]
        if not self.worth_saving:
            self.end(f"stopped during {self.doing}, with nothing new to save; {AGAIN}", self.stop_code)

    def _look_at_the_clock(self) -> None:
        # Put off at every look, so it ends a process only in which this thread cannot run.
        faulthandler.dump_traceback_later(3 * self._limit + 2 * TICK, file=2, exit=True)
        seconds = time.monotonic() - self._since
        if seconds > self._limit and not self._reported:
            self._reported = True
            self._report(seconds)
        elif seconds > 2 * self._limit:
            self.end(f"rank {self._world.rank} has hung in {self.doing} for {seconds:.0f} s and ends; {AGAIN}", HUNG, every_rank=True)

    def _report(self, seconds: float) -> None:
        """Every thread's stack, into the run's folder and on standard error."""
        path, where = self._folder / f"stacks-rank-{self._world.rank}.txt", "below"
        if self._folder.is_dir():
            try:
                with path.open("a") as file:
                    file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}, {seconds:.0f} s in {self.doing}\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
                where = f"in {path} and below"
            except OSError:
                pass  # a full disk may be why it hangs
        _say(
            f"rank {self._world.rank} has been in {self.doing} for {seconds:.0f} s: its threads' stacks are {where}; see where the main "
            "thread waits (in torch.distributed: for a rank that hangs or has died, so look at the others' stacks); the process ends in "
            f"{self._limit:g} s unless it goes on (faults.hang_seconds)"
        )
        faulthandler.dump_traceback(2)

    def end(self, sentence: str, code: int, every_rank: bool = False) -> NoReturn:
        """Leave at once, whatever the other threads are in and a library's exit handlers would wait for; the first rank of a machine says
        why, or every one."""
        if every_rank or self._world.local_rank == 0:
            _say(sentence)
        os._exit(code)


def _say(sentence: str) -> None:
    os.write(2, f"\nrdtrain: {sentence}\n".encode())  # the main thread may hold sys.stderr's lock


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _launchers() -> list[psutil.Process]:
    """The processes without which a launched rank is an orphan: torchrun, or DeepSpeed's launcher and the `deepspeed` command, which does
    not pass SIGTERM on. None where there is no launcher: a shell may end before what it started."""
    if not {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"} & os.environ.keys():
        return []
    parents = psutil.Process().parents()
    return parents[: 2 if "CROSS_SIZE" in os.environ else 1]
