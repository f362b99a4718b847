// An argument that is a list of tensors, read in place.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "torch/arguments.h"

namespace effkern {

// TORCH_BOX makes a std::vector<Tensor> of such an argument: two allocations a tensor, and as many
// visits to its record. Over thousands of small tensors that costs more than the work on them.
class TensorList {
 public:
  // Takes over the list in `argument`.
  explicit TensorList(StableIValue argument)
      : list_(torch::stable::detail::to<StableListHandle>(argument)) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list_, &size_));
  }
  ~TensorList() {
    for (size_t i = 0; i < size_; ++i) aoti_torch_delete_tensor_object((*this)[i]);
    torch_delete_list(list_);
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  int64_t size() const { return static_cast<int64_t>(size_); }

  // Lives as long as the list does.
  AtenTensorHandle operator[](int64_t i) const {
    StableIValue item = 0;
    torch_list_get_item(list_, static_cast<size_t>(i), &item);  // fails for no i below size()
    return torch::stable::detail::to<AtenTensorHandle>(item);
  }

 private:
  StableListHandle list_;
  size_t size_ = 0;
};

}  // namespace effkern
