// The kernels of patch masking on ragged sizes under every schedule, against plain loops, and where in memory the rows
// of tensors lie that no test has room for. For the sanitizers: exit status 1 and a line per failure.
#include "cuda/patch_mask.cuh"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "host.h"

using namespace sslkernels;
using patch_mask::Images;
using patch_mask::Rows;
using patch_mask::Selection;

namespace {

int failures = 0, schedule = 0;

void expect(bool holds, const char* what, int64_t samples, int64_t tokens, int64_t kept) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s of (%ld, %ld, %ld) under schedule %d\n", what, static_cast<long>(samples),
              static_cast<long>(tokens), static_cast<long>(kept), schedule);
}

// ---- which tokens stay

struct Masks {
  std::vector<int64_t> keep, restore;
  std::vector<unsigned char> removed;

  Masks(int64_t samples, int64_t tokens, int64_t kept)
      : keep(samples * kept, -7), restore(samples * tokens, -7), removed(samples * tokens, 7) {}
  void fill(Selection& s) {
    s.ids_keep = keep.data();
    s.ids_restore = restore.data();
    s.mask = reinterpret_cast<bool*>(removed.data());
  }
  bool operator==(const Masks& other) const {
    return keep == other.keep && restore == other.restore && removed == other.removed;
  }
};

uint32_t random_key(uint64_t seed, uint64_t sample, uint32_t token) {
  uint32_t words[4] = {token / 4, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32), 2};
  philox(words, seed, PhiloxScalar{});
  return words[token % 4];
}

// The definition, given the keys' order.
template <class Before>
Masks by_sorting(int64_t samples, int64_t tokens, int64_t kept, bool ordered, const Before& before) {
  Masks masks(samples, tokens, kept);
  for (int64_t n = 0; n < samples; n++) {
    std::vector<int64_t> order(tokens);
    for (int64_t t = 0; t < tokens; t++) order[t] = t;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return before(n, a, b); });
    if (ordered) std::sort(order.begin(), order.begin() + kept);
    int64_t* const restore = masks.restore.data() + n * tokens;
    std::fill(restore, restore + tokens, tokens);
    for (int64_t k = 0; k < kept; k++) restore[masks.keep[n * kept + k] = order[k]] = k;
    int64_t next = kept;
    for (int64_t t = 0; t < tokens; t++) {
      masks.removed[n * tokens + t] = restore[t] == tokens;
      if (restore[t] == tokens) restore[t] = next++;
    }
  }
  return masks;
}

void check_selection(int64_t samples, int64_t tokens, int64_t kept, bool ordered) {
  const int64_t seed = -0x123456789abcdef;
  std::vector<int64_t> ids;
  for (int64_t n = 0; n < samples; n++) ids.push_back(n * 0x300000001 - 1);
  HostMemory host;
  Masks drawn(samples, tokens, kept);
  Selection s{&seed, ids.data(), nullptr, tokens, kept, ordered, nullptr, nullptr, nullptr};
  drawn.fill(s);
  patch_mask::select(host, s, samples);
  const auto key = [&](int64_t n, int64_t t) {
    return random_key(static_cast<uint64_t>(seed), static_cast<uint64_t>(ids[n]), static_cast<uint32_t>(t));
  };
  expect(drawn == by_sorting(samples, tokens, kept, ordered,
                             [&](int64_t n, int64_t a, int64_t b) { return key(n, a) < key(n, b); }),
         "drawn masks", samples, tokens, kept);

  std::vector<float> scores;
  for (int64_t i = 0; i < samples * tokens; i++) scores.push_back(std::sin(static_cast<float>(i % 37)));
  Masks scored(samples, tokens, kept);
  s.scores = scores.data();
  scored.fill(s);
  patch_mask::select(host, s, samples);
  const auto score = [&](int64_t n, int64_t t) { return scores[n * tokens + t]; };
  expect(scored == by_sorting(samples, tokens, kept, ordered,
                              [&](int64_t n, int64_t a, int64_t b) { return score(n, a) < score(n, b); }),
         "masks of scores with ties", samples, tokens, kept);

  Masks inverted(samples, tokens, kept);
  inverted.fill(s);
  inverted.keep = scored.keep;
  s.ids_keep = inverted.keep.data();
  patch_mask::invert(host, s, samples);
  expect(inverted == scored, "inverted ids", samples, tokens, kept);
}

