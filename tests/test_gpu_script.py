"""`make gpu`: its steps, what time each may take, and that none stops another."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "scripts/gpu.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "LOGS", tmp_path / "logs")
    return script


def options(**given):
    return Namespace(**{"wheels": None, "quick": False, "only": [], **given})


def main(gpu, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    return gpu.main()


def test_every_bench_is_a_step_of_its_own_between_the_tests(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    steps = gpu.commands(options(wheels=tmp_path))
    stems = sorted(path.stem[6:] for path in (ROOT / "benches").glob("bench_*.py"))
    assert len(stems) > 10
    names = [f"bench {stem}" for stem in stems]
    assert list(steps) == ["wheels", "build", "info", "memory", "kernels", *names, "tests"]
    assert all("--no-index" in step for name, step in steps.items() if name == "wheels")
    for stem, name in zip(stems, names, strict=True):
        assert steps[name][-6:-2] == ["--device", "cuda", "--op", stem]
    assert list(gpu.commands(options(only=["bench"]))) == names
    assert list(gpu.commands(options(only=["build", names[0]]))) == ["build", names[0]]


def test_time_is_shared_and_what_is_left_goes_on(gpu):
    names = ["build", "kernels", "bench a", "bench b", "tests"]
    limits = dict(zip(names, gpu.limits(names, 2_500), strict=True))
    assert limits == {"build": 800, "kernels": 500, "bench a": 450, "bench b": 450, "tests": 300}
    assert gpu.limits(names[1:], 2_490)[0] > limits["kernels"]
    assert gpu.limits(["tests"], 60) == [60]


def test_steps_that_fail_or_hang_stop_no_other(gpu, monkeypatch, capfd):
    def python(program):
        return [sys.executable, "-c", f"import sys, time\n{program}"]

    steps = {
        "build": python("print('broken'); sys.exit(3)"),
        "bench a": python("print('begun', flush=True); time.sleep(60)"),
        "bench b": python("print(sys.argv[1:])"),
        "tests": python("print('last')"),
    }
    monkeypatch.setattr(gpu, "commands", lambda options: steps)
    assert main(gpu, monkeypatch, "--minutes", "0.1") == 1
    table = capfd.readouterr().out.split("last line of")[1].splitlines()[1:]
    assert [line.split("  ")[0] for line in table] == list(steps)
    assert "failed 3" in table[0] and table[0].endswith("broken")
    assert "too long" in table[1] and table[1].endswith("begun")
    assert "ok" in table[2] and "ok" in table[3] and table[3].endswith("last")
    (flag, minutes), log = json.loads(table[2].split("  ")[-1].replace("'", '"')), gpu.LOGS
    assert flag == "--minutes" and 0 < float(minutes) < 0.1
    assert (log / "bench-a.log").read_text() == "begun\n"


def test_an_unknown_step_is_refused(gpu, monkeypatch, capfd):
    with pytest.raises(SystemExit):
        main(gpu, monkeypatch, "--only", "nothing")
    assert "no step nothing" in capfd.readouterr().err
