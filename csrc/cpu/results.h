// Tensors for the results of an operator.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../tensors.h"
#include "result_memory.h"

namespace sslkernels {

// torch_from_blob with a deleter, which torch has had since 2.11.
using FromBlob = AOTITorchError (*)(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                    int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                                    AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
                                    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context),
                                    void* context);

// Null where the torch that runs has none.
inline FromBlob from_blob_lookup() {
  static const auto lookup = [] {
    void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<FromBlob>(library ? dlsym(library, "torch_from_blob") : nullptr);
  }();
  return lookup;
}

inline ResultMemory& result_memory() {
  static auto* const memory = new ResultMemory;  // for good: tensors may outlive everything else
  return *memory;
}

// A dense tensor in the memory of `block`, which goes back with it.
inline Tensor tensor_of(ResultBlock block, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
  const auto give_back = [](void* data, void* bytes) {
    result_memory().give({data, static_cast<int64_t>(reinterpret_cast<intptr_t>(bytes))});
  };
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(from_blob_lookup()(
      block.data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), -1, &handle,
      aoti_torch_layout_strided(), nullptr, 0, give_back, reinterpret_cast<void*>(static_cast<intptr_t>(block.bytes))));
  return Tensor(handle);
}

// Of an element of `like`, or of another dtype among those of results.
inline int64_t bytes_of_one(const Tensor& like, ScalarType dtype) {
  if (dtype == like.scalar_type()) return static_cast<int64_t>(like.element_size());
  if (dtype == ScalarType::Bool) return 1;
  if (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) return 2;
  return dtype == ScalarType::Float ? 4 : 8;
}

// An uninitialised tensor on the CPU, of the dtype of `like` or another.
inline Tensor new_result(const Tensor& like, const std::vector<int64_t>& sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
  const ScalarType type = dtype ? *dtype : like.scalar_type();
  int64_t bytes = bytes_of_one(like, type);
  bool counted = true;  // what no int64 can count is torch's error
  for (const int64_t size : sizes) counted = counted && !__builtin_mul_overflow(bytes, size, &bytes);
  const bool kept = counted && bytes > kKeptResult;
  if (kept && from_blob_lookup())
    if (const ResultBlock block = result_memory().take(bytes); block.data) return tensor_of(block, sizes, type);
  Tensor result = torch::stable::new_empty(like, sizes, type);
  if (kept) prefer_huge_pages(result.mutable_data_ptr(), bytes);
  return result;
}

}  // namespace sslkernels
