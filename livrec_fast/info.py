"""`livrec-fast info`: what is built, for which processors, what is missing and how to mend it."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch

from . import _native

OPTIONAL = {  # module: distribution
    "numba": "numba",
    "faiss": "faiss-cpu",
    "pyarrow": "pyarrow",
    "matplotlib": "matplotlib",
    "tokenizers": "tokenizers",
    "pytest_benchmark": "pytest-benchmark",
}


def info() -> dict[str, Any]:
    """Describe this machine, the build, and what each op can run on here.

    Returns:
        A dict that json.dumps takes: versions, device, native, cuda, ops, optional, environment.

    Example:
        >>> info()["native"]["isa"]["in use"]
        'avx2'

    """
    return {
        "versions": _versions(),
        "device": _device(),
        "native": {
            "present": _native.MISSING is None,
            "missing": _native.MISSING,
            "isa": {
                "built": list(_native.isa_built()),
                "usable": list(_native.isa_levels()),
                "in use": _native.isa(),
            },
        },
        "cuda": _cuda(),
        "ops": _ops(),
        "optional": {module: _optional(module) for module in OPTIONAL},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("LIVREC_")},
    }


def _versions() -> dict[str, str | None]:
    from . import __version__

    return {
        "livrec_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": version_of("triton"),  # importing it would take a second
    }


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
    }


def cpu_name(listing: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, with family and model where it tells no kinds apart.

    Virtual machines give names like "AMD EPYC" to processors of several generations.
    """
    facts: dict[str, str] = {}
    for line in listing.read_text().splitlines() if listing.exists() else []:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    kind = [f"{fact} {facts[fact]}" for fact in ("cpu family", "model") if fact in facts]
    return name if any(map(str.isdigit, name)) else ", ".join([name, *kind])


def _cuda() -> dict[str, Any]:
    if _native._C is not None and _native.WITH_CUDA:
        return {"built": True, "archs": _native._C.cuda_archs().split("+"), "missing": None}
    if torch.version.cuda is None:
        missing = (
            "this torch has no CUDA (to mend: pip install a CUDA build of torch, then rebuild)"
        )
    else:
        missing = f"not built (needs nvcc; to mend: LIVREC_CUDA=1 {_native.MEND})"
    return {"built": False, "archs": [], "missing": missing}


def _ops() -> dict[str, dict[str, str | None]]:
    """Ask every backend what speaks against the op's typical float32 inputs on the best device."""
    from .testing.subjects import inputs_for, subjects

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for name, subject in subjects().items():
        inputs = inputs_for(subject.oracle, "typical", device=device)
        found[name] = subject.op.reasons(*subject.arguments(inputs))
    return found


def _optional(module: str) -> dict[str, str | None]:
    present = find_spec(module) is not None
    command = None if present else f"pip install {OPTIONAL[module]}"
    return {"version": version_of(OPTIONAL[module]) if present else None, "to install": command}


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def table(*columns: str) -> Table:
        return Table(*columns, box=None, pad_edge=False, show_header=len(columns) > 2)

    general = table("", "")
    general.add_row("versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
    device = found["device"]
    general.add_row("cpu", f"{device['cpu']}, {device['cores']} cores, {device['threads']} threads")
    general.add_row("gpus", ", ".join(device["gpus"]) or "none")
    isa = found["native"]["isa"]
    levels = (
        f"built for {', '.join(isa['built'])}; uses {isa['in use']} of {', '.join(isa['usable'])}"
    )
    general.add_row("compiled library", found["native"]["missing"] or levels)
    cuda = found["cuda"]
    general.add_row("CUDA kernels", cuda["missing"] or f"built for {', '.join(cuda['archs'])}")
    given = ", ".join(f"{k}={v}" for k, v in found["environment"].items())
    general.add_row("environment", given or "no LIVREC_ variable is set")
    ops = table("op", "backend", "here")
    for name, reasons in found["ops"].items():
        for at, (backend, reason) in enumerate(reasons.items()):
            ops.add_row("" if at else name, backend, reason or "runs")
    optional = table("optional package", "version", "to install")
    for module, state in found["optional"].items():
        version = state["version"] or ("unknown" if state["to install"] is None else "missing")
        optional.add_row(module, version, state["to install"] or "")
    console = Console(markup=False)
    for part in (general, ops, optional):
        console.print(part, "")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(as_json: bool) -> None:
    """Show what is built, for which processors, what is missing and how to mend it."""
    found = info()
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _print(found)
