// sslkernels::ema_update_ for CUDA tensors.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <list>
#include <mutex>
#include <optional>

#include "cuda/ema.cuh"
#include "cuda/torch_host.h"
#include "ema_args.h"

namespace sslkernels {
namespace {

bool is_capturing(const OnDevice& device) {
  cudaStreamCaptureStatus status;
  device.check(cudaStreamIsCapturing(device.stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

// Tables on the device, kept for the next step: a training run has one. What a CUDA graph has captured is kept for
// good, since the graph may be replayed at any time.
class Tables {
 public:
  const ema::Entry* on_device(int device, const std::vector<ema::Entry>& host, const OnDevice& current) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool capturing = is_capturing(current);
    for (auto table = tables_.begin(); table != tables_.end(); ++table)
      if (table->device == device && same(table->host, host)) {
        table->captured |= capturing;
        tables_.splice(tables_.begin(), tables_, table);
        return table->memory;
      }
    STD_TORCH_CHECK(!capturing, "ema_update_: call it once with these tensors before capturing a CUDA graph");
    Table table{device, host, nullptr, false};
    const size_t bytes = host.size() * sizeof(ema::Entry);
    current.check(cudaMalloc(reinterpret_cast<void**>(&table.memory), bytes), "cudaMalloc");
    current.check(cudaMemcpy(table.memory, host.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    tables_.push_front(std::move(table));
    evict(current);
    return tables_.front().memory;
  }

 private:
  static constexpr size_t kKept = 16;
  struct Table {
    int device;
    std::vector<ema::Entry> host;
    ema::Entry* memory;
    bool captured;
  };

  static bool same(const std::vector<ema::Entry>& a, const std::vector<ema::Entry>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(ema::Entry)) == 0;
  }
  void evict(const OnDevice& current) {
    size_t loose = 0;
    for (auto table = tables_.begin(); table != tables_.end();) {
      const bool old = !table->captured && ++loose > kKept;
      if (old) current.check(cudaFree(table->memory), "cudaFree");  // waits for the kernels that read it
      table = old ? tables_.erase(table) : std::next(table);
    }
  }

  std::mutex mutex_;
  std::list<Table> tables_;
};

void ema_update_cuda(std::vector<Tensor> teacher, std::vector<Tensor> student, const Tensor& momentum,
                     std::optional<Tensor> found_inf, std::vector<Tensor> bf16_copy, std::optional<int64_t> seed,
                     std::optional<Tensor> step, std::vector<int64_t> keys) {
  if (teacher.empty()) return;
  const EmaArguments arguments(teacher, student, momentum, found_inf, bf16_copy, seed, step, keys);
  const ema::Options options{static_cast<const double*>(momentum.const_data_ptr()),
                             found_inf ? static_cast<const float*>(found_inf->const_data_ptr()) : nullptr,
                             seed ? static_cast<const int64_t*>(step->const_data_ptr()) : nullptr,
                             static_cast<uint64_t>(seed.value_or(0))};
  ema::update_on_gpu(arguments.list.tensors, options, teacher[0].get_device_index());
}

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CUDA, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_cuda)); }

}  // namespace

void ema::update_on_gpu(const std::vector<EmaTensor>& tensors, const Options& options, int32_t device) {
  const std::vector<Table> tables = tables_of(tensors);
  STD_TORCH_CHECK(!tables.empty() || tensors.empty(), "ema_update_: at most ", kMaxDims,
                  " dimensions that do not merge");
  const OnDevice current("ema_update_", device);
  static Tables* const kept = new Tables;  // never destroyed: CUDA may be gone by then
  for (const Table& table : tables) {
    launch(table, kept->on_device(device, table.entries, current), options, current.stream);
    current.check();
  }
}

}  // namespace sslkernels
