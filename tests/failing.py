"""What goes wrong in a worker: a process that is started imports this by name, which it cannot a file of tests."""

import os

import torch

from sidt.errors import InputError


def sleep_or_fail(what):
    """In a worker: one waits for ever for the other, who says something else."""
    if what == "wait":
        torch.distributed.barrier()
    elif what == "input":
        raise InputError("this cannot be used")
    elif what == "die":
        os._exit(3)
    raise ZeroDivisionError(what)
