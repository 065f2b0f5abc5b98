#include "cpu/rope_table.h"

#include <cmath>
#include <utility>

namespace apar {
namespace cpu {

std::shared_ptr<RopeTable> RopeTable::get(std::vector<float> inv_freq, float scale) {
  static std::mutex mutex;
  static std::vector<std::weak_ptr<RopeTable>> tables;
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto it = tables.begin(); it != tables.end();) {
    if (const std::shared_ptr<RopeTable> table = it->lock()) {
      if (table->scale_ == scale && table->inv_freq_ == inv_freq) return table;
      ++it;
    } else {
      it = tables.erase(it);
    }
  }
  auto table = std::make_shared<RopeTable>(std::move(inv_freq), scale);
  tables.push_back(table);
  return table;
}

RopeTable::RopeTable(std::vector<float> inv_freq, float scale) : inv_freq_(std::move(inv_freq)), scale_(scale) {}

RopeTable::~RopeTable() {
  for (std::atomic<float*>& page : pages_) delete[] page.load(std::memory_order_relaxed);
}

const float* RopeTable::row(int32_t position) {
  if (position >= kCachedPositions) return nullptr;
  std::atomic<float*>& slot = pages_[static_cast<size_t>(position / kPagePositions)];
  float* page = slot.load(std::memory_order_acquire);
  if (page == nullptr) {
    const std::lock_guard<std::mutex> lock(mutex_);
    page = slot.load(std::memory_order_relaxed);
    if (page == nullptr) {
      page = new float[static_cast<size_t>(kPagePositions) * row_size()];
      const int32_t first = position - position % kPagePositions;
      for (int32_t i = 0; i < kPagePositions; ++i) compute(first + i, page + static_cast<ptrdiff_t>(i) * row_size());
      slot.store(page, std::memory_order_release);
    }
  }
  return page + static_cast<ptrdiff_t>(position % kPagePositions) * row_size();
}

void RopeTable::compute(int32_t position, float* row) const {
  const size_t n = inv_freq_.size();
  for (size_t i = 0; i < n; ++i) {
    const float angle = static_cast<float>(position) * inv_freq_[i];
    row[i] = std::cos(angle) * scale_;
    row[n + i] = std::sin(angle) * scale_;
  }
}

}  // namespace cpu
}  // namespace apar
