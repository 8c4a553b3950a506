"""One process of a training run, for `deepspeed launch/train.py --config FILE`, `torchrun launch/train.py ...` or plain `python`."""

from rdtrain.cli import train_main

train_main()
