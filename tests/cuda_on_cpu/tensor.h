// torch's CPU tensors as arguments of bound functions, without torch's headers.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "types.h"

// The elements of a contiguous CPU tensor; nullptr for None.
template <class T>
struct Tensor {
  T* data = nullptr;
  int64_t size = 0;
  operator T*() const { return data; }

  using Element = std::remove_const_t<T>;
  static constexpr const char* kName = std::is_same_v<Element, float>           ? "float32"
                                       : std::is_same_v<Element, double>        ? "float64"
                                       : std::is_same_v<Element, __nv_bfloat16> ? "bfloat16"
                                       : std::is_same_v<Element, __half>        ? "float16"
                                       : std::is_same_v<Element, int64_t>       ? "int64"
                                       : std::is_same_v<Element, int32_t>       ? "int32"
                                       : std::is_same_v<Element, uint32_t>      ? "uint32"
                                       : std::is_same_v<Element, bool>          ? "bool"
                                                                                : "uint8";
};
template <class T>
using In = Tensor<const T>;
template <class T>
using Out = Tensor<T>;

namespace pybind11::detail {

template <class T>
struct type_caster<Tensor<T>> {
  PYBIND11_TYPE_CASTER(Tensor<T>, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!hasattr(source, "data_ptr")) return false;
    const std::string dtype = str(source.attr("dtype"));
    if (dtype != std::string("torch.") + Tensor<T>::kName) return false;
    if (std::string(str(source.attr("device"))) != "cpu") return false;
    if (!source.attr("is_contiguous")().template cast<bool>()) return false;
    value.data = reinterpret_cast<T*>(source.attr("data_ptr")().template cast<uintptr_t>());
    value.size = source.attr("numel")().template cast<int64_t>();
    return true;
  }
};

}  // namespace pybind11::detail
