// The contrastive core on a GPU, in chunks of rows: a matrix multiplication leaves the products of a chunk in memory,
// kernels reduce them or turn them into weights, and further multiplications apply the weights. contrast_op.py says
// what is computed. Memory: O((N + M) D) and one chunk of O(rows of it * M).
//
// Here is the order of the steps. What multiplies and allocates is the caller's `Host`: torch on a GPU, plain loops
// where the tests run this on the CPU.
//
//   void* allocate(int64_t bytes)       memory aligned to 16 bytes that lives until the call has ended
//   void multiply(a, b, out)            out = a b; out is fp32, a and b have one dtype
//   void check()                        follows every launch
//   cudaStream_t stream
#pragma once
#include <algorithm>
#include <optional>

#include "cuda/contrast_backward.cuh"
#include "cuda/contrast_chunk.cuh"
#include "cuda/contrast_forward.cuh"

namespace sslkernels {
namespace contrast {

constexpr int64_t kChunkBytes = 32 << 20;   // of products: what an L2 cache holds
constexpr int64_t kMaxChunkRows = 1 << 20;  // whose segments fit the second dimension of a grid

struct Matrix {
  void* data;
  Dtype dtype;
  int64_t rows, columns, row_stride, column_stride;

  Matrix transposed() const { return {data, dtype, columns, rows, column_stride, row_stride}; }
  Matrix part(int64_t first, int64_t count) const {
    const int64_t bytes = (dtype == Dtype::kFloat32 ? 4 : 2) * first * row_stride;
    return {static_cast<unsigned char*>(data) + bytes, dtype, count, columns, row_stride, column_stride};
  }
};

// What forward and backward of both losses are given.
struct Inputs {
  const float* query;  // (rows, dim)
  int64_t rows, dim;
  const void* key;  // (columns, dim), or null: the query
  Dtype key_dtype;
  bool normalize_key;
  const float* scale;
  Pairs pairs;
  Dtype matmul;  // of the operands: fp32, bf16 or fp16
  int64_t chunk_bytes = kChunkBytes;
};

// Memory of results; null where one is not wanted. Gradients and the attraction are zero at first.
struct ForwardResults {
  RowResults rows;
  ColumnResults columns;
  float* attraction;
};
struct Gradients {
  float *query, *key, *scale, *bias;
};

inline int64_t padded(int64_t count) { return (count + kVector - 1) / kVector * kVector; }
inline unsigned blocks(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

inline int64_t chunk_rows(const Inputs& in) {
  const int64_t fit = in.chunk_bytes / (4 * std::max<int64_t>(padded(in.pairs.columns), kVector));
  const int64_t whole = std::min(std::max<int64_t>(fit, kSegment), kMaxChunkRows) / kSegment * kSegment;
  return std::min(whole, in.rows);
}

// One call: its operands, and the memory that all chunks use in turn.
template <class Host>
class Pass {
 public:
  Pass(Host& host, const Inputs& in) : host(host), in(in), most(chunk_rows(in)), stride(padded(in.pairs.columns)) {
    query = operand(in.query, Dtype::kFloat32, in.rows, false);
    key = in.key ? operand(in.key, in.key_dtype, in.pairs.columns, in.normalize_key) : query;
    products = allocate<float>(most * stride);
  }

  template <class T>
  T* allocate(int64_t count) {
    return static_cast<T*>(host.allocate(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T))));
  }

  // Calls step(chunk, whether it is the last) with the products of each chunk.
  template <class Step>
  void each_chunk(const Step& step) {
    for (int64_t first = 0; first < in.rows; first += most) {
      const Chunk chunk{products, stride, first, std::min(most, in.rows - first)};
      if (in.pairs.columns)
        host.multiply(query.part(first, chunk.rows), key.transposed(), weighted(products, Dtype::kFloat32, chunk.rows));
      step(chunk, first + chunk.rows == in.rows);
    }
  }

  // Where the weights go: over the products, or beside them in the dtype of the operands.
  Weights weights() {
    if (in.matmul == Dtype::kFloat32) return {products, in.matmul};
    return {allocate<uint16_t>(most * stride), in.matmul};
  }

