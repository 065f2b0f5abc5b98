// ForkAttention on the CPU: checks, the plan of a step, and its execution on the chosen kernels.
#include "fork_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/rope_table.h"
#include "cpu/support.h"

using apar::cpu::Buffer;
using apar::cpu::hardware_threads;
using apar::cpu::Isa;
using apar::cpu::Kernels;
using apar::cpu::kMaxChunkKeys;
using apar::cpu::kTileQueries;
using apar::cpu::Message;
using apar::cpu::Pool;
using apar::cpu::Query;
using apar::cpu::RopeTable;
using apar::cpu::Tile;
using apar::cpu::Write;

struct AparForkAttention {
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t chunk_keys;
  float q_scale;
  const Kernels* kernels;
  std::shared_ptr<RopeTable> rope;
};

namespace {

// Queries of one key/value head that are computed together: either whole rows that share their first
// chunks, or a part of one row. A row's queries are numbered token * group + head of the group.
struct Bundle {
  int32_t first_row;
  int32_t last_row;
  int32_t first_query;  // of a single row; several rows are always whole
  int32_t last_query;
  int32_t shared_chunks;  // leading chunks that are the same keys for all rows, visible to all queries
  int32_t last_chunk;
  int32_t count;   // queries, padding included: an upper bound
  int32_t pieces;  // tasks that the chunks are cut into
  int64_t first_task;
  int64_t partials;  // first float of this bundle's parts, for head 0
  int64_t head_partials;
};

// Slots that have been seen, one bit each; all bits are zero between uses.
class SlotSet {
 public:
  void reserve(int64_t slots) { words_.resize(std::max(words_.size(), static_cast<size_t>(slots + 63) / 64)); }
  // False if the slot was there already.
  bool add(int32_t slot) {
    uint64_t& word = words_[static_cast<size_t>(slot) / 64];
    const uint64_t bit = uint64_t{1} << (slot % 64);
    if (word & bit) return false;
    word |= bit;
    return true;
  }
  void remove(int32_t slot) { words_[static_cast<size_t>(slot) / 64] = 0; }

