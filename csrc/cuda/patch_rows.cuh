// Rows of tokens moved on a GPU: which row goes where is a matter of ids, and what a row holds is bytes, but where rows
// are added. The widest unit moves that all addresses are aligned to. Offsets are 64-bit throughout.
#pragma once
#include <cstring>
#include <type_traits>

#include "cuda/patch_select.cuh"
#include "cuda/platform.h"
#include "cuda/storage.cuh"
#include "dtype.h"

namespace sslkernels {
namespace patch_mask {

constexpr int kRowThreads = 256;

// ---- units: what a thread moves at a time

template <class Unit>
__device__ __forceinline__ Unit load_unit(const char* from) {
  if constexpr (sizeof(Unit) == 16)
    return load16(from);
  else
    return *reinterpret_cast<const Unit*>(from);
}

template <class Unit>
__device__ __forceinline__ void store_unit(char* to, Unit unit) {
  if constexpr (sizeof(Unit) == 16)
    store16(to, unit);
  else
    *reinterpret_cast<Unit*>(to) = unit;
}

// A unit of eight bytes over and over.
template <class Unit>
__device__ __forceinline__ Unit filled(uint64_t pattern) {
  const uint64_t twice[2] = {pattern, pattern};
  Unit unit;
  memcpy(&unit, twice, sizeof unit);
  return unit;
}

// A unit as numbers to be added.
template <class T, class Unit>
struct Numbers {
  static constexpr int kCount = sizeof(Unit) / sizeof(typename T::Storage);
  typename T::Real value[kCount];

  Numbers() = default;
  explicit __device__ __forceinline__ Numbers(Unit unit) {
    typename T::Storage raw[kCount];
    memcpy(raw, &unit, sizeof unit);
#pragma unroll
    for (int i = 0; i < kCount; i++) value[i] = T::load(raw[i]);
  }
  __device__ __forceinline__ void operator+=(const Numbers& other) {
#pragma unroll
    for (int i = 0; i < kCount; i++) value[i] += other.value[i];
  }
  __device__ __forceinline__ Unit unit() const {
    typename T::Storage raw[kCount];
#pragma unroll
    for (int i = 0; i < kCount; i++) raw[i] = T::store(value[i]);
    Unit unit;
    memcpy(&unit, raw, sizeof unit);
    return unit;
  }
};

// ---- where rows lie

// Rows of a batch; strides in bytes.
struct Rows {
  char* data;
  int64_t sample_stride, row_stride;

  __host__ __device__ char* row(int64_t sample, int64_t row) const {
    return data + sample * sample_stride + row * row_stride;
  }
  template <class Unit>
  __host__ __device__ static int64_t offset(int64_t unit) {
    return unit * static_cast<int64_t>(sizeof(Unit));
  }
};

// Patches of images or videos (samples, channels, frames, height, width), strides in bytes. A row is a patch in the
// order of a convolution's weight: lines of its width, which run through lines, frames and channels.
struct Images {
  char* data;
  int64_t sample_stride, strides[4];  // of channels, frames, lines and columns
  int64_t grid[3], size[3];           // patches, and elements of one, along frames, lines and columns
  int64_t line_units, unit_stride;    // units of a patch's line, and bytes from one to the next

  int64_t patches() const { return grid[0] * grid[1] * grid[2]; }
  int64_t elements() const { return size[0] * size[1] * size[2]; }  // of a channel of a patch

  __host__ __device__ char* row(int64_t sample, int64_t patch) const {
    const int64_t along = patch / grid[2], column = patch - along * grid[2];
    const int64_t frame = along / grid[1], line = along - frame * grid[1];
    return data + sample * sample_stride + frame * size[0] * strides[1] + line * size[1] * strides[2] +
           column * size[2] * strides[3];
  }
  template <class Unit>
  __host__ __device__ int64_t offset(int64_t unit) const {
    // a patch has fewer than 2^32 units: its divisions are cheap
    const uint32_t at = static_cast<uint32_t>(unit), units = static_cast<uint32_t>(line_units);
    const uint32_t of_line = at / units, column = at - of_line * units;
    const uint32_t of_frame = of_line / static_cast<uint32_t>(size[1]);
    const uint32_t line = of_line - of_frame * static_cast<uint32_t>(size[1]);
    const uint32_t channel = of_frame / static_cast<uint32_t>(size[0]);
    const uint32_t frame = of_frame - channel * static_cast<uint32_t>(size[0]);
    return channel * strides[0] + frame * strides[1] + line * strides[2] + column * unit_stride;
  }
};

// ---- where a row comes from

// The row, or null: then every unit is `fill`.
struct Source {
  const char* row;
  uint64_t fill;
};

// Rows chosen by ids (samples, count), after `prefix` rows as they are. An id outside [0, size) gives `missing`.
template <class From>
struct Gather {
  From from;
  const int64_t* ids;
  int64_t count, prefix, size;
  uint64_t missing;

  __host__ __device__ Source source(int64_t sample, int64_t row) const {
    if (row < prefix) return {from.row(sample, row), 0};
    const int64_t id = ids[sample * count + row - prefix];
    if (id < 0 || id >= size) return {nullptr, missing};
    return {from.row(sample, prefix + id), 0};
  }
};

// All tokens, given their places among the num_keep that are there: those that are not are mask tokens, or zeros
// without one. A negative place gives `missing`.
struct Restore {
  Rows from;
  const int64_t* ids_restore;
  int64_t tokens, prefix, num_keep;
  const char* mask_token;  // or null
  uint64_t missing;

