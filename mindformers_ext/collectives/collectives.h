// The collectives between the ranks of a Job. Buffers are private memory of the caller; counts are elements.
// All ranks of `ranks` must call the same collective in the same order; every function returns when this rank's
// part is done and its buffers may be reused, and throws JobError instead of hanging.
#pragma once
#include <cstdint>
#include <vector>

#include "reduce.h"
#include "shared_job.h"

namespace cpu_parallel {

using Ranks = std::vector<int>;

// out[i] = reduction over the ranks of in[i]; in and out may be the same buffer.
void AllReduce(Job* job, const Ranks& ranks, DType type, Reduce how, const void* in, void* out, int64_t count);
// out = the in (count elements) of every rank, one after the other.
void AllGather(Job* job, const Ranks& ranks, DType type, const void* in, void* out, int64_t count);
// in has ranks.size() parts of `count` elements; rank i gets the reduction of all i-th parts.
void ReduceScatter(Job* job, const Ranks& ranks, DType type, Reduce how, const void* in, void* out, int64_t count);
// The i-th of n equal parts of dimension `split` goes to rank i; what arrives is joined, in rank order, along `concat`.
void AllToAll(Job* job, const Ranks& ranks, DType type, const std::vector<int64_t>& shape, int split, int concat,
              const void* in, void* out);
// send_counts[i] elements, one part after the other, go to rank i; recv_counts[i] elements come from it. `in` and `out`
// have in_count and out_count elements.
void AllToAllV(Job* job, const Ranks& ranks, DType type, const std::vector<int64_t>& send_counts,
               const std::vector<int64_t>& recv_counts, const void* in, int64_t in_count, void* out, int64_t out_count);
// out = the in of rank `root` (a global rank).
void Broadcast(Job* job, const Ranks& ranks, DType type, int root, const void* in, void* out, int64_t count);
void Barrier(Job* job, const Ranks& ranks);
// A message to a peer; the sender may be kMailboxDepth messages of one tag ahead of the receiver.
void Send(Job* job, int peer, int64_t tag, DType type, const void* in, int64_t count);
void Receive(Job* job, int peer, int64_t tag, DType type, void* out, int64_t count);

// One collective by name: what the attributes of a graph's operator, or the arguments of collectives.py, say.
struct Request {
  std::string collective;
  Ranks ranks;
  DType type = kF32;
  Reduce reduce = kSum;
  int split = 0, concat = 0, root = -1, peer = -1;
  int64_t tag = 0;
  std::vector<int64_t> send_counts, recv_counts;
};

// Runs it on `in`, of this shape. Throws when `out_count` elements cannot be what comes of it.
void Run(const Request& request, const void* in, const std::vector<int64_t>& shape, void* out, int64_t out_count);
void CheckSizes(const Request& request, int64_t in_count, int64_t out_count);

// Let MindSpore's own CPU kernels use OMP_NUM_THREADS threads of its pool (see kernel_threads.cc).
void LimitKernelThreads();

// The job of this process; throws JobError before cpu_parallel_join.
Job* CurrentJob();
int RecordFailure(const char* message);

// Runs an operation; on an exception records the sentence, stops the other ranks and returns 1.
template <class Operation>
int Guarded(Operation operation) {
  try {
    operation();
    return 0;
  } catch (const std::exception& error) {
    return RecordFailure(error.what());
  }
}

}  // namespace cpu_parallel
