// What the operators' planning code shares. Not for kernel files: these are compiled for one instruction set.
#ifndef APAR_CPU_SUPPORT_H_
#define APAR_CPU_SUPPORT_H_

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <thread>

#include "fork_attention.h"

namespace apar {
namespace cpu {

// Where a failure's sentence goes.
struct Message {
  char* text;
  size_t size;

  __attribute__((format(printf, 3, 4))) AparStatus fail(AparStatus status, const char* format, ...) const {
    if (size > 0) {
      va_list arguments;
      va_start(arguments, format);
      std::vsnprintf(text, size, format, arguments);
      va_end(arguments);
    }
    return status;
  }
};

// Memory that grows and is kept from step to step; contents are not.
template <class T>
class Buffer {
 public:
  T* reserve(size_t size) {
    if (size > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(new T[size]);
      size_ = size;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<T[]> data_;
  size_t size_ = 0;
};

inline int32_t hardware_threads() {
  static const int32_t count = std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()));
  return count;
}

}  // namespace cpu
}  // namespace apar

#endif  // APAR_CPU_SUPPORT_H_
