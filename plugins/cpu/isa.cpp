#include "cpu/isa.h"

#include <cstdlib>

namespace apar {
namespace cpu {
namespace {

// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool available(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) return avx512;
  if (isa == Isa::kAvx512Vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
  return isa == Isa::kGeneric;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Vnni:
      return "avx512_vnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kGeneric:
      break;
  }
  return "generic";
}

bool choose_isa(Isa* isa, std::string* error) {
  const char* wish = std::getenv("APAR_CPU_ISA");
  if (wish != nullptr && *wish == '\0') wish = nullptr;
  std::string have;
  for (const Isa candidate : {Isa::kAvx512Vnni, Isa::kAvx512, Isa::kAvx2, Isa::kGeneric}) {
    if (!available(candidate)) continue;
    if (wish == nullptr || std::string(wish) == isa_name(candidate)) {
      *isa = candidate;
      return true;
    }
    have += have.empty() ? "" : ", ";
    have += isa_name(candidate);
  }
  *error = std::string("APAR_CPU_ISA is '") + wish + "', which this machine does not offer; it has " + have +
           " (unset the variable for the best one)";
  return false;
}

}  // namespace cpu
}  // namespace apar
