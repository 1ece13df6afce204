"""What is shipped: sdist, wheel and editable install, each built and used outside the checkout.

A copy of the checkout gives the sdist, the sdist gives the wheel and the editable install (one
compilation serves both), and the copy is built once more without a compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import livrec_fast

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = (".*", "build", "dist", "out", "shared", "*.egg-info", "*.so", "__pycache__")
MISSING_TORCH = """\
livrec_fast builds against the torch that you have, and there is none here. Run
    pip install 'torch>=2.11'
    pip install --no-build-isolation .
"""


def run(*command, cwd, status=0, **variables):
    """Run a command with nothing of the checkout on its paths; return what it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LIVREC_", "PYTHON"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**kept, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == status, done.stdout[-4000:]
    return done.stdout


def build(kind, source, folder, **variables):
    """Build an sdist or a wheel with the project's backend; return it and what was printed."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    printed = run(sys.executable, "-c", code, cwd=source, **variables)
    (built,) = folder.iterdir()
    return built, printed


def run_setup(source, before="pass", **variables):
    """Run `setup.py build_ext`, which must fail; return what it printed."""
    code = f"import runpy, sys; {before}; sys.argv[1:] = ['build_ext']; runpy.run_path('setup.py')"
    return run(sys.executable, "-c", code, cwd=source, status=1, **variables)


class Environment:
    """A virtual environment that sees the packages of this one, but not the checkout."""

    def __init__(self, folder: Path):
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.folder, self.python = folder, folder / "bin" / "python"
        (self.site,) = (folder / "lib").glob("python*/site-packages")
        others = [p for p in sys.path if p.endswith(("site-packages", "dist-packages", "/site"))]
        (self.site / "others.pth").write_text("\n".join(others))
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def pip_install(self, *arguments, **variables):
        """Install without dependencies or downloads; return what pip and the build printed."""
        flags = ("install", "--verbose", "--no-index", "--no-deps", "--no-build-isolation")
        return run(self.python, "-m", "pip", *flags, *arguments, cwd=self.elsewhere, **variables)

    def execute(self, code):
        """Run a piece of Python far from the checkout; return what it printed."""
        return run(self.python, "-c", textwrap.dedent(code), cwd=self.elsewhere).strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder outside the checkout."""
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def checkout(folder):
    """Copy the checkout without what was built in it."""
    copy = folder / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    return copy


@pytest.fixture(scope="module")
def sdist(folder, checkout):
    """Build the sdist."""
    return build("sdist", checkout, folder / "sdist")[0]


@pytest.fixture(scope="module")
def unpacked(folder, sdist):
    """Unpack the sdist."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return source


@pytest.fixture(scope="module")
def wheel(folder, unpacked):
    """Build the wheel from the sdist, compiled kernels and all."""
    return build("wheel", unpacked, folder / "wheel", LIVREC_REQUIRE_NATIVE="1")[0]


@pytest.fixture(scope="module")
def installed(folder, wheel):
    """Install the wheel."""
    environment = Environment(folder / "installed")
    environment.pip_install(wheel)
    return environment


@pytest.fixture(scope="module")
def without_compiler(folder, checkout):
    """Build and install where every compilation fails; return the environment and the wheel."""
    built, printed = build("wheel", checkout, folder / "no-compiler", CXX="false")
    assert "compiled kernels were NOT built" in printed
    assert "pip install --no-build-isolation --force-reinstall --no-deps ." in printed
    environment = Environment(folder / "installed-no-compiler")
    environment.pip_install(built)
    return environment, built


def files_of(wheel):
    """Return the names of a wheel's files, those of its metadata left out."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def shipped(source):
    """Return the names that the package's files in a source tree have in a wheel."""
    package = {p.relative_to(source) for p in (source / "livrec_fast").rglob("*") if p.is_file()}
    kernels = {Path("livrec_fast/kernels") / p.name for p in (source / "kernels").glob("*.py")}
    assert kernels
    return {path.as_posix() for path in package | kernels}


def test_sdist_holds_the_sources_and_no_tests(sdist, checkout):
    with tarfile.open(sdist) as archive:
        names = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    for part in ("csrc", "kernels", "livrec_fast"):
        files = {p.relative_to(checkout).as_posix() for p in (checkout / part).glob("**/*.*")}
        assert files <= names, part
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py"} <= names
    assert not {name for name in names if name.startswith(("tests/", "benches/"))}
    assert not {name for name in names if name.endswith((".so", ".o", ".pyc"))}


def test_wheel_holds_the_package_and_nothing_else(wheel, checkout):
    assert wheel.name.startswith("livrec_fast-") and "-cp311-abi3-" in wheel.name
    assert files_of(wheel) == shipped(checkout) | {"livrec_fast/_C.abi3.so"}
    assert "livrec_fast/py.typed" in files_of(wheel)