// ---- rows

std::vector<float> numbers(int64_t count) {
  std::vector<float> x(count);
  for (int64_t i = 0; i < count; i++) x[i] = static_cast<float>(i % 251) - 100;  // sums of few are exact
  return x;
}

constexpr int64_t kBad[] = {-1, INT64_MIN, INT64_MAX, int64_t{1} << 32};

// Ids with repetitions and, among them, some that do not exist.
std::vector<int64_t> some_ids(int64_t count, int64_t tokens) {
  std::vector<int64_t> ids(count);
  for (int64_t i = 0; i < count; i++) ids[i] = i % 5 == 3 || tokens == 0 ? kBad[i % 4] : i * i % tokens;
  return ids;
}

struct Shape {
  int64_t samples, tokens, kept, prefix, dim;
};

bool is_id(int64_t id, int64_t tokens) { return id >= 0 && id < tokens; }

void check_gather(const Shape& s) {
  const auto [samples, tokens, kept, prefix, dim] = s;
  const int64_t row = dim * 4;
  std::vector<float> x = numbers(samples * (prefix + tokens) * dim), out(samples * (prefix + kept) * dim, 7);
  std::vector<float> back(x.size(), 7), sums(x.size(), 0);
  const std::vector<int64_t> ids = some_ids(samples * kept, tokens);
  HostMemory host;
  const Rows from = patch_mask::dense_rows(x.data(), prefix + tokens, row);
  patch_mask::gather_tokens(host, Dtype::kFloat32, from, ids.data(), samples, kept, tokens, prefix, dim, out.data());
  bool right = true;
  for (int64_t n = 0; n < samples; n++)
    for (int64_t r = 0; r < prefix + kept; r++) {
      const int64_t id = r < prefix ? r : ids[n * kept + r - prefix];
      const bool exists = r < prefix || is_id(id, tokens);
      for (int64_t d = 0; d < dim; d++) {
        const float value = out[(n * (prefix + kept) + r) * dim + d];
        const int64_t at = exists ? (n * (prefix + tokens) + (r < prefix ? r : prefix + id)) * dim + d : 0;
        right = right && (exists ? value == x[at] : std::isnan(value));
        if (exists) sums[at] += x[at];
        if (!exists) out[(n * (prefix + kept) + r) * dim + d] = 1;  // must not be added to anything
      }
    }
  expect(right, "gathered tokens", samples, tokens, kept);
  const Rows grad = patch_mask::dense_rows(out.data(), prefix + kept, row);
  patch_mask::gather_tokens_backward(host, Dtype::kFloat32, grad, ids.data(), samples, kept, tokens, prefix, dim,
                                     back.data());
  expect(back == sums, "gradients of gathered tokens", samples, tokens, kept);
}

void check_restore(const Shape& s) {
  const auto [samples, tokens, kept, prefix, dim] = s;
  const int64_t row = dim * 4, rows = prefix + tokens;
  std::vector<int64_t> places(samples * tokens);
  for (int64_t i = 0; i < samples * tokens; i++) {
    const int64_t place = (i * 7 + 3) % (tokens ? tokens : 1);  // 7 divides none of the numbers of tokens: all come
    places[i] = i % tokens == 2 ? INT64_MIN : place < kept ? place : INT64_MAX - place;
  }
  const std::vector<float> x = numbers(samples * (prefix + kept) * dim), token = numbers(dim),
                           embedding = numbers(rows * dim);
  std::vector<float> out(samples * rows * dim, 7);
  HostMemory host;
  const Rows from = patch_mask::dense_rows(const_cast<float*>(x.data()), prefix + kept, row);
  patch_mask::restore_tokens(host, Dtype::kFloat32,
                             {from, places.data(), tokens, prefix, kept, reinterpret_cast<const char*>(token.data()),
                              patch_mask::nan_of(Dtype::kFloat32)},
                             {embedding.data(), rows}, samples, dim, out.data());
  std::vector<float> grad_x(x.size(), 7), of_x(x.size(), 0), of_token(dim, 0), of_embedding(rows * dim, 0);
  std::vector<float> grad_token(dim, 7), grad_embedding(rows * dim, 7);
  bool right = true;
  for (int64_t n = 0; n < samples; n++)
    for (int64_t r = 0; r < rows; r++) {
      const int64_t place = r < prefix ? 0 : places[n * tokens + r - prefix];
      const bool is_there = r < prefix || (place >= 0 && place < kept);
      for (int64_t d = 0; d < dim; d++) {
        float& value = out[(n * rows + r) * dim + d];
        const int64_t at = is_there ? (n * (prefix + kept) + (r < prefix ? r : prefix + place)) * dim + d : 0;
        const float expected = (is_there ? x[at] : token[d]) + embedding[r * dim + d];
        right = right && (place < 0 ? std::isnan(value) : value == expected);
        if (place < 0) value = 0;
        if (is_there) of_x[at] = value;
        if (!is_there && place >= 0) of_token[d] += value;
        of_embedding[r * dim + d] += value;
      }
    }
  expect(right, "restored tokens", samples, tokens, kept);
  const Rows grad = patch_mask::dense_rows(out.data(), rows, row);
  patch_mask::restore_tokens_backward(host, Dtype::kFloat32, grad, places.data(), samples, tokens, kept, prefix, dim,
                                      {grad_x.data(), grad_token.data(), grad_embedding.data(), rows});
  expect(grad_x == of_x, "gradients of what was restored", samples, tokens, kept);
  expect(grad_token == of_token && grad_embedding == of_embedding, "sums of gradients", samples, tokens, kept);
}

