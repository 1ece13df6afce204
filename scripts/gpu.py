"""Builds, tests and times livrec_fast on a GPU machine, unattended: what `make gpu` runs.

Every step runs whatever became of the ones before it; a table of the outcomes comes last, and the
exit status is 1 if any of them failed. Nothing is downloaded: the benchmarks' peers that the
interpreter lacks are among the wheels of the folder, or absent from the results. On a machine with
an index, `pip download --no-deps --dest folder -r requirements/peers.txt` fills the folder.

A step that runs past its limit is ended and has failed. Where compute-sanitizer is on PATH, it
watches small runs of the kernels before the tests.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "site"
LOGS = ROOT / "out" / "gpu"
LIMITS = {"wheels": 600, "build": 1800, "info": 300, "memory": 1200, "tests": 7200, "bench": 7200}


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the steps in order, each as a command."""
    python = [sys.executable, "-u"]
    steps = {}
    if options.wheels:
        wheels = map(str, sorted(options.wheels.glob("*.whl")))
        flags = ("--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(SITE))
        steps["wheels"] = [*python, "-m", "pip", "install", *flags, *wheels]
    steps["build"] = [*python, "setup.py", "--quiet", "build_ext", "--inplace"]
    steps["info"] = [*python, "-m", "livrec_fast", "info"]
    if sanitizer := shutil.which("compute-sanitizer"):
        flags = ("--error-exitcode", "1", "--target-processes", "application-only")
        own = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")  # each tensor has bounds of its own
        steps["memory"] = [*own, sanitizer, *flags, *python, "scripts/small_kernels.py"]
    steps["tests"] = [*python, "-m", "pytest", "--color=no", "--continue-on-collection-errors"]
    quick = ["--quick"] if options.quick else []
    steps["bench"] = [*python, "-m", "livrec_fast", "bench", *quick]
    return {name: step for name, step in steps.items() if name in options.only or not options.only}


def run(name: str, command: list[str]) -> tuple[int, float, str]:
    """Run one step, to the screen and into its log; return its status, seconds and last line."""
    print(f"\n=== {name}: {' '.join(command)}", flush=True)
    begin, last = time.monotonic(), ""
    with (LOGS / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        end = threading.Timer(LIMITS[name], os.killpg, (process.pid, signal.SIGKILL))
        end.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                last = line.strip() or last
            status = process.wait()
        finally:
            end.cancel()
            if process.poll() is None:  # this script itself was interrupted
                os.killpg(process.pid, signal.SIGKILL)
    return status, time.monotonic() - begin, last


def environment() -> dict[str, str]:
    """Return the environment of the steps: the checkout and the wheels on PYTHONPATH."""
    given = os.environ.get("PYTHONPATH", "")
    paths = [str(ROOT), str(SITE), *filter(None, given.split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LIVREC_REQUIRE_NATIVE": "1"}


def main() -> int:
    """Run the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, help="install the wheels of this folder first")
    parser.add_argument("--quick", action="store_true", help="time a tenth of the rows")
    parser.add_argument("--only", action="append", default=[], help="this step alone; repeatable")
    options = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    outcomes = {name: run(name, command) for name, command in commands(options).items()}
    print(f"\n{'step':<8}{'outcome':<10}{'seconds':>8}  last line of out/gpu/<step>.log")
    for name, (status, seconds, last) in outcomes.items():
        ended = status == -signal.SIGKILL and seconds >= LIMITS[name]
        outcome = "ok" if status == 0 else "too long" if ended else f"failed {status}"
        print(f"{name:<8}{outcome:<10}{seconds:>8.1f}  {last[:100]}")
    return int(any(status for status, _, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
