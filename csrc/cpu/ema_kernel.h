// The loops of the moving average, compiled once per instruction set. A block of elements is read as floats (doubles
// where a tensor is float64), moved towards the student, and written back rounded to nearest or stochastically.
#pragma once
#include "../rounding.h"
#include "ema.h"
#include "philox_vector.h"
#include "storage.h"

namespace sslkernels::SSLK_ISA {

constexpr int64_t kEmaBlock = 256;

SSLK_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
SSLK_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

// start at weight 0 or where both are equal, end at weight 1, bit for bit. Every backend rounds as this does: once for
// the difference, once for the rest.
template <class Real>
struct Lerp {
  explicit Lerp(double weight)
      : from_end(weight >= 0.5),
        at_end(weight == 1),
        factor(from_end ? static_cast<Real>(weight) - 1 : static_cast<Real>(weight)) {}
  SSLK_INLINE Real operator()(Real start, Real end) const {
    const Real moved = fma(factor, end - start, from_end ? end : start);
    return at_end ? end : end == start ? start : moved;
  }
  const bool from_end, at_end;
  const Real factor;
};

// ---- rounding

// 16 random bits of an element; eight neighbours share a counter.
SSLK_INLINE uint16_t random_bits(const EmaTensor& tensor, const EmaJob& job, int64_t element) {
  const uint64_t at = static_cast<uint64_t>(element);
  uint32_t words[4] = {static_cast<uint32_t>(at >> 3), tensor.index, job.step, kPhiloxEma};
  philox(words, job.seed, PhiloxScalar{});
  return static_cast<uint16_t>(words[at >> 1 & 3] >> (at & 1) * 16);
}

// The random bits of `count` elements from `element` on, one after the other; returns where they start in `buffer`.
SSLK_INLINE const uint16_t* random_run(const EmaTensor& tensor, const EmaJob& job, int64_t element, int64_t count,
                                       uint16_t* buffer) {
  const VecWord zero{}, lanes = (VecWord)lane_index() + static_cast<uint32_t>(element >> 3);
  const VecWord index = zero + tensor.index, step = zero + job.step, stream = zero + uint32_t{kPhiloxEma};
  const int64_t skip = element & 7, counters = (skip + count + 7) / 8;
  for (int64_t at = 0; at < counters; at += 2 * kLanes) {
    const VecWord counter = lanes + static_cast<uint32_t>(at);
    WordPair c[4] = {{counter, counter + uint32_t{kLanes}}, {index, index}, {step, step}, {stream, stream}};
    philox(c, job.seed, PhiloxVector{});
    store_blocks(c[0].a, c[1].a, c[2].a, c[3].a, buffer + at * 8);
    store_blocks(c[0].b, c[1].b, c[2].b, c[3].b, buffer + (at + kLanes) * 8);
  }
  return buffer + skip;
}

SSLK_INLINE uint16_t round_stochastically(Bf16, float x, uint32_t random) { return stochastic_bf16(x, random); }
SSLK_INLINE uint16_t round_stochastically(Fp16, float x, uint32_t random) { return stochastic_fp16(x, random); }

// ---- dense tensors, in place

template <class Real, class Teacher, class Student, bool kCopy>
void update_dense(const EmaTensor& tensor, const EmaJob& job, int64_t begin, int64_t end) {
  const Lerp<Real> lerp(job.weight);
  auto* teacher = static_cast<typename Teacher::Storage*>(tensor.teacher);
  const auto* student = static_cast<const typename Student::Storage*>(tensor.student);
  auto* copy = static_cast<uint16_t*>(tensor.copy);
#pragma GCC ivdep
  for (int64_t i = begin; i < end; i++) {
    const Real value = lerp(Teacher::load(teacher[i]), Student::load(student[i]));
    teacher[i] = Teacher::store(value);
    if (kCopy) copy[i] = to_bf16(value);
  }
}

template <class Teacher, class Student>
void update_dense_stochastically(const EmaTensor& tensor, const EmaJob& job, int64_t begin, int64_t end) {
  const Lerp<float> lerp(job.weight);
  alignas(64) uint16_t bits[kEmaBlock + 16 * kLanes];
  for (int64_t at = begin; at < end; at += kEmaBlock) {
    const int64_t count = min(kEmaBlock, end - at);
    auto* teacher = static_cast<typename Teacher::Storage*>(tensor.teacher) + at;
    const auto* student = static_cast<const typename Student::Storage*>(tensor.student) + at;
    const uint16_t* random = random_run(tensor, job, tensor.first + at, count, bits);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++) {
      const float value = lerp(Teacher::load(teacher[i]), Student::load(student[i]));
      teacher[i] = round_stochastically(Teacher{}, value, random[i]);
    }
  }
}

// ---- any strides, any dtypes

