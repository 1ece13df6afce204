"""`livrec-fast info`: what it says, with the compiled library and without it."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, python

from livrec_fast import _native
from livrec_fast._dispatch import OPS
from livrec_fast.cli import main
from livrec_fast.info import cpu_name, info


@pytest.fixture(scope="module")
def found():
    return info()


@pytest.fixture(scope="module")
def without_library(tmp_path_factory):
    """Copy the package, but for the compiled library, as an install without a compiler has it."""
    path = tmp_path_factory.mktemp("installed")
    skipped = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "livrec_fast", path / "livrec_fast", ignore=skipped)
    shutil.copytree(ROOT / "kernels", path / "kernels", ignore=skipped)
    return path


def test_versions_and_device(found):
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["livrec_fast"] == __import__("livrec_fast").__version__
    assert found["device"]["threads"] == torch.get_num_threads()
    assert found["device"]["cpu"] and found["device"]["cores"] >= 1
    assert len(found["device"]["gpus"]) == torch.cuda.device_count()


@pytest.mark.parametrize(
    "given, name",
    [
        ("AMD EPYC", "AMD EPYC, cpu family 25, model 17"),
        ("AMD EPYC 9654 96-Core Processor", "AMD EPYC 9654 96-Core Processor"),
    ],
)
def test_generations_of_one_name_are_told_apart(given, name, tmp_path):
    listing = tmp_path / "cpuinfo"
    cpu = f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {given}\n"
    listing.write_text(cpu + "\n" + cpu.replace("17", "18"))
    assert cpu_name(listing) == name


def test_native(found):
    native = found["native"]
    assert native["present"] == (native["missing"] is None) == (_native._C is not None)
    if native["present"]:
        assert native["isa"]["in use"] in native["isa"]["usable"]
        assert set(native["isa"]["usable"]) <= set(native["isa"]["built"])


def test_cuda(found):
    cuda = found["cuda"]
    assert cuda["built"] == bool(cuda["archs"]) == (cuda["missing"] is None)
    assert cuda["built"] or "to mend: " in cuda["missing"]


def test_every_op_and_backend(found):
    assert found["ops"].keys() == OPS.keys()
    for name, op in OPS.items():
        reasons = found["ops"][name]
        assert list(reasons) == [backend.name for backend in op.backends]
        assert reasons["reference"] is None
        if "triton" in reasons and not torch.cuda.is_available():
            assert "CUDA" in reasons["triton"]


def test_optional_packages(found):
    assert found["optional"].keys() >= {"numba", "faiss", "pyarrow", "matplotlib", "tokenizers"}
    for state in found["optional"].values():
        assert (state["version"] is None) == (state["to install"] is not None)


def test_json():
    done = CliRunner().invoke(main, ["info", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["ops"].keys() == OPS.keys()


def test_table():
    done = CliRunner().invoke(main, ["info"])
    assert done.exit_code == 0, done.output
    for word in ("torch", "compiled library", "CUDA kernels", *OPS, "faiss"):
        assert word in done.output


def test_absent_packages_and_variables_in_force():
    program = (
        "import sys; sys.modules['faiss'] = None; import livrec_fast.info as i, json; "
        "i.find_spec = lambda name: None; print(json.dumps(i.info()))"
    )
    done = python(program, LIVREC_BACKEND="reference")
    found = json.loads(done.stdout)
    assert found["optional"]["faiss"] == {"version": None, "to install": "pip install faiss-cpu"}
    assert found["environment"] == {"LIVREC_BACKEND": "reference"}


def test_without_the_library_info_says_how_to_mend_it(without_library):
    done = python("-m", "livrec_fast", "info", "--json", path=without_library, cwd=without_library)
    found = json.loads(done.stdout)
    assert not found["native"]["present"]
    assert _native.MEND in found["native"]["missing"]
    assert found["native"]["isa"] == {"built": [], "usable": [], "in use": None}
    for reasons in found["ops"].values():
        assert "not built" in reasons.get("native", "not built")


def test_without_the_library_ops_compute_and_warn_once(without_library):
    program = """
import torch, warnings, livrec_fast
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    books = [torch.tensor([[0.0, 0.0], [4.0, 4.0]])]
    for _ in range(3):
        codes = livrec_fast.residual_kmeans_encode(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), books)
        decoded = livrec_fast.residual_kmeans_decode(codes, books)
    livrec_fast.residual_kmeans_encode(decoded, books, backend="reference")
assert codes.tolist() == [[1], [0]] and decoded.tolist() == [[4, 4], [0, 0]]
print(len(caught), caught[0].message, caught[0].filename)
"""
    done = python(program, path=without_library, cwd=without_library)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 livrec_fast computes by its reference: ")
    assert "compiler" in done.stdout and _native.MEND in done.stdout
    assert done.stdout.split()[-1] == "<string>", "the warning points at the caller"
