// The moving average on a GPU: every tensor of the list in one launch. Moves 16 bytes at a time where the tensors allow
// it; a thread then has eight neighbours, as many as share a counter of Philox.
#pragma once
#include <algorithm>
#include <vector>

#include "cuda/ema.h"
#include "cuda/platform.h"
#include "cuda/storage.cuh"

namespace sslkernels {
namespace ema {

constexpr int kMaxDims = 8;
constexpr int kThreads = 256;
constexpr int64_t kBlockElements = kThreads * 16L;  // elements of a tensor that a block updates

// An EmaTensor as the device reads it. Tensors with `dims` are walked by their strides, the others are dense.
struct Entry {
  void* teacher;
  const void* student;
  uint16_t* copy;
  int64_t count, first, spatial, channels;
  int64_t first_block;
  uint32_t index;
  int32_t dims;
  int64_t sizes[kMaxDims], strides[3][kMaxDims];
};

// The tensors of a list that have one pair of dtypes: one launch.
struct Table {
  Dtype teacher, student;
  int64_t blocks = 0;
  std::vector<Entry> entries;

  void add(const EmaTensor& t) {
    Entry entry{};
    entry.teacher = t.teacher;
    entry.student = t.student;
    entry.copy = static_cast<uint16_t*>(t.copy);
    entry.count = t.count;
    entry.first = t.first;
    entry.spatial = t.spatial;
    entry.channels = t.channels;
    entry.first_block = blocks;
    entry.index = t.index;
    if (t.sizes) {
      entry.dims = static_cast<int32_t>(t.dims);
      const int64_t* const strides[] = {t.teacher_strides, t.student_strides, t.copy ? t.copy_strides : nullptr};
      std::copy(t.sizes, t.sizes + t.dims, entry.sizes);
      for (int s = 0; s < 3; s++)
        if (strides[s]) std::copy(strides[s], strides[s] + t.dims, entry.strides[s]);
    }
    blocks += (t.count + kBlockElements - 1) / kBlockElements;
    entries.push_back(entry);
  }
};

// A list as tables; none where a tensor has too many dimensions that do not merge.
inline std::vector<Table> tables_of(const std::vector<EmaTensor>& tensors) {
  std::vector<Table> tables;
  for (const EmaTensor& t : tensors) {
    if (t.sizes && t.dims > kMaxDims) return {};
    const auto same = [&t](const Table& table) {
      return table.teacher == t.teacher_dtype && table.student == t.student_dtype;
    };
    auto table = std::find_if(tables.begin(), tables.end(), same);
    if (table == tables.end()) table = tables.insert(table, Table{t.teacher_dtype, t.student_dtype, 0, {}});
    table->add(t);
  }
  return tables;
}

// ---- the arithmetic

// start at weight 0 or where both are equal, end at weight 1, bit for bit; rounded twice, as on the CPU.
template <class Real>
__device__ __forceinline__ Real lerp(Real start, Real end, double weight) {
  const bool from_end = weight >= 0.5;
  const Real factor = from_end ? static_cast<Real>(weight) - 1 : static_cast<Real>(weight);
  const Real difference = end - start, base = from_end ? end : start;
  Real moved;
  if constexpr (sizeof(Real) == 4)
    moved = fmaf(factor, difference, base);
  else
    moved = fma(factor, difference, base);
  return weight == 1 ? end : end == start ? start : moved;
}

__device__ __forceinline__ void random_words(const Entry& entry, const Options& options, int64_t element,
                                             uint32_t (&words)[4]) {
  words[0] = static_cast<uint32_t>(static_cast<uint64_t>(element) >> 3);
  words[1] = entry.index;
  words[2] = static_cast<uint32_t>(*options.step);
  words[3] = kPhiloxEma;
  philox(words, options.seed, PhiloxScalar{});
}

// ---- eight neighbours, 16 bytes at a time

template <class Teacher, class Student>
__device__ __forceinline__ void update8(const Entry& entry, const Options& options, double weight, int64_t at) {
  auto* teacher = static_cast<typename Teacher::Storage*>(entry.teacher) + at;
  float value[kVector];
  load8<Teacher>(teacher, value);
  if (weight != 0) {
    float student[kVector];
    load8<Student>(static_cast<const typename Student::Storage*>(entry.student) + at, student);
    alignas(16) typename Teacher::Storage raw[kVector];
    uint32_t words[4];
    if (kIs16Bits<Teacher> && options.step) random_words(entry, options, entry.first + at, words);
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      value[i] = lerp(value[i], student[i], weight);
      if constexpr (kIs16Bits<Teacher>)
        raw[i] = options.step ? Teacher::stochastic(value[i], words[i / 2] >> i % 2 * 16 & 0xffff)
                              : Teacher::store(value[i]);
      else
        raw[i] = Teacher::store(value[i]);
    }
    store8(raw, teacher);
  }
  if (entry.copy) {
    alignas(16) uint16_t raw[kVector];
#pragma unroll
    for (int i = 0; i < kVector; i++) raw[i] = Bf16::store(value[i]);
    store8(raw, entry.copy + at);
  }
}

// ---- any strides, one element at a time

struct Division {
  int64_t quotient, rest;
};

// a / b for a >= 0, b > 0, without the call that 64 bits otherwise cost.
__device__ __forceinline__ Division divide(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) {
    const uint32_t quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return {quotient, static_cast<uint32_t>(a) - quotient * static_cast<uint32_t>(b)};
  }
  Division result{0, 0};
  for (int bit = 62; bit >= 0; bit--) {
    result.rest = result.rest * 2 + (a >> bit & 1);
    const bool fits = result.rest >= b;
    result.rest -= fits ? b : 0;
    result.quotient = result.quotient * 2 + fits;
  }
  return result;
}