// The row-major index of the element that comes at `position` in memory.
SSLK_INLINE int64_t element_at(const EmaTensor& t, int64_t position) {
  if (t.sizes || t.channels == 1) return position;
  const int64_t plane = t.channels * t.spatial, inside = position % plane;
  return position - inside + inside % t.channels * t.spatial + inside / t.channels;
}

// Where a run of elements along the last dimension starts, and its step.
struct EmaRun {
  EmaRun(const EmaTensor& t, const int64_t* strides, int64_t position)
      : offset(t.sizes ? 0 : position), step(t.sizes ? strides[t.dims - 1] : 1) {
    for (int64_t d = t.dims - 1; t.sizes && d >= 0; d--) {
      offset += position % t.sizes[d] * strides[d];
      position /= t.sizes[d];
    }
  }
  SSLK_INLINE int64_t operator[](int64_t i) const { return offset + i * step; }
  int64_t offset;
  const int64_t step;
};

template <class Real>
SSLK_INLINE void write(Dtype dtype, void* to, int64_t offset, Real value) {
  with_any_storage(dtype, [&](auto type) {
    typedef decltype(type.load({})) Value;
    static_cast<typename decltype(type)::Storage*>(to)[offset] = type.store(static_cast<Value>(value));
  });
}
template <class Real>
SSLK_INLINE Real read(Dtype dtype, const void* from, int64_t offset) {
  Real value{};
  with_any_storage(dtype, [&](auto type) {
    value = static_cast<Real>(type.load(static_cast<const typename decltype(type)::Storage*>(from)[offset]));
  });
  return value;
}

template <class Real>
SSLK_INLINE void write_rounded(const EmaTensor& tensor, const EmaJob& job, int64_t position, int64_t at, Real value) {
  const Dtype dtype = tensor.teacher_dtype;
  if (!job.stochastic || (dtype != Dtype::kBFloat16 && dtype != Dtype::kFloat16))
    return write(dtype, tensor.teacher, at, value);
  const uint16_t random = random_bits(tensor, job, tensor.first + element_at(tensor, position));
  const float x = static_cast<float>(value);
  static_cast<uint16_t*>(tensor.teacher)[at] =
      dtype == Dtype::kBFloat16 ? round_stochastically(Bf16{}, x, random) : round_stochastically(Fp16{}, x, random);
}

template <class Real>
void update_any(const EmaTensor& tensor, const EmaJob& job, int64_t begin, int64_t end) {
  const Lerp<Real> lerp(job.weight);
  const int64_t inner = tensor.sizes ? tensor.sizes[tensor.dims - 1] : tensor.count;
  for (int64_t position = begin; position < end;) {
    const EmaRun teacher(tensor, tensor.teacher_strides, position), student(tensor, tensor.student_strides, position);
    const EmaRun copy(tensor, tensor.copy ? tensor.copy_strides : tensor.teacher_strides, position);
    const int64_t run = min(end - position, inner - position % inner);
    for (int64_t i = 0; i < run; i++) {
      Real value = read<Real>(tensor.teacher_dtype, tensor.teacher, teacher[i]);
      if (job.weight != 0) {
        value = lerp(value, read<Real>(tensor.student_dtype, tensor.student, student[i]));
        write_rounded(tensor, job, position + i, teacher[i], value);
      }
      if (tensor.copy) static_cast<uint16_t*>(tensor.copy)[copy[i]] = to_bf16(static_cast<float>(value));
    }
    position += run;
  }
}

// ---- the choice

template <class Teacher>
void update_dense_from(const EmaTensor& tensor, const EmaJob& job, int64_t begin, int64_t end) {
  with_storage(tensor.student_dtype, [&](auto student) {
    typedef decltype(student) Student;
    if constexpr (sizeof(typename Teacher::Storage) == 2) {
      if (job.stochastic) return update_dense_stochastically<Teacher, Student>(tensor, job, begin, end);
    } else {
      if (tensor.copy) return update_dense<float, Teacher, Student, true>(tensor, job, begin, end);
    }
    update_dense<float, Teacher, Student, false>(tensor, job, begin, end);
  });
}

inline void update_ema(const EmaTensor& tensor, const EmaJob& job, int64_t begin, int64_t end) {
  const bool is_double = tensor.teacher_dtype == Dtype::kFloat64 || tensor.student_dtype == Dtype::kFloat64;
  const bool any = tensor.sizes || job.weight == 0 || (job.stochastic && tensor.channels > 1);
  if (is_double && !any && tensor.teacher_dtype == tensor.student_dtype && !tensor.copy)
    return update_dense<double, Fp64, Fp64, false>(tensor, job, begin, end);
  if (is_double) return update_any<double>(tensor, job, begin, end);
  if (any) return update_any<float>(tensor, job, begin, end);
  with_storage(tensor.teacher_dtype, [&](auto teacher) {  //
    update_dense_from<decltype(teacher)>(tensor, job, begin, end);
  });
}

EmaKernel ema_kernel() { return {update_ema}; }

}  // namespace sslkernels::SSLK_ISA
