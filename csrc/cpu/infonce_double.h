// NT-Xent in float64, for gradcheck and reference runs: plain loops over the rows, nothing packed, no symmetry used.
#pragma once
#include <cmath>
#include <vector>

#include "infonce.h"

namespace sslkernels {

struct NtXentDouble {
  NtXentJob job;
  std::vector<double> z, scale;  // rows of Z, and what made them so
  double *loss, *positive, *logsumexp;
  const double *grad_loss, *saved_loss, *saved_logsumexp;
  const double* positive_weight = nullptr;  // as in the job

  void load() {
    const int64_t rows = job.in.count, dim = job.in.dim;
    z.resize(rows * dim);
    scale.assign(rows, 1);
    for (int64_t i = 0; i < rows; i++) {
      const double* x = static_cast<const double*>(job.in.view[i % 2]) + i / 2 * job.in.row_stride[i % 2];
      double square = 0;
      for (int64_t d = 0; d < dim; d++) {
        z[i * dim + d] = x[d * job.in.column_stride[i % 2]];
        square += z[i * dim + d] * z[i * dim + d];
      }
      if (!job.in.normalize) continue;
      const double norm = std::sqrt(square);
      scale[i] = 1 / (norm < kNormalizeEps ? kNormalizeEps : norm);
      for (int64_t d = 0; d < dim; d++) z[i * dim + d] *= scale[i];
    }
  }

  // Derivative of a row's loss by its positive's logit.
  double pull(int64_t at) const { return positive_weight ? -positive_weight[at] : std::expm1(-saved_loss[at]); }

  double logit(int64_t i, int64_t j) const {
    double s = 0;
    for (int64_t d = 0; d < job.in.dim; d++) s += z[i * job.in.dim + d] * z[j * job.in.dim + d];
    return s / job.temperature;
  }

  void forward_row(int64_t i) {
    const int64_t rows = job.in.count, partner = i ^ 1, at = job.output_row(i);
    const double own = logit(i, partner);
    double largest = -INFINITY, sum = 0;
    for (int64_t j = 0; j < rows; j++) {
      if (j == i || j == partner) continue;
      const double l = logit(i, j);
      if (l > largest) {
        sum = sum * std::exp(largest - l) + 1;
        largest = l;
      } else {
        sum += std::exp(l - largest);
      }
    }
    const double top = largest > own ? largest : own;
    const double others = sum * std::exp(largest - top), mine = std::exp(own - top);
    loss[at] = others < mine ? std::log1p(others / mine) : std::log(others + mine) + top - own;
    logsumexp[at] = loss[at] + own;
    if (positive_weight) {
      logsumexp[at] = rows > 2 ? std::log(sum) + largest : 0;
      loss[at] = logsumexp[at] - positive_weight[at] * own;
    }
    positive[at] = own;
    if (job.top1) job.hit[at] = own > largest;
  }

  // Returns the row's share of the gradient of the temperature. `g` has room for one row.
  double backward_row(int64_t i, double* g) const {
    const int64_t rows = job.in.count, dim = job.in.dim, at = job.output_row(i);
    for (int64_t d = 0; d < dim; d++) g[d] = 0;
    for (int64_t j = 0; j < rows; j++) {
      if (j == i) continue;
      const int64_t of = job.output_row(j);
      double weight;
      if (j == (i ^ 1)) {
        weight = grad_loss[at] * pull(at) + grad_loss[of] * pull(of);
      } else {
        const double l = logit(i, j);
        weight = grad_loss[at] * std::exp(l - saved_logsumexp[at]) + grad_loss[of] * std::exp(l - saved_logsumexp[of]);
      }
      for (int64_t d = 0; d < dim; d++) g[d] += weight / job.temperature * z[j * dim + d];
    }
    double along = 0;
    for (int64_t d = 0; d < dim; d++) along += g[d] * z[i * dim + d];
    const double shrink = job.in.normalize && scale[i] < 1 / kNormalizeEps ? along : 0;
    double* out = static_cast<double*>(job.grad_view[i % 2]) + i / 2 * dim;
    for (int64_t d = 0; d < dim; d++) out[d] = scale[i] * (g[d] - shrink * z[i * dim + d]);
    return -along / (2 * job.temperature);
  }
};

}  // namespace sslkernels
