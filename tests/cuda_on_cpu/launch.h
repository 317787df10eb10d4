// The host's side: launches, their limits, and the few functions of the runtime that launchers call.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "block.h"

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // what would be an error is an exception here
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace cuda_on_cpu {

// One launch at a time: the running block is a global, and the host's threads take turns.
inline std::mutex launch_mutex;
inline Schedule schedule;
inline std::map<const void*, size_t>& dynamic_limits() {
  static std::map<const void*, size_t> limits;
  return limits;
}

inline void set_schedule(int number) {
  std::lock_guard<std::mutex> lock(launch_mutex);
  schedule.number = number;
}

inline void check_launch(const LaunchShape& shape, const void* kernel) {
  const auto& [grid, block, dynamic_bytes] = shape;
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error("a GPU refuses this launch: " + what);
  };
  require(grid.x && grid.y && grid.z && block.x && block.y && block.z, "the grid or the block is empty");
  require(grid.x <= 0x7fffffff && grid.y <= 0xffff && grid.z <= 0xffff, "the grid is too large");
  require(uint64_t{block.x} * block.y * block.z <= kMaxThreads && block.z <= 64, "the block is too large");
  const auto limit = dynamic_limits().find(kernel);
  require(
      dynamic_bytes <= (limit == dynamic_limits().end() ? kMaxStaticBytes : limit->second),
      std::to_string(dynamic_bytes) + " bytes of dynamic shared memory; above 48 KiB cudaFuncSetAttribute comes first");
}

// The fibers of a launch. Blocks may share theirs, but not under ThreadSanitizer, which sees no race between two blocks
// whose threads are the same to it; it has a limit, though.
class ThreadPool {
 public:
  std::vector<Thread*> take(unsigned n) {
#if defined(CUDA_ON_CPU_TSAN)
    constexpr size_t kMaxFibers = 6000;
    if (next_ + n > kMaxFibers) next_ = 0;
#else
    next_ = 0;
#endif
    static auto& all = *new std::vector<Thread*>;
    while (all.size() < next_ + n) all.push_back(new Thread);
    next_ += n;
    return {all.begin() + (next_ - n), all.begin() + next_};
  }

 private:
  size_t next_ = 0;
};

inline void run_blocks(const LaunchShape& shape, const Kernel& kernel) {
  const uint64_t plane = uint64_t{shape.grid.x} * shape.grid.y, blocks = plane * shape.grid.z;
  std::vector<uint32_t> order(blocks);
  Random random = schedule.random(~uint64_t{0});
  schedule.arrange(order.data(), static_cast<uint32_t>(blocks), random);
  ThreadPool pool;
  for (const uint32_t b : order) {
    const uint3 index = {b % shape.grid.x, b / shape.grid.x % shape.grid.y, static_cast<unsigned>(b / plane)};
    std::vector<Thread*> threads = pool.take(shape.block.x * shape.block.y * shape.block.z);
    std::make_unique<Block>(shape, index, schedule, kernel, std::move(threads))->run();
  }
}

// Every thread gets a copy of the arguments, as on a GPU.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t,
            Arguments&&... arguments) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  const LaunchShape shape = {grid, block, dynamic_bytes};
  check_launch(shape, reinterpret_cast<const void*>(kernel));
  const std::pair<void (*)(Parameters...), std::tuple<Parameters...>> call(
      kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  const auto apply = [](const void* p) {
    const auto& [function, values] = *static_cast<decltype(&call)>(p);
    std::apply(function, std::tuple<Parameters...>(values));
  };
  const struct AfterTheHostAndBeforeIt {
    AfterTheHostAndBeforeIt() { publish(&begin_clock); }
    ~AfterTheHostAndBeforeIt() { observe(&end_clock); }
  } ordered;
  const Unwatched unwatched;
  run_blocks(shape, {apply, &call});
}

}  // namespace cuda_on_cpu

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > cuda_on_cpu::kMaxSharedBytes)
    throw std::runtime_error("no GPU has that much shared memory: " + std::to_string(bytes) + " bytes");
  const std::lock_guard<std::mutex> lock(cuda_on_cpu::launch_mutex);
  cuda_on_cpu::dynamic_limits()[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}
