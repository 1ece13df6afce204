"""Builds livrec_fast: `pip install --no-build-isolation .` with torch already installed.

The package installs without a compiler, too: it then computes by the readable reference and says so.
Environment: CXX picks the compiler, LIVREC_REQUIRE_NATIVE=1 makes a failed build an error,
LIVREC_CUDA=0|1 leaves out or demands the CUDA part, TORCH_CUDA_ARCH_LIST picks its targets.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
TARGET = "0x020b000000000000"  # torch 2.11: the oldest torch that one build serves
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c",
               "-mprefer-vector-width=512"],
}  # fmt: skip

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "livrec_fast builds against the torch that you have, and there is none here. Run\n"
        "    pip install 'torch>=2.11'\n"
        "    pip install --no-build-isolation ."
    )


def isa_levels():
    """The levels to compile: all three on x86-64, the plain one elsewhere."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return ISA_FLAGS if on_x86 else {"baseline": []}


def wants_cuda():
    """Whether the CUDA part is built: a CUDA torch, an nvcc, and a source."""
    chosen = os.environ.get("LIVREC_CUDA")
    if chosen is not None:
        return chosen != "0"
    return bool(torch.version.cuda and cpp_extension.CUDA_HOME and list(CSRC.glob("*_cuda.cu")))


class BuildExtension(cpp_extension.BuildExtension):
    """torch's BuildExtension, plus one object per CPU kernel and instruction-set level."""

    def run(self):
        try:
            super().run()
        except Exception as error:  # noqa: BLE001 - every way a compiler can fail or be missing
            if os.environ.get("LIVREC_REQUIRE_NATIVE") == "1":
                raise
            self.extensions = []  # nothing was built: install what is written in Python
            print(
                "\nlivrec_fast: the compiled kernels were NOT built"
                f" ({type(error).__name__}: {str(error).splitlines()[0][:200]}).\n"
                "The package works through its reference implementations. To mend: install a C++17"
                " compiler, then\n    pip install --no-build-isolation --force-reinstall --no-deps .\n",
                file=sys.stderr,
            )

    def build_extension(self, ext):
        ext.extra_objects = ext.extra_objects + self._isa_objects()
        super().build_extension(ext)

    def _isa_objects(self):
        objects = []
        for level, flags in isa_levels().items():
            for source in sorted(CSRC.glob("*_cpu.cpp")):
                output = Path(self.build_temp) / level / f"{source.stem}.o"
                output.parent.mkdir(parents=True, exist_ok=True)
                newest = max(p.stat().st_mtime for p in [source, *CSRC.glob("*.h"), Path(__file__)])
                if not output.exists() or output.stat().st_mtime < newest:
                    compiler = os.environ.get("CXX", "c++").split()
                    self.spawn(
                        [*compiler, "-c", str(source), "-o", str(output), "-std=c++17", "-O3", "-fPIC",
                         "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra",
                         f"-DLIVREC_ISA={level}", *flags]
                    )  # fmt: skip
                objects.append(str(output))
        return objects


def extension():
    """`livrec_fast._C`: the module, and each op's glue to torch."""
    sources = [CSRC / "module.cpp", *sorted(CSRC.glob("*_torch.cpp"))]
    macros = [("TORCH_TARGET_VERSION", TARGET)]
    flags = {"cxx": ["-O3", "-fvisibility=hidden"]}
    make = cpp_extension.CppExtension
    if wants_cuda():
        make = cpp_extension.CUDAExtension
        sources += [*sorted(CSRC.glob("*_cuda.cpp")), *sorted(CSRC.glob("*_cuda.cu"))]
        macros += [("USE_CUDA", None), ("LIVREC_WITH_CUDA", None)]
        flags["nvcc"] = ["-O3", "--use_fast_math=false", "-Xcompiler=-fvisibility=hidden"]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
    return make(
        name="livrec_fast._C",
        sources=[str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[str(CSRC)],
        define_macros=macros,
        extra_compile_args=flags,
        py_limited_api=True,
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
