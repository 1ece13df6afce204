"""Runs pieces of Python where Triton's kernels are interpreted: imports once, forks for each piece.

A line of stdin is a JSON list: the piece, and the files that its stdout and stderr go to. The
answer is its exit status, negative for a signal.
"""

import json
import os
import sys
import traceback


def run(piece: str, *files: str) -> None:
    """Run a piece as this process's last."""
    status = 1
    try:
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        exec(piece, {})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Import what takes long, then answer until stdin ends."""
    import interpreter  # noqa: F401 - before any kernel
    import torch

    import livrec_fast.testing  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(*json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


if __name__ == "__main__":
    serve()
