"""Gates that need no GPU: GPU kernels fit the chips they are for, CPU objects their levels."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import gpu_gates as gates
import pytest
from torch.utils import cpp_extension

from livrec_fast.testing.subjects import USED_BY

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton is not installed, or TRITON_INTERPRET=1 has replaced its compiler",
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
needs_binutils = pytest.mark.skipif(
    not all(map(shutil.which, ("g++", "nm", "objdump"))) or platform.machine() != "x86_64",
    reason="needs g++, nm and objdump on x86-64, where there are instruction-set levels",
)


@needs_triton
@pytest.mark.parametrize("name", gates.triton_modules())
def test_module_offers_every_kernel_to_the_gate(name):
    module = gates.load(name)
    assert hasattr(module, "compile_configs"), f"kernels/{name}.py has no compile_configs()"
    offered = {gates.plain(kernel).__name__ for kernel, *_ in module.compile_configs()}
    assert gates.launched_kernels(module) == offered


@needs_triton
@pytest.mark.parametrize("name", gates.triton_modules())
def test_triton_kernels_fit(name):
    """Of each kernel and chip one is disassembled: ptxas has one instruction for what PTX asks."""
    disassembled = set()
    for built in gates.compile_module(name):
        assert built.local == 0, f"{built.label}: spills, or indexes registers: {built.local} bytes"
        limit = gates.SHARED_LIMIT[built.arch]
        assert built.shared <= limit, f"{built.label}: {built.shared} bytes shared"
        if built.matrix:
            found = re.search(gates.MATRIX_INSTRUCTION, built.ptx)
            assert found, f"{built.label}: no matrix instruction"
            if (built.name, built.arch) not in disassembled:
                disassembled.add((built.name, built.arch))
                assert re.search(gates.MATRIX_INSTRUCTION_OF_CHIP, built.sass), built.label


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("source", gates.cuda_sources(), ids=lambda path: path.stem)
def test_cuda_kernels_do_not_spill(source, arch, tmp_path):
    """Nor loop around an atomic; and those of code attention read rows of logits in 128 bits."""
    log, cubin = gates.compile_cuda(source, arch, tmp_path)
    spilled = dict(gates.spilled_bytes(log))
    assert spilled, "ptxas told of no kernel"
    assert not any(spilled.values()), spilled
    if find_spec("triton") is None:
        return  # which brings the disassembler
    found = gates.instructions(cubin)
    assert len(found) >= len(spilled)
    for name, sass in found.items():
        assert not re.search(r"\bATOM\S*CAS", sass), f"{name}: compares and swaps"
        if re.search("attend|measure|spread", name):
            assert len(re.findall(r"\bLDS\.128", sass)) >= 8 and "STS.128" in sass, name
            assert not re.search(r"\b(ATOM|RED)\S*", sass), f"{name}: atomics"


@needs_nvcc
@pytest.mark.parametrize("source", gates.cuda_glue(), ids=lambda path: path.stem)
def test_cuda_glue_compiles(source, tmp_path):
    """It is built only with a CUDA torch; its headers come with every torch."""
    headers = [f"-I{path}" for path in [*cpp_extension.include_paths(), source.parent]]
    flags = ["-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", *headers]
    command = ["nvcc", "-c", str(source), "-o", str(tmp_path / "glue.o"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def cpu_objects(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Compile every CPU kernel for every level with the flags of setup.py; key: (op, level)."""
    folder = tmp_path_factory.mktemp("objects")
    with mock.patch("setuptools.setup"):
        setup = runpy.run_path(str(gates.ROOT / "setup.py"))
    compiler = os.environ.get("CXX", "g++").split()
    objects, commands = {}, []
    for level, level_flags in setup["ISA_FLAGS"].items():
        for source in setup["sources_of"](level):
            output = folder / f"{source.stem}.{level}.o"
            objects[source.stem.removesuffix("_cpu"), level] = output
            flags = [*setup["OBJECT_FLAGS"], f"-DLIVREC_ISA={level}", *level_flags]
            commands.append([*compiler, "-c", str(source), "-o", str(output), *flags])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    return objects


@needs_binutils
@pytest.mark.xdist_group("cpu_objects")
def test_cpu_objects_have_no_weak_symbols(cpu_objects):
    """The linker keeps one copy of a weak symbol for all levels, and it may be that of AVX-512."""
    for key, path in cpu_objects.items():
        table = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
        assert " T " in table, key
        assert not re.findall(r"^\S* ?[VvWwu] .*", table, re.MULTILINE), key


@needs_binutils
@pytest.mark.xdist_group("cpu_objects")
def test_cpu_objects_use_their_own_instruction_set(cpu_objects):
    for (op, level), path in cpu_objects.items():
        command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if level in ("baseline", "avx2", "amx_emulated"):
            assert "%zmm" not in code, (op, level)
        if level in ("baseline", "amx_emulated"):
            assert "%ymm" not in code, (op, level)
        source = (gates.ROOT / "csrc" / f"{op}_cpu.cpp").read_text()
        register = {"avx512": "zmm", "avx2": "ymm"}.get(level)
        if register and "__AVX512F__" in source:  # the source has a path of its own for each level
            assert re.search(rf"vfn?m(add|sub)\d+ps.*%{register}", code), (op, level)
        if level == "avx512_vnni" and "__AVX512VNNI__" in source:
            assert re.search(r"vpdpbusd.*%zmm", code), (op, level)
        if level == "avx512_bf16":
            assert re.search(r"vdpbf16ps.*%zmm", code), (op, level)
        assert ("tdpbf16ps" in code) == (level == "amx"), (op, level)
        assert level == "amx" or not re.search(r"%tmm|ldtilecfg|tilerelease", code), (op, level)


def test_levels_are_used_by_whom_the_contract_asks():
    used = {"avx512_vnni": {"codebook"}, "avx512_bf16": {"pairs"}}
    used["amx"] = {"contrastive", "matrix"}  # matrix_tiles.h is contrastive_tiles.h's alone
    macros = {level: f"__{level.replace('_', '').upper()}__" for level in used}
    macros["amx"] = "__AMX_BF16__"
    assert USED_BY.keys() == used.keys()
    for level, stems in used.items():
        files = [f for f in (gates.ROOT / "csrc").iterdir() if macros[level] in f.read_text()]
        assert {f.stem.split("_")[0] for f in files} == stems, level
    users = [f for f in (gates.ROOT / "csrc").iterdir() if '#include "pairs.h"' in f.read_text()]
    assert {f.name for f in users} == {"contrastive_tiles.h", "attention_pairs.h"}
