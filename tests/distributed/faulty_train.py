"""launch/train.py with a fault put into one of its processes: `faulty_train.py fault=KIND:STEP ARGUMENTS`.

It befalls the last rank, in the given step (counted from 1), or from it on: nan-from, a loss that is not a number; kill, SIGKILL; hang, no
end; other-rate, a learning rate of its own; read, a store that gives an error instead of the step's first samples.
"""

import errno
import os
import signal
import sys
import time
from unittest import mock

from rdtrain import train as loop
from rdtrain.cli import train_main
from rdtrain.data.chunks import ChunkedArray
from rdtrain.data.loader import Loader
from rdtrain.objectives import DiffusionBlocks, Loss

argument = next(argument for argument in sys.argv if argument.startswith("fault="))
sys.argv.remove(argument)
kind, fault_step = argument.removeprefix("fault=").split(":")
mine = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
plain_loss, plain_rate, plain_batch = DiffusionBlocks.__call__, loop.learning_rate, Loader.batch
GLOBAL_SEQUENCES = 8
at = 0


def learning_rate(step, *arguments):
    global at
    at = step + 1
    rate = plain_rate(step, *arguments)
    return 2 * rate if mine and kind == "other-rate" and at == int(fault_step) else rate


def loss(objective, model, tokens, random):
    value = plain_loss(objective, model, tokens, random)
    if mine and kind == "kill" and at == int(fault_step):
        os.kill(os.getpid(), signal.SIGKILL)
    if mine and kind == "hang" and at == int(fault_step):
        time.sleep(3600)
    return Loss(value.value * float("nan"), value.metrics) if mine and kind == "nan-from" and at >= int(fault_step) else value


def batch(loader, indices):
    if mine and kind == "read" and indices[0] // GLOBAL_SEQUENCES == int(fault_step) - 1:
        with mock.patch.object(ChunkedArray, "__getitem__", side_effect=OSError(errno.EIO, os.strerror(errno.EIO))):
            loader.reader.read(0, 1)
    return plain_batch(loader, indices)


loop.learning_rate, DiffusionBlocks.__call__, Loader.batch = learning_rate, loss, batch
train_main()
