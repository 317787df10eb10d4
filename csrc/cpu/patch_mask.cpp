// The operators of patch masking for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../checks.h"
#include "../tensors.h"
#include "isa.h"
#include "patch_mask_patches.h"
#include "patch_mask_restore.h"
#include "patch_mask_rows.h"
#include "patch_mask_select.h"
#include "results.h"
#include "threads.h"

namespace sslkernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

// One call's kernels and threads.
struct Call {
  PatchMaskKernel kernel = isa().patch_mask();
  TorchThreads threads;
  Workers<TorchThreads> workers{kernel, torch::stable::get_num_threads(), threads};
};

// ---- tensors to plain data

// (N, L, D) with its columns side by side.
Tensor checked_tokens(const char* op, const char* argument, const Tensor& x, int64_t prefix) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, op, ": ", argument, " must be (N, L, D) on the CPU");
  STD_TORCH_CHECK(prefix >= 0 && prefix <= x.size(1), op, ": num_prefix must be in [0, ", x.size(1), "], got ", prefix);
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

// What is read; the jobs say which rows are written.
char* bytes_of(const Tensor& x) { return const_cast<char*>(const_data<char>(x)); }

TokenRows rows_of(const Tensor& x) {
  const int64_t item = x.element_size();
  return {bytes_of(x), x.stride(0) * item, x.stride(1) * item};
}

// (N, K) int64, dense.
Tensor checked_ids(const char* op, const char* argument, const Tensor& ids, int64_t samples) {
  STD_TORCH_CHECK(ids.is_cpu() && ids.scalar_type() == ScalarType::Long && ids.dim() == 2 && ids.size(0) == samples, op,
                  ": ", argument, " must be (", samples, ", K) int64 on the CPU");
  return torch::stable::contiguous(ids);
}

void check_range(const char* op, const char* argument, const Tensor& ids, int64_t tokens, const Call& call) {
  const int64_t samples = ids.size(0), kept = ids.size(1), *values = const_data<int64_t>(ids);
  const int64_t row = row_out_of_range(values, samples, kept, tokens, call.workers);
  for (int64_t k = 0; row >= 0 && k < kept; k++) {
    const int64_t id = values[row * kept + k];
    STD_TORCH_CHECK(id >= 0 && id < tokens, op, ": ", argument, " must be in [0, ", tokens, "), got ", id, " in row ",
                    row);
  }
}

// ---- which tokens stay

struct Masks {
  Tensor ids_keep, ids_restore, mask;
};

Masks new_masks(const Tensor& like, int64_t samples, int64_t tokens, int64_t kept) {
  return {new_result(like, {samples, kept}, ScalarType::Long), new_result(like, {samples, tokens}, ScalarType::Long),
          new_result(like, {samples, tokens}, ScalarType::Bool)};
}

Masks select(const char* op, const Tensor& seed, const OptionalTensor& sample_ids, const OptionalTensor& scores,
             int64_t samples, int64_t tokens, int64_t kept, bool ordered, const Call& call) {
  STD_TORCH_CHECK(samples >= 0 && tokens >= 0 && tokens <= int64_t{1} << 32, op,
                  ": there must be at most 2**32 tokens");
  STD_TORCH_CHECK(kept >= 0 && kept <= tokens, op, ": num_keep must be in [0, ", tokens, "], got ", kept);
  check_rows(op, "seed", seed, ScalarType::Long, 1);
  Masks masks = new_masks(seed, samples, tokens, kept);
  MaskJob job{samples,
              tokens,
              kept,
              ordered,
              static_cast<uint64_t>(*const_data<int64_t>(seed)),
              nullptr,
              nullptr,
              data<int64_t>(masks.ids_keep),
              data<int64_t>(masks.ids_restore),
              data<bool>(masks.mask)};
  OptionalTensor dense_ids, dense_scores;
  if (sample_ids) {
    dense_ids = torch::stable::contiguous(*sample_ids);
    check_rows(op, "sample_ids", *dense_ids, ScalarType::Long, samples);
    job.sample_ids = const_data<int64_t>(*dense_ids);
  }
  if (scores) {
    dense_scores = torch::stable::contiguous(*scores);
    check_rows(op, "scores", *dense_scores, ScalarType::Float, samples * tokens);
    job.scores = const_data<float>(*dense_scores);
  }
  draw_masks(job, call.workers);
  return masks;
}

