// Rows whose elements may be strided, as contiguous rows: read where they lie if they are that,
// else by way of a buffer, several neighbouring rows at a time, so that whole cache lines are
// moved. cpu/kernels/isa.h must come first.
#pragma once

#include "common/norm_softmax.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

constexpr int64_t kMostNeighbours = 16;  // rows at a time: a cache line of float32

inline bool is_contiguous(const StridedRows& rows, int64_t features) {
  return rows.stride == 1 || features == 1;
}

// How many rows are taken at a time where some are not dense: fewer of long ones.
inline int64_t neighbours(int64_t features) {
  constexpr int64_t kElements = 65536, kFewest = 4;
  const int64_t fit = kElements / (features > 0 ? features : 1);
  return fit < kFewest ? kFewest : fit > kMostNeighbours ? kMostNeighbours : fit;
}

// Memory for as many rows of T as are taken at a time, if any.
template <class T>
class Buffer {
 public:
  Buffer(bool needed, int64_t features)
      : data_(needed ? static_cast<T*>(__builtin_malloc(
                           static_cast<size_t>(neighbours(features) * features) * sizeof(T)))
                     : nullptr) {
    if (needed && !data_) __builtin_trap();
  }
  ~Buffer() { __builtin_free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

// Calls body(place in the buffer, element) for all elements of `count` rows from `first` on: the
// same element of all rows, then the next.
template <class T, class Body>
void for_each_strided(T* data, const StridedRows& layout, int64_t first, int64_t count,
                      int64_t features, const Body& body) {
  T* rows[kMostNeighbours];
  for (int64_t r = 0; r < count; ++r) rows[r] = data + row_offset(layout.rows, first + r);
  for (int64_t i = 0; i < features; ++i) {
    for (int64_t r = 0; r < count; ++r) body(r * features + i, rows[r][i * layout.stride]);
  }
}

// Some rows of an input.
template <class T>
class RowsIn {
 public:
  RowsIn(const void* data, const StridedRows& layout, int64_t features)
      : data_(static_cast<const T*>(data)),
        layout_(layout),
        features_(features),
        buffer_(data && !is_contiguous(layout, features), features) {}

  bool is_dense() const { return !buffer_.data(); }
  void read(int64_t first, int64_t count) {
    first_ = first;
    T* const to = buffer_.data();
    if (!to) return;
    for_each_strided(data_, layout_, first, count, features_,
                     [&](int64_t i, const T& element) { to[i] = element; });
  }
  // Row number r of those read.
  const T* operator[](int64_t r) const {
    if (buffer_.data()) return buffer_.data() + r * features_;
    return data_ ? data_ + row_offset(layout_.rows, first_ + r) : nullptr;
  }

 private:
  const T* data_;
  StridedRows layout_;
  int64_t features_, first_ = 0;
  Buffer<T> buffer_;
};

// Some rows of an output.
template <class T>
class RowsOut {
 public:
  RowsOut(void* data, const StridedRows& layout, int64_t features)
      : data_(static_cast<T*>(data)),
        layout_(layout),
        features_(features),
        buffer_(data && !is_contiguous(layout, features), features) {}

  bool is_dense() const { return !buffer_.data(); }
  void begin(int64_t first) { first_ = first; }
  T* operator[](int64_t r) const {
    if (buffer_.data()) return buffer_.data() + r * features_;
    return data_ ? data_ + row_offset(layout_.rows, first_ + r) : nullptr;
  }
  void write(int64_t count) const {
    const T* const from = buffer_.data();
    if (!from) return;
    for_each_strided(data_, layout_, first_, count, features_,
                     [&](int64_t i, T& element) { element = from[i]; });
  }

 private:
  T* data_;
  StridedRows layout_;
  int64_t features_, first_ = 0;
  Buffer<T> buffer_;
};

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