__device__ __forceinline__ int64_t offset_of(const Entry& entry, int which, int64_t position) {
  if (entry.dims == 0) return position;
  int64_t offset = 0;
  for (int d = entry.dims - 1; d >= 0; d--) {
    const Division at = divide(position, entry.sizes[d]);
    offset += at.rest * entry.strides[which][d];
    position = at.quotient;
  }
  return offset;
}

// The row-major index of the element that comes at `position` in memory.
__device__ __forceinline__ int64_t element_at(const Entry& entry, int64_t position) {
  if (entry.dims || entry.channels == 1) return position;
  const Division plane = divide(position, entry.channels * entry.spatial), inside = divide(plane.rest, entry.channels);
  return position - plane.rest + inside.rest * entry.spatial + inside.quotient;
}

template <class Teacher, class Student>
__device__ __forceinline__ void update1(const Entry& entry, const Options& options, double weight, int64_t position) {
  constexpr bool kDouble = sizeof(typename Teacher::Storage) == 8 || sizeof(typename Student::Storage) == 8;
  using Real = std::conditional_t<kDouble, double, float>;
  auto* teacher = static_cast<typename Teacher::Storage*>(entry.teacher) + offset_of(entry, 0, position);
  Real value = Teacher::load(*teacher);
  if (weight != 0) {
    const auto* student = static_cast<const typename Student::Storage*>(entry.student) + offset_of(entry, 1, position);
    value = lerp(value, static_cast<Real>(Student::load(*student)), weight);
    const auto rounded = static_cast<typename Teacher::Real>(value);
    bool stored = false;
    if constexpr (kIs16Bits<Teacher>) {
      if (options.step) {
        const int64_t element = entry.first + element_at(entry, position);
        uint32_t words[4];
        random_words(entry, options, element, words);
        const int which = static_cast<int>(element & 7);
        const uint32_t word = which < 4 ? (which < 2 ? words[0] : words[1]) : (which < 6 ? words[2] : words[3]);
        *teacher = Teacher::stochastic(rounded, word >> which % 2 * 16 & 0xffff);
        stored = true;
      }
    }
    if (!stored) *teacher = Teacher::store(rounded);
  }
  if (entry.copy) entry.copy[offset_of(entry, 2, position)] = Bf16::store(static_cast<float>(value));
}