std::tuple<Tensor, Tensor, Tensor> patch_mask_fwd_cpu(const Tensor& seed, const OptionalTensor& sample_ids,
                                                      const OptionalTensor& scores, int64_t samples, int64_t tokens,
                                                      int64_t num_keep, bool ordered) {
  const Call call;
  Masks masks = select("patch_mask", seed, sample_ids, scores, samples, tokens, num_keep, ordered, call);
  return {masks.ids_keep, masks.ids_restore, masks.mask};
}

std::tuple<Tensor, Tensor> invert_ids_cpu(const Tensor& ids_keep, int64_t tokens) {
  const Call call;
  const Tensor ids = checked_ids("random_masking", "ids_keep", ids_keep, ids_keep.size(0));
  check_range("random_masking", "ids_keep", ids, tokens, call);
  const int64_t samples = ids.size(0), kept = ids.size(1);
  Tensor ids_restore = new_result(ids, {samples, tokens}), mask = new_result(ids, {samples, tokens}, ScalarType::Bool);
  const MaskJob job{
      samples,         tokens, kept, false, 0, nullptr, nullptr, data<int64_t>(ids), data<int64_t>(ids_restore),
      data<bool>(mask)};
  const int64_t row = invert_masks(job, call.workers);
  STD_TORCH_CHECK(row < 0, "random_masking: ids_keep must not repeat an id, row ", row, " does");
  return {ids_restore, mask};
}

// ---- rows of tokens

