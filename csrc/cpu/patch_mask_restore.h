// Kept tokens put back among mask tokens, with a positional embedding, and the gradients of all three. No torch, no
// instruction set.
#pragma once
#include "patch_mask_rows.h"

namespace sslkernels {

// Where each token lies among the kept ones: (samples, tokens), `kept` or more where it was removed.
struct Places {
  const int64_t* ids_restore;
  int64_t samples, tokens, kept;

  const int64_t* row(int64_t sample) const { return ids_restore + sample * tokens; }
};

// The first row that has a negative place or one below `kept` twice, or -1. absent(n, k) is called for places that no
// token has, in rows that are right.
template <class Parallel, class Absent>
int64_t check_places(const Places& places, const Workers<Parallel>& workers, const Absent& absent) {
  FirstRow bad;
  workers.share(places.samples, rows_per_chunk(8 * places.tokens), [&] {
    return [&, seen = std::vector<char>(places.kept)](int64_t begin, int64_t end) mutable {
      for (int64_t n = begin; n < end; n++) {
        const int64_t* row = places.row(n);
        std::fill(seen.begin(), seen.end(), 0);
        int64_t found = 0;
        bool right = true;
        for (int64_t t = 0; t < places.tokens; t++) {
          if (row[t] >= places.kept) continue;
          right = right && row[t] >= 0 && !seen[row[t]];
          if (!right) break;
          seen[row[t]] = 1;
          found++;
        }
        if (!right) bad.report(n);
        for (int64_t k = 0; right && found < places.kept && k < places.kept; k++)
          if (!seen[k]) absent(n, k);
      }
    };
  });
  return bad.row();
}

struct RestoreJob {
  TokenRows from;  // (samples, prefix + kept)
  void* to;        // dense (samples, prefix + tokens)
  Places places;
  const void* mask_token;  // (columns), or null: zeros
  const void* pos_embed;   // dense (pos_tokens, columns), for the last rows, or null
  int64_t prefix, pos_tokens, columns;
  Dtype dtype;
};

template <class Parallel>
void restore_rows(const RestoreJob& job, const Workers<Parallel>& workers) {
  const int64_t rows = job.prefix + job.places.tokens, row_bytes = job.columns * itemsize(job.dtype);
  const int64_t without = rows - job.pos_tokens;  // so many of the first have no position
  const TokenRows to = dense_rows(job.to, rows, row_bytes);
  const char* positions = static_cast<const char*>(job.pos_embed);
  const RowMoves& moves = workers.moves(job.places.samples * rows * row_bytes);
  workers.share(job.places.samples * rows, rows_per_chunk(row_bytes), [&] {
    return [&](int64_t begin, int64_t end) {
      for_rows(rows, begin, end, [&](int64_t n, int64_t j) {
        const int64_t place = j < job.prefix ? -1 : job.places.row(n)[j - job.prefix];
        const void* source = job.mask_token;
        if (place < job.places.kept) source = job.from.at(n, place < 0 ? j : job.prefix + place);
        const void* position = j < without || !positions ? nullptr : positions + (j - without) * row_bytes;
        if (source && position) return moves.add(job.dtype, to.at(n, j), source, position, job.columns);
        if (!source) source = position;
        if (!source) return moves.zero(to.at(n, j), row_bytes);
        moves.copy(to.at(n, j), source, row_bytes);
      });
    };
  });
}

struct RestoreGradJob {
  TokenRows grad;  // (samples, prefix + tokens)
  Places places;
  void* grad_x;           // dense (samples, prefix + kept), or null
  void* grad_mask_token;  // (columns), or null
  void* grad_pos;         // dense (pos_tokens, columns), of the last rows, or null
  int64_t prefix, pos_tokens, columns;
  Dtype dtype;
};

// How the rows are shared out, by their number and size alone, for the sums not to depend on the threads. A unit is a
// block of tokens of a group of samples; with positions to sum over all samples, of all.
struct RestoreUnits {
  static constexpr int64_t kRows = 512;           // of a unit, without positions
  static constexpr int64_t kSumBytes = 16 << 10;  // of a unit's sums of positions, which stay in the cache
  static constexpr int64_t kFewestUnits = 16;     // with positions, where there are so many tokens

  int64_t tokens_per_unit, samples_per_unit, blocks, count;