// Videos whose lines are dense or not, in patches of 2 x 3 x `width`.
void check_patches(int64_t width, int64_t step) {
  const int64_t samples = 2, kept = 7, edges[3] = {2, 3, width}, sizes[5] = {samples, 3, 4, 6, 2 * width};
  const int64_t elements = 3 * 2 * 3 * width;
  int64_t strides[5], dense[5], count = 1;
  for (int d = 4; d >= 0; d--) {
    strides[d] = count * step;
    dense[d] = count;
    count *= sizes[d];
  }
  const std::vector<float> images = numbers(count * step);
  const std::vector<int64_t> ids = some_ids(samples * kept, 8);
  std::vector<float> out(samples * kept * elements, 7), back(count, 7), sums(count, 0);
  HostMemory host;
  const Images from = patch_mask::images_of(const_cast<float*>(images.data()), Dtype::kFloat32, sizes, strides, edges);
  patch_mask::gather_patches(host, Dtype::kFloat32, from, ids.data(), samples, kept, 3, out.data());
  bool right = true;
  for (int64_t i = 0; i < samples * kept * elements; i++) {
    const int64_t id = ids[i / elements];
    const int64_t q = i % width, p = i / width % 3, t = i / width / 3 % 2, c = i / width / 6 % 3;
    if (is_id(id, 8)) {
      const int64_t at = i / elements / kept * dense[0] + c * dense[1] + (id / 4 * 2 + t) * dense[2] +
                         (id / 2 % 2 * 3 + p) * dense[3] + id % 2 * width + q;
      right = right && out[i] == images[at * step];
      sums[at] += out[i];
    } else {
      right = right && std::isnan(out[i]);
      out[i] = 1;
    }
  }
  expect(right, "gathered patches", samples, width, step);
  const Images to = patch_mask::images_of(back.data(), Dtype::kFloat32, sizes, dense, edges);
  const Rows grad = patch_mask::dense_rows(out.data(), kept, elements * 4);
  patch_mask::gather_patches_backward(host, Dtype::kFloat32, grad, ids.data(), samples, kept, 3, to);
  expect(back == sums, "gradients of gathered patches", samples, width, step);
}

// ---- beyond 2^31 and 2^32

bool is_at(const char* begin, const char* row, __int128 offset) { return row - begin == static_cast<int64_t>(offset); }

