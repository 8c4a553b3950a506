"""Shards a folder in small units with two workers, again and again: python sharding_process.py INPUT TOKENIZER OUTPUT; tests kill it.

For each line on standard input a child is forked that does it, and its number is printed; its exit code follows when it has ended. So
a kill costs what the work costs, and not the start of Python.
"""

import os
import sys
from pathlib import Path

from rdtrain.data.sharding import write_shards
from rdtrain.errors import user_errors_as_exit
from rdtrain.model.tokenizer import Tokenizer

if __name__ == "__main__":
    source, tokenizer, output = Path(sys.argv[1]), Tokenizer(sys.argv[2]), Path(sys.argv[3])
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            with user_errors_as_exit():
                write_shards([source], tokenizer, output, shard_tokens=2000, workers=2, validation_share=0.2, unit_bytes=2000)
            sys.exit()
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
