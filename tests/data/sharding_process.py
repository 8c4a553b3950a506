"""Shards a folder in small units with two workers: python sharding_process.py INPUT TOKENIZER OUTPUT; tests kill it."""

import sys
from pathlib import Path

from rdtrain.data.sharding import write_shards
from rdtrain.errors import user_errors_as_exit
from rdtrain.model.tokenizer import Tokenizer

if __name__ == "__main__":
    with user_errors_as_exit():
        write_shards([Path(sys.argv[1])], Tokenizer(sys.argv[2]), Path(sys.argv[3]), shard_tokens=2000, workers=2, validation_share=0.2,
                     unit_bytes=2000)