 private:
  std::vector<uint64_t> words_;
};

// One for each calling thread: a session's layers run one after another on it.
struct Workspace {
  Buffer<float> q;
  Buffer<const float*> rope;
  Buffer<float> rope_rows;
  Buffer<uint32_t> copies;
  Buffer<float> partials;
  Buffer<std::atomic<int32_t>> open_pieces;
  Buffer<uint8_t> live;
  std::vector<Bundle> bundles;
  SlotSet slots;
};

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

// ------------------------------------------------------------------ checks

AparStatus check_targets(const int32_t* slots, int64_t count, int64_t stride, const char* name, SlotSet& seen,
                         const Message& message) {
  int64_t i = 0;
  while (i < count && (slots[i * stride] < 0 || seen.add(slots[i * stride]))) ++i;
  AparStatus status = APAR_OK;
  if (i < count) {
    int64_t other = 0;
    while (slots[other * stride] != slots[i * stride]) ++other;
    status = message.fail(APAR_INVALID_ARGUMENT,
                          "ForkAttention: %s writes slot %d twice, at index %lld and at index %lld", name,
                          slots[i * stride], static_cast<long long>(other), static_cast<long long>(i));
  }
  for (int64_t j = 0; j < i; ++j)
    if (slots[j * stride] >= 0) seen.remove(slots[j * stride]);
  return status;
}

// Everything that is read as an index is in bounds afterwards. `live[r]` says whether row r has any
// token that is not padding.
AparStatus check(const AparForkAttention& op, const AparForkAttentionTensors& t, uint8_t* live, SlotSet& seen,
                 const Message& message) {
  const auto wrong = [&message](const char* name, int64_t i, int64_t value, const std::string& rule) {
    return message.fail(APAR_INVALID_ARGUMENT, "ForkAttention: %s[%lld] = %lld, but %s", name,
                        static_cast<long long>(i), static_cast<long long>(value), rule.c_str());
  };
  const int64_t most = std::numeric_limits<int32_t>::max();
  const int64_t slots = t.num_blocks * op.block_size;
  if (t.num_tokens < 0 || t.num_rows < 0 || t.num_blocks < 0 || t.table_width < 0 || t.num_copies < 0 ||
      t.num_groups < 0 || t.mask_words < 0)
    return message.fail(APAR_INVALID_ARGUMENT, "ForkAttention: a tensor has a negative dimension");
  if (t.num_tokens > most || t.num_blocks > most / op.block_size || t.mask_words > most / 32)
    return message.fail(APAR_INVALID_ARGUMENT, "ForkAttention: a tensor is too large for 32-bit indices");
  if (t.kv_type != APAR_FLOAT32 && t.kv_type != APAR_FLOAT16)
    return message.fail(APAR_INVALID_ARGUMENT, "ForkAttention: past_kv must be float32 or float16");

  if (t.query_start[0] != 0) return wrong("query_start", 0, t.query_start[0], "the first row starts at token 0");
  for (int64_t r = 0; r < t.num_rows; ++r)
    if (t.query_start[r + 1] < t.query_start[r])
      return wrong("query_start", r + 1, t.query_start[r + 1],
                   "the entry before it is " + std::to_string(t.query_start[r]) + " and it must not decrease");
  if (t.query_start[t.num_rows] != t.num_tokens)
    return wrong("query_start", t.num_rows, t.query_start[t.num_rows],
                 "qkv has " + std::to_string(t.num_tokens) + " tokens");

  for (int64_t i = 0; i < t.num_tokens; ++i) {
    if (t.slot_mapping[i] < -1 || t.slot_mapping[i] >= slots)
      return wrong("slot_mapping", i, t.slot_mapping[i],
                   "it must be -1 or a slot of the pool, which has " + std::to_string(slots));
    if (t.slot_mapping[i] >= 0 && t.position_ids[i] < 0)
      return wrong("position_ids", i, t.position_ids[i], "a position must not be negative");
  }
  for (int64_t i = 0; i < 2 * t.num_copies; ++i)
    if (t.slot_copies[i] < 0 || t.slot_copies[i] >= slots)
      return message.fail(APAR_INVALID_ARGUMENT,
                          "ForkAttention: slot_copies[%lld, %lld] = %d, but it must be a slot of the pool, "
                          "which has %lld",
                          static_cast<long long>(i / 2), static_cast<long long>(i % 2), t.slot_copies[i],
                          static_cast<long long>(slots));
  seen.reserve(slots);
  AparStatus status = check_targets(t.slot_mapping, t.num_tokens, 1, "slot_mapping", seen, message);
  if (status != APAR_OK) return status;
  if (t.num_copies > 0) {
    status = check_targets(t.slot_copies + 1, t.num_copies, 2, "slot_copies", seen, message);
    if (status != APAR_OK) return status;
  }

  for (int64_t r = 0; r < t.num_rows; ++r) {
    live[r] = 0;
    for (int32_t i = t.query_start[r]; i < t.query_start[r + 1]; ++i) live[r] |= t.slot_mapping[i] >= 0;
    if (!live[r]) continue;
    const int32_t tokens = t.query_start[r + 1] - t.query_start[r];
    if (t.kv_len[r] < tokens)
      return wrong("kv_len", r, t.kv_len[r], "the row has " + std::to_string(tokens) + " tokens in this step");
    if (t.kv_len[r] > t.table_width * op.block_size)
      return wrong("kv_len", r, t.kv_len[r],
                   "a row of block_table holds " + std::to_string(t.table_width * op.block_size) + " slots");
    const int32_t* table = t.block_table + r * t.table_width;
    const int32_t blocks = (t.kv_len[r] - 1) / op.block_size + 1;
    for (int32_t b = 0; b < blocks; ++b)
      if (table[b] < 0 || table[b] >= t.num_blocks)
        return message.fail(
            APAR_INVALID_ARGUMENT,
            "ForkAttention: block_table[%lld, %d] = %d, but kv_len[%lld] = %d needs it to be one of the %lld blocks",
            static_cast<long long>(r), b, table[b], static_cast<long long>(r), t.kv_len[r],
            static_cast<long long>(t.num_blocks));
  }

  if (t.num_groups == 0) return APAR_OK;
  if (t.prefix_rows[0] != 0) return wrong("prefix_rows", 0, t.prefix_rows[0], "the first group starts at row 0");
  for (int64_t g = 0; g < t.num_groups; ++g)
    if (t.prefix_rows[g + 1] < t.prefix_rows[g])
      return wrong("prefix_rows", g + 1, t.prefix_rows[g + 1],
                   "the entry before it is " + std::to_string(t.prefix_rows[g]) + " and it must not decrease");
  if (t.prefix_rows[t.num_groups] != t.num_rows)
    return wrong("prefix_rows", t.num_groups, t.prefix_rows[t.num_groups],
                 "there are " + std::to_string(t.num_rows) + " rows");
  for (int64_t g = 0; g < t.num_groups; ++g) {
    const int32_t blocks = t.prefix_blocks[g];
    if (blocks < 0 || blocks > t.table_width)
      return wrong("prefix_blocks", g, blocks,
                   "a row of block_table has " + std::to_string(t.table_width) + " entries");
    int64_t leader = -1;
    for (int64_t r = t.prefix_rows[g]; r < t.prefix_rows[g + 1]; ++r) {
      if (!live[r]) continue;
      if (leader < 0) leader = r;
      const int32_t* ours = t.block_table + r * t.table_width;
      const int32_t* theirs = t.block_table + leader * t.table_width;
      for (int32_t b = 0; b < blocks; ++b)
        if (ours[b] != theirs[b])
          return message.fail(APAR_INVALID_ARGUMENT,
                              "ForkAttention: prefix_blocks[%lld] = %d, but rows %lld and %lld of that group differ at "
                              "block_table[:, %d]",
                              static_cast<long long>(g), blocks, static_cast<long long>(leader),
                              static_cast<long long>(r), b);
    }
  }
  return APAR_OK;
}

// ------------------------------------------------------------------ the step

class Step {
 public:
  Step(const AparForkAttention& op, const AparForkAttentionTensors& tensors, Workspace& space)
      : op_(op), t_(tensors), space_(space), group_(op.num_heads / op.num_kv_heads) {
    pool_.data = tensors.present_kv;
    pool_.num_blocks = tensors.num_blocks;
    pool_.num_kv_heads = op.num_kv_heads;
    pool_.block_size = op.block_size;
    pool_.head_dim = op.head_dim;
    pool_.half = tensors.kv_type == APAR_FLOAT16;
  }

