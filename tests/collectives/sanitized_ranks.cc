// Ranks of a job as threads of one program, for the sanitizers: every collective in several types, groups and sizes,
// its result compared, then calls that cannot work, which must throw. The linker's --wrap gives all threads the same
// mappings, as a sanitizer of threads knows memory by its address, and locks that belong to a rank.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "collectives.h"

using namespace cpu_parallel;

namespace {
std::mutex mapping;
std::map<std::pair<off_t, size_t>, void*> mapped;
}  // namespace

extern "C" void* __real_mmap(void* address, size_t length, int protection, int flags, int fd, off_t offset);
extern "C" int __real_munmap(void* address, size_t length);
extern "C" int __real_fcntl(int fd, int command, ...);

extern "C" void* __wrap_mmap(void* address, size_t length, int protection, int flags, int fd, off_t offset) {
  if (fd < 0) return __real_mmap(address, length, protection, flags, fd, offset);
  const std::lock_guard<std::mutex> guard(mapping);
  void*& found = mapped[{offset, length}];
  if (found == nullptr) found = __real_mmap(address, length, protection, flags, fd, offset);
  return found;
}

extern "C" int __wrap_munmap(void*, size_t) { return 0; }

extern "C" int __wrap_fcntl(int fd, int command, ...) {
  va_list list;
  va_start(list, command);
  void* argument = va_arg(list, void*);
  va_end(list);
  if (command == F_SETLK || command == F_GETLK) return 0;  // every rank holds its lock
  return __real_fcntl(fd, command, argument);
}

namespace {

constexpr int kRanks = 4;

void Expect(bool right, const char* what) {
  if (right) return;
  std::printf("%s is wrong\n", what);
  std::exit(1);
}

void Refused(const char* what, const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception&) {
    return;
  }
  std::printf("%s is not refused\n", what);
  std::exit(1);
}

// Buffers have exactly their size.
using Floats = std::vector<float>;

void Every(Job* job, const Ranks& ranks, int64_t count) {
  const int size = static_cast<int>(ranks.size());
  int self = 0;
  while (ranks[self] != job->rank()) ++self;
  const auto value = [](int rank, int64_t i) { return static_cast<float>(rank * 3 + i % 17); };
  Floats in(count), out(count), all(count * size), part(count);
  float expected = 0;
  for (int rank : ranks) expected += value(rank, count - 1);
  for (int64_t i = 0; i < count; ++i) in[i] = value(job->rank(), i);
  AllReduce(job, ranks, kF32, kSum, in.data(), out.data(), count);
  Expect(out[count - 1] == expected, "AllReduce");
  AllGather(job, ranks, kF32, in.data(), all.data(), count);
  Expect(all[count * size - 1] == value(ranks[size - 1], count - 1), "AllGather");
  ReduceScatter(job, ranks, kF32, kMax, all.data(), part.data(), count);
  Expect(part[count - 1] == value(ranks[self], count - 1), "ReduceScatter");
  Broadcast(job, ranks, kF32, ranks[size - 1], in.data(), out.data(), count);
  Expect(out[0] == value(ranks[size - 1], 0), "Broadcast");
  Floats turned(all.size());
  AllToAll(job, ranks, kF32, {count, size}, 1, 0, all.data(), turned.data());
  std::vector<int64_t> send, receive;
  int64_t sent = 0, received = 0;
  for (int i = 0; i < size; ++i) {
    send.push_back((self + i) % 3 * count);
    receive.push_back((self + i) % 3 * count);
    sent += send.back();
    received += receive.back();
  }
  Floats from(sent, static_cast<float>(job->rank())), to(received);
  AllToAllV(job, ranks, kF32, send, receive, from.data(), sent, to.data(), received);
  if (receive[0] > 0) Expect(to[0] == static_cast<float>(ranks[0]), "AlltoAllV");
  Barrier(job, ranks);
  if (size < 2) return;
  const int next = ranks[(self + 1) % size], before = ranks[(self + size - 1) % size];
  for (int message = 0; message < 3; ++message) {
    if (self == 0) Send(job, next, count, kF32, in.data(), count);
    Receive(job, before, count, kF32, out.data(), count);
    if (self != 0) Send(job, next, count, kF32, in.data(), count);
    Expect(out[0] == value(before, 0), "Receive");
  }
}

