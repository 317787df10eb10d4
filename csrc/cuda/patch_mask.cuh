// Patch masking on a GPU: the order of the steps. patch_select.cuh chooses tokens, patch_rows.cuh moves them and
// patch_sums.cuh adds up gradients. What allocates is the caller's `Host`: torch on a GPU, plain memory where the tests
// run this on the CPU.
//
//   void* allocate(int64_t bytes)       memory aligned to 16 bytes that lives until the call has ended
//   void check()                        follows every launch
//   cudaStream_t stream
#pragma once
#include <algorithm>

#include "cuda/patch_rows.cuh"
#include "cuda/patch_select.cuh"
#include "cuda/patch_sums.cuh"

namespace sslkernels {
namespace patch_mask {

constexpr int64_t kMaxTokens = 0x7fffffff;  // of a sample: an index is half of a word that is sorted
constexpr int64_t kMaxGridY = 65535;

// Eight bytes of NaN.
inline uint64_t nan_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return 0x7fc000007fc00000;
    case Dtype::kBFloat16:
      return 0x7fc07fc07fc07fc0;
    case Dtype::kFloat16:
      return 0x7e007e007e007e00;
    default:
      return 0x7ff8000000000000;
  }
}

// f(Fp32{}), or whatever the dtype is.
template <class F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(Fp32{});
    case Dtype::kBFloat16:
      return f(Bf16{});
    case Dtype::kFloat16:
      return f(Fp16{});
    case Dtype::kFloat64:
      return f(Fp64{});
  }
}

// The bytes of the widest unit that divides all these addresses, strides and sizes, from two to 16.
template <class... Bytes>
int64_t unit_bytes(Bytes... bytes) {
  const int64_t any = (int64_t{16} | ... | bytes);
  return any & -any;
}

inline int64_t address(const void* memory) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory)); }
inline int64_t alignment(const Rows& rows) {
  return unit_bytes(address(rows.data), rows.sample_stride, rows.row_stride);
}

// f(a unit) of so many bytes.
template <class F>
void with_unit(int64_t bytes, const F& f) {
  switch (bytes) {
    case 16:
      return f(uint4{});
    case 8:
      return f(uint2{});
    case 4:
      return f(uint32_t{});
    default:
      return f(uint16_t{});
  }
}

// f(type, unit): 16 bytes where all is aligned to them, or one number.
template <class F>
void with_numbers(Dtype dtype, int64_t bytes, const F& f) {
  with_type(dtype, [&](auto type) {
    if (bytes == 16)
      f(type, uint4{});
    else
      f(type, typename decltype(type)::Storage{});
  });
}

// Blocks of a kernel that goes by rows.
struct RowGrid {
  dim3 grid, block;

  RowGrid(int64_t samples, int64_t rows, int64_t units) {
    unsigned lanes = 1;
    while (lanes < 32 && lanes < units) lanes *= 2;
    const int64_t together = std::min<int64_t>(kRowThreads / lanes, rows);
    block = dim3(lanes, static_cast<unsigned>(together));
    const int64_t blocks = std::min((rows + together - 1) / together, kMaxGridY);
    grid = dim3(static_cast<unsigned>(samples), static_cast<unsigned>(blocks));
  }
};

// A dense tensor (samples, rows, dim).
inline Rows dense_rows(void* data, int64_t rows, int64_t row_bytes) {
  return {static_cast<char*>(data), rows * row_bytes, row_bytes};
}

// ---- ids

template <class Host>
void select(Host& host, const Selection& s, int64_t samples) {
  if (!samples || !s.tokens) return;
  launch_select(s, samples, host.stream);
  host.check();
}

template <class Host>
void invert(Host& host, const Selection& s, int64_t samples) {
  if (!samples || !s.tokens) return;
  launch_invert(s, samples, host.stream);
  host.check();
}

// Sorted words of the ids and their positions.
template <class Host>
Lists lists_of(Host& host, const int64_t* ids, int64_t samples, int64_t count, int64_t size) {
  auto* const words = static_cast<uint64_t*>(host.allocate(std::max<int64_t>(samples * count, 1) * 8));
  if (samples && count) {
    const size_t shared = std::min<int64_t>(count, kSortChunk) * sizeof(uint64_t);
    SSLK_LAUNCH(patch_lists_kernel, static_cast<unsigned>(samples), threads_for((count + 1) / 2), shared, host.stream,
                ids, count, size, words);
    host.check();
  }
  return {words, count};
}

// ---- tokens

// to (samples, rows): the rows that `map` names. `bytes` is what everything is aligned to.
template <class Host, class Map>
void move_rows(Host& host, const Map& map, const Rows& to, int64_t samples, int64_t rows, int64_t row_bytes,
               int64_t bytes) {
  if (!samples || !rows || !row_bytes) return;
  with_unit(bytes, [&](auto unit) {
    using Unit = decltype(unit);
    const int64_t units = row_bytes / static_cast<int64_t>(sizeof unit);
    const RowGrid at(samples, rows, units);
    SSLK_LAUNCH((patch_move_kernel<Unit, Map>), at.grid, at.block, 0, host.stream, map, to, rows, units);
    host.check();
  });
}