  Matrix weighted(void* data, Dtype dtype, int64_t rows) const {
    return {data, dtype, rows, in.pairs.columns, stride, 1};
  }

  // sums (a.rows, dim) += constant * factor * a b
  void add_product(const Matrix& a, const Matrix& b, float* sums, float* part, float constant, const float* factor) {
    const int64_t count = a.rows * in.dim;
    if (!count || !a.columns) return;
    host.multiply(a, b, {part, Dtype::kFloat32, a.rows, in.dim, in.dim, 1});
    SSLK_LAUNCH(contrast_accumulate_kernel, blocks(count, kRowThreads * kVector), kRowThreads, 0, host.stream, sums,
                part, count, constant, factor);
    host.check();
  }

  Host& host;
  const Inputs& in;
  const int64_t most, stride;  // rows of a chunk, elements of a row
  Matrix query, key;
  float* products;

 private:
  // Rows as they are where they fit, or a copy.
  Matrix operand(const void* x, Dtype from, int64_t rows, bool normalize) {
    const int64_t dim = in.dim, row_stride = padded(dim);
    if (from == in.matmul && !normalize) return {const_cast<void*>(x), from, rows, dim, dim, 1};
    void* const out = host.allocate(std::max<int64_t>(rows, 1) * row_stride * (in.matmul == Dtype::kFloat32 ? 4 : 2));
    if (rows) {
      SSLK_LAUNCH(contrast_pack_kernel, blocks(rows, kPackRows), 32 * kPackRows, 0, host.stream, x, from, rows, dim,
                  normalize, out, in.matmul, row_stride);
      host.check();
    }
    return {out, in.matmul, rows, dim, row_stride, 1};
  }
};

// The columns' log-sum-exps, over all chunks.
template <class Host>
class Columns {
 public:
  Columns(Pass<Host>& pass, const ColumnResults& results)
      : pass_(pass),
        results_(results),
        parts_(pass.template allocate<float>(blocks(pass.most, kSegment) * 2 * pass.stride)),
        total_(pass.template allocate<float>(2 * pass.stride)) {
    if (!pass.in.rows) merge(0, true, true);
  }

  void add(const Chunk& chunk, bool last) {
    const unsigned segments = blocks(chunk.rows, kSegment);
    if (!pass_.in.pairs.columns) return;
    const dim3 grid(blocks(pass_.in.pairs.columns, kWalkThreads * kVector), segments);
    SSLK_LAUNCH(contrast_columns_kernel, grid, kWalkThreads, 0, pass_.host.stream, chunk, pass_.in.pairs,
                pass_.in.scale, parts_);
    pass_.host.check();
    merge(segments, chunk.first == 0, last);
  }

 private:
  void merge(int64_t segments, bool first, bool last) {
    const int64_t columns = pass_.in.pairs.columns;
    if (!columns) return;
    SSLK_LAUNCH(contrast_merge_kernel, blocks(columns, kRowThreads), kRowThreads, 0, pass_.host.stream, parts_,
                segments, pass_.stride, columns, first, last, pass_.in.scale, total_, results_);
    pass_.host.check();
  }

