"""How the ranks that a test starts end."""

import os

import torch.distributed as dist


def leave():
    """Wait until all ranks are here, and end this one at once.

    Taking a process group down may hang: what is left of DistributedDataParallel waits, with
    Python's lock, for a thread of gloo's that wants the lock to forget the last reduction.
    """
    dist.barrier()
    os._exit(0)
