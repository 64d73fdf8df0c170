// A small thread pool: the caller works too; idle workers look for work a moment longer, then sleep. One kernel uses it
// at a time; another that MindSpore runs beside it computes its tasks alone, which is as fast when all cores are busy
// and gives the same bits.
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "kernel.h"

namespace cpu_kernels {
namespace {

// Waking a sleeping thread takes longer than the gap between two kernels of a step. Whoever waits gives its core to any
// other thread that wants it, so that it costs nothing where processes share cores.
constexpr std::chrono::microseconds kPatience(200);

// Wait for `holds()` at most kPatience without sleeping; returns it.
template <class Condition>
bool wait_awake(const Condition& holds) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (!holds()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      ++round_;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // False when another caller has the pool.
  bool try_run(int64_t count, const std::function<void(int64_t)>& task) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      count_ = count;
      next_ = 0;
      error_ = nullptr;
      ++round_;
    }
    wake_.notify_all();
    take_tasks(task);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      task_ = nullptr;  // a worker that wakes up only now has nothing to do, and nobody waits for it
    }
    const auto all_done = [this] { return busy_ == 0; };
    if (!wait_awake(all_done)) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, all_done);
    }
    if (error_) std::rethrow_exception(error_);
    return true;
  }

 private:
  void work() {
    uint64_t seen = 0;
    const auto called = [&] { return round_ != seen; };
    while (true) {
      wait_awake(called);
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, called);
      if (stopping_) return;
      seen = round_;
      const std::function<void(int64_t)>* task = task_;  // the caller forgets it before this thread is done
      if (task == nullptr) continue;
      ++busy_;
      lock.unlock();
      take_tasks(*task);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void take_tasks(const std::function<void(int64_t)>& task) {
    try {
      for (int64_t i = next_++; i < count_; i = next_++) task(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      next_ = count_;
      if (!error_) error_ = std::current_exception();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::exception_ptr error_;
  std::atomic<int> busy_{0};  // workers inside the round
  std::atomic<uint64_t> round_{0};
  bool stopping_ = false;
};

// OMP_NUM_THREADS, or the cores that this process may use.
int default_threads() {
  const char* asked = std::getenv("OMP_NUM_THREADS");
  const int threads = asked == nullptr ? 0 : std::atoi(asked);
  cpu_set_t cores;
  if (threads > 0 || sched_getaffinity(0, sizeof cores, &cores) != 0) return std::max(threads, 1);
  return CPU_COUNT(&cores);
}

std::mutex pool_mutex;
std::shared_ptr<Pool>& current() {
  // Never destroyed: the end of the process does not wait for it.
  static auto* pool = new std::shared_ptr<Pool>(std::make_shared<Pool>(default_threads()));
  return *pool;
}

std::shared_ptr<Pool> pool() {
  const std::lock_guard<std::mutex> lock(pool_mutex);
  return current();
}

}  // namespace

void parallel(int64_t count, const std::function<void(int64_t)>& task) {
  if (count > 1) {
    const std::shared_ptr<Pool> shared = pool();
    if (shared->threads() > 1 && shared->try_run(count, task)) return;
  }
  for (int64_t i = 0; i < count; ++i) task(i);
}

void parallel_ranges(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& task) {
  parallel(blocks_of(count, grain),
           [&](int64_t block) { task(block * grain, std::min(count, (block + 1) * grain)); });
}

}  // namespace cpu_kernels

// Threads that compute, the caller included; not while an operator runs.
extern "C" void cpu_kernels_set_threads(int threads) {
  const std::lock_guard<std::mutex> lock(cpu_kernels::pool_mutex);
  if (cpu_kernels::current()->threads() != std::max(threads, 1)) {
    cpu_kernels::current() = std::make_shared<cpu_kernels::Pool>(std::max(threads, 1));
  }
}

extern "C" int cpu_kernels_threads() { return cpu_kernels::pool()->threads(); }
