// Linear on the CPU: checks, and the cut of a call into tasks.
#include "linear.h"

#include <algorithm>
#include <memory>
#include <new>
#include <string>

#include "cpu/isa.h"
#include "cpu/linear_kernels.h"
#include "cpu/support.h"

using apar::cpu::Buffer;
using apar::cpu::Isa;
using apar::cpu::kLinearSegment;
using apar::cpu::kLinearTile;
using apar::cpu::LinearCall;
using apar::cpu::LinearKernels;
using apar::cpu::LinearTable;
using apar::cpu::Message;
using apar::cpu::Unit;

static_assert(kLinearTile == APAR_LINEAR_TILE, "one layout");

struct AparLinear {
  AparLinearParams params;
  int64_t tiles;
  int64_t groups;
  int64_t steps;
  int32_t together;  // input channels that lie together in the packed matrix
  int32_t unit;
  int64_t tile_bytes;
  const LinearKernels* kernels;
};

namespace {

// One for each calling thread: a session's layers run one after another on it.
struct Workspace {
  Buffer<float> values;
  Buffer<Unit> units;
};

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

// Below this many products, waking other threads costs more than they save.
constexpr int64_t kLeastParallel = 1 << 17;
// Inputs below this many numbers are prepared by the calling thread.
constexpr int64_t kLeastParallelInputs = 1 << 15;
// Weights of a task: small enough to even out threads of unequal speed, large enough to be streamed.
constexpr int64_t kTaskBytes = 128 << 10;
// A task has at least so many tiles where there are enough: the kernels take as many at once for one or two tokens.
constexpr int64_t kTaskTiles = 4;
// Tasks come in multiples of this, so that each of 2, 4 or 8 threads has as many.
constexpr int64_t kEvenTasks = 8;

int64_t up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t tasks_of(const AparLinear& op) {
  const int64_t most = std::max(std::min(op.tiles, kEvenTasks), op.tiles / kTaskTiles / kEvenTasks * kEvenTasks);
  return std::min(most, up(op.tiles * op.tile_bytes / kTaskBytes + 1, kEvenTasks));
}

const LinearTable& table_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Vnni) return apar::cpu::kLinearAvx512Vnni;
  if (isa == Isa::kAvx512) return apar::cpu::kLinearAvx512;
  if (isa == Isa::kAvx2) return apar::cpu::kLinearAvx2;
#endif
  static_cast<void>(isa);
  return apar::cpu::kLinearGeneric;
}

AparStatus check_params(const AparLinearParams& p, const Message& message) {
  if (p.abi_version != APAR_LINEAR_ABI_VERSION)
    return message.fail(APAR_ABI_MISMATCH,
                        "Linear: the engine has ABI version %d, this library has %d; rebuild the engine with "
                        "`apar build` or reinstall apar",
                        p.abi_version, APAR_LINEAR_ABI_VERSION);
  if (p.format < 0 || p.format >= apar::cpu::kLinearFormats)
    return message.fail(APAR_INVALID_ARGUMENT, "Linear: the weight has the unknown format %d", p.format);
  const int64_t most = int64_t{1} << 24;
  if (p.in_features < 1 || p.in_features > most || p.out_features < 1 || p.out_features > most)
    return message.fail(APAR_INVALID_ARGUMENT,
                        "Linear: in_features = %lld and out_features = %lld must be between 1 and %lld",
                        static_cast<long long>(p.in_features), static_cast<long long>(p.out_features),
                        static_cast<long long>(most));
  const int32_t g = p.group_size;
  const bool grouped = g == 16 || g == 32 || g == 64 || g == 128 || g == 256;
  const bool right = p.format == APAR_LINEAR_INT4   ? grouped
                     : p.format == APAR_LINEAR_INT8 ? grouped || g == 0
                                                    : g == 0;
  if (!right)
    return message.fail(APAR_INVALID_ARGUMENT,
                        "Linear: group_size = %d does not suit the weight: int4 needs 16, 32, 64, 128 or 256, int8 one "
                        "of these or 0, floats 0",
                        g);
  return APAR_OK;
}

// The shape of the packed matrix.
void plan(AparLinear* op) {
  const AparLinearParams& p = op->params;
  op->tiles = (p.out_features + kLinearTile - 1) / kLinearTile;
  op->groups = p.group_size > 0 ? (p.in_features + p.group_size - 1) / p.group_size : 1;
  op->together = 1;
  op->unit = 0;
  int32_t bytes = 4;  // of one step of one output channel
  switch (p.format) {
    case APAR_LINEAR_FLOAT16:
      bytes = 2;
      break;
    case APAR_LINEAR_BFLOAT16:
      op->together = 2;
      break;
    case APAR_LINEAR_INT8:
      op->together = 4;
      op->unit = p.group_size > 0 ? p.group_size : kLinearSegment;
      break;
    case APAR_LINEAR_INT4:
      op->together = 8;
      op->unit = std::min(32, p.group_size);
      break;
    default:
      break;
  }
  const int32_t multiple = p.group_size > 0 ? p.group_size : p.format == APAR_LINEAR_INT8 ? 32 : op->together;
  op->steps = up(p.in_features, multiple) / op->together;
  op->tile_bytes = op->steps * kLinearTile * bytes;
}

