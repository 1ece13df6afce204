"""Builds, tests and times livrec_fast on a GPU machine, unattended: what `make gpu` runs.

Every step runs whatever became of the ones before it; a table of the outcomes comes last, and the
exit status is 1 if any of them failed. Nothing is downloaded: the benchmarks' peers that the
interpreter lacks are among the wheels of the folder, or absent from the results. On a machine with
an index, `pip download --no-deps --dest folder -r requirements/peers.txt` fills the folder.

All of it takes --minutes at most, 25 if nothing is said. Each step may take its share of what is
left, and is ended after that; what it leaves over goes to the steps that follow. Each file of
benches/ is a step of its own, whose results are written case by case. Where compute-sanitizer is
on PATH, it watches small runs of the kernels. Tests that need kernels on the GPU come before the
benchmarks, all others after them.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "site"
LOGS = ROOT / "out" / "gpu"
SHARES = {"wheels": 1, "build": 8, "info": 1, "memory": 2, "kernels": 5, "bench": 9, "tests": 3}
ON_GPU = "(triton or cuda or gpu) and not interpreter and not gates"  # of tests, by name
TIMED = 0.8  # of a benchmark's time, after which no case is begun


def stems() -> list[str]:
    """Return what names the files of the benchmarks."""
    return sorted(
        path.stem.removeprefix("bench_") for path in (ROOT / "benches").glob("bench_*.py")
    )


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the steps in order, each as a command; benchmarks are told their time later."""
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
    tests = [*python, "-m", "pytest", "--color=no", "--continue-on-collection-errors", *workers()]
    steps["kernels"] = [*tests, "-k", ON_GPU, "-m", "not slow"]
    chosen = ["--quick"] if options.quick else ["--budget", "2"]
    for stem in stems():
        bench = [*python, "-m", "livrec_fast", "bench", "--device", "cuda", "--op", stem]
        steps[f"bench {stem}"] = [*bench, *chosen]
    steps["tests"] = [*tests, "-k", f"not ({ON_GPU})", "-m", "not slow"]
    wanted = set(options.only)
    return {
        name: step
        for name, step in steps.items()
        if not wanted or wanted & {name, name.partition(" ")[0]}
    }


def workers() -> list[str]:
    """Return pytest's arguments for several processes, where it has the plugin."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2))), "--dist", "loadgroup"]


def limits(names: Sequence[str], seconds: float) -> list[float]:
    """Divide seconds among steps by their shares, that of benchmarks among all of them."""
    benches = sum(name.startswith("bench ") for name in names)
    shares = [
        SHARES["bench"] / benches if name.startswith("bench ") else SHARES[name] for name in names
    ]
    return [seconds * share / sum(shares) for share in shares]


def run(name: str, command: list[str], limit: float) -> tuple[str, float, str]:
    """Run one step, to the screen and into its log; return its outcome, seconds and last line."""
    print(f"\n=== {name}, {limit:.0f} s at most: {' '.join(command)}", flush=True)
    begin, last = time.monotonic(), ""
    with (LOGS / f"{name.replace(' ', '-')}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        end = threading.Timer(limit, stop, (process,))
        end.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                log.flush()
                last = line.strip() or last
            status = process.wait()
        finally:
            end.cancel()
            if process.poll() is None:  # this script itself was interrupted
                stop(process)
    seconds = time.monotonic() - begin
    ended = status == -signal.SIGKILL and seconds >= limit
    return "ok" if status == 0 else "too long" if ended else f"failed {status}", seconds, last


def stop(process: subprocess.Popen) -> None:
    """End a step and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def environment() -> dict[str, str]:
    """Return the environment of the steps: the checkout and the wheels on PYTHONPATH."""
    given = os.environ.get("PYTHONPATH", "")
    paths = [str(ROOT), str(SITE), *filter(None, given.split(os.pathsep))]
    fixed = {"LIVREC_REQUIRE_NATIVE": "1", "MPLBACKEND": "Agg"}
    fixed["PYTHONHASHSEED"] = "0"  # pytest's workers must find the same tests in the same order
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **fixed}


def main() -> int:
    """Run the steps and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="install the wheels of this folder first")
    parser.add_argument("--quick", action="store_true", help="time a tenth of the rows")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all steps (25)")
    only = f"this step alone; repeatable: {', '.join(SHARES)}, or 'bench STEM'"
    parser.add_argument("--only", action="append", default=[], help=only)
    options = parser.parse_args()
    steps = commands(options)
    if not steps:
        parser.error(f"--only: no step {' or '.join(options.only)}")
    LOGS.mkdir(parents=True, exist_ok=True)
    end, names, outcomes = time.monotonic() + 60 * options.minutes, list(steps), {}
    for at, name in enumerate(names):
        limit = limits(names[at:], max(0.0, end - time.monotonic()))[0]
        timed = ["--minutes", f"{TIMED * limit / 60:.3f}"] if name.startswith("bench ") else []
        outcomes[name] = run(name, [*steps[name], *timed], limit)
    width = max(map(len, names)) + 2
    print(f"\n{'step':<{width}}{'outcome':<10}{'seconds':>8}  last line of out/gpu/<step>.log")
    for name, (outcome, seconds, last) in outcomes.items():
        print(f"{name:<{width}}{outcome:<10}{seconds:>8.1f}  {last[:100]}")
    return int(any(outcome != "ok" for outcome, _, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
