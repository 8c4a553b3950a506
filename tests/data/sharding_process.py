"""Shards a folder in small units, again and again: python sharding_process.py INPUT TOKENIZER OUTPUT; tests kill it.

For each line on standard input, WORKERS SECONDS, a child is forked that does it; its number is printed, and its exit code when it has
ended. So a kill costs what the work costs, and not the start of Python. With SECONDS above 0 the kernel kills the child when it has used so
much of a processor's time, which is the same moment of its work however busy the machine is.
"""

import os
import signal
import sys
from pathlib import Path

from rdtrain.data.sharding import write_shards
from rdtrain.errors import user_errors_as_exit
from rdtrain.model.tokenizer import Tokenizer

if __name__ == "__main__":
    source, tokenizer, output = Path(sys.argv[1]), Tokenizer(sys.argv[2]), Path(sys.argv[3])
    for line in sys.stdin:
        workers, seconds = line.split()
        child = os.fork()
        if not child:
            signal.setitimer(signal.ITIMER_PROF, float(seconds))  # nobody handles its signal
            with user_errors_as_exit():
                write_shards([source], tokenizer, output, 2000, workers=int(workers), validation_share=0.2, unit_bytes=2000)
            sys.exit()
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
