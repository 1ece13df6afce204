// Instruction-set levels: every `<op>_cpu.cpp` is compiled once per level, in a namespace of that
// name, and the level is chosen when an op runs. Objects of a level hold no weak symbols: an inline
// function compiled with AVX-512 must never be the copy that the linker keeps for everybody.
#pragma once

namespace livrec {

enum class Isa : int {
  baseline = 0,
  avx2 = 1,
  avx512 = 2,
  avx512_vnni = 3,
  avx512_bf16 = 4,
  amx = 5,          // all kernels but those in tiles are those of avx512_bf16
  amx_emulated = 6  // for tests, on any processor: likewise, of baseline
};

// The level in use: the best that both this build and this processor have, or a lower one set by
// LIVREC_CPU_ISA or set_isa().
Isa current_isa();
Isa best_isa();
void set_isa(Isa isa);

}  // namespace livrec

// LIVREC_DECLARE(int64_t, encode, (const Args&)) declares encode in the namespace of every level;
// LIVREC_CALL(encode, args) calls the one of the current level.
#if defined(__x86_64__)
#define LIVREC_DECLARE(result, name, parameters) \
  namespace baseline {                           \
  result name parameters;                        \
  }                                              \
  namespace avx2 {                               \
  result name parameters;                        \
  }                                              \
  namespace avx512 {                             \
  result name parameters;                        \
  }                                              \
  namespace avx512_vnni {                        \
  result name parameters;                        \
  }                                              \
  namespace avx512_bf16 {                        \
  result name parameters;                        \
  }
#define LIVREC_CALL(name, ...)                                                                    \
  (livrec::current_isa() == livrec::Isa::avx512_bf16 || livrec::current_isa() == livrec::Isa::amx \
       ? livrec::avx512_bf16::name(__VA_ARGS__)                                                   \
   : livrec::current_isa() == livrec::Isa::avx512_vnni ? livrec::avx512_vnni::name(__VA_ARGS__)   \
   : livrec::current_isa() == livrec::Isa::avx512      ? livrec::avx512::name(__VA_ARGS__)        \
   : livrec::current_isa() == livrec::Isa::avx2        ? livrec::avx2::name(__VA_ARGS__)          \
                                                       : livrec::baseline::name(__VA_ARGS__))
// Likewise for kernels that multiply in tiles, too.
#define LIVREC_DECLARE_TILED(result, name, parameters) \
  LIVREC_DECLARE(result, name, parameters)             \
  namespace amx {                                      \
  result name parameters;                              \
  }                                                    \
  namespace amx_emulated {                             \
  result name parameters;                              \
  }
#define LIVREC_CALL_TILED(name, ...)                                                              \
  (livrec::current_isa() == livrec::Isa::amx            ? livrec::amx::name(__VA_ARGS__)          \
   : livrec::current_isa() == livrec::Isa::amx_emulated ? livrec::amx_emulated::name(__VA_ARGS__) \
                                                        : LIVREC_CALL(name, __VA_ARGS__))
#else
#define LIVREC_DECLARE(result, name, parameters) \
  namespace baseline {                           \
  result name parameters;                        \
  }
#define LIVREC_CALL(name, ...) (livrec::baseline::name(__VA_ARGS__))
#define LIVREC_DECLARE_TILED LIVREC_DECLARE
#define LIVREC_CALL_TILED LIVREC_CALL
#endif
