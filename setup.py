"""Builds livrec_fast: `pip install --no-build-isolation .` with torch already installed.

The package installs without a compiler, too: it then computes by its reference and says so.
Environment: CXX picks the compiler, MAX_JOBS how many run at once, LIVREC_REQUIRE_NATIVE=1 makes a
failed build an error, LIVREC_CUDA=0|1 leaves out or demands the CUDA part, TORCH_CUDA_ARCH_LIST
picks its targets.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
TARGET = "0x020b000000000000"  # torch 2.11: the oldest torch that one build serves
CUDA_ARCHS = "8.0+PTX;9.0a"  # PTX of 8.0 runs on whatever comes later, PTX of 9.0a on nothing else
AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
]
AVX512_BF16 = [*AVX512, "-mavx512vnni", "-mavx512bf16"]
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx512_bf16": AVX512_BF16,
    "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
    "amx_emulated": ["-DLIVREC_EMULATED_TILES"],
}
CPU_KERNELS = {  # of the levels that only some have kernels of their own for; see csrc/isa.h
    "avx512_vnni": ("codebook*", "kmeans_step*", "residual_kmeans*"),
    "avx512_bf16": ("contrastive*", "target_attention*"),
    "amx": ("contrastive*",),
    "amx_emulated": ("contrastive*",),
}
OBJECT_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-Wall", "-Wextra"),  # sqrt tells nobody of negative numbers
]


def cuda_home():
    """Return the folder of the CUDA toolkit as nvcc tells it: what is on PATH may be a script."""
    try:
        command = ["nvcc", "--dryrun", "-x", "cu", "-E", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True).stderr
    except OSError:
        return None
    found = re.search(r"^#\$ _HERE_=(.+)/bin$", told, re.MULTILINE)
    return found and found[1]


if "CUDA_HOME" not in os.environ and "CUDA_PATH" not in os.environ and cuda_home():
    os.environ["CUDA_HOME"] = cuda_home()  # torch looks for headers two folders above `which nvcc`

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "livrec_fast builds against the torch that you have, and there is none here. Run\n"
        "    pip install 'torch>=2.11'\n"
        "    pip install --no-build-isolation ."
    )

if "CXX" not in os.environ and shutil.which("c++") is None:
    os.environ["CXX"] = "g++"  # torch's own default is c++


def isa_levels():
    """Return the levels to compile: all on x86-64, the plain one elsewhere."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return ISA_FLAGS if on_x86 else {"baseline": []}


def sources_of(level):
    """Return the kernels that are compiled for a level."""
    names = CPU_KERNELS.get(level, ("*",))
    return sorted(path for name in names for path in CSRC.glob(f"{name}_cpu.cpp"))


def wants_cuda():
    """Return whether the CUDA part is built: a CUDA torch, an nvcc, and a source."""
    chosen = os.environ.get("LIVREC_CUDA")
    able = bool(torch.version.cuda and cpp_extension.CUDA_HOME)
    if chosen == "1" and not able:
        sys.exit("LIVREC_CUDA=1 needs a torch built with CUDA, and nvcc on PATH or in CUDA_HOME")
    return able and chosen != "0" and (chosen == "1" or any(CSRC.glob("*_cuda.cu")))


def is_fresh(output):
    """Return whether an object is newer than this file and all that the compiler read for it."""
    listed = output.with_suffix(".d")
    if not (output.exists() and listed.exists()):
        return False
    names = listed.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    inputs = [Path(__file__), *map(Path, names)]
    newest = max((p.stat().st_mtime if p.exists() else float("inf")) for p in inputs)
    return output.stat().st_mtime > newest


class BuildExtension(cpp_extension.BuildExtension):
    """torch's BuildExtension, plus one object per CPU kernel and instruction-set level."""

    def run(self):
        """Build; where that fails, install what is written in Python and say what is missing."""
        if self.editable_mode:  # pip gives a new folder each time; with the old objects it is fast
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        try:
            super().run()
        except Exception as error:  # every way a compiler can fail or be missing
            if os.environ.get("LIVREC_REQUIRE_NATIVE") == "1":
                raise
            self._go_on_without(error)

    def _go_on_without(self, error):
        self.extensions = self.distribution.ext_modules = []
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None:  # the wheel holds Python alone: let its name say so
            wheel.root_is_pure, wheel.py_limited_api = True, False
        cause = (str(error).splitlines() or [""])[0][:200]
        print(
            f"\nlivrec_fast: the compiled kernels were NOT built: {type(error).__name__}: {cause}\n"
            "The package works through its reference implementations. To mend: install a C++17\n"
            "compiler (LIVREC_CUDA=0 leaves out what needs nvcc), then\n"
            "    pip install --no-build-isolation --force-reinstall --no-deps .\n",
            file=sys.stderr,
        )

    def build_extension(self, ext):
        """Compile the objects of every level, then the extension that holds them."""
        ext.extra_objects = [*ext.extra_objects, *self._isa_objects()]
        super().build_extension(ext)

    def _isa_objects(self):
        compiler = [*os.environ.get("CXX", "c++").split(), "-MMD", "-c"]
        objects, commands = [], []
        for level, level_flags in isa_levels().items():
            flags = [*OBJECT_FLAGS, f"-DLIVREC_ISA={level}", *level_flags]
            for source in sources_of(level):
                output = Path(self.build_temp) / level / f"{source.stem}.o"
                output.parent.mkdir(parents=True, exist_ok=True)
                objects.append(str(output))
                if not is_fresh(output):
                    commands.append([*compiler, str(source), "-o", str(output), *flags])
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(self.spawn, commands))
        return objects


def extension():
    """Return `livrec_fast._C`: the module, and each op's glue to torch."""
    sources = [CSRC / "module.cpp", *sorted(CSRC.glob("*_torch.cpp"))]
    macros = [("TORCH_TARGET_VERSION", TARGET)]
    flags = {"cxx": ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]}
    given = os.environ.get("CFLAGS", "").split()
    if not any(flag.startswith("-g") for flag in given):  # what Python was built with asks for it
        flags["cxx"].append("-g0")
    make = cpp_extension.CppExtension
    if wants_cuda():
        make = cpp_extension.CUDAExtension
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        sources += [*sorted(CSRC.glob("*_torch_cuda.cpp")), *sorted(CSRC.glob("*_cuda.cu"))]
        names = "+".join(f"sm_{arch.replace('.', '')}" for arch in re.findall(r"[\d.]+a?", archs))
        macros += [("USE_CUDA", None), ("LIVREC_WITH_CUDA", None), ("LIVREC_CUDA_ARCHS", names)]
        flags["nvcc"] = ["-O3", "-Xcompiler=-fvisibility=hidden"]
    return make(
        name="livrec_fast._C",
        sources=[str(path.relative_to(ROOT)) for path in sources],
        depends=[str(path.relative_to(ROOT)) for path in sorted(CSRC.iterdir())],
        include_dirs=[str(CSRC)],
        define_macros=macros,
        extra_compile_args=flags,
        py_limited_api=True,
    )


setup(
    packages=[*find_packages(include=["livrec_fast", "livrec_fast.*"]), "livrec_fast.kernels"],
    package_dir={"livrec_fast": "livrec_fast", "livrec_fast.kernels": "kernels"},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
