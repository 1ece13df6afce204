"""Files that are replaced whole or not at all."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from livrec_fast._files import replacing

ROOT = Path(__file__).parent.parent


def test_replacing_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_replacing_by_name_where_files_need_one(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    test_replacing_keeps_the_old_file_when_it_fails(tmp_path)


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files have names here from the start")
def test_replacing_leaves_nothing_when_killed(tmp_path):
    code = """
        import sys, time
        from livrec_fast._files import replacing
        with replacing(sys.argv[1]) as file:
            file.write(b"half" * 10_000_000)
            print("writing", flush=True)
            time.sleep(60)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "file")]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=variables) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []
