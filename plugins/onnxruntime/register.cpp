// The entry point that SessionOptions.register_custom_ops_library looks for.
#include "fork_attention.h"
#include "onnxruntime/ort_api.h"

namespace apar {
namespace ort {

const OrtApi* api = nullptr;

}  // namespace ort
}  // namespace apar

extern "C" APAR_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using apar::ort::api;
  const OrtApi* found = base->GetApi(apar::ort::kApiVersion);
  // Without an API there is no way to make a status either.
  if (found == nullptr) return nullptr;
  api = found;

  // Sessions refer to the domain for as long as they live; it is never released.
  static OrtCustomOpDomain* domain = nullptr;
  static OrtStatus* (*const create)(OrtCustomOpDomain**) = [](OrtCustomOpDomain** made) -> OrtStatus* {
    APAR_ORT_TRY(api->CreateCustomOpDomain(apar::ort::kDomain, made));
    APAR_ORT_TRY(apar::ort::add_fork_attention(*made));
    return apar::ort::add_linear(*made);
  };
  static OrtStatus* const failure = create(&domain);
  if (failure != nullptr) return api->CreateStatus(api->GetErrorCode(failure), api->GetErrorMessage(failure));
  return api->AddCustomOpDomain(options, domain);
}
