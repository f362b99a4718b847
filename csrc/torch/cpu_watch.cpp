// effkern::_watch, _watch_moved and _unwatch: whether tensors, on any device, still stand where
// they stood. An optimizer asks this of every state at every step.
#include <atomic>
#include <memory>
#include <vector>

#include "torch/cpu.h"

namespace effkern {
namespace {

// What a table of addresses relies on. Sizes and strides are left out: they stand elsewhere in a
// tensor's record, and reading them too would cost half as much again.
struct Place {
  void* address;
  int64_t numel;
  int32_t dtype;
  bool operator==(const Place&) const = default;
};

Place place_of(const Tensor& tensor) {
  Place place;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &place.address));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor.get(), &place.numel));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &place.dtype));
  return place;
}

class Watch {
 public:
  explicit Watch(const std::vector<Tensor>& tensors) : tensors_(tensors) {
    for (const Tensor& tensor : tensors_) places_.push_back(place_of(tensor));
  }

  bool moved() const {
    std::atomic<bool> same = true;
    // Nearly all of the time goes into waiting for memory: threads wait side by side.
    constexpr int64_t kGrain = 2048;
    const int64_t count = static_cast<int64_t>(tensors_.size());
    cpu::in_threads(torch_threads, count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (place_of(tensors_[i]) != places_[i]) same = false;
      }
    });
    return !same;
  }

 private:
  std::vector<Tensor> tensors_;
  std::vector<Place> places_;
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
