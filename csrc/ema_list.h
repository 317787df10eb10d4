// Teachers with their students and copies, and how each lies in memory. No torch, no device.
#pragma once
#include <algorithm>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <unordered_set>
#include <vector>

#include "dtype.h"

namespace sslkernels {

// One teacher with its student. Elements that lie densely and in one order in all of its tensors are walked as they lie
// in memory: as (batch, spatial, channels), if row-major is (batch, channels, spatial). That covers row-major tensors
// (one channel), channels_last and transposed matrices. All others have `sizes`, and strides in elements.
struct EmaTensor {
  void* teacher;
  const void* student;
  void* copy;  // bf16, or null
  Dtype teacher_dtype, student_dtype;
  int64_t count;
  int64_t channels, spatial;
  int64_t dims;
  const int64_t* sizes;  // null: dense
  const int64_t *teacher_strides, *student_strides, *copy_strides;
  uint32_t index;  // of the tensor and of its first element, for stochastic rounding
  int64_t first;
};

// A tensor as far as the list is concerned. Strides are in elements.
struct TensorView {
  void* data;
  Dtype dtype;
  int64_t dims;
  const int64_t *sizes, *strides;

  int64_t count() const {
    int64_t product = 1;
    for (int64_t d = 0; d < dims; d++) product *= sizes[d];
    return product;
  }
  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t d = dims - 1; d >= 0; d--) {
      if (sizes[d] != 1 && strides[d] != step) return false;
      step *= sizes[d];
    }
    return true;
  }
  bool same_shape(const TensorView& other) const {
    return dims == other.dims && std::equal(sizes, sizes + dims, other.sizes);
  }
};

// The dimensions of tensors of one shape, neighbours merged wherever all of them allow it.
struct EmaLayout {
  std::vector<int64_t> sizes, strides[3];
  int tensors = 0;

  explicit EmaLayout(std::initializer_list<const TensorView*> views) {
    const TensorView& shape = **views.begin();
    tensors = static_cast<int>(views.size());
    for (int64_t d = 0; d < shape.dims; d++) {
      if (shape.sizes[d] == 1) continue;
      bool merges = !sizes.empty();
      int t = 0;
      for (const TensorView* view : views) merges = merges && strides[t++].back() == shape.sizes[d] * view->strides[d];
      if (!merges) sizes.push_back(1);
      sizes.back() *= shape.sizes[d];
      t = 0;
      for (const TensorView* view : views) {
        if (!merges) strides[t].push_back(0);
        strides[t++].back() = view->strides[d];
      }
    }
  }

  // Whether memory holds (batch, spatial, channels) of a row-major (batch, channels, spatial), in every tensor.
  bool transposed(int64_t& channels, int64_t& spatial) const {
    const size_t dims = sizes.size();
    if (dims < 2 || dims > 3) return false;
    for (int t = 1; t < tensors; t++)
      if (strides[t] != strides[0]) return false;
    const int64_t inner = sizes[dims - 2], outer = sizes[dims - 1];
    if (strides[0][dims - 2] != 1 || strides[0][dims - 1] != inner || (dims == 3 && strides[0][0] != inner * outer))
      return false;
    channels = inner;
    spatial = outer;
    return true;
  }
};

class EmaList {
 public:
  explicit EmaList(size_t size) {
    tensors.reserve(size);
    written_.reserve(size);
  }

  // All of one shape. Returns false, and adds nothing, where two elements of what is written may be one, or where
  // memory is missing.
  bool add(const TensorView& teacher, const TensorView& student, const TensorView* copy, uint32_t index,
           int64_t first) {
    EmaTensor t{};
    t.teacher = teacher.data;
    t.student = student.data;
    t.copy = copy ? copy->data : nullptr;
    t.teacher_dtype = teacher.dtype;
    t.student_dtype = student.dtype;
    t.count = teacher.count();
    t.channels = 1;
    t.index = index;
    t.first = first;
    if (t.count == 0) return true;
    if (!t.teacher || !t.student || (copy && !t.copy)) return false;  // storage that was freed, say
    if (!written_.insert(t.teacher).second || (copy && !written_.insert(t.copy).second)) return false;
    if (!teacher.is_contiguous() || !student.is_contiguous() || (copy && !copy->is_contiguous())) {
      EmaLayout layout = copy ? EmaLayout{&teacher, &student, copy} : EmaLayout{&teacher, &student};
      if (!layout.transposed(t.channels, t.spatial)) {
        if (has_zero(layout.strides[0]) || has_zero(layout.strides[2])) return false;
        const EmaLayout& kept = layouts_.emplace_back(std::move(layout));
        t.dims = static_cast<int64_t>(kept.sizes.size());
        t.sizes = kept.sizes.data();
        t.teacher_strides = kept.strides[0].data();
        t.student_strides = kept.strides[1].data();
        t.copy_strides = kept.strides[2].data();
      }
    }
    tensors.push_back(t);
    return true;
  }

  std::vector<EmaTensor> tensors;

 private:
  static bool has_zero(const std::vector<int64_t>& strides) {
    return std::find(strides.begin(), strides.end(), 0) != strides.end();
  }

  std::deque<EmaLayout> layouts_;
  std::unordered_set<const void*> written_;
};

}  // namespace sslkernels
