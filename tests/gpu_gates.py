"""What compilers say of the GPU kernels, asked without a GPU: spills, memory, instructions."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a block may have
# mma, or wgmma from sm_90 on, of 16-bit floats or TF32: in what Triton gives ptxas, and on the chip
MATRIX_INSTRUCTION = r"\b(?:wgmma\.mma_async|mma)\.sync\S*\.(?:f16|bf16|tf32)\b"
MATRIX_INSTRUCTION_OF_CHIP = r"\bHG?MMA\b"


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one chip. local: bytes of local memory per thread, where spills go."""

    name: str
    label: str
    arch: int
    matrix: bool
    local: int
    shared: int
    registers: int
    ptx: str
    cubin: bytes

    @property
    def sass(self) -> str:
        """Disassemble it, which takes as long as half a compilation."""
        return dump(self.cubin)


def triton_modules() -> list[str]:
    """Return the names of the modules in kernels/, but for the functions they share."""
    return sorted(
        path.stem
        for path in (ROOT / "kernels").glob("*.py")
        if path.stem[0] != "_" or "def compile_configs" in path.read_text()
    )


def cuda_sources() -> list[Path]:
    """Return the CUDA sources."""
    return sorted((ROOT / "csrc").glob("*.cu"))


def cuda_glue() -> list[Path]:
    """Return what registers the CUDA kernels with torch."""
    return sorted((ROOT / "csrc").glob("*_torch_cuda.cpp"))


def load(module: str) -> Any:
    """Import a module of kernels/."""
    return importlib.import_module(f"livrec_fast.kernels.{module}")


def launched_kernels(module: Any) -> set[str]:
    """Return the names of the jitted functions of a module that no other one calls."""
    from triton.runtime import JITFunction

    own = {
        value.__name__: value.src
        for value in map(plain, vars(module).values())
        if isinstance(value, JITFunction) and value.__module__ == module.__name__
    }
    return {
        name
        for name in own
        if not any(re.search(rf"\b{name}\(", src) for other, src in own.items() if other != name)
    }


def compile_module(name: str) -> Iterator[Compiled]:
    """Compile what a module's `compile_configs()` yields.

    All that is for sm_90, and for sm_80 only what it may lack room for: what is for old chips, and
    of each kernel, and each type of rows on tensor cores, what takes most shared memory on sm_90,
    and what most registers.
    """
    most: dict[tuple[Any, ...], tuple[int, Any]] = {}
    for config in load(name).compile_configs():
        kernel, types, _, options = config
        if options.get("newest", 90) < 90:
            yield compile_triton(*config, 80)
            continue
        built = compile_triton(*config, 90)
        yield built
        if options.get("oldest", 80) <= 80:
            group = plain(kernel).__name__, options["matrix"] and frozenset(types.values())
            for what in ("shared", "registers"):
                entry = getattr(built, what), config
                most[group, what] = max(most.get((group, what), entry), entry, key=lambda e: e[0])
    for config in {id(config): config for _, config in most.values()}.values():
        yield compile_triton(*config, 80)


def compile_triton(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    arch: int,
) -> Compiled:
    """Compile one launch configuration, as a module's `compile_configs()` yields it.

    types and constants may name more arguments than the kernel has; ":16" after a type says that
    the argument is divisible by 16, as Triton finds out itself at a launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = plain(kernel)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n].split(":")[0] for n in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in constants.items() if n in names},
        attrs={
            (at,): [["tt.divisibility", 16]]
            for at, n in enumerate(names)
            if n not in constants and types[n].endswith(":16")
        },
    )
    own = {name: v for name, v in options.items() if name not in ("matrix", "oldest", "newest")}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=own)
    label = f"{kernel.__name__}({types}, {constants}, {own}) on sm_{arch}"
    ptx, cubin = built.asm["ptx"], built.asm["cubin"]
    told = dump(cubin, "-res-usage")
    used = _total(r"(?:STACK|LOCAL):(\d+)", told), built.metadata.shared, _total(r"REG:(\d+)", told)
    return Compiled(kernel.__name__, label, arch, options["matrix"], *used, ptx, cubin)


def compile_cuda(source: Path, arch: str, folder: Path) -> tuple[str, bytes]:
    """Compile a CUDA source; return what ptxas says of it, and the cubin."""
    output = folder / f"{source.stem}.{arch}.cubin"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", f"-I{source.parent}"]
    ran = subprocess.run(
        ["nvcc", target, *flags, str(source), "-o", str(output)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stderr, output.read_bytes()


def spilled_bytes(ptxas_log: str) -> Iterator[tuple[str, int]]:
    """Yield each kernel in ptxas's words, and the bytes that it spills or has on a stack."""
    kernel = ""
    for line in ptxas_log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = found[1]
        if found := re.search(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) .* loads", line):
            yield kernel, sum(map(int, found.groups()))


def instructions(cubin: bytes) -> dict[str, str]:
    """Return each kernel's instructions by its name."""
    _, *kernels = dump(cubin).split("Function : ")
    return {told.split()[0]: told for told in kernels}


def plain(kernel: Any) -> Any:
    """Return the jitted function inside an autotuner or a heuristic."""
    from triton.runtime import JITFunction

    while not isinstance(kernel, JITFunction) and type(kernel).__module__.startswith("triton."):
        if not hasattr(kernel, "fn"):
            break
        kernel = kernel.fn
    return kernel


@cache
def _cuobjdump() -> str:
    import triton.backends.nvidia as nvidia

    shipped = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    found = str(shipped) if shipped.exists() else shutil.which("cuobjdump")
    assert found, "cuobjdump comes with Triton, and is not there"
    return found


def dump(cubin: bytes, what: str = "-sass") -> str:
    """Return what cuobjdump tells of a kernel: what it uses, or its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _total(pattern: str, told: str) -> int:
    used = re.findall(pattern, told)
    assert used, "cuobjdump -res-usage told nothing"
    return sum(map(int, used))
