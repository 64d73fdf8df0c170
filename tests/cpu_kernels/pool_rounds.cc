// Rounds of the thread pool with more threads than cores, for ThreadSanitizer: tests/cpu_kernels/test_sanitized.py.
#include <atomic>
#include <cstdio>

#include "kernel.h"

extern "C" void cpu_kernels_set_threads(int threads);

int main() {
  cpu_kernels_set_threads(4);
  for (int round = 0; round < 3000; ++round) {
    const int64_t count = 2 + round % 5;
    std::atomic<int64_t> done{0};
    cpu_kernels::parallel(count, [&](int64_t) { ++done; });
    if (done != count) return 1;
  }
  std::puts("all rounds ran");
}
