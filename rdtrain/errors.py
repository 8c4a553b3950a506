"""The one exception that a user is meant to read.

Everything that a user can cause (a bad setting, a missing file, a full disk) is raised as `UserError` with one sentence that says
what is wrong, where, and the mend. The command line prints that sentence without a traceback and exits with code 2. Anything else
that escapes is a bug in rdtrain and keeps its traceback.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A fault that the user can mend; its text is one sentence: what, where, and the mend.

    everywhere: whether every process of a run meets the same fault, so that one of them can speak for all.
    """

    def __init__(self, sentence: str, everywhere: bool = True):
        super().__init__(sentence)
        self.everywhere = everywhere


@contextmanager
def user_errors_as_exit() -> Iterator[None]:
    """Print a UserError as `rdtrain: sentence` on standard error and exit with code 2.

    Of several processes on a machine, the first speaks for all unless the fault is a process's own.
    """
    try:
        yield
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or not error.everywhere:
            print(f"rdtrain: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
