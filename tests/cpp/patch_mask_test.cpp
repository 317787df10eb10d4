// The C++ of patch masking on every instruction set that runs here: odd sizes, several threads, every path. Without
// torch, so that it runs under the sanitizers. Exit status 1 and a line per failure.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/patch_mask_patches.h"
#include "cpu/patch_mask_restore.h"
#include "cpu/patch_mask_rows.h"
#include "cpu/patch_mask_select.h"
#include "philox.h"
#include "std_threads.h"

using namespace sslkernels;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s\n", what.c_str());
}

struct Call {
  PatchMaskKernel kernel;
  StdThreads threads;
  Workers<StdThreads> workers;

  Call(const Isa& isa, int64_t count) : kernel(isa.patch_mask()), workers{kernel, count, threads} {}
};

struct Masks {
  std::vector<int64_t> keep, restore;
  std::vector<char> mask;

  Masks(int64_t samples, int64_t tokens, int64_t kept)
      : keep(samples * kept), restore(samples * tokens), mask(samples * tokens) {}
  bool operator==(const Masks& other) const {
    return keep == other.keep && restore == other.restore && mask == other.mask;
  }
  MaskJob job(int64_t samples, int64_t tokens, int64_t kept, bool ordered) {
    return {samples, tokens,  kept,        ordered,        0x123456789abcdef0,
            nullptr, nullptr, keep.data(), restore.data(), reinterpret_cast<bool*>(mask.data())};
  }
};

uint32_t key_of(uint64_t seed, int64_t sample, int64_t token) {
  uint32_t words[4] = {static_cast<uint32_t>(token / 4), static_cast<uint32_t>(sample),
                       static_cast<uint32_t>(sample >> 32), kPhiloxPatchMask};
  philox(words, seed, PhiloxScalar{});
  return words[token % 4];
}

// By sorting all keys.
std::vector<int64_t> define(const MaskJob& job, int64_t sample) {
  std::vector<int64_t> order(job.tokens);
  std::iota(order.begin(), order.end(), 0);
  const auto key = [&](int64_t t) {
    return job.scores ? score_key(job.scores[sample * job.tokens + t]) : key_of(job.seed, sample, t);
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key(a) < key(b); });
  order.resize(job.kept);
  if (job.ordered) std::sort(order.begin(), order.end());
  return order;
}

void check_masks(const Isa& isa, int64_t samples, int64_t tokens, int64_t kept, bool ordered, bool scores) {
  const std::string name = std::string(isa.name) + " masks " + std::to_string(tokens) + " keep " +
                           std::to_string(kept) + (ordered ? " ordered" : "") + (scores ? " scores" : "");
  std::vector<float> values(samples * tokens);
  for (size_t i = 0; i < values.size(); i++) values[i] = std::floor(10 * std::sin(static_cast<float>(7 * i)));  // ties
  Masks one(samples, tokens, kept), four(samples, tokens, kept), inverted(samples, tokens, kept);
  MaskJob job = one.job(samples, tokens, kept, ordered);
  if (scores) job.scores = values.data();
  draw_masks(job, Call(isa, 1).workers);
  bool right = true;
  for (int64_t n = 0; n < samples; n++) {
    const std::vector<int64_t> order = define(job, n);
    right = right && std::equal(order.begin(), order.end(), one.keep.begin() + n * kept);
  }
  expect(right, name);
  MaskJob again = four.job(samples, tokens, kept, ordered);
  again.scores = job.scores;
  draw_masks(again, Call(isa, 4).workers);
  expect(one == four, name + " depends on the number of threads");
  inverted.keep = one.keep;
  expect(invert_masks(inverted.job(samples, tokens, kept, ordered), Call(isa, 3).workers) == -1 && inverted == one,
         name + " inverted");
}

std::vector<float> random(int64_t count, float step) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; i++) values[i] = std::sin(step * static_cast<float>(i + 1));
  return values;
}

TokenRows rows(std::vector<float>& values, int64_t tokens, int64_t columns) {
  return dense_rows(values.data(), tokens, 4 * columns);
}

bool near(const std::vector<float>& a, const std::vector<double>& b) {
  double worst = 0;
  for (size_t i = 0; i < b.size(); i++) worst = std::fmax(worst, std::fabs(a[i] - b[i]));
  return a.size() == b.size() && worst < 1e-4;
}

