// Threads of the standard library, as the kernels take them from torch.
#pragma once
#include <cstdint>
#include <thread>
#include <vector>

// Runs body(begin, end) over a partition of [0, n), each part on a thread.
struct StdThreads {
  template <class Body>
  void operator()(int64_t n, const Body& body) const {
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < n; i++) threads.emplace_back([&body, i] { body(i, i + 1); });
    body(0, 1);
    for (auto& thread : threads) thread.join();
  }
};