  Pass<Host>& pass_;
  const ColumnResults results_;
  float *parts_, *total_;
};

template <class Host>
void forward(Host& host, const Inputs& in, const ForwardResults& results) {
  Pass<Host> pass(host, in);
  const float lift = in.matmul == Dtype::kFloat16 ? kFp16Lift : 1;
  const Weights weights = results.attraction ? pass.weights() : Weights{};
  float* const part = results.attraction ? pass.template allocate<float>(pass.most * in.dim) : nullptr;
  const bool along_columns = results.columns.logsumexp;
  std::optional<Columns<Host>> columns;
  if (along_columns) columns.emplace(pass, results.columns);
  pass.each_chunk([&](const Chunk& chunk, bool last) {
    if (columns) columns->add(chunk, last);
    SSLK_LAUNCH(contrast_rows_kernel, static_cast<unsigned>(chunk.rows), kRowThreads, 0, host.stream, chunk, in.pairs,
                in.scale, results.rows, weights, lift);
    host.check();
    if (results.attraction)
      pass.add_product(pass.weighted(weights.data, weights.dtype, chunk.rows), pass.key,
                       results.attraction + chunk.first * in.dim, part, 1 / lift, nullptr);
  });
}

// `loss` turns products into gradients of logits; grad_columns is null where columns have none.
template <class Host, class Loss>
void backward(Pass<Host>& pass, const Loss& loss, const double* grad_rows, const double* grad_columns,
              const Gradients& grads) {
  Host& host = pass.host;
  const Inputs& in = pass.in;
  const int64_t columns = in.pairs.columns;
  if (!in.rows || !columns) return;
  const Weights weights = pass.weights();
  auto* const factors = pass.template allocate<Factors>(1);
  SSLK_LAUNCH(contrast_factors_kernel, 1, kSumThreads, 0, host.stream, grad_rows, in.rows, grad_columns, columns,
              in.scale, weights.dtype, factors);
  host.check();
  auto* const part = pass.template allocate<float>(std::max(pass.most, columns) * in.dim);
  const unsigned across = blocks(columns, kWalkThreads * kVector);
  auto* const partials = pass.template allocate<double>(2 * across * blocks(pass.most, kSegment));
  auto* const totals = pass.template allocate<double>(2);
  float* const grad_key = in.key ? grads.key : grads.query;
  pass.each_chunk([&](const Chunk& chunk, bool) {
    const dim3 grid(across, blocks(chunk.rows, kSegment));
    SSLK_LAUNCH((contrast_gradient_kernel<Loss>), grid, kWalkThreads, 0, host.stream, chunk, in.pairs, loss, factors,
                weights, partials);
    host.check();
    SSLK_LAUNCH(contrast_totals_kernel, 2, kSumThreads, 0, host.stream, partials, int64_t{grid.x} * grid.y,
                chunk.first == 0, totals, grads.scale, grads.bias);
    host.check();
    const Matrix of_logits = pass.weighted(weights.data, weights.dtype, chunk.rows);
    pass.add_product(of_logits, pass.key, grads.query + chunk.first * in.dim, part, 1, &factors->back);
    pass.add_product(of_logits.transposed(), pass.query.part(chunk.first, chunk.rows), grad_key, part, 1,
                     &factors->back);
  });
}

template <class Host>
Term* terms(Pass<Host>& pass, const double* logsumexp, const double* grad, int64_t count) {
  if (!grad) return nullptr;
  auto* const terms = pass.template allocate<Term>(count);
  if (count) {
    SSLK_LAUNCH(contrast_terms_kernel, blocks(count, kRowThreads), kRowThreads, 0, pass.host.stream, logsumexp, grad,
                count, pass.in.scale, terms);
    pass.host.check();
  }
  return terms;
}

template <class Host>
void softmax_backward(Host& host, const Inputs& in, const double* grad_rows, const double* grad_columns,
                      const double* lse_rows, const double* lse_columns, const Gradients& grads) {
  Pass<Host> pass(host, in);
  const Softmax loss{in.scale, terms(pass, lse_rows, grad_rows, in.rows),
                     terms(pass, lse_columns, grad_columns, in.pairs.columns)};
  backward(pass, loss, grad_rows, grad_columns, grads);
}

template <class Host>
void sigmoid_forward(Host& host, const Inputs& in, const float* bias, double* loss) {
  Pass<Host> pass(host, in);
  pass.each_chunk([&](const Chunk& chunk, bool) {
    SSLK_LAUNCH(contrast_sigmoid_rows_kernel, static_cast<unsigned>(chunk.rows), kRowThreads, 0, host.stream, chunk,
                in.pairs, in.scale, bias, loss);
    host.check();
  });
}

template <class Host>
void sigmoid_backward(Host& host, const Inputs& in, const float* bias, const double* grad_rows,
                      const Gradients& grads) {
  Pass<Host> pass(host, in);
  backward(pass, Sigmoid{in.scale, bias, grad_rows}, grad_rows, nullptr, grads);
}

}  // namespace contrast
}  // namespace sslkernels