  // Allocates everything, so that nothing fails once the pool is being written.
  void plan(const uint8_t* live, bool parallel) {
    const size_t tokens = static_cast<size_t>(t_.num_tokens);
    q_ = space_.q.reserve(tokens * op_.num_heads * op_.head_dim);
    copies_ = space_.copies.reserve(static_cast<size_t>(t_.num_copies) * op_.num_kv_heads * 2 * op_.head_dim);
    plan_rope();
    plan_bundles(live);
    plan_tasks(parallel);
  }

  void run(AparParallelFor parallel_for, void* context) {
    if (t_.present_kv != t_.past_kv) {
      const size_t width = pool_.half ? 2 : 4;
      std::memcpy(t_.present_kv, t_.past_kv,
                  width * 2 * t_.num_blocks * op_.num_kv_heads * op_.block_size * op_.head_dim);
    }
    const size_t heads = static_cast<size_t>(op_.num_kv_heads);
    if (parallel_for == nullptr || inline_) {
      for (size_t head = 0; head < heads; ++head) run_head(this, head);
    } else if (fused_) {
      parallel_for(context, &run_head, heads, this);
    } else {
      parallel_for(context, &run_write, heads, this);
      parallel_for(context, &run_task, static_cast<size_t>(num_tasks_) * heads, this);
    }
  }