Tensor gathered(const Tensor& x, const int64_t* ids, int64_t kept, int64_t prefix, const Call& call) {
  const int64_t samples = x.size(0), columns = x.size(2);
  Tensor out = new_result(x, {samples, prefix + kept, columns});
  gather_rows({rows_of(x), out.mutable_data_ptr(), ids, samples, kept, x.size(1) - prefix, prefix,
               columns * static_cast<int64_t>(x.element_size())},
              call.workers);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> random_masking_fwd_cpu(const Tensor& x, const Tensor& seed,
                                                                  const OptionalTensor& sample_ids,
                                                                  const OptionalTensor& scores, int64_t num_keep,
                                                                  int64_t num_prefix, bool ordered) {
  const Call call;
  const Tensor tokens = checked_tokens("random_masking", "x", x, num_prefix);
  Masks masks =
      select("random_masking", seed, sample_ids, scores, x.size(0), x.size(1) - num_prefix, num_keep, ordered, call);
  Tensor kept = gathered(tokens, const_data<int64_t>(masks.ids_keep), num_keep, num_prefix, call);
  return {kept, masks.ids_keep, masks.ids_restore, masks.mask};
}

Tensor gather_tokens_fwd_cpu(const Tensor& x, const Tensor& ids, int64_t num_prefix) {
  const Call call;
  const Tensor tokens = checked_tokens("gather_tokens", "x", x, num_prefix);
  const Tensor dense_ids = checked_ids("gather_tokens", "ids", ids, x.size(0));
  check_range("gather_tokens", "ids", dense_ids, x.size(1) - num_prefix, call);
  return gathered(tokens, const_data<int64_t>(dense_ids), ids.size(1), num_prefix, call);
}

Tensor gather_tokens_bwd_cpu(const Tensor& grad, const Tensor& ids, int64_t tokens, int64_t num_prefix) {
  const Call call;
  const Tensor rows = checked_tokens("gather_tokens", "grad", grad, num_prefix);
  const Tensor dense_ids = checked_ids("gather_tokens", "ids", ids, grad.size(0));
  check_range("gather_tokens", "ids", dense_ids, tokens, call);
  const int64_t samples = grad.size(0), columns = grad.size(2);
  STD_TORCH_CHECK(grad.size(1) - num_prefix == ids.size(1), "gather_tokens: grad must have a row for each id");
  Tensor out = new_result(grad, {samples, num_prefix + tokens, columns});
  scatter_rows({rows_of(rows), out.mutable_data_ptr(), const_data<int64_t>(dense_ids), samples, ids.size(1), tokens,
                num_prefix, columns, dtype_of("gather_tokens", "grad", grad)},
               call.workers);
  return out;
}

// ---- restoring

constexpr char kRestore[] = "restore_tokens";

template <class Absent>
void check_places(const Places& places, const Call& call, const Absent& absent) {
  const int64_t row = sslkernels::check_places(places, call.workers, absent);
  for (int64_t t = 0; row >= 0 && t < places.tokens; t++)
    STD_TORCH_CHECK(places.row(row)[t] >= 0, kRestore, ": ids_restore must be 0 or more, got ", places.row(row)[t],
                    " in row ", row);
  STD_TORCH_CHECK(row < 0, kRestore, ": ids_restore must not repeat a place below ", places.kept, ", row ", row,
                  " does");
}

// A dense operand of the dtype of x, whose last dimension is that of x.
Tensor checked_operand(const char* argument, const Tensor& operand, const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(operand.is_cpu() && operand.scalar_type() == x.scalar_type() && operand.dim() == dims &&
                      operand.size(dims - 1) == x.size(2),
                  kRestore, ": ", argument, " must have the dtype and the columns of x");
  return torch::stable::contiguous(operand);
}

Tensor restore_tokens_fwd_cpu(const Tensor& x, const Tensor& ids_restore, const OptionalTensor& mask_token,
                              const OptionalTensor& pos_embed, int64_t num_prefix) {
  const Call call;
  const Tensor rows = checked_tokens(kRestore, "x", x, num_prefix);
  const Tensor ids = checked_ids(kRestore, "ids_restore", ids_restore, x.size(0));
  const int64_t samples = x.size(0), tokens = ids.size(1), columns = x.size(2);
  const Places places{const_data<int64_t>(ids), samples, tokens, x.size(1) - num_prefix};
  check_places(places, call, [](int64_t, int64_t) {});
  Tensor out = new_result(x, {samples, num_prefix + tokens, columns});
  RestoreJob job{rows_of(rows), out.mutable_data_ptr(),    places, nullptr, nullptr, num_prefix, 0,
                 columns,       dtype_of(kRestore, "x", x)};
  OptionalTensor token, position;
  if (mask_token) {
    token = checked_operand("mask_token", *mask_token, x, 1);
    job.mask_token = token->const_data_ptr();
  }
  if (pos_embed) {
    position = checked_operand("pos_embed", *pos_embed, x, 2);
    job.pos_embed = position->const_data_ptr();
    job.pos_tokens = position->size(0);
    STD_TORCH_CHECK(job.pos_tokens == tokens || job.pos_tokens == num_prefix + tokens, kRestore,
                    ": pos_embed must have ", tokens, " or ", num_prefix + tokens, " rows, got ", job.pos_tokens);
  }
  restore_rows(job, call.workers);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> restore_tokens_bwd_cpu(const Tensor& grad, const Tensor& ids_restore,
                                                          int64_t num_keep, int64_t num_prefix, int64_t pos_tokens,
                                                          bool need_x, bool need_mask_token) {
  const Call call;
  const Tensor rows = checked_tokens(kRestore, "grad", grad, num_prefix);
  const Tensor ids = checked_ids(kRestore, "ids_restore", ids_restore, grad.size(0));
  const int64_t samples = grad.size(0), tokens = ids.size(1), columns = grad.size(2);
  STD_TORCH_CHECK(grad.size(1) == num_prefix + tokens && num_keep >= 0 && pos_tokens >= 0 && pos_tokens <= grad.size(1),
                  kRestore, ": grad must have a row for each token");
  // an operator's results share no memory
  const auto nothing = [&] { return torch::stable::new_empty(grad, {0}); };
  Tensor grad_x = need_x ? new_result(grad, {samples, num_prefix + num_keep, columns}) : nothing();
  Tensor grad_mask_token = need_mask_token ? torch::stable::new_empty(grad, {columns}) : nothing();
  Tensor grad_pos = pos_tokens > 0 ? torch::stable::new_empty(grad, {pos_tokens, columns}) : nothing();
  const Places places{const_data<int64_t>(ids), samples, tokens, num_keep};
  const int64_t row_bytes = columns * static_cast<int64_t>(grad.element_size());
  const TokenRows kept = dense_rows(grad_x.mutable_data_ptr(), num_prefix + num_keep, row_bytes);
  check_places(places, call, [&](int64_t n, int64_t k) {
    if (need_x) call.kernel.cached.zero(kept.at(n, num_prefix + k), row_bytes);
  });
  const RestoreGradJob job{rows_of(rows),
                           places,
                           need_x ? grad_x.mutable_data_ptr() : nullptr,
                           need_mask_token ? grad_mask_token.mutable_data_ptr() : nullptr,
                           pos_tokens > 0 ? grad_pos.mutable_data_ptr() : nullptr,
                           num_prefix,
                           pos_tokens,
                           columns,
                           dtype_of(kRestore, "grad", grad)};
  restore_rows_backward(job, call.workers);
  return {grad_x, grad_mask_token, grad_pos};
}

// ---- rows of patches

constexpr char kEmbed[] = "masked_patch_embed";

Patches patches_of(const Tensor& images, const std::vector<int64_t>& patch_size) {
  const int64_t dims = static_cast<int64_t>(patch_size.size());
  STD_TORCH_CHECK(images.is_cpu() && (dims == 2 || dims == 3) && images.dim() == 2 + dims, kEmbed,
                  ": images must be (N, C, H, W) or (N, C, T, H, W) on the CPU");
  const int64_t item = images.element_size();
  Patches patches{bytes_of(images),
                  images.size(0),
                  images.size(1),
                  {images.stride(0) * item, images.stride(1) * item, 0, 0, 0},
                  {1, 1, 1},
                  {1, 1, 1},
                  item};
  for (int64_t d = 0; d < dims; d++) {
    const int64_t axis = 3 - dims + d, size = images.size(2 + d);  // an image is a video of one frame
    STD_TORCH_CHECK(patch_size[d] > 0 && size % patch_size[d] == 0, kEmbed,
                    ": the sizes of images must be multiples of the patch size");
    patches.step[2 + axis] = images.stride(2 + d) * item;
    patches.patch[axis] = patch_size[d];
    patches.grid[axis] = size / patch_size[d];
  }
  return patches;
}

Tensor gather_patches_fwd_cpu(const Tensor& images, const Tensor& ids, std::vector<int64_t> patch_size) {
  const Call call;
  const Patches patches = patches_of(images, patch_size);
  const Tensor dense_ids = checked_ids(kEmbed, "ids_keep", ids, images.size(0));
  check_range(kEmbed, "ids_keep", dense_ids, patches.count(), call);
  Tensor out = new_result(images, {images.size(0), ids.size(1), patches.elements()});
  gather_patches({patches, out.mutable_data_ptr(), const_data<int64_t>(dense_ids), ids.size(1)}, call.workers);
  return out;
}

Tensor gather_patches_bwd_cpu(const Tensor& grad, const Tensor& ids, std::vector<int64_t> image_shape,
                              std::vector<int64_t> patch_size) {
  const Call call;
  const Tensor rows = checked_tokens(kEmbed, "grad", grad, 0);
  Tensor out = new_result(grad, image_shape);
  const Patches patches = patches_of(out, patch_size);
  const Tensor dense_ids = checked_ids(kEmbed, "ids_keep", ids, out.size(0));
  check_range(kEmbed, "ids_keep", dense_ids, patches.count(), call);
  STD_TORCH_CHECK(grad.size(0) == out.size(0) && grad.size(1) == ids.size(1) && grad.size(2) == patches.elements(),
                  kEmbed, ": grad must have a row for each id, of one patch");
  scatter_patches({rows_of(rows), patches, const_data<int64_t>(dense_ids), ids.size(1), dtype_of(kEmbed, "grad", grad)},
                  call.workers);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, m) {
  m.impl("patch_mask_fwd", TORCH_BOX(&patch_mask_fwd_cpu));
  m.impl("invert_ids", TORCH_BOX(&invert_ids_cpu));
  m.impl("random_masking_fwd", TORCH_BOX(&random_masking_fwd_cpu));
  m.impl("gather_tokens_fwd", TORCH_BOX(&gather_tokens_fwd_cpu));
  m.impl("gather_tokens_bwd", TORCH_BOX(&gather_tokens_bwd_cpu));
  m.impl("restore_tokens_fwd", TORCH_BOX(&restore_tokens_fwd_cpu));
  m.impl("restore_tokens_bwd", TORCH_BOX(&restore_tokens_bwd_cpu));
  m.impl("gather_patches_fwd", TORCH_BOX(&gather_patches_fwd_cpu));
  m.impl("gather_patches_bwd", TORCH_BOX(&gather_patches_bwd_cpu));
}

}  // namespace
}  // namespace sslkernels
