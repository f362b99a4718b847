// Rows of any storage type and stride, as contiguous rows of the accumulation type: read where they
// lie if they are that, else by way of a buffer. Where elements are strided, several neighbouring
// rows are taken at a time, so that whole cache lines are moved. cpu/kernels/isa.h must come first.
#pragma once

#include "common/norm_softmax.h"

namespace effkern::cpu::EFFKERN_ISA {
namespace {

constexpr int64_t kMostNeighbours = 16;  // a cache line of float32

inline bool is_contiguous(const StridedRows& rows, int64_t features) {
  return rows.stride == 1 || features == 1;
}

// How many rows are taken at a time where some are strided: fewer of long ones.
inline int64_t neighbours(int64_t features) {
  constexpr int64_t kElements = 65536, kFewest = 4;
  const int64_t fit = kElements / (features > 0 ? features : 1);
  return fit < kFewest ? kFewest : fit > kMostNeighbours ? kMostNeighbours : fit;
}

// Memory for some numbers, or none.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t numbers)
      : data_(numbers > 0
                  ? static_cast<T*>(__builtin_malloc(static_cast<size_t>(numbers) * sizeof(T)))
                  : nullptr) {
    if (numbers > 0 && !data_) __builtin_trap();
  }
  ~Buffer() { __builtin_free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

// Calls body with a value of the storage type, which is computed with in S; a bool is a byte.
template <class S, class Body>
void with_storage(DType dtype, const Body& body) {
  if constexpr (std::is_same_v<S, float>) {
    if (dtype == DType::kBFloat16) return body(BFloat16{});
    if (dtype == DType::kFloat16) return body(Float16{});
  }
  body(S{});
}

template <class S>
bool is_stored_as(DType dtype) {
  return std::is_same_v<S, uint8_t> || dtype == DType::kFloat32 || dtype == DType::kFloat64;
}

// What inputs and outputs share: where the rows are, and the buffers that they go through.
template <class S>
class BufferedRows {
 public:
  // `data` is null where there are none.
  BufferedRows(const void* data, DType dtype, const StridedRows& layout, int64_t features)
      : data_(static_cast<const char*>(data)),
        dtype_(dtype),
        layout_(layout),
        features_(features),
        gathered_(data && !is_contiguous(layout, features) ? size() * int64_t{sizeof(S)} : 0),
        wide_(data && !is_stored_as<S>(dtype) ? size() : 0) {}

  bool is_gathered() const { return gathered_.data() != nullptr; }
  // Whether the rows are used where they lie.
  bool is_direct() const { return !is_gathered() && !wide_.data(); }

 protected:
  int64_t size() const { return neighbours(features_) * features_; }

  // Row r of those that begin at `first_`: as it is stored, and as it is computed with.
  template <class T>
  T* stored(int64_t r) const {
    if (is_gathered()) return reinterpret_cast<T*>(gathered_.data()) + r * features_;
    return place<T>(r);
  }
  template <class T>
  T* place(int64_t r) const {
    T* const all = reinterpret_cast<T*>(const_cast<char*>(data_));
    return all ? all + row_offset(layout_.rows, first_ + r) : nullptr;
  }
  S* computed(int64_t r) const {
    return wide_.data() ? wide_.data() + r * features_ : stored<S>(r);
  }

  // Calls body(number in the buffer, element) for all elements of `count` rows: the same element of
  // all rows, then the next.
  template <class T, class Body>
  void for_each_strided(int64_t count, const Body& body) const {
    T* rows[kMostNeighbours];
    for (int64_t r = 0; r < count; ++r) rows[r] = place<T>(r);
    for (int64_t i = 0; i < features_; ++i) {
      for (int64_t r = 0; r < count; ++r) body(r * features_ + i, rows[r][i * layout_.stride]);
    }
  }

  const char* data_;
  DType dtype_;
  StridedRows layout_;
  int64_t features_, first_ = 0;
  Buffer<char> gathered_;
  Buffer<S> wide_;
};

template <class S>
class RowsIn : public BufferedRows<S> {
 public:
  using BufferedRows<S>::BufferedRows;

  // Makes `count` rows from `first` on ready.
  void read(int64_t first, int64_t count) {
    this->first_ = first;
    if (this->is_direct() || !this->data_) return;
    with_storage<S>(this->dtype_, [&](auto storage) {
      using T = decltype(storage);
      if (this->is_gathered()) {
        T* const to = this->template stored<T>(0);
        this->template for_each_strided<T>(
            count, [&](int64_t number, const T& element) { to[number] = element; });
      }
      if constexpr (!std::is_same_v<S, T>) {
        for (int64_t r = 0; r < count; ++r) {
          const T* const from = this->template stored<T>(r);
          S* const to = this->computed(r);
          for_each_vector<T>(this->features_, [&](int64_t i, int64_t some, int) EFFKERN_LAMBDA {
            store_some(to + i, load_some(from + i, some), some);
          });
        }
      }
    });
  }
  const S* operator[](int64_t r) const { return this->computed(r); }
};

template <class S>
class RowsOut : public BufferedRows<S> {
 public:
  using BufferedRows<S>::BufferedRows;

  void begin(int64_t first) { this->first_ = first; }
  S* operator[](int64_t r) const { return this->computed(r); }
  // Brings the `count` rows begun where they belong.
  void write(int64_t count) const {
    if (this->is_direct() || !this->data_) return;
    with_storage<S>(this->dtype_, [&](auto storage) {
      using T = decltype(storage);
      if constexpr (!std::is_same_v<S, T>) {
        for (int64_t r = 0; r < count; ++r) {
          T* const to = this->template stored<T>(r);
          const S* const from = this->computed(r);
          for_each_vector<T>(this->features_, [&](int64_t i, int64_t some, int) EFFKERN_LAMBDA {
            store_some(to + i, load_some(from + i, some), some);
          });
        }
      }
      if (this->is_gathered()) {
        const T* const from = this->template stored<T>(0);
        this->template for_each_strided<T>(
            count, [&](int64_t number, T& element) { element = from[number]; });
      }
    });
  }
};

}  // namespace
}  // namespace effkern::cpu::EFFKERN_ISA