// x (samples, prefix + tokens, dim) -> out (samples, prefix + count, dim)
template <class Host>
void gather_tokens(Host& host, Dtype dtype, const Rows& x, const int64_t* ids, int64_t samples, int64_t count,
                   int64_t tokens, int64_t prefix, int64_t dim, void* out) {
  const int64_t row_bytes = dim * itemsize(dtype);
  const Rows to = dense_rows(out, prefix + count, row_bytes);
  move_rows(host, Gather<Rows>{x, ids, count, prefix, tokens, nan_of(dtype)}, to, samples, prefix + count, row_bytes,
            unit_bytes(alignment(x), alignment(to)));
}

// The sum of all rows of grad (samples, prefix + count) that were taken from a row of `to` (samples, prefix + tokens).
template <class Host, class To>
void scatter_rows(Host& host, Dtype dtype, const Rows& grad, const int64_t* ids, int64_t samples, int64_t count,
                  int64_t tokens, int64_t prefix, int64_t row_bytes, const To& to, int64_t bytes) {
  if (!samples || !(prefix + tokens) || !row_bytes) return;
  const Lists lists = lists_of(host, ids, samples, count, tokens);
  with_numbers(dtype, bytes, [&](auto type, auto unit) {
    using Type = decltype(type);
    using Unit = decltype(unit);
    const int64_t units = row_bytes / static_cast<int64_t>(sizeof unit);
    const RowGrid at(samples, prefix + tokens, units);
    SSLK_LAUNCH((patch_scatter_kernel<Type, Unit, To>), at.grid, at.block, 0, host.stream, grad, lists, to, prefix,
                prefix + tokens, units);
    host.check();
  });
}

template <class Host>
void gather_tokens_backward(Host& host, Dtype dtype, const Rows& grad, const int64_t* ids, int64_t samples,
                            int64_t count, int64_t tokens, int64_t prefix, int64_t dim, void* out) {
  const int64_t row_bytes = dim * itemsize(dtype);
  const Rows to = dense_rows(out, prefix + tokens, row_bytes);
  scatter_rows(host, dtype, grad, ids, samples, count, tokens, prefix, row_bytes, to,
               unit_bytes(alignment(grad), alignment(to)));
}

// Where the positional embedding lies, (positions, dim), dense: of all rows, or of the tokens after the prefix.
struct Positions {
  const void* data;  // or null
  int64_t count;
};

// x (samples, prefix + num_keep, dim) -> out (samples, prefix + tokens, dim)
template <class Host>
void restore_tokens(Host& host, Dtype dtype, const Restore& map, const Positions& positions, int64_t samples,
                    int64_t dim, void* out) {
  const int64_t row_bytes = dim * itemsize(dtype), rows = map.prefix + map.tokens;
  const Rows to = dense_rows(out, rows, row_bytes);
  const int64_t bytes = unit_bytes(alignment(map.from), alignment(to), address(map.mask_token));
  if (!positions.data) return move_rows(host, map, to, samples, rows, row_bytes, bytes);
  if (!samples || !rows || !dim) return;
  const Rows added = dense_rows(const_cast<void*>(positions.data), 0, row_bytes);
  with_numbers(dtype, unit_bytes(bytes, alignment(added)), [&](auto type, auto unit) {
    using Type = decltype(type);
    using Unit = decltype(unit);
    const int64_t units = row_bytes / static_cast<int64_t>(sizeof unit);
    const RowGrid at(samples, rows, units);
    SSLK_LAUNCH((patch_restore_kernel<Type, Unit>), at.grid, at.block, 0, host.stream, map, to, added,
                rows - positions.count, rows, units);
    host.check();
  });
}

// Memory of gradients, dense; null where one is not wanted. `positions` has `count` rows.
struct RestoreGradients {
  void *x, *mask_token, *positions;
  int64_t count;
};

// totals (rows, dim) in the dtype of T, of parts (count, rows, dim).
template <class T, class Host>
void total(Host& host, const typename T::Real* parts, int64_t count, int64_t rows, int64_t dim, void* totals) {
  unsigned lanes = 1;
  while (lanes < kTotalLanes && lanes < count) lanes *= 2;
  const int64_t blocks = rows * ((dim + kTotalColumns - 1) / kTotalColumns);
  SSLK_LAUNCH((patch_total_kernel<T>), static_cast<unsigned>(blocks), dim3(kTotalColumns, lanes), 0, host.stream, parts,
              count, rows, dim, static_cast<typename T::Storage*>(totals));
  host.check();
}