 private:
  void plan_rope() {
    const size_t tokens = static_cast<size_t>(t_.num_tokens);
    rope_ = space_.rope.reserve(tokens);
    size_t uncached = 0;
    for (size_t i = 0; i < tokens; ++i) {
      rope_[i] = t_.slot_mapping[i] < 0 ? nullptr : op_.rope->row(t_.position_ids[i]);
      uncached += t_.slot_mapping[i] >= 0 && rope_[i] == nullptr;
    }
    if (uncached == 0) return;
    float* row = space_.rope_rows.reserve(uncached * op_.rope->row_size());
    for (size_t i = 0; i < tokens; ++i) {
      if (t_.slot_mapping[i] < 0 || rope_[i] != nullptr) continue;
      op_.rope->compute(t_.position_ids[i], row);
      rope_[i] = row;
      row += op_.rope->row_size();
    }
  }

  int32_t tokens(int64_t row) const { return t_.query_start[row + 1] - t_.query_start[row]; }
  int32_t context(int64_t row) const { return t_.kv_len[row] - tokens(row); }
  int32_t chunks(int64_t keys) const { return static_cast<int32_t>((keys + op_.chunk_keys - 1) / op_.chunk_keys); }

  // One past the last key that any of a row's tokens before `token` may see.
  int32_t last_key(int64_t row, int32_t token) const {
    return t_.mask_words > 0 ? t_.kv_len[row] : context(row) + token;
  }

  void plan_bundles(const uint8_t* live) {
    space_.bundles.clear();
    int64_t group = 0;
    for (int32_t r = 0; r < t_.num_rows;) {
      if (!live[r]) {
        ++r;
        continue;
      }
      const int64_t queries = int64_t{tokens(r)} * group_;
      int32_t last = r + 1;
      int32_t shared = 0;
      if (t_.num_groups > 0 && queries < kTileQueries) {
        while (t_.prefix_rows[group + 1] <= r) ++group;
        last = siblings(live, r, t_.prefix_rows[group + 1], t_.prefix_blocks[group], &shared);
      }
      if (last > r + 1) {
        Bundle bundle = {r, last, 0, 0, shared, 0, 0, 1, 0, 0, 0};
        for (int32_t row = r; row < last; ++row) {
          if (!live[row]) continue;
          bundle.count += tokens(row) * group_;
          bundle.last_chunk = std::max(bundle.last_chunk, chunks(t_.kv_len[row]));
        }
        space_.bundles.push_back(bundle);
      } else {
        for (int64_t first = 0; first < queries; first += kTileQueries) {
          const int32_t end = static_cast<int32_t>(std::min<int64_t>(queries, first + kTileQueries));
          const int32_t key = last_key(r, (end - 1) / group_ + 1);
          space_.bundles.push_back({r, r + 1, static_cast<int32_t>(first), end, 0, chunks(key),
                                    static_cast<int32_t>(end - first), 1, 0, 0, 0});
        }
      }
      r = last;
    }
  }

  // End of the rows from `first` on, inside its group, that fill one tile and share at least one whole
  // chunk that lies before all their step tokens.
  int32_t siblings(const uint8_t* live, int32_t first, int32_t end, int32_t blocks, int32_t* shared) const {
    int64_t queries = 0;
    int64_t keys = int64_t{blocks} * op_.block_size;
    int32_t row = first;
    for (; row < end && row < first + kTileQueries; ++row) {
      if (!live[row]) continue;
      queries += int64_t{tokens(row)} * group_;
      const int64_t common = std::min<int64_t>(keys, context(row));
      if (queries > kTileQueries || common < op_.chunk_keys) break;
      keys = common;
    }
    *shared = static_cast<int32_t>(keys / op_.chunk_keys);
    return std::max(row, first + 1);
  }