  RestoreUnits(int64_t samples, int64_t rows, int64_t columns, bool positions) {
    if (positions) {
      const int64_t cached = kSumBytes / (4 * columns + 1);
      tokens_per_unit = std::max<int64_t>(1, std::min(cached, rows / kFewestUnits));
      samples_per_unit = std::max<int64_t>(1, samples);
    } else {
      tokens_per_unit = std::min(rows, kRows);
      samples_per_unit = std::max<int64_t>(1, kRows / std::max<int64_t>(1, rows));
    }
    blocks = rows == 0 ? 0 : blocks_of(rows, tokens_per_unit);
    count = blocks * std::max<int64_t>(1, blocks_of(samples, samples_per_unit));  // without samples, sums of nothing
  }
};

// One worker's part of the gradients of restoring.
class RestoreGrad {
 public:
  RestoreGrad(const RestoreGradJob& job, const RestoreUnits& units, const PatchMaskKernel& kernel,
              const RowMoves& moves, double* mask_sums)
      : job_(job),
        units_(units),
        moves_(moves),
        mask_sums_(mask_sums),
        row_bytes_(job.columns * itemsize(job.dtype)),
        rows_(job.prefix + job.places.tokens),
        without_(rows_ - job.pos_tokens),
        to_(dense_rows(job.grad_x, job.prefix + job.places.kept, row_bytes_)),
        mask_sum_(kernel, job.dtype, job.grad_mask_token ? job.columns : 0),
        pos_sums_(job.grad_pos ? units.tokens_per_unit : 0, RowSum(kernel, job.dtype, job.columns)) {}

  void run(int64_t unit) {
    const int64_t first = unit % units_.blocks * units_.tokens_per_unit;
    const int64_t last = std::min(rows_, first + units_.tokens_per_unit);
    const int64_t group = unit / units_.blocks * units_.samples_per_unit;
    const int64_t samples = std::min(job_.places.samples, group + units_.samples_per_unit);
    for (int64_t n = group; n < samples; n++)
      for (int64_t j = first; j < last; j++) take(n, j, first);
    if (job_.grad_mask_token) mask_sum_.move_into(mask_sums_ + unit * job_.columns);
    for (int64_t j = std::max(first, without_); job_.grad_pos && j < last; j++)
      pos_sums_[j - first].write(static_cast<char*>(job_.grad_pos) + (j - without_) * row_bytes_);
  }

 private:
  void take(int64_t n, int64_t j, int64_t first) {
    const char* row = job_.grad.at(n, j);
    const int64_t place = j < job_.prefix ? -1 : job_.places.row(n)[j - job_.prefix];
    if (place < job_.places.kept) {
      if (job_.grad_x) moves_.copy(to_.at(n, place < 0 ? j : job_.prefix + place), row, row_bytes_);
    } else if (job_.grad_mask_token) {
      mask_sum_.add(row);
    }
    if (job_.grad_pos && j >= without_) pos_sums_[j - first].add(row);
  }

  const RestoreGradJob& job_;
  const RestoreUnits& units_;
  const RowMoves& moves_;
  double* mask_sums_;  // of every unit
  int64_t row_bytes_, rows_, without_;
  TokenRows to_;
  RowSum mask_sum_;
  std::vector<RowSum> pos_sums_;  // of every token of a block
};

// Where places are absent, their rows of grad_x are zero already.
template <class Parallel>
void restore_rows_backward(const RestoreGradJob& job, const Workers<Parallel>& workers) {
  const RestoreUnits units(job.places.samples, job.prefix + job.places.tokens, job.columns, job.grad_pos != nullptr);
  const int64_t kept_rows = job.places.samples * (job.prefix + job.places.kept);
  const RowMoves& moves = workers.moves(kept_rows * job.columns * itemsize(job.dtype));
  std::vector<double> mask_sums(job.grad_mask_token ? units.count * job.columns : 0);
  workers.share(units.count, 1, [&] {
    return
        [grad = RestoreGrad(job, units, workers.kernel, moves, mask_sums.data())](int64_t begin, int64_t end) mutable {
          for (int64_t unit = begin; unit < end; unit++) grad.run(unit);
        };
  });
  if (!job.grad_mask_token) return;
  std::vector<double> total(job.columns);
  for (int64_t unit = 0; unit < units.count; unit++)
    for (int64_t d = 0; d < job.columns; d++) total[d] += mask_sums[unit * job.columns + d];
  workers.kernel.round(job.dtype, job.grad_mask_token, total.data(), job.columns);
}

}  // namespace sslkernels