template <class T, class Unit, class Host>
void restore_sums(Host& host, const Rows& grad, Sums<T> sums, const SumPlan& plan, const RestoreGradients& grads) {
  using Real = typename T::Real;
  const int64_t dim = plan.units * Numbers<T, Unit>::kCount;
  const auto allocate = [&](int64_t rows) {
    return static_cast<Real*>(host.allocate(rows * dim * static_cast<int64_t>(sizeof(Real))));
  };
  if (grads.mask_token) sums.of_masked = allocate(plan.segments * plan.tiles);
  if (grads.positions && plan.segments > 1) sums.of_positions = allocate(plan.segments * grads.count);
  sums.positions = static_cast<char*>(grads.positions);
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.segments), plan.column_blocks);
  SSLK_LAUNCH((patch_sum_kernel<T, Unit>), grid, plan.threads, 0, host.stream, grad, sums, plan);
  host.check();
  if (grads.mask_token) total<T>(host, sums.of_masked, plan.segments * plan.tiles, 1, dim, grads.mask_token);
  if (sums.of_positions) total<T>(host, sums.of_positions, plan.segments, grads.count, dim, grads.positions);
}

// grad (samples, prefix + tokens, dim), of which num_keep tokens of each sample came from x. Where grad is empty the
// sums are not written.
template <class Host>
void restore_tokens_backward(Host& host, Dtype dtype, const Rows& grad, const int64_t* ids_restore, int64_t samples,
                             int64_t tokens, int64_t num_keep, int64_t prefix, int64_t dim,
                             const RestoreGradients& grads) {
  const int64_t row_bytes = dim * itemsize(dtype), rows = prefix + tokens;
  if (!samples || !dim) return;
  if (grads.x) {
    const Rows to = dense_rows(grads.x, prefix + num_keep, row_bytes);
    auto* const places = static_cast<int64_t*>(host.allocate(std::max<int64_t>(samples * num_keep, 1) * 8));
    SSLK_LAUNCH(patch_places_kernel, static_cast<unsigned>(samples), threads_for(tokens), 0, host.stream, ids_restore,
                tokens, places, num_keep);
    host.check();
    move_rows(host, Gather<Rows>{grad, places, num_keep, prefix, tokens, 0}, to, samples, prefix + num_keep, row_bytes,
              unit_bytes(alignment(grad), alignment(to)));
  }
  if (!rows || (!grads.mask_token && !grads.positions)) return;
  const int64_t bytes = unit_bytes(alignment(grad), row_bytes, address(grads.positions));
  with_numbers(dtype, bytes, [&](auto type, auto unit) {
    using Type = decltype(type);
    using Unit = decltype(unit);
    const SumPlan plan(samples, rows, row_bytes / static_cast<int64_t>(sizeof unit));
    const Sums<Type> sums{ids_restore, tokens, prefix, num_keep, rows - grads.count, nullptr, nullptr, nullptr};
    restore_sums<Type, Unit>(host, grad, sums, plan, grads);
  });
}

// ---- patches

// Images of five dimensions and their strides in elements, and patches of so many frames, lines and columns.
inline Images images_of(void* data, Dtype dtype, const int64_t (&sizes)[5], const int64_t (&strides)[5],
                        const int64_t (&patch)[3]) {
  const int64_t bytes = itemsize(dtype);
  Images images{};
  images.data = static_cast<char*>(data);
  images.sample_stride = strides[0] * bytes;
  for (int i = 0; i < 4; i++) images.strides[i] = strides[i + 1] * bytes;
  for (int i = 0; i < 3; i++) {
    images.size[i] = patch[i];
    images.grid[i] = sizes[i + 2] / patch[i];
  }
  return images;
}

// Sets the unit that lines move by, at most `bytes` wide, and returns its width: one element where they are not dense.
inline int64_t set_unit(Images& images, Dtype dtype, int64_t bytes) {
  const int64_t element = itemsize(dtype), line = images.size[2] * element;
  const bool dense = images.strides[3] == element;
  if (dense)
    bytes = unit_bytes(bytes, address(images.data), images.sample_stride, images.strides[0], images.strides[1],
                       images.strides[2], line);
  else
    bytes = element;
  images.line_units = line / bytes;
  images.unit_stride = dense ? bytes : images.strides[3];
  return bytes;
}

// images -> out (samples, count, elements of a patch)
template <class Host>
void gather_patches(Host& host, Dtype dtype, Images images, const int64_t* ids, int64_t samples, int64_t count,
                    int64_t channels, void* out) {
  const int64_t row_bytes = channels * images.elements() * itemsize(dtype);
  const Rows to = dense_rows(out, count, row_bytes);
  const int64_t bytes = set_unit(images, dtype, alignment(to));
  move_rows(host, Gather<Images>{images, ids, count, 0, images.patches(), nan_of(dtype)}, to, samples, count, row_bytes,
            bytes);
}

// grad (samples, count, elements of a patch) -> images, dense, every element of which lies in a patch
template <class Host>
void gather_patches_backward(Host& host, Dtype dtype, const Rows& grad, const int64_t* ids, int64_t samples,
                             int64_t count, int64_t channels, Images images) {
  const int64_t row_bytes = channels * images.elements() * itemsize(dtype);
  int64_t bytes = set_unit(images, dtype, alignment(grad));
  if (bytes != 16) bytes = set_unit(images, dtype, itemsize(dtype));  // sums go by 16 bytes or by one number
  scatter_rows(host, dtype, grad, ids, samples, count, images.patches(), 0, row_bytes, images, bytes);
}

}  // namespace patch_mask
}  // namespace sslkernels
