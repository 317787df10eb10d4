// Rows of tokens moved by index, and back: what random masking, gathering and restoring do once it is known which token
// goes where. No torch, no instruction set.
#pragma once
#include <vector>

#include "patch_mask_share.h"

namespace sslkernels {

// Tokens whose columns lie side by side, each with a step in bytes from sample to sample and from token to token.
struct TokenRows {
  char* data;
  int64_t sample_step, token_step;

  char* at(int64_t sample, int64_t token) const { return data + sample * sample_step + token * token_step; }
};

inline TokenRows dense_rows(void* data, int64_t tokens, int64_t row_bytes) {
  return {static_cast<char*>(data), tokens * row_bytes, row_bytes};
}

// Calls work(n, j) for every row of (samples, rows) in [begin, end), in order.
template <class Work>
void for_rows(int64_t rows, int64_t begin, int64_t end, const Work& work) {
  if (begin == end) return;
  int64_t n = begin / rows, j = begin % rows;
  for (int64_t row = begin; row < end; row++) {
    work(n, j);
    if (++j == rows) j = 0, n++;
  }
}

// ---- (samples, prefix + kept) rows out of (samples, prefix + tokens), by index

struct GatherJob {
  TokenRows from;
  void* to;            // dense
  const int64_t* ids;  // (samples, kept), in [0, tokens)
  int64_t samples, kept, tokens, prefix, row_bytes;
};

// The first row of ids that has one out of range, or -1.
template <class Parallel>
int64_t row_out_of_range(const int64_t* ids, int64_t samples, int64_t kept, int64_t tokens,
                         const Workers<Parallel>& workers) {
  FirstRow bad;
  workers.share(samples, rows_per_chunk(8 * kept), [&] {
    return [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++)
        for (int64_t k = 0; k < kept; k++)
          if (ids[n * kept + k] < 0 || ids[n * kept + k] >= tokens) bad.report(n);
    };
  });
  return bad.row();
}

template <class Parallel>
void gather_rows(const GatherJob& job, const Workers<Parallel>& workers) {
  const int64_t rows = job.prefix + job.kept;
  const TokenRows to = dense_rows(job.to, rows, job.row_bytes);
  const RowMoves& moves = workers.moves(job.samples * rows * job.row_bytes);
  workers.share(job.samples * rows, rows_per_chunk(job.row_bytes), [&] {
    return [&](int64_t begin, int64_t end) {
      for_rows(rows, begin, end, [&](int64_t n, int64_t j) {
        const int64_t t = j < job.prefix ? j : job.prefix + job.ids[n * job.kept + j - job.prefix];
        moves.copy(to.at(n, j), job.from.at(n, t), job.row_bytes);
      });
    };
  });
}

// ---- the adjoint: rows of equal ids are added

// For every token of every sample, which of its ids name it, in ascending order.
struct Occurrences {
  std::vector<int64_t> starts, places;  // (samples, tokens + 1) and (samples, kept)
  int64_t tokens, kept;

  template <class Parallel>
  Occurrences(const int64_t* ids, int64_t samples, int64_t kept, int64_t tokens, const Workers<Parallel>& workers)
      : starts(samples * (tokens + 1)), places(samples * kept), tokens(tokens), kept(kept) {
    workers.share(samples, rows_per_chunk(8 * (kept + tokens)), [&] {
      return [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++) list(ids + n * kept, n);
      };
    });
  }

  const int64_t* begin(int64_t sample, int64_t token) const {
    return places.data() + sample * kept + starts[sample * (tokens + 1) + token];
  }
  int64_t count(int64_t sample, int64_t token) const {
    const int64_t* start = starts.data() + sample * (tokens + 1) + token;
    return start[1] - start[0];
  }

 private:
  void list(const int64_t* ids, int64_t sample) {
    int64_t* start = starts.data() + sample * (tokens + 1);
    int64_t* place = places.data() + sample * kept;
    for (int64_t k = 0; k < kept; k++) start[ids[k] + 1]++;
    for (int64_t t = 0; t < tokens; t++) start[t + 1] += start[t];
    for (int64_t k = kept - 1; k >= 0; k--) place[--start[ids[k] + 1]] = k;  // each end becomes its token's start
    // which leaves the starts one entry too far on
    std::copy(start + 1, start + tokens + 1, start);
    start[tokens] = kept;
  }
};

// The sum of rows of one dtype, in fp32 (fp64 for fp64) for a while and then in fp64.
class RowSum {
 public:
  RowSum(const PatchMaskKernel& kernel, Dtype dtype, int64_t columns)
      : kernel_(kernel), dtype_(dtype), part_(columns), total_(columns) {}

  void add(const void* row) {
    kernel_.accumulate(dtype_, part_.data(), row, columns());
    if (++added_ == kFlushed) flush();
  }
  // Writes the sum, and starts again.
  void write(void* to) {
    flush();
    kernel_.round(dtype_, to, total_.data(), columns());
    std::fill(total_.begin(), total_.end(), 0);
  }
  // Adds the sum to `to`, and starts again.
  void move_into(double* to) {
    flush();
    for (int64_t d = 0; d < columns(); d++) to[d] += total_[d];
    std::fill(total_.begin(), total_.end(), 0);
  }

 private:
  static constexpr int64_t kFlushed = 64;

  int64_t columns() const { return static_cast<int64_t>(part_.size()); }
  void flush() {
    kernel_.flush(dtype_, total_.data(), part_.data(), columns());
    added_ = 0;
  }

  const PatchMaskKernel& kernel_;
  Dtype dtype_;
  std::vector<double> part_;  // room for any dtype
  std::vector<double> total_;
  int64_t added_ = 0;
};

struct ScatterJob {
  TokenRows from;  // (samples, prefix + kept)
  void* to;        // dense (samples, prefix + tokens)
  const int64_t* ids;
  int64_t samples, kept, tokens, prefix, columns;
  Dtype dtype;
};

template <class Parallel>
void scatter_rows(const ScatterJob& job, const Workers<Parallel>& workers) {
  const int64_t rows = job.prefix + job.tokens, row_bytes = job.columns * itemsize(job.dtype);
  const Occurrences found(job.ids, job.samples, job.kept, job.tokens, workers);
  const TokenRows to = dense_rows(job.to, rows, row_bytes);
  const RowMoves& moves = workers.moves(job.samples * rows * row_bytes);
  workers.share(job.samples * rows, rows_per_chunk(row_bytes), [&] {
    return [&, sum = RowSum(workers.kernel, job.dtype, job.columns)](int64_t begin, int64_t end) mutable {
      for_rows(rows, begin, end, [&](int64_t n, int64_t j) {
        const int64_t t = j - job.prefix, count = t < 0 ? 1 : found.count(n, t);
        if (count == 0) return moves.zero(to.at(n, j), row_bytes);
        const int64_t* places = t < 0 ? nullptr : found.begin(n, t);
        if (count == 1) return moves.copy(to.at(n, j), job.from.at(n, t < 0 ? j : job.prefix + places[0]), row_bytes);
        for (int64_t i = 0; i < count; i++) sum.add(job.from.at(n, job.prefix + places[i]));
        sum.write(to.at(n, j));
      });
    };
  });
}

}  // namespace sslkernels