// Memory of which only what is touched exists.
class Sparse {
 public:
  static constexpr size_t kBytes = size_t{1} << 34;
  Sparse()
      : begin(static_cast<char*>(
            mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {}
  ~Sparse() { munmap(begin, kBytes); }
  char* const begin;
};

void check_offsets(const Sparse& memory) {
  char* const begin = memory.begin;
  const __int128 big = 70000, row_bytes = 3072;
  const Rows rows = patch_mask::dense_rows(begin, 197, 3072);
  expect(is_at(begin, rows.row(70000, 196), (big * 197 + 196) * row_bytes), "offset of a row", 70000, 197, 0);
  expect(Rows::offset<uint16_t>(int64_t{3} << 31) == int64_t{3} << 32, "offset in a row", 1, 1, 0);
  Selection s{};
  s.tokens = 0x7fffffff;
  s.num_keep = 0x7ffffff0;
  expect(s.first_token(70000) == int64_t{70000} * 0x7fffffff, "offset of a mask", 70000, s.tokens, s.num_keep);
  expect(s.first_kept(70000) == int64_t{70000} * 0x7ffffff0, "offset of ids", 70000, s.tokens, s.num_keep);

  const int64_t sizes[5] = {100, 3, 64, 8192, 8192}, edges[3] = {2, 16, 16};
  const int64_t strides[5] = {3L * 64 * 8192 * 8192, 64L * 8192 * 8192, 8192L * 8192, 8192, 1};
  Images images = patch_mask::images_of(begin, Dtype::kBFloat16, sizes, strides, edges);
  expect(patch_mask::set_unit(images, Dtype::kBFloat16, 16) == 16, "unit of images", 0, 0, 0);
  const int64_t last = images.patches() - 1;
  expect(is_at(begin, images.row(2, last), 2 * ((__int128{2} * strides[0]) + 62 * strides[2] + 8176 * 8192 + 8176)),
         "offset of a patch", 2, last, 0);
  const int64_t end = 3 * 2 * 16 * 2 - 1;  // the last unit: the second half of the last line of the last frame
  expect(images.offset<uint4>(end) == 2 * (2 * strides[1] + strides[2] + 15 * 8192 + 8), "offset in a patch", 2, end,
         0);
}

// Kernels that read and write 2^32 bytes and more apart.
void check_far_rows(const Sparse& memory) {
  const int64_t row_bytes = 24, samples = 2, tokens = 2, far = int64_t{7} << 29;
  const Rows from{memory.begin, tokens * far, far}, to{memory.begin + 64, tokens * far, far};
  for (int64_t r = 0; r < samples * tokens; r++)
    for (int64_t d = 0; d < row_bytes / 4; d++)
      reinterpret_cast<float*>(from.row(0, r))[d] = static_cast<float>(10 * r + d);
  const int64_t ids[] = {1, 0, 1, 1};
  HostMemory host;
  patch_mask::move_rows(host, patch_mask::Gather<Rows>{from, ids, tokens, 0, tokens, 0}, to, samples, tokens, row_bytes,
                        8);
  const Rows added{memory.begin + 128, tokens * far, far};
  patch_mask::scatter_rows(host, Dtype::kFloat32, to, ids, samples, tokens, tokens, 0, row_bytes, added, 4);
  bool right = true;
  for (int64_t n = 0; n < samples; n++)
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t d = 0; d < row_bytes / 4; d++) {
        const auto value = [d](const Rows& rows, int64_t sample, int64_t row) {
          return reinterpret_cast<const float*>(rows.row(sample, row))[d];
        };
        const float times = static_cast<float>(std::count(ids + n * tokens, ids + (n + 1) * tokens, t));
        right = right && value(to, n, t) == value(from, n, ids[n * tokens + t]);
        right = right && value(added, n, t) == times * value(from, n, t);
      }
  expect(right, "rows far apart", samples, tokens, tokens);
}

}  // namespace

int main() {
  const Sparse memory;
  check_offsets(memory);
  for (; schedule < cuda_on_cpu::kSchedules; schedule++) {
    cuda_on_cpu::set_schedule(schedule);
    check_selection(2, 1, 1, false);
    check_selection(3, 10, 3, true);
    check_selection(2, 197, 49, false);
    check_selection(1, 300, 300, schedule % 2 == 0);
    check_gather({2, 10, 7, 1, 8});
    check_gather({3, 5, 40, 0, 5});
    check_gather({2, 0, 3, 2, 4});
    check_restore({3, 6, 3, 2, 8});
    check_restore({2, 13, 5, 1, 7});
    check_patches(8, 1);
    check_patches(3, 1);
    check_patches(4, 2);
    check_far_rows(memory);
  }
  cuda_on_cpu::set_schedule(schedule = 5);
  check_selection(1, 9000, 4500, false);  // keys that are drawn again, and words that shared memory does not hold
  std::printf("%d failed\n", failures);
  return failures != 0;
}
