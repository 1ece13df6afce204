"""The contract, part 4: where things are, what imports what, and what is documented."""

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SUBJECTS, python

import livrec_fast

API = {
    "BackendError",
    "PrefixNgramEmbedding",
    "ResidualKMeans",
    "RoomVotes",
    "code_attention",
    "explain",
    "history_search",
    "history_search_codes",
    "in_batch_contrastive",
    "kmeans_step",
    "majority_vote",
    "pack_codes",
    "prefix_ngram_lookup",
    "residual_kmeans_decode",
    "residual_kmeans_details",
    "residual_kmeans_encode",
    "target_attention",
    "unpack_codes",
}
PACKAGE = ROOT / "livrec_fast"
SECTIONS = ("Args:", "Returns:", "Raises:", "Source:", "Example:")
# stems that another's C++ kernels serve: one tensor for keys and values, several terms, other steps
KERNELS_OF = {
    "target_attention_features": "target_attention",
    "contrastive_multi": "contrastive",
    "prefix_ngram_update": "prefix_ngram_gradient",
}


def test_the_public_names():
    assert API <= set(livrec_fast.__all__)
    assert all(hasattr(livrec_fast, name) for name in livrec_fast.__all__)
    assert sorted(livrec_fast.__all__) == livrec_fast.__all__


def test_every_op_is_public_and_at_home(subject):
    name, stem = subject.op.name, subject.stem
    assert name in livrec_fast.__all__
    assert subject.function.__module__ == f"livrec_fast.ops.{stem}"
    files = [f"livrec_fast/ops/{stem}.py", f"livrec_fast/reference/{stem}.py"]
    files.append(f"tests/test_{stem}.py")
    backends = [backend.name for backend in subject.op.backends]
    home = KERNELS_OF.get(stem, stem)
    if "native" in backends:
        files += [f"csrc/{home}.h", f"csrc/{home}_cpu.cpp"]
    if "triton" in backends:
        files.append(f"kernels/{home}.py")
    if "cuda" in backends:
        files.append(f"csrc/{stem}_cuda.cu")
    missing = [file for file in files if not (ROOT / file).is_file()]
    assert not missing, f"{name} lacks {', '.join(missing)}"


def test_every_op_is_documented(subject):
    text = subject.function.__doc__ or ""
    missing = [word for word in SECTIONS if not re.search(rf"^\s*{word}", text, re.MULTILINE)]
    assert not missing, f"the docstring of {subject.op.name} lacks {', '.join(missing)}"
    assert text.index("Args:") < text.index("Returns:") < text.index("Raises:")
    assert "orkspace" in text, "how many bytes does it need beyond inputs and outputs?"
    for argument in ast.parse(
        Path(sys.modules[subject.function.__module__].__file__).read_text()
    ).body:
        if isinstance(argument, ast.FunctionDef) and argument.name == subject.op.name:
            every = [*argument.args.args, *argument.args.kwonlyargs]
            unnamed = [a.arg for a in every if not re.search(rf"^\s+.*\b{a.arg}\b.*:", text, re.M)]
            assert not unnamed, f"Args: says nothing of {', '.join(unnamed)}"


@pytest.mark.parametrize("name", sorted(API - SUBJECTS.keys()))
def test_other_public_names_are_documented(name):
    assert (getattr(livrec_fast, name).__doc__ or "").strip()


def imported(file, module):
    """Return the absolute names that a file imports, in functions too."""
    found = set()
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            found |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return found


def modules():
    """Return every module of the package, by name, and what it imports."""
    files = {
        ".".join(["livrec_fast", *path.relative_to(PACKAGE).with_suffix("").parts]): path
        for path in PACKAGE.rglob("*.py")
    }
    files |= {f"livrec_fast.kernels.{path.stem}": path for path in (ROOT / "kernels").rglob("*.py")}
    return {
        name.removesuffix(".__init__"): imported(path, name.removesuffix(".__init__"))
        for name, path in files.items()
    }


def within(names, *packages):
    """Return the names that lie in one of the packages."""
    roots = [f"livrec_fast.{package}" for package in packages]
    return {n for n in names if any(n == root or n.startswith(f"{root}.") for root in roots)}


def test_imports_run_one_way():
    found = modules()
    assert len(found) > 20 and any(within(names, "ops") for names in found.values())
    may_import_ops = ("", "ops", "modules", "systems", "interop")
    wrong = []
    for module, names in found.items():
        part = (module.split(".") + [""])[1]
        if part == "reference" and (bad := within(names, "ops", "kernels", "_native", "_dispatch")):
            wrong.append(f"{module} is a reference and imports {bad}")
        shared = {n for n in names if n.startswith("livrec_fast.kernels._")}  # no op's own
        if part == "kernels" and (bad := within(names - shared, "ops", "reference", "kernels")):
            wrong.append(f"{module} is a kernel and imports {bad}")
        if part not in may_import_ops and (bad := within(names, "ops")):
            wrong.append(f"{module} imports {bad}")
    assert not wrong, "\n".join(wrong)


def test_files_are_short():
    files = [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "kernels").rglob("*.py"),
        *(ROOT / "tests").glob("*.py"),
    ]
    long = {
        str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > 300
    }
    assert not long


def test_import_is_light(tmp_path):
    program = (  # without the collection of torch's garbage, which may fall due at any allocation
        "import gc, sys, time, torch; gc.collect(); gc.disable(); "
        "start = time.process_time(); import livrec_fast; "
        "print(time.process_time() - start, torch.cuda.is_initialized(), *sys.modules)"
    )
    taken = []
    for _ in range(5):  # the first one compiles the package to bytecode
        done = python(program, PYTHONPYCACHEPREFIX=str(tmp_path), PYTHONDONTWRITEBYTECODE="")
        assert done.returncode == 0, done.stderr
        seconds, initialized, *loaded = done.stdout.split()
        assert initialized == "False"
        assert not {"triton", "numba", "faiss", "matplotlib", "pyarrow"} & set(loaded)
        taken.append(float(seconds))
    assert min(taken) < 0.1, f"importing livrec_fast adds {1000 * min(taken):.0f} ms to torch's"
