"""How far a command has come, on standard error: a bar on a terminal, and elsewhere, as in the log of a job, a line now and then."""

import sys
from typing import TextIO

from tqdm import tqdm

LINE_SECONDS = 60.0  # between two lines; a command that ends before writes none
LINE = "{desc}: {percentage:.0f}% {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left, {rate_fmt}{postfix}"
COUNT = "{desc}: {n_fmt}, {elapsed} so far, {rate_fmt}{postfix}"  # of what nobody knows the size of


class _Lines(tqdm):
    """tqdm that ends each of its lines, where tqdm itself goes back to the beginning of one, and leaves the last as it is."""

    monitor_interval = 0  # no thread beside it

    @staticmethod
    def status_printer(file: TextIO):
        return lambda line: print(line, file=file, flush=True)

    def close(self) -> None:
        """Ends it; may be called again."""
        self.disable = True


def show_progress(*arguments, total: int | None, **options) -> tqdm:
    """tqdm(*arguments, total=total, **options), in the form that suits standard error."""
    if sys.stderr is None or sys.stderr.isatty():
        return tqdm(*arguments, total=total, disable=None, **options)
    return _Lines(*arguments, total=total, bar_format=COUNT if total is None else LINE, miniters=1, mininterval=LINE_SECONDS,
                  maxinterval=LINE_SECONDS, delay=LINE_SECONDS, **options)
