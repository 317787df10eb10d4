// Patches of images as rows, by index, and back. No torch, no instruction set.
#pragma once
#include <cstring>

#include "patch_mask_rows.h"

namespace sslkernels {

// Images or videos (samples, channels, times, height, width) of any strides, in bytes, cut into patches.
struct Patches {
  char* data;
  int64_t samples, channels;
  int64_t step[5];   // by sample, channel, time, line and column
  int64_t grid[3];   // patches along time, height and width
  int64_t patch[3];  // elements along these
  int64_t item;      // bytes of an element

  int64_t count() const { return grid[0] * grid[1] * grid[2]; }
  int64_t elements() const { return channels * patch[0] * patch[1] * patch[2]; }

  // Calls line(address, index) for every line of a patch, with its place in the row: channel, time, line, column.
  template <class Line>
  void for_lines(int64_t sample, int64_t index, const Line& line) const {
    const int64_t column = index % grid[2], above = index / grid[2];
    char* corner = data + sample * step[0] + above / grid[1] * patch[0] * step[2] +
                   above % grid[1] * patch[1] * step[3] + column * patch[2] * step[4];
    int64_t at = 0;
    for (int64_t c = 0; c < channels; c++)
      for (int64_t t = 0; t < patch[0]; t++)
        for (int64_t p = 0; p < patch[1]; p++, at += patch[2])
          line(corner + c * step[1] + t * step[2] + p * step[3], at);
  }
};

template <int64_t kItem>
void copy_strided(char* to, const char* from, int64_t count, int64_t step) {
  for (int64_t i = 0; i < count; i++) std::memcpy(to + i * kItem, from + i * step, kItem);
}

struct GatherPatchesJob {
  Patches images;
  void* to;            // dense (samples, kept, elements)
  const int64_t* ids;  // (samples, kept), in [0, count)
  int64_t kept;
};

inline void copy_line(const Patches& images, const PatchMaskKernel& kernel, char* to, const char* from) {
  const int64_t count = images.patch[2], step = images.step[4];
  if (step == images.item) return kernel.cached.copy(to, from, count * images.item);
  if (images.item == 2) return copy_strided<2>(to, from, count, step);
  if (images.item == 4) return copy_strided<4>(to, from, count, step);
  copy_strided<8>(to, from, count, step);
}

template <class Parallel>
void gather_patches(const GatherPatchesJob& job, const Workers<Parallel>& workers) {
  const Patches& images = job.images;
  const int64_t row_bytes = images.elements() * images.item;
  const TokenRows to = dense_rows(job.to, job.kept, row_bytes);
  workers.share(images.samples * job.kept, rows_per_chunk(row_bytes), [&] {
    return [&](int64_t begin, int64_t end) {
      for_rows(job.kept, begin, end, [&](int64_t n, int64_t k) {
        char* row = to.at(n, k);
        images.for_lines(n, job.ids[n * job.kept + k], [&](const char* from, int64_t at) {
          copy_line(images, workers.kernel, row + at * images.item, from);
        });
      });
    };
  });
}

struct ScatterPatchesJob {
  TokenRows from;  // (samples, kept) rows of elements
  Patches images;  // dense
  const int64_t* ids;
  int64_t kept;
  Dtype dtype;
};

template <class Parallel>
void scatter_patches(const ScatterPatchesJob& job, const Workers<Parallel>& workers) {
  const Patches& images = job.images;
  const int64_t elements = images.elements(), line_bytes = images.patch[2] * images.item;
  const Occurrences found(job.ids, images.samples, job.kept, images.count(), workers);
  workers.share(images.samples * images.count(), rows_per_chunk(elements * images.item), [&] {
    return [&, sum = RowSum(workers.kernel, job.dtype, elements), summed = std::vector<char>(elements * images.item)](
               int64_t begin, int64_t end) mutable {
      for_rows(images.count(), begin, end, [&](int64_t n, int64_t patch) {
        const int64_t count = found.count(n, patch);
        const int64_t* places = found.begin(n, patch);
        const char* row = count == 1 ? job.from.at(n, places[0]) : summed.data();
        if (count > 1) {
          for (int64_t i = 0; i < count; i++) sum.add(job.from.at(n, places[i]));
          sum.write(summed.data());
        }
        images.for_lines(n, patch, [&](char* to, int64_t at) {
          if (count == 0) return workers.kernel.cached.zero(to, line_bytes);
          workers.kernel.cached.copy(to, row + at * images.item, line_bytes);
        });
      });
    };
  });
}

}  // namespace sslkernels