// Rows by repeated ids and back, with a prefix.
void check_rows(const Isa& isa, int64_t samples, int64_t tokens, int64_t kept, int64_t columns, int64_t prefix) {
  const std::string name = std::string(isa.name) + " rows " + std::to_string(tokens) + " x " + std::to_string(columns);
  const int64_t all = prefix + tokens, some = prefix + kept;
  std::vector<float> x = random(samples * all * columns, 0.7f), grad = random(samples * some * columns, 0.3f);
  std::vector<float> out(grad.size()), back(x.size());
  std::vector<int64_t> ids(samples * kept);
  for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<int64_t>(i * i % (tokens / 2 + 1));
  std::vector<double> picked(out.size()), sums(back.size());
  for (int64_t n = 0; n < samples; n++)
    for (int64_t j = 0; j < some; j++)
      for (int64_t d = 0; d < columns; d++) {
        const int64_t t = j < prefix ? j : prefix + ids[n * kept + j - prefix];
        picked[(n * some + j) * columns + d] = x[(n * all + t) * columns + d];
        sums[(n * all + t) * columns + d] += grad[(n * some + j) * columns + d];
      }
  const Call call(isa, 4);
  expect(row_out_of_range(ids.data(), samples, kept, tokens, call.workers) == -1, name + " in range");
  if (kept > 0 && samples > 1) {
    expect(row_out_of_range(ids.data(), samples, kept, 0, call.workers) == 0, name + " out of range");
    ids[kept] += tokens;
    expect(row_out_of_range(ids.data(), samples, kept, tokens, call.workers) == 1, name + " out of range in row 1");
    ids[kept] -= tokens;
  }
  gather_rows({rows(x, all, columns), out.data(), ids.data(), samples, kept, tokens, prefix, 4 * columns},
              call.workers);
  expect(near(out, picked), name + " gathered");
  scatter_rows(
      {rows(grad, some, columns), back.data(), ids.data(), samples, kept, tokens, prefix, columns, Dtype::kFloat32},
      call.workers);
  expect(near(back, sums), name + " scattered");
}

// What is written past the caches is what is written through them, wherever a row begins and ends, and nothing beside
// it.
void check_streams(const Isa& isa, int64_t offset, int64_t elements) {
  const PatchMaskKernel kernel = isa.patch_mask();
  const int64_t columns = elements + 100;
  std::vector<float> a = random(columns, 0.7f), b = random(columns, 0.3f);
  std::vector<float> cached[3], streamed[3];
  for (int i = 0; i < 3; i++) cached[i] = streamed[i] = std::vector<float>(columns, 7.f);
  const auto write = [&](const RowMoves& moves, std::vector<float>(&to)[3]) {
    moves.copy(to[0].data() + offset, a.data() + 1, 4 * elements);
    moves.zero(to[1].data() + offset, 4 * elements);
    moves.add(Dtype::kFloat32, to[2].data() + offset, a.data(), b.data() + 3, elements);
    finish_streams();
  };
  write(kernel.cached, cached);
  write(kernel.streamed, streamed);
  for (int i = 0; i < 3; i++)
    expect(cached[i] == streamed[i],
           std::string(isa.name) + " streamed " + std::to_string(elements) + " from " + std::to_string(offset));
}

struct Restored {
  std::vector<float> out, grad_x, grad_token, grad_pos;

  bool operator==(const Restored& other) const {
    return out == other.out && grad_x == other.grad_x && grad_token == other.grad_token && grad_pos == other.grad_pos;
  }
};

Restored restore(const Call& call, const Places& places, std::vector<float>& x, std::vector<float>& grad,
                 const std::vector<float>& token, const std::vector<float>& pos, int64_t prefix, int64_t columns) {
  const int64_t all = prefix + places.tokens, some = prefix + places.kept;
  const int64_t pos_tokens = static_cast<int64_t>(pos.size()) / columns;
  Restored r{std::vector<float>(grad.size()), std::vector<float>(x.size()), std::vector<float>(columns),
             std::vector<float>(pos.size())};
  expect(check_places(places, call.workers, [](int64_t, int64_t) {}) == -1, "places");
  restore_rows({rows(x, some, columns), r.out.data(), places, token.data(), pos.empty() ? nullptr : pos.data(), prefix,
                pos_tokens, columns, Dtype::kFloat32},
               call.workers);
  restore_rows_backward({rows(grad, all, columns), places, r.grad_x.data(), r.grad_token.data(),
                         pos.empty() ? nullptr : r.grad_pos.data(), prefix, pos_tokens, columns, Dtype::kFloat32},
                        call.workers);
  return r;
}