  void plan_tasks(bool parallel) {
    const int32_t heads = op_.num_kv_heads;
    const int64_t bundles = static_cast<int64_t>(space_.bundles.size());
    int64_t work = t_.num_tokens * 8 + t_.num_copies * 2;  // in keys times queries of one head
    for (const Bundle& b : space_.bundles) work += int64_t{b.count} * b.last_chunk * op_.chunk_keys / 2;
    // Waking other threads costs some microseconds; below that much work it does not pay.
    inline_ = !parallel || work * heads * op_.head_dim < 50000;
    const int32_t threads = hardware_threads();
    fused_ = heads % threads == 0 || heads >= 4 * threads;
    const int64_t wanted = inline_ || fused_ || bundles * heads >= 2 * threads
                               ? 1
                               : (2 * threads + bundles * heads - 1) / std::max<int64_t>(1, bundles * heads);
    num_tasks_ = 0;
    int64_t floats = 0;
    for (Bundle& b : space_.bundles) {
      b.pieces = static_cast<int32_t>(std::min<int64_t>(wanted, b.last_chunk));
      b.first_task = num_tasks_;
      num_tasks_ += b.pieces;
      if (b.pieces == 1) continue;
      b.partials = floats;
      b.head_partials = int64_t{b.last_chunk} * b.count * (op_.head_dim + 2);
      floats += b.head_partials * heads;
    }
    if (floats == 0) return;
    partials_ = space_.partials.reserve(static_cast<size_t>(floats));
    open_pieces_ = space_.open_pieces.reserve(static_cast<size_t>(bundles * heads));
    for (int64_t i = 0; i < bundles * heads; ++i)
      open_pieces_[i].store(space_.bundles[i % bundles].pieces, std::memory_order_relaxed);
  }

  void write(int32_t head) const {
    Write w;
    w.pool = &pool_;
    w.qkv = t_.qkv;
    w.rope = rope_;
    w.slots = t_.slot_mapping;
    w.copies = t_.slot_copies;
    w.copy_buffer = copies_ + t_.num_copies * 2 * op_.head_dim * head;
    w.q = q_;
    w.attn = t_.attn;
    w.num_tokens = t_.num_tokens;
    w.num_copies = t_.num_copies;
    w.num_heads = op_.num_heads;
    w.kv_head = head;
    w.q_scale = op_.q_scale;
    op_.kernels->write(w);
  }

  // Appends the queries first .. last - 1 of a row, without padding tokens.
  int32_t add_queries(int64_t row, int32_t first, int32_t last, int32_t head, Query* to) const {
    int32_t count = 0;
    for (int32_t i = first; i < last; ++i) {
      const int32_t token = i / group_;
      const int64_t t = t_.query_start[row] + token;
      if (t_.slot_mapping[t] < 0) continue;
      const int64_t at = (t * op_.num_heads + int64_t{head} * group_ + i % group_) * op_.head_dim;
      Query& q = to[count++];
      q.q = q_ + at;
      q.out = t_.attn + at;
      q.mask = t_.mask_words > 0 ? t_.tree_mask + t * t_.mask_words : nullptr;
      q.mask_bits = static_cast<int32_t>(std::min<int64_t>(t_.mask_words * 32, tokens(row)));
      q.context = context(row);
      q.limit = last_key(row, token + 1);
      q.max = -INFINITY;
      q.sum = 0.0f;
    }
    return count;
  }

  // Chunks first .. last - 1 of a bundle's queries: the shared ones for all rows at once.
  void attend(const Bundle& b, int32_t head, int32_t first, int32_t last, Query* queries, const int32_t* row_end,
              float* partials) const {
    Tile tile;
    tile.pool = &pool_;
    tile.kv_head = head;
    tile.chunk_keys = op_.chunk_keys;
    tile.partial_queries = b.count;
    const int32_t rows = b.last_row - b.first_row;
    if (first < b.shared_chunks) {
      int32_t row = 0;
      while (row_end[row] == 0) ++row;  // the first row with queries speaks for all
      tile.table = t_.block_table + (b.first_row + row) * t_.table_width;
      tile.queries = queries;
      tile.count = row_end[rows - 1];
      tile.first_chunk = first;
      tile.last_chunk = std::min(last, b.shared_chunks);
      tile.partials = partials;
      op_.kernels->attend(tile);
    }
    if (last <= b.shared_chunks) return;
    for (int32_t row = 0, begin = 0; row < rows; begin = row_end[row++]) {
      if (row_end[row] == begin) continue;
      tile.table = t_.block_table + (b.first_row + row) * t_.table_width;
      tile.queries = queries + begin;
      tile.count = row_end[row] - begin;
      tile.first_chunk = std::max(first, b.shared_chunks);
      tile.last_chunk = last;
      tile.partials = partials == nullptr ? nullptr : partials + begin * (op_.head_dim + 2);
      op_.kernels->attend(tile);
    }
  }

