"""The one exception that a user is meant to read.

Everything that a user can cause (a bad setting, a missing file, a full disk) is raised as `UserError` with one sentence that says
what is wrong, where, and the mend. The command line prints that sentence without a traceback and exits with code 2. Anything else
that escapes is a bug in rdtrain and keeps its traceback.
"""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .model.exceptions import first_line, out_of_memory

HEARING_SECONDS = 10.0
"""How long processes wait with their end where the first speaks for all: at the first end a launcher ends the others."""


class UserError(Exception):
    """A fault that the user can mend; its text is one sentence: what, where, and the mend.

    everywhere: whether every process of a run meets the same fault, so that one of them can speak for all.
    """

    def __init__(self, sentence: str, everywhere: bool = True):
        super().__init__(sentence)
        self.everywhere = everywhere


def disk_is_full(error: OSError) -> bool:
    """Whether it is room that a disk lacks, or a user's share of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def user_errors_as_exit() -> Iterator[None]:
    """Print a UserError as `rdtrain: sentence` on standard error and exit with code 2; leave with code 130 on Ctrl-C.

    Of several processes on a machine, the first speaks for all unless the fault is a process's own. Memory that runs out, which
    torch reports as a RuntimeError on every device, is a fault of the user's settings.
    """
    try:
        yield
    except UserError as error:
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        if local_rank == "0" or not error.everywhere:
            print(f"rdtrain: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(HEARING_SECONDS)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        reason = first_line(error)
        if out_of_memory(error):
            mend = "lower batch.micro_sequences (of rdtrain evaluate --batch or --judge-batch) or the size of the model"
            print(f"rdtrain: out of memory ({reason}): {mend}", file=sys.stderr, flush=True)
            sys.exit(2)
        raise
    except KeyboardInterrupt:
        print("rdtrain: stopped; start the same command again", file=sys.stderr, flush=True)
        sys.exit(130)
