// Cosines and sines of RoPE, computed once and shared by all layers of all sessions.
#ifndef APAR_CPU_ROPE_TABLE_H_
#define APAR_CPU_ROPE_TABLE_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace apar {
namespace cpu {

class RopeTable {
 public:
  // The table of these parameters; equal parameters share one table as long as anyone holds it.
  static std::shared_ptr<RopeTable> get(std::vector<float> inv_freq, float scale);

  RopeTable(std::vector<float> inv_freq, float scale);
  ~RopeTable();
  RopeTable(const RopeTable&) = delete;
  RopeTable& operator=(const RopeTable&) = delete;

  // Row of a position: cos [n], sin [n] for n inverse frequencies. It stays valid as long as the table.
  // Null for positions from kCachedPositions on, which compute() serves.
  const float* row(int32_t position);
  void compute(int32_t position, float* row) const;
  int32_t row_size() const { return static_cast<int32_t>(2 * inv_freq_.size()); }

 private:
  static constexpr int32_t kPagePositions = 64;
  static constexpr int32_t kCachedPositions = 1 << 16;

  std::vector<float> inv_freq_;
  float scale_;
  std::mutex mutex_;
  std::array<std::atomic<float*>, kCachedPositions / kPagePositions> pages_{};
};

}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_ROPE_TABLE_H_