void Wrong(Job* job) {
  char memory[8] = {};
  const Ranks all = {0, 1, 2, 3};
  Ranks many, twice = {0, 1, 1, 2, 3};
  for (int i = 0; i < 100; ++i) many.push_back(i % kRanks);
  for (const Ranks& ranks : {many, twice, Ranks{}, Ranks{0, 1, 2, 3, 4}, Ranks{-1, 0, 1, 2, 3}}) {
    Refused("a group", [&] { AllReduce(job, ranks, kF32, kSum, memory, memory, 1); });
    Refused("a group", [&] { Barrier(job, ranks); });
  }
  for (const int64_t count : {int64_t{-1}, INT64_MIN, INT64_MAX}) {
    Refused("AllReduce", [&] { AllReduce(job, all, kF32, kSum, memory, memory, count); });
    Refused("AllGather", [&] { AllGather(job, all, kF32, memory, memory, count); });
    Refused("ReduceScatter", [&] { ReduceScatter(job, all, kF32, kSum, memory, memory, count); });
    Refused("Broadcast", [&] { Broadcast(job, all, kF32, 0, memory, memory, count); });
    Refused("Send", [&] { Send(job, (job->rank() + 1) % kRanks, 99, kF32, memory, count); });
    Refused("Receive", [&] { Receive(job, (job->rank() + 1) % kRanks, 99, kF32, memory, count); });
    Refused("AlltoAll", [&] { AllToAll(job, all, kF32, {count, 4}, 1, 0, memory, memory); });
    Refused("AlltoAll", [&] { AllToAll(job, all, kF32, {0, 4, count}, 1, 0, memory, memory); });
    Refused("AlltoAllV", [&] { AllToAllV(job, all, kF32, {count, 0, 0, 1}, {0, 0, 0, 0}, memory, 2, memory, 2); });
    Refused("AlltoAllV", [&] { AllToAllV(job, all, kF32, {0, 0, 0, 0}, {1, 0, 0, count}, memory, 2, memory, 2); });
  }
  Refused("AlltoAllV", [&] { AllToAllV(job, all, kF32, {1, 1, 1, 0}, {0, 0, 0, 0}, memory, 2, memory, 2); });
  Refused("AlltoAllV", [&] { AllToAllV(job, all, kF32, {0, 0, 0, 0}, {1, 1, 1, 0}, memory, 2, memory, 2); });
  Refused("AlltoAllV", [&] { AllToAllV(job, all, kF32, {1}, {1}, memory, 2, memory, 2); });
  Refused("AlltoAll", [&] { AllToAll(job, all, kF32, {2, 3}, 1, 0, memory, memory); });
  Refused("AlltoAll", [&] { AllToAll(job, all, kF32, {4}, 1, 0, memory, memory); });
  Refused("Broadcast", [&] { Broadcast(job, {0, 1, 2, 3}, kF32, 7, memory, memory, 1); });
  Refused("Send", [&] { Send(job, kRanks, 0, kF32, memory, 1); });
  Refused("Send", [&] { Send(job, job->rank(), 0, kF32, memory, 1); });
  Refused("Receive", [&] { Receive(job, -1, 0, kF32, memory, 1); });
}

void Rank(int rank, const std::string& name) {
  Job job(name, rank, kRanks, 60, 60);
  for (const int64_t count : {1, 33, 5000, 300000}) {
    Every(&job, {0, 1, 2, 3}, count);
    if (rank % 2 == 0) Every(&job, {0, 2}, count);
    if (rank > 0) Every(&job, {1, 2, 3}, count);
    Every(&job, {rank}, count);
  }
  Wrong(&job);
  Every(&job, {0, 1, 2, 3}, 1000);  // what was refused left nothing behind
  job.Leave();
}

}  // namespace

int main() {
  const std::string name = "sanitized-" + std::to_string(getpid());
  Refused("a job", [&] { Job(name, 0, kMaxRanks + 1, 1, 1); });
  Refused("a job", [&] { Job(name, 1, 1, 1, 1); });
  Refused("a job", [&] { Job(std::string(300, 'x'), 0, 1, 1, 1); });
  Refused("a type", [] { ParseDType("complex64"); });
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < kRanks; ++rank) ranks.emplace_back(Rank, rank, name);
  for (auto& rank : ranks) rank.join();
  std::puts("all collectives ran");
  return 0;
}