  __host__ __device__ Source source(int64_t sample, int64_t row) const {
    if (row < prefix) return {from.row(sample, row), 0};
    const int64_t place = ids_restore[sample * tokens + row - prefix];
    if (place < 0) return {nullptr, missing};
    if (place >= num_keep) return {mask_token, 0};
    return {from.row(sample, prefix + place), 0};
  }
};

// Positions of equal ids: sorted words of id and position, `count` to a sample.
struct Lists {
  const uint64_t* words;
  int64_t count;

  // The first word of the sample whose id is not below this one.
  __host__ __device__ int64_t first(int64_t sample, int64_t id) const {
    const uint64_t* const of_sample = words + sample * count;
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (of_sample[middle] >> 32 < static_cast<uint64_t>(id))
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  // The first word from `begin` on that is of another id.
  __host__ __device__ int64_t end(int64_t sample, int64_t id, int64_t begin) const {
    const uint64_t* const of_sample = words + sample * count;
    while (begin < count && of_sample[begin] >> 32 == static_cast<uint64_t>(id)) begin++;
    return begin;
  }
  __host__ __device__ int64_t position(int64_t sample, int64_t word) const {
    return static_cast<int64_t>(words[sample * count + word] & 0xffffffff);
  }
};

// ---- kernels: blocks of (threads of a row, rows), grids of (samples, blocks of rows)

template <class Step>
__device__ __forceinline__ void each_row(int64_t rows, const Step& step) {
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < rows; row += int64_t{gridDim.y} * blockDim.y)
    step(int64_t{blockIdx.x}, row);
}

template <class Unit, class Map>
__global__ void __launch_bounds__(kRowThreads)
    patch_move_kernel(const Map map, const Rows to, int64_t rows, int64_t units) {
  constexpr int kUnroll = 4;  // loads on the way at a time
  each_row(rows, [&](int64_t sample, int64_t row) {
    const Source source = map.source(sample, row);
    char* const target = to.row(sample, row);
    const int64_t step = blockDim.x;
    const auto load = [&](int64_t at) { return load_unit<Unit>(source.row + map.from.template offset<Unit>(at)); };
    int64_t at = threadIdx.x;
    if (!source.row) {
      for (; at < units; at += step) store_unit(target + Rows::offset<Unit>(at), filled<Unit>(source.fill));
      return;
    }
    for (; at + (kUnroll - 1) * step < units; at += kUnroll * step) {
      Unit unit[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; i++) unit[i] = load(at + i * step);
#pragma unroll
      for (int i = 0; i < kUnroll; i++) store_unit(target + Rows::offset<Unit>(at + i * step), unit[i]);
    }
    for (; at < units; at += step) store_unit(target + Rows::offset<Unit>(at), load(at));
  });
}

// Rows restored and added to those of `positions`, whose first is for row `first_position`.
template <class T, class Unit>
__global__ void __launch_bounds__(kRowThreads)
    patch_restore_kernel(const Restore map, const Rows to, const Rows positions, int64_t first_position, int64_t rows,
                         int64_t units) {
  each_row(rows, [&](int64_t sample, int64_t row) {
    const Source source = map.source(sample, row);
    char* const target = to.row(sample, row);
    const char* const position = row < first_position ? nullptr : positions.row(0, row - first_position);
    for (int64_t at = threadIdx.x; at < units; at += blockDim.x) {
      const int64_t offset = Rows::offset<Unit>(at);
      Unit unit = source.row ? load_unit<Unit>(source.row + offset) : filled<Unit>(source.fill);
      if (position) {
        Numbers<T, Unit> sum(unit);
        sum += Numbers<T, Unit>(load_unit<Unit>(position + offset));
        unit = sum.unit();
      }
      store_unit(target + offset, unit);
    }
  });
}

// The transpose of a Gather: every row becomes the sum of those that were taken from it, in order of position.
template <class T, class Unit, class To>
__global__ void __launch_bounds__(kRowThreads)
    patch_scatter_kernel(const Rows grad, const Lists lists, const To to, int64_t prefix, int64_t rows, int64_t units) {
  each_row(rows, [&](int64_t sample, int64_t row) {
    const bool is_prefix = row < prefix;
    const int64_t begin = is_prefix ? 0 : lists.first(sample, row - prefix);
    const int64_t end = is_prefix ? 1 : lists.end(sample, row - prefix, begin);
    char* const target = to.row(sample, row);
    const auto source = [&](int64_t i) {
      return grad.row(sample, is_prefix ? row : prefix + lists.position(sample, i));
    };
    for (int64_t at = threadIdx.x; at < units; at += blockDim.x) {
      const int64_t offset = Rows::offset<Unit>(at);
      Unit unit = begin < end ? load_unit<Unit>(source(begin) + offset) : filled<Unit>(0);
      if (end - begin > 1) {
        Numbers<T, Unit> sum(unit);
        for (int64_t i = begin + 1; i < end; i++) sum += Numbers<T, Unit>(load_unit<Unit>(source(i) + offset));
        unit = sum.unit();
      }
      store_unit(target + to.template offset<Unit>(at), unit);
    }
  });
}

}  // namespace patch_mask
}  // namespace sslkernels