  void attend_piece(int64_t index, int32_t head, int32_t piece) const {
    const Bundle& b = space_.bundles[index];
    Query queries[kTileQueries];
    int32_t row_end[kTileQueries];
    int32_t count = 0;
    if (b.last_row - b.first_row == 1) {
      count = add_queries(b.first_row, b.first_query, b.last_query, head, queries);
      row_end[0] = count;
    } else {
      for (int32_t row = b.first_row; row < b.last_row; ++row) {
        count += add_queries(row, 0, tokens(row) * group_, head, queries + count);
        row_end[row - b.first_row] = count;
      }
    }
    if (b.pieces == 1) {
      if (count > 0) attend(b, head, 0, b.last_chunk, queries, row_end, nullptr);
      for (int32_t i = 0; i < count; ++i) op_.kernels->finish(queries[i], op_.head_dim);
      return;
    }
    const int64_t part = op_.head_dim + 2;
    float* partials = partials_ + b.partials + head * b.head_partials;
    const int32_t first = static_cast<int32_t>(int64_t{b.last_chunk} * piece / b.pieces);
    const int32_t last = static_cast<int32_t>(int64_t{b.last_chunk} * (piece + 1) / b.pieces);
    for (int64_t i = int64_t{first} * b.count; i < int64_t{last} * b.count; ++i) partials[i * part] = -INFINITY;
    if (count > 0) attend(b, head, first, last, queries, row_end, partials);
    // The last piece to finish merges them all, in the order of chunks.
    const int64_t bundles = static_cast<int64_t>(space_.bundles.size());
    if (open_pieces_[head * bundles + index].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    for (int32_t i = 0; i < count; ++i) {
      op_.kernels->merge(queries[i], partials + i * part, b.count * part, b.last_chunk, op_.head_dim);
      op_.kernels->finish(queries[i], op_.head_dim);
    }
  }

  static void run_write(void* self, size_t head) { static_cast<const Step*>(self)->write(static_cast<int32_t>(head)); }

  static void run_head(void* self, size_t head) {
    const Step& step = *static_cast<const Step*>(self);
    step.write(static_cast<int32_t>(head));
    for (size_t i = 0; i < step.space_.bundles.size(); ++i)
      step.attend_piece(static_cast<int64_t>(i), static_cast<int32_t>(head), 0);
  }

  // Tasks of one head are neighbours: rows that share blocks find them in the cache.
  static void run_task(void* self, size_t index) {
    const Step& step = *static_cast<const Step*>(self);
    const int64_t head = static_cast<int64_t>(index) / step.num_tasks_;
    const int64_t task = static_cast<int64_t>(index) % step.num_tasks_;
    const std::vector<Bundle>& bundles = step.space_.bundles;
    const auto after = std::upper_bound(bundles.begin(), bundles.end(), task,
                                        [](int64_t value, const Bundle& b) { return value < b.first_task; });
    const int64_t bundle = after - bundles.begin() - 1;
    step.attend_piece(bundle, static_cast<int32_t>(head), static_cast<int32_t>(task - bundles[bundle].first_task));
  }

  const AparForkAttention& op_;
  const AparForkAttentionTensors& t_;
  Workspace& space_;
  const int32_t group_;
  Pool pool_;
  float* q_ = nullptr;
  const float** rope_ = nullptr;
  uint32_t* copies_ = nullptr;
  float* partials_ = nullptr;
  std::atomic<int32_t>* open_pieces_ = nullptr;
  int64_t num_tasks_ = 0;
  bool inline_ = false;
  bool fused_ = false;
};

const Kernels* kernels_of(Isa isa, int32_t block_size) {
#if defined(__x86_64__)
  // A vector of keys must fit into a block.
  if (isa >= Isa::kAvx512 && block_size % 16 != 0 && block_size % 8 == 0) return &apar::cpu::kAvx2Kernels;
  if (isa >= Isa::kAvx512) return &apar::cpu::kAvx512Kernels;
  if (isa == Isa::kAvx2) return &apar::cpu::kAvx2Kernels;
#endif
  static_cast<void>(isa);
  static_cast<void>(block_size);
  return &apar::cpu::kGenericKernels;
}

AparStatus check_params(const AparForkAttentionParams& p, const Message& message) {
  if (p.abi_version != APAR_ABI_VERSION)
    return message.fail(APAR_ABI_MISMATCH,
                        "ForkAttention: the engine has ABI version %d, this library has %d; rebuild the engine with "
                        "`apar build` or reinstall apar",
                        p.abi_version, APAR_ABI_VERSION);
  if (p.num_kv_heads < 1 || p.num_heads < 1 || p.num_heads % p.num_kv_heads != 0)
    return message.fail(APAR_INVALID_ARGUMENT,
                        "ForkAttention: num_heads = %d must be a positive multiple of num_kv_heads = %d", p.num_heads,
                        p.num_kv_heads);
  if (p.head_dim < 2 || p.head_dim % 2 != 0)
    return message.fail(APAR_INVALID_ARGUMENT, "ForkAttention: head_dim = %d must be even and positive", p.head_dim);
  if (p.block_size < 1)
    return message.fail(APAR_INVALID_ARGUMENT, "ForkAttention: block_size = %d must be positive", p.block_size);
  if (p.rope_inv_freq_count != p.head_dim / 2 || p.rope_inv_freq == nullptr)
    return message.fail(APAR_INVALID_ARGUMENT,
                        "ForkAttention: rope_inv_freq has %d entries, head_dim = %d needs %d of them",
                        p.rope_inv_freq_count, p.head_dim, p.head_dim / 2);
  return APAR_OK;
}

}  // namespace

int32_t apar_abi_version(void) { return APAR_ABI_VERSION; }

const char* apar_cpu_isa(void) {
  try {
    Isa isa;
    std::string error;
    return apar::cpu::choose_isa(&isa, &error) ? apar::cpu::isa_name(isa) : nullptr;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

AparStatus apar_fork_attention_create(const AparForkAttentionParams* params, AparForkAttention** op, char* text,
                                      size_t size) {
  const Message message = {text, size};
  *op = nullptr;
  try {
    const AparStatus status = check_params(*params, message);
    if (status != APAR_OK) return status;
    Isa isa;
    std::string error;
    if (!apar::cpu::choose_isa(&isa, &error))
      return message.fail(APAR_UNSUPPORTED, "ForkAttention: %s", error.c_str());
    auto made = std::make_unique<AparForkAttention>();
    made->num_heads = params->num_heads;
    made->num_kv_heads = params->num_kv_heads;
    made->head_dim = params->head_dim;
    made->block_size = params->block_size;
    made->chunk_keys = std::max(1, kMaxChunkKeys / params->block_size) * params->block_size;
    if (params->block_size > kMaxChunkKeys) made->chunk_keys = kMaxChunkKeys;
    made->q_scale = static_cast<float>(params->scale * 1.4426950408889634);  // log2(e): softmax in base 2
    made->kernels = kernels_of(isa, params->block_size);
    made->rope = RopeTable::get({params->rope_inv_freq, params->rope_inv_freq + params->rope_inv_freq_count},
                                params->rope_scale);
    *op = made.release();
    return APAR_OK;
  } catch (const std::bad_alloc&) {
    return message.fail(APAR_OUT_OF_MEMORY, "ForkAttention: out of memory");
  }
}

AparStatus apar_fork_attention_run(const AparForkAttention* op, const AparForkAttentionTensors* tensors,
                                   AparParallelFor parallel_for, void* parallel_context, char* text, size_t size) {
  const Message message = {text, size};
  try {
    Workspace& space = workspace();
    uint8_t* live = space.live.reserve(static_cast<size_t>(std::max<int64_t>(0, tensors->num_rows)));
    const AparStatus status = check(*op, *tensors, live, space.slots, message);
    if (status != APAR_OK) return status;
    Step step(*op, *tensors, space);
    step.plan(live, parallel_for != nullptr);
    step.run(parallel_for, parallel_context);
    return APAR_OK;
  } catch (const std::bad_alloc&) {
    return message.fail(APAR_OUT_OF_MEMORY, "ForkAttention: out of memory");
  }
}

void apar_fork_attention_destroy(AparForkAttention* op) { delete op; }