class Call {
 public:
  Call(const AparLinear& op, const AparLinearTensors& t, Workspace& space) : op_(op) {
    const AparLinearParams& p = op.params;
    call_.num_tokens = t.num_tokens;
    call_.in_features = p.in_features;
    call_.out_features = p.out_features;
    call_.steps = op.steps;
    call_.groups = op.groups;
    call_.group_size = p.group_size;
    call_.weight = t.weight;
    call_.channel_scales = op.unit > 0 && p.group_size == 0 ? static_cast<const float*>(t.scales) : nullptr;
    call_.group_scales = p.group_size > 0 ? static_cast<const uint16_t*>(t.scales) : nullptr;
    call_.zeros = t.zeros;
    call_.bias = t.bias;
    call_.residual = t.residual;
    call_.y = t.y;
    call_.x = t.x;
    call_.norm = t.norm;
    call_.epsilon = p.norm_epsilon;
    call_.gated = p.gated;
    call_.unit = op.unit;
    const int64_t columns = op.steps * op.together;
    call_.unit_stride = op.unit > 0 ? (columns + op.unit - 1) / op.unit : 0;
    prepared_ = op.unit > 0 || t.norm != nullptr || p.gated || columns != p.in_features;
    // Not a power of two: tokens would meet in a few lines of the first-level cache.
    call_.value_stride = prepared_ ? up(columns, 64) + 64 : columns;
    call_.values = const_cast<float*>(t.x);
    call_.units = nullptr;
    if (!prepared_) return;
    // As many bytes as floats would take, whatever is put there.
    call_.values = space.values.reserve(static_cast<size_t>(t.num_tokens * call_.value_stride));
    call_.units = space.units.reserve(static_cast<size_t>(t.num_tokens * call_.unit_stride));
  }

  void run(AparParallelFor parallel_for, void* context) {
    const int64_t products = call_.num_tokens * op_.params.in_features * op_.params.out_features;
    if (products < kLeastParallel) parallel_for = nullptr;
    if (prepared_) {
      const bool together = call_.num_tokens > 1 && call_.num_tokens * op_.params.in_features >= kLeastParallelInputs;
      each(together ? parallel_for : nullptr, context, &run_prepare, call_.num_tokens);
    }
    tasks_ = parallel_for != nullptr ? tasks_of(op_) : 1;
    each(parallel_for, context, &run_multiply, tasks_);
  }

 private:
  void each(AparParallelFor parallel_for, void* context, void (*body)(void*, size_t), int64_t count) {
    if (parallel_for != nullptr) return parallel_for(context, body, static_cast<size_t>(count), this);
    for (int64_t i = 0; i < count; ++i) body(this, static_cast<size_t>(i));
  }

  static void run_prepare(void* self, size_t token) {
    const Call& call = *static_cast<const Call*>(self);
    call.op_.kernels->prepare(call.call_, static_cast<int64_t>(token));
  }

  static void run_multiply(void* self, size_t task) {
    const Call& call = *static_cast<const Call*>(self);
    const int64_t number = static_cast<int64_t>(task);
    call.op_.kernels->multiply(call.call_, call.first_tile(number), call.first_tile(number + 1));
  }

  // Where a task begins. Few tokens go through kTaskTiles tiles at once; more share a tile, and even tasks serve them
  // better.
  int64_t first_tile(int64_t task) const {
    const bool whole = call_.num_tokens <= 2 && op_.tiles >= tasks_ * kTaskTiles;
    const int64_t together = whole ? kTaskTiles : 1;
    return task == tasks_ ? op_.tiles : op_.tiles / together * task / tasks_ * together;
  }

  const AparLinear& op_;
  LinearCall call_;
  int64_t tasks_ = 1;
  bool prepared_ = false;
};

}  // namespace

int32_t apar_linear_abi_version(void) { return APAR_LINEAR_ABI_VERSION; }

AparStatus apar_linear_create(const AparLinearParams* params, AparLinear** op, char* text, size_t size) {
  const Message message = {text, size};
  *op = nullptr;
  try {
    const AparStatus status = check_params(*params, message);
    if (status != APAR_OK) return status;
    Isa isa;
    std::string error;
    if (!apar::cpu::choose_isa(&isa, &error)) return message.fail(APAR_UNSUPPORTED, "Linear: %s", error.c_str());
    auto made = std::make_unique<AparLinear>();
    made->params = *params;
    plan(made.get());
    made->kernels = &table_of(isa).formats[params->format];
    *op = made.release();
    return APAR_OK;
  } catch (const std::bad_alloc&) {
    return message.fail(APAR_OUT_OF_MEMORY, "Linear: out of memory");
  }
}

AparLinearSizes apar_linear_sizes(const AparLinear* op) {
  const int64_t groups = op->unit > 0 ? op->tiles * op->groups * kLinearTile : 0;
  const int32_t format = op->params.format;
  const int64_t width = format == APAR_LINEAR_FLOAT32                                   ? 4
                        : format == APAR_LINEAR_FLOAT16 || format == APAR_LINEAR_BFLOAT16 ? 2
                                                                                          : 1;
  return {op->tiles * op->tile_bytes / width, groups, groups};
}

AparStatus apar_linear_run(const AparLinear* op, const AparLinearTensors* tensors, AparParallelFor parallel_for,
                           void* parallel_context, char* text, size_t size) {
  const Message message = {text, size};
  if (tensors->num_tokens < 0) return message.fail(APAR_INVALID_ARGUMENT, "Linear: x has a negative dimension");
  if (tensors->norm != nullptr && op->params.gated)
    return message.fail(APAR_INVALID_ARGUMENT, "Linear: inputs are either normed or gated, not both");
  if (tensors->num_tokens == 0) return APAR_OK;
  try {
    Call(*op, *tensors, workspace()).run(parallel_for, parallel_context);
    return APAR_OK;
  } catch (const std::bad_alloc&) {
    return message.fail(APAR_OUT_OF_MEMORY, "Linear: out of memory");
  }
}

void apar_linear_destroy(AparLinear* op) { delete op; }