void check_restore(const Isa& isa, int64_t samples, int64_t tokens, int64_t kept, int64_t columns, int64_t prefix,
                   int64_t pos_tokens) {
  const std::string name = std::string(isa.name) + " restored " + std::to_string(tokens) + " x " +
                           std::to_string(columns) + " pos " + std::to_string(pos_tokens);
  const int64_t all = prefix + tokens, some = prefix + kept;
  std::vector<float> x = random(samples * some * columns, 0.7f), grad = random(samples * all * columns, 0.3f);
  const std::vector<float> token = random(columns, 0.9f), pos = random(pos_tokens * columns, 0.2f);
  Masks masks(samples, tokens, kept);
  draw_masks(masks.job(samples, tokens, kept, false), Call(isa, 2).workers);
  const Places places{masks.restore.data(), samples, tokens, kept};
  const Restored one = restore(Call(isa, 1), places, x, grad, token, pos, prefix, columns);
  const Restored four = restore(Call(isa, 4), places, x, grad, token, pos, prefix, columns);
  expect(one == four, name + " depends on the number of threads");
  std::vector<double> out(grad.size()), grad_x(x.size()), grad_token(columns), grad_pos(pos.size());
  for (int64_t n = 0; n < samples; n++)
    for (int64_t j = 0; j < all; j++)
      for (int64_t d = 0; d < columns; d++) {
        const int64_t at = (n * all + j) * columns + d, p = (j - all + pos_tokens) * columns + d;
        const int64_t place = j < prefix ? j : prefix + masks.restore[n * tokens + j - prefix];
        if (p >= 0) out[at] = pos[p], grad_pos[p] += grad[at];
        out[at] += place < some ? x[(n * some + place) * columns + d] : token[d];
        (place < some ? grad_x[(n * some + place) * columns + d] : grad_token[d]) += grad[at];
      }
  expect(near(four.out, out) && near(four.grad_x, grad_x), name);
  expect(near(four.grad_token, grad_token) && near(four.grad_pos, grad_pos), name + " sums");
}

// Every patch of images goes out and comes back; some twice.
void check_patches(const Isa& isa, int64_t samples, int64_t channels, int64_t time, int64_t height, int64_t width) {
  const std::string name = std::string(isa.name) + " patches " + std::to_string(width);
  const int64_t t = 2, p = 3, q = width / 2, lines = time * height;
  std::vector<float> images = random(samples * channels * lines * width, 0.7f), back(images.size());
  Patches patches{reinterpret_cast<char*>(images.data()),
                  samples,
                  channels,
                  {4 * channels * lines * width, 4 * lines * width, 4 * height * width, 4 * width, 4},
                  {time / t, height / p, 2},
                  {t, p, q},
                  4};
  const int64_t kept = patches.count() + 1;
  std::vector<int64_t> ids(samples * kept);
  for (int64_t i = 0; i < samples * kept; i++) ids[i] = i % kept % patches.count();
  std::vector<float> out(samples * kept * patches.elements());
  const Call call(isa, 4);
  gather_patches({patches, out.data(), ids.data(), kept}, call.workers);
  Patches target = patches;
  target.data = reinterpret_cast<char*>(back.data());
  scatter_patches({dense_rows(out.data(), kept, 4 * patches.elements()), target, ids.data(), kept, Dtype::kFloat32},
                  call.workers);
  bool right = true;
  for (size_t i = 0; i < images.size(); i++) {
    const int64_t at = static_cast<int64_t>(i), line = at / width % height, frame = at / width / height % time;
    const bool twice = line < p && frame < t && at % width < q;  // the first patch
    right = right && back[i] == (twice ? 2 : 1) * images[i];
  }
  expect(right, name);
  patches.step[4] = 8;  // every other column of half as many
  patches.patch[2] = q / 2;
  gather_patches({patches, out.data(), ids.data(), kept}, call.workers);
  expect(q < 4 || (out[0] == images[0] && out[1] == images[2]), name + " strided");
}

}  // namespace

int main() {
  for (const Isa& isa : built_isas()) {
    if (!isa.supported()) continue;
    for (int64_t tokens : {0, 1, 7, 129, 600, 5000})
      for (int64_t kept : {int64_t{0}, tokens / 4, tokens})
        for (bool ordered : {false, true})
          for (bool scores : {false, true}) check_masks(isa, 3, tokens, kept, ordered, scores);
    for (int64_t offset : {0, 1, 13, 16})
      for (int64_t elements : {0, 1, 15, 16, 31, 100, 1030, 2500}) check_streams(isa, offset, elements);
    check_rows(isa, 3, 9, 30, 37, 2);
    check_rows(isa, 2, 200, 90, 1, 0);
    check_rows(isa, 2, 5, 0, 8, 1);
    check_rows(isa, 1, 3, 300, 530, 0);
    check_restore(isa, 5, 29, 7, 37, 2, 29);
    check_restore(isa, 5, 29, 7, 37, 2, 31);
    check_restore(isa, 70, 40, 10, 600, 0, 40);
    check_restore(isa, 3, 700, 100, 3, 1, 0);
    check_restore(isa, 2, 6, 0, 5, 0, 6);
    check_restore(isa, 2, 6, 6, 5, 1, 7);
    check_patches(isa, 2, 3, 4, 6, 34);
    check_patches(isa, 1, 1, 2, 3, 2);
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}