// ---- the kernel

template <class Teacher, class Student>
__device__ __forceinline__ void update(const Entry& entry, const Options& options, double weight, int64_t begin,
                                       int64_t end) {
  int64_t done = begin;
  if constexpr (sizeof(typename Teacher::Storage) < 8 && sizeof(typename Student::Storage) < 8) {
    const bool draws = kIs16Bits<Teacher> && options.step;
    const bool wide = entry.dims == 0 && aligned(entry.teacher) && aligned(entry.student) && aligned(entry.copy) &&
                      (!draws || (entry.channels == 1 && entry.first % kVector == 0));
    if (wide) {
      done = end - (end - begin) % kVector;
      for (int64_t at = begin + threadIdx.x * kVector; at < done; at += kThreads * kVector)
        update8<Teacher, Student>(entry, options, weight, at);
    }
  }
  for (int64_t at = done + threadIdx.x; at < end; at += kThreads) update1<Teacher, Student>(entry, options, weight, at);
}

// A block updates kBlockElements of one tensor, which it finds in the table by bisection. All tensors have these
// dtypes.
template <class Teacher, class Student>
__global__ void __launch_bounds__(kThreads)
    ema_update_kernel(const Entry* __restrict__ table, int tensors, const Options options) {
  const bool skip = options.found_inf && *options.found_inf != 0;
  const double weight = skip ? 0 : 1 - *options.momentum;
  int low = 0, high = tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table[middle].first_block <= static_cast<int64_t>(blockIdx.x))
      low = middle;
    else
      high = middle - 1;
  }
  const Entry& entry = table[low];
  SSLK_ASSUME_GLOBAL(entry.teacher);
  SSLK_ASSUME_GLOBAL(entry.student);
  SSLK_ASSUME_GLOBAL(entry.copy);
  if (weight == 0 && !entry.copy) return;
  const int64_t begin = (blockIdx.x - entry.first_block) * kBlockElements;
  const int64_t end = begin + kBlockElements < entry.count ? begin + kBlockElements : entry.count;
  update<Teacher, Student>(entry, options, weight, begin, end);
}

template <class Teacher>
void launch_from(const Table& table, const Entry* on_device, const Options& options, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(table.blocks);
  const int tensors = static_cast<int>(table.entries.size());
  switch (table.student) {
    case Dtype::kFloat32:
      SSLK_LAUNCH((ema_update_kernel<Teacher, Fp32>), blocks, kThreads, 0, stream, on_device, tensors, options);
      break;
    case Dtype::kBFloat16:
      SSLK_LAUNCH((ema_update_kernel<Teacher, Bf16>), blocks, kThreads, 0, stream, on_device, tensors, options);
      break;
    case Dtype::kFloat16:
      SSLK_LAUNCH((ema_update_kernel<Teacher, Fp16>), blocks, kThreads, 0, stream, on_device, tensors, options);
      break;
    case Dtype::kFloat64:
      SSLK_LAUNCH((ema_update_kernel<Teacher, Fp64>), blocks, kThreads, 0, stream, on_device, tensors, options);
      break;
  }
}

// All of a table in one launch; `on_device` is a copy of its entries.
inline void launch(const Table& table, const Entry* on_device, const Options& options, cudaStream_t stream) {
  switch (table.teacher) {
    case Dtype::kFloat32:
      return launch_from<Fp32>(table, on_device, options, stream);
    case Dtype::kBFloat16:
      return launch_from<Bf16>(table, on_device, options, stream);
    case Dtype::kFloat16:
      return launch_from<Fp16>(table, on_device, options, stream);
    case Dtype::kFloat64:
      return launch_from<Fp64>(table, on_device, options, stream);
  }
}

}  // namespace ema
}  // namespace sslkernels
