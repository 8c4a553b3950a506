"""launch/train.py with a fault put into one of its processes: `faulty_train.py fault=KIND:STEP ARGUMENTS`.

It befalls the last rank, in the given step (counted from 1), or from it on: nan-from, a loss that is not a number; kill, SIGKILL; hang, no
end; other-rate, a learning rate of its own.
"""

import os
import signal
import sys
import time

from rdtrain import train as loop
from rdtrain.cli import train_main
from rdtrain.objectives import DiffusionBlocks, Loss

argument = next(argument for argument in sys.argv if argument.startswith("fault="))
sys.argv.remove(argument)
kind, fault_step = argument.removeprefix("fault=").split(":")
mine = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
plain_loss, plain_rate = DiffusionBlocks.__call__, loop.learning_rate
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


loop.learning_rate, DiffusionBlocks.__call__ = learning_rate, loss
train_main()
