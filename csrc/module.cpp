// The extension module `livrec_fast._C`. Importing it registers the C++ kernels with torch (each
// `<op>_torch.cpp` does so in a static initialiser); what the module itself offers is the choice of
// the instruction-set level, and huge pages.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "huge_pages.h"
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace livrec {
namespace {

const char* const kNames[] = {"baseline",    "avx2", "avx512",      "avx512_vnni",
                              "avx512_bf16", "amx",  "amx_emulated"};
#if defined(__x86_64__)
constexpr int kBuilt = 6, kWithEmulated = 7;
#else
constexpr int kBuilt = 1, kWithEmulated = 1;
#endif

int find_level(const char* name) {
  for (int level = 0; level < kWithEmulated; ++level)
    if (std::strcmp(name, kNames[level]) == 0) return level;
  return -1;
}

Isa initial_isa() {
  const char* wanted = std::getenv("LIVREC_CPU_ISA");
  const int level = wanted == nullptr ? -1 : find_level(wanted);
  const int best = static_cast<int>(best_isa());
  return static_cast<Isa>(level >= 0 && level < best ? level : best);
}

// Whether the processor has tiles of bfloat16, and the system lets this process use them.
bool find_amx() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTiles) == 0)
    return false;
  constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  static const bool found = find_amx();
  return found;
}

std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return !__builtin_cpu_supports("avx512vnni")   ? Isa::avx512
           : !__builtin_cpu_supports("avx512bf16") ? Isa::avx512_vnni
           : !has_amx()                            ? Isa::avx512_bf16
                                                   : Isa::amx;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa current_isa() { return isa_in_use().load(std::memory_order_relaxed); }
bool reaches(Isa level) {
  const Isa isa = current_isa();
  return isa == Isa::amx_emulated ? level == isa || level == Isa::baseline : level <= isa;
}
void set_isa(Isa isa) { isa_in_use().store(isa, std::memory_order_relaxed); }

}  // namespace livrec

namespace {

PyObject* get_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(livrec::kNames[static_cast<int>(livrec::current_isa())]);
}

PyObject* names_of_first(int count) {
  PyObject* names = PyTuple_New(count);
  for (int level = 0; names != nullptr && level < count; ++level)
    PyTuple_SetItem(names, level, PyUnicode_FromString(livrec::kNames[level]));
  return names;
}

PyObject* isa_built(PyObject*, PyObject*) { return names_of_first(livrec::kBuilt); }

PyObject* isa_levels(PyObject*, PyObject*) {
  return names_of_first(static_cast<int>(livrec::best_isa()) + 1);
}

PyObject* set_isa(PyObject*, PyObject* argument) {
  PyObject* bytes = PyUnicode_AsUTF8String(argument);
  if (bytes == nullptr) return nullptr;
  const int level = livrec::find_level(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  const bool runs = level >= 0 && (level <= static_cast<int>(livrec::best_isa()) ||
                                   level == static_cast<int>(livrec::Isa::amx_emulated));
  if (!runs) {
    PyErr_Format(PyExc_ValueError,
                 "isa: %R is not one of the levels this processor runs (_C.isa_levels())",
                 argument);
    return nullptr;
  }
  livrec::set_isa(static_cast<livrec::Isa>(level));
  Py_RETURN_NONE;
}

PyObject* ask_for_huge_pages(PyObject*, PyObject* arguments) {
  unsigned long long address = 0, bytes = 0;
  if (!PyArg_ParseTuple(arguments, "KK", &address, &bytes)) return nullptr;
  livrec::ask_for_huge_pages(reinterpret_cast<const void*>(address), bytes);
  Py_RETURN_NONE;
}

#if defined(LIVREC_CUDA_ARCHS)
#define LIVREC_QUOTE_(...) #__VA_ARGS__
#define LIVREC_QUOTE(...) LIVREC_QUOTE_(__VA_ARGS__)
PyObject* cuda_archs(PyObject*, PyObject*) {
  return PyUnicode_FromString(LIVREC_QUOTE(LIVREC_CUDA_ARCHS));
}
#endif

PyMethodDef methods[] = {
    {"isa", get_isa, METH_NOARGS, "The instruction-set level in use."},
    {"isa_built", isa_built, METH_NOARGS, "The levels this library was built for, slowest first."},
    {"isa_levels", isa_levels, METH_NOARGS, "The levels this processor can run, slowest first."},
    {"ask_for_huge_pages", ask_for_huge_pages, METH_VARARGS,
     "Ask for huge pages under memory, given its address and bytes."},
    {"set_isa", set_isa, METH_O, "Use this level from now on."},
#if defined(LIVREC_CUDA_ARCHS)
    {"cuda_archs", cuda_archs, METH_NOARGS,
     "The GPU targets that this build holds, as \"sm_80+sm_90a\"."},
#endif
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "Compiled kernels of livrec_fast.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
