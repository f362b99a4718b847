// effkern::_watch, _watch_moved and _unwatch: whether tensors, on any device, still stand where
// they stood. An optimizer asks this of every parameter and state at every step; from Python it
// would cost as much as the step itself.
#include <atomic>
#include <memory>
#include <vector>

#include "torch/cpu.h"

namespace effkern {
namespace {

// Everything of a tensor that a table of addresses relies on.
class Watch {
 public:
  explicit Watch(const std::vector<Tensor>& tensors) : tensors_(tensors) {
    for (const Tensor& tensor : tensors_) {
      first_.push_back(seen_.size());
      visit(tensor, [&](int64_t now) {
        seen_.push_back(now);
        return true;
      });
    }
  }

  bool moved() const {
    std::atomic<bool> same = true;
    const auto look = [&](int64_t begin, int64_t end) {
      const int64_t* then = seen_.data() + first_[begin];
      for (int64_t i = begin; i < end; ++i) {
        if (visit(tensors_[i], [&](int64_t now) { return now == *then++; })) continue;
        same = false;
        return;
      }
    };
    // Nearly all of the time goes into waiting for memory: threads wait side by side.
    constexpr int64_t kGrain = 2048;
    torch_threads(
        static_cast<int64_t>(tensors_.size()), kGrain,
        [](int64_t begin, int64_t end, void* context) {
          (*static_cast<decltype(look)*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&look)));
    return !same;
  }

 private:
  // Calls see(number) for the address, dtype, number of dimensions, sizes and strides, until it
  // says false; then so does visit.
  template <class See>
  static bool visit(const Tensor& tensor, const See& see) {
    void* address;
    int32_t dtype;
    int64_t ndim, *sizes, *strides;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &address));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &ndim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
    if (!see(reinterpret_cast<int64_t>(address)) || !see(dtype) || !see(ndim)) return false;
    for (int64_t d = 0; d < ndim; ++d) {
      if (!see(sizes[d]) || !see(strides[d])) return false;
    }
    return true;
  }

  std::vector<Tensor> tensors_;
  std::vector<int64_t> seen_;  // the numbers of all tensors, one after another
  std::vector<size_t> first_;  // where those of each tensor begin
};

Watch* at(int64_t watch) { return reinterpret_cast<Watch*>(watch); }

int64_t watch(const std::vector<Tensor>& tensors) {
  return reinterpret_cast<int64_t>(std::make_unique<Watch>(tensors).release());
}

bool watch_moved(int64_t watch) { return at(watch)->moved(); }

void unwatch(int64_t watch) { delete at(watch); }

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CompositeExplicitAutograd, m) {
  m.impl("_watch", TORCH_BOX(&effkern::watch));
  m.impl("_watch_moved", TORCH_BOX(&effkern::watch_moved));
  m.impl("_unwatch", TORCH_BOX(&effkern::unwatch));
}