def test_wheel_metadata_names_what_it_needs(installed):
    (found,) = metadata.distributions(name="livrec-fast", path=[str(installed.site)])
    needs = [need for need in found.requires or [] if "extra ==" not in need]
    assert {need.split(">")[0] for need in needs} == {
        *("torch", "numpy", "safetensors", "click", "rich")
    }
    licence = "License :: OSI Approved :: Apache Software License"
    assert licence in found.metadata.get_all("Classifier")
    assert [file for file in found.files or [] if file.name == "LICENSE"]


def test_installed_wheel_is_used_and_compiled(installed):
    printed = installed.execute("""
        from importlib.util import find_spec
        import livrec_fast
        from livrec_fast import _native
        print(livrec_fast.__file__, find_spec("livrec_fast.kernels.residual_kmeans").origin)
        print(_native.MISSING, _native.isa())
    """)
    package, kernel, missing, isa = printed.split()
    assert Path(package) == installed.site / "livrec_fast" / "__init__.py"
    assert Path(kernel) == installed.site / "livrec_fast" / "kernels" / "residual_kmeans.py"
    assert missing == "None" and re.fullmatch("baseline|avx2|avx512(_vnni|_bf16)?|amx", isa)


def test_installed_commands_answer(installed):
    script = installed.folder / "bin" / "livrec-fast"
    printed = run(script, "--version", cwd=installed.elsewhere)
    assert printed.split()[-1] == livrec_fast.__version__
    module = (installed.python, "-m", "livrec_fast")
    assert run(*module, "--version", cwd=installed.elsewhere) == printed


def test_installed_wheel_passes_tests_outside_the_checkout(installed, folder):
    outside = folder / "outside"
    shutil.copytree(ROOT / "tests", outside / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", outside)
    (outside / "tests" / "test_place.py").write_text(
        "import sys, livrec_fast\n"
        "def test_place():\n    assert livrec_fast.__file__.startswith(sys.prefix)\n"
    )
    chosen = ("tests/test_place.py", "tests/test_pack_codes.py", "tests/test_contract.py")
    names = "place or pack or (residual_kmeans and not interpreter)"
    pytest_run = (installed.python, "-m", "pytest", "-p", "no:cacheprovider", "-k", names)
    printed = run(*pytest_run, *chosen, cwd=outside)
    assert "passed" in printed and "failed" not in printed


def test_editable_install_leads_to_the_sources(folder, unpacked, wheel):
    environment = Environment(folder / "editable")
    environment.pip_install("--editable", unpacked, LIVREC_REQUIRE_NATIVE="1")
    printed = environment.execute("""
        import sys
        from importlib.util import find_spec
        import livrec_fast
        from livrec_fast import _native
        print(livrec_fast.__file__, find_spec("livrec_fast.kernels.residual_kmeans").origin)
        print(_native.MISSING, "triton" in sys.modules)
    """)
    package, kernel, missing, triton = printed.split()
    assert Path(package) == unpacked / "livrec_fast" / "__init__.py"
    assert Path(kernel) == unpacked / "kernels" / "residual_kmeans.py"
    assert (missing, triton) == ("None", "False")
    assert (environment.folder / "bin" / "livrec-fast").exists()


def test_without_a_compiler_the_wheel_is_pure(without_compiler, wheel):
    _, pure = without_compiler
    assert pure.name.endswith("-py3-none-any.whl")
    assert files_of(pure) == files_of(wheel) - {"livrec_fast/_C.abi3.so"}


def test_without_a_compiler_ops_warn_once_and_compute_by_the_reference(without_compiler):
    environment, _ = without_compiler
    printed = environment.execute("""
        import warnings
        import torch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import livrec_fast
            from livrec_fast.reference.residual_kmeans import residual_kmeans_encode as reference
            assert not [w for w in caught if "livrec" in str(w.message)], "importing warned"
            x = torch.randn(100, 8)
            books = [torch.randn(16, 8), torch.randn(300, 8)]
            for _ in range(3):
                codes = livrec_fast.residual_kmeans_encode(x, books)
        assert torch.equal(codes, reference(x, books)) and codes.any()
        (message,) = [str(w.message) for w in caught if "livrec" in str(w.message)]
        print(message)
        try:
            livrec_fast.residual_kmeans_encode(x, books, backend="native")
        except livrec_fast.BackendError as error:
            print(error)
    """)
    warned, *refused = printed.splitlines()
    assert "computes by its reference" in warned and "was not built" in warned
    assert "pip install --no-build-isolation --force-reinstall --no-deps livrec-fast" in warned
    assert any(line.split()[0] == "native" and "was not built" in line for line in refused)


def test_a_failed_build_is_an_error_where_native_is_required(checkout):
    printed = run_setup(checkout, CXX="false", LIVREC_REQUIRE_NATIVE="1")
    assert "NOT built" not in printed and "['false', '--version']" in printed


def test_a_build_without_torch_says_how_to_get_there(checkout):
    assert run_setup(checkout, "sys.modules['torch'] = None") == MISSING_TORCH


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_demanding_cuda_of_a_cpu_torch_says_what_is_missing(checkout):
    assert "needs a torch built with CUDA" in run_setup(checkout, LIVREC_CUDA="1")
