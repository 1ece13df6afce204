// Instruction-set levels: every `<op>_cpu.cpp` is compiled once per level, in a namespace of that
// name, and the level is chosen when an op runs. What a level adds to the one below it may be of
// use to few: only these have kernels there (setup.py: CPU_KERNELS), of others those below run.
// Objects of a level hold no weak symbols: an inline function compiled with AVX-512 must never be
// the copy that the linker keeps for everybody.
#pragma once

namespace livrec {

enum class Isa : int {
  baseline = 0,
  avx2 = 1,
  avx512 = 2,
  avx512_vnni = 3,
  avx512_bf16 = 4,
  amx = 5,
  amx_emulated = 6  // for tests, on any processor: kernels in tiles, all else as at baseline
};

// The level in use: the best that both this build and this processor have, or a lower one set by
// LIVREC_CPU_ISA or set_isa().
Isa current_isa();
Isa best_isa();
void set_isa(Isa isa);

// Whether the level in use has all that kernels of `level` need.
bool reaches(Isa level);

}  // namespace livrec

// LIVREC_DECLARE(int64_t, encode, (const Args&)) declares encode in the namespace of every level
// that has kernels of its own for all; LIVREC_CALL(encode, args) calls the best one that the level
// in use reaches. _VNNI, _BF16, _AMX: likewise for those few that have kernels at these levels,
// too.
#define LIVREC_DECLARE_AT(level, result, name, parameters) \
  namespace level {                                        \
  result name parameters;                                  \
  }
#define LIVREC_CALL_AT(level, name, arguments, otherwise) \
  (livrec::reaches(livrec::Isa::level) ? livrec::level::name arguments : otherwise)

#if defined(__x86_64__)
#define LIVREC_DECLARE(result, name, parameters)        \
  LIVREC_DECLARE_AT(baseline, result, name, parameters) \
  LIVREC_DECLARE_AT(avx2, result, name, parameters)     \
  LIVREC_DECLARE_AT(avx512, result, name, parameters)
#define LIVREC_CALL(name, ...)                \
  LIVREC_CALL_AT(avx512, name, (__VA_ARGS__), \
                 LIVREC_CALL_AT(avx2, name, (__VA_ARGS__), livrec::baseline::name(__VA_ARGS__)))

#define LIVREC_DECLARE_VNNI(result, name, parameters) \
  LIVREC_DECLARE(result, name, parameters)            \
  LIVREC_DECLARE_AT(avx512_vnni, result, name, parameters)
#define LIVREC_CALL_VNNI(name, ...) \
  LIVREC_CALL_AT(avx512_vnni, name, (__VA_ARGS__), LIVREC_CALL(name, __VA_ARGS__))

#define LIVREC_DECLARE_BF16(result, name, parameters) \
  LIVREC_DECLARE(result, name, parameters)            \
  LIVREC_DECLARE_AT(avx512_bf16, result, name, parameters)
#define LIVREC_CALL_BF16(name, ...) \
  LIVREC_CALL_AT(avx512_bf16, name, (__VA_ARGS__), LIVREC_CALL(name, __VA_ARGS__))

#define LIVREC_DECLARE_AMX(result, name, parameters) \
  LIVREC_DECLARE_BF16(result, name, parameters)      \
  LIVREC_DECLARE_AT(amx, result, name, parameters)   \
  LIVREC_DECLARE_AT(amx_emulated, result, name, parameters)
#define LIVREC_CALL_AMX(name, ...)                  \
  LIVREC_CALL_AT(amx_emulated, name, (__VA_ARGS__), \
                 LIVREC_CALL_AT(amx, name, (__VA_ARGS__), LIVREC_CALL_BF16(name, __VA_ARGS__)))
#else
#define LIVREC_DECLARE(result, name, parameters) \
  LIVREC_DECLARE_AT(baseline, result, name, parameters)
#define LIVREC_CALL(name, ...) (livrec::baseline::name(__VA_ARGS__))
#define LIVREC_DECLARE_VNNI LIVREC_DECLARE
#define LIVREC_CALL_VNNI LIVREC_CALL
#define LIVREC_DECLARE_BF16 LIVREC_DECLARE
#define LIVREC_CALL_BF16 LIVREC_CALL
#define LIVREC_DECLARE_AMX LIVREC_DECLARE
#define LIVREC_CALL_AMX LIVREC_CALL
#endif
