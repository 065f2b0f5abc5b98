// Choice of the instruction set at run time.
#ifndef APAR_CPU_ISA_H_
#define APAR_CPU_ISA_H_

#include <string>

namespace apar {
namespace cpu {

// From the least to the most; each has all that those before it have.
enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Vnni };

const char* isa_name(Isa isa);

// The best instruction set of this machine, or the one that the environment variable APAR_CPU_ISA names.
// False, with the reason in `error`, where that is unknown or not available here.
bool choose_isa(Isa* isa, std::string* error);

}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_ISA_H_
