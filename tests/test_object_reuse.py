"""The compiler of .ci/run: an object is reused where the same would be compiled, or not at all."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

COMPILER = ROOT / ".ci" / "g++"
pytestmark = pytest.mark.skipif(
    not (COMPILER.exists() and shutil.which("bash") and shutil.which("g++")),
    reason="needs a checkout, bash and g++",
)


class Folder:
    """A source and its header in a folder; objects are kept beside it."""

    def __init__(self, path):
        self.path, self.kept = path, path.parent / "kept"
        self.kept.mkdir(exist_ok=True)
        path.mkdir()
        (path / "x.cpp").write_text('#include "x.h"\nint f() { return VALUE; }\n')
        self.header("#define VALUE 1\n")

    def header(self, text):
        """Write the header."""
        (self.path / "x.h").write_text(text)

    def compile(self, *flags, status=0):
        """Compile; return the object and how many are kept."""
        command = [COMPILER, "-MMD", "-c", self.path / "x.cpp", "-o", self.path / "x.o", *flags]
        given = {**os.environ, "OBJECTS": str(self.kept)}
        done = subprocess.run(command, env=given, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert all(file.suffix == ".o" for file in self.kept.iterdir())
        built = self.path / "x.o"
        return built.read_bytes() if built.exists() else done.stderr, len(list(self.kept.iterdir()))


def test_the_same_text_and_flags_share_an_object(tmp_path):
    one, other = Folder(tmp_path / "one"), Folder(tmp_path / "other")
    built = one.compile("-O1")
    other.header("// the same but for this\n#define VALUE 1\n")
    assert other.compile("-O1", f"-I{tmp_path}") == built == (built[0], 1)
    names = (other.path / "x.d").read_text().replace("\\\n", " ").split()
    assert names == [f"{other.path}/x.o:", f"{other.path}/x.cpp", f"{other.path}/x.h"]


@pytest.mark.parametrize("flags", [("-O2",), ("-O1", "-g"), ("-O1", "-DVALUE=1"), ("-O1", "-fPIC")])
def test_other_flags_are_compiled(tmp_path, flags):
    folder = Folder(tmp_path / "one")
    folder.header("#ifndef VALUE\n#define VALUE 1\n#endif\n")
    folder.compile("-O1")
    assert folder.compile(*flags)[1] == 2


def test_another_header_is_compiled(tmp_path):
    one, other = Folder(tmp_path / "one"), Folder(tmp_path / "other")
    other.header("#define VALUE 2\n")
    assert one.compile()[0] != other.compile()[0]
    assert other.compile()[1] == 2


def test_what_does_not_compile_leaves_nothing(tmp_path):
    folder = Folder(tmp_path / "one")
    for text in ("#define VALUE wrong\n", "#error wrong\n"):
        folder.header(text)
        said, kept = folder.compile(status=1)
        assert "wrong" in said and kept == 0
    (folder.path / "x.h").unlink()
    said, kept = folder.compile(status=1)
    assert "x.h: No such file" in said and kept == 0
