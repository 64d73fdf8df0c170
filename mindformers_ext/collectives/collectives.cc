// Collectives over the shared memory of a Job, and the C interface that collectives.py calls.
//
// A buffer larger than a slot goes through in chunks. The slots rotate (Group::NextSlot), so one barrier a chunk is
// enough: while a slow rank still reads chunk c, the fast ones already write chunk c + 1 into the next slot.
#include "collectives.h"

#include <algorithm>
#include <memory>

namespace cpu_parallel {
namespace {

enum Op : int32_t { kAllReduce, kAllGather, kReduceScatter, kAllToAll, kAllToAllV, kBroadcast, kBarrier };

// Up to this size every rank reduces everything itself: one barrier instead of two.
constexpr int64_t kSmallBytes = 16 << 10;

const char* At(const void* base, int64_t offset) { return static_cast<const char*>(base) + offset; }
char* At(void* base, int64_t offset) { return static_cast<char*>(base) + offset; }

// A tensor part that lies in `run` consecutive bytes every `stride` bytes, addressed as if it were contiguous.
struct Strided {
  char* base;
  int64_t run, stride;
  template <class Copy>
  void Walk(int64_t begin, int64_t end, Copy copy) const {
    for (int64_t at = begin; at < end;) {
      const int64_t inside = at % run;
      const int64_t length = std::min(run - inside, end - at);
      copy(base + at / run * stride + inside, at - begin, length);
      at += length;
    }
  }
  void Read(int64_t begin, int64_t end, char* out) const {
    Walk(begin, end, [out](char* here, int64_t at, int64_t length) { std::memcpy(out + at, here, length); });
  }
  void Write(int64_t begin, int64_t end, const char* in) const {
    Walk(begin, end, [in](char* here, int64_t at, int64_t length) { std::memcpy(here, in + at, length); });
  }
};

// Elements [begin, end) of `count` that member `index` of `size` reduces; cache lines are not shared.
std::pair<int64_t, int64_t> Share(int64_t count, int index, int size, int64_t element) {
  const int64_t unit = std::max<int64_t>(1, 64 / element);
  const int64_t each = (count + size * unit - 1) / (size * unit) * unit;
  return {std::min(count, each * index), std::min(count, each * (index + 1))};
}

void AllReduceSmall(Group* group, DType type, Reduce how, const void* in, void* out, int64_t count) {
  std::memcpy(group->Slot(group->index()), in, count * SizeOf(type));
  group->Barrier();
  std::vector<const char*> parts;
  for (int i = 0; i < group->size(); ++i) parts.push_back(group->Slot(i));
  ReduceParts(type, how, parts, static_cast<char*>(out), count);
  group->NextSlot();
}

// One chunk: everybody copies in; after a barrier everybody reduces its share in its own slot; after another barrier
// everybody copies all shares out. Copying the next chunk in belongs before the second barrier, which serves both.
void AllReduceLarge(Group* group, DType type, Reduce how, const void* in, void* out, int64_t count) {
  const int64_t element = static_cast<int64_t>(SizeOf(type));
  const int64_t chunk = static_cast<int64_t>(kSlotBytes) / element;
  const auto copy_in = [&](char* slot, int64_t start) {
    const int64_t length = std::min(chunk, count - start);
    const auto [begin, end] = Share(length, group->index(), group->size(), element);
    std::memcpy(slot, At(in, start * element), begin * element);  // not the own share: it is reduced from `in`
    std::memcpy(slot + end * element, At(in, (start + end) * element), (length - end) * element);
  };
  copy_in(group->Slot(group->index()), 0);
  group->Barrier();
  for (int64_t start = 0; start < count; start += chunk) {
    const int64_t length = std::min(chunk, count - start);
    const auto [begin, end] = Share(length, group->index(), group->size(), element);
    std::vector<const char*> parts;
    for (int i = 0; i < group->size(); ++i) {
      parts.push_back(i == group->index() ? At(in, (start + begin) * element) : group->Slot(i) + begin * element);
    }
    char* own = group->Slot(group->index());
    ReduceParts(type, how, parts, own + begin * element, end - begin);
    if (start + chunk < count) copy_in(group->FollowingSlot(group->index()), start + chunk);
    group->Barrier();
    for (int i = 0; i < group->size(); ++i) {
      const auto [from, to] = Share(length, i, group->size(), element);
      std::memcpy(At(out, (start + from) * element), group->Slot(i) + from * element, (to - from) * element);
    }
    group->NextSlot();
  }
}

// Exchanges one part with every member: part i of `source` (part_bytes[i] long) is read by member i into its target.
// `longest` is the longest part of all members.
void Exchange(Group* group, const std::vector<Strided>& source, const std::vector<int64_t>& send_bytes,
              const std::vector<Strided>& target, const std::vector<int64_t>& recv_bytes, int64_t longest) {
  const int64_t chunk = static_cast<int64_t>(kSlotBytes) / group->size() / 64 * 64;
  const int self = group->index();
  for (int64_t start = 0; start == 0 || start < longest; start += chunk) {
    for (int i = 0; i < group->size(); ++i) {
      const int64_t end = std::min(start + chunk, send_bytes[i]);
      if (start < end) source[i].Read(start, end, group->Slot(self) + i * chunk);
    }
    group->Barrier();
    for (int i = 0; i < group->size(); ++i) {
      const int64_t end = std::min(start + chunk, recv_bytes[i]);
      if (start < end) target[i].Write(start, end, group->Slot(i) + self * chunk);
    }
    group->NextSlot();
  }
}

std::vector<Strided> Consecutive(char* base, const std::vector<int64_t>& bytes) {
  std::vector<Strided> parts;
  int64_t offset = 0;
  for (const int64_t length : bytes) {
    parts.push_back({base + offset, std::max<int64_t>(length, 1), std::max<int64_t>(length, 1)});
    offset += length;
  }
  return parts;
}

std::string Named(const char* name, DType type, int64_t count) {
  return std::string(name) + " of " + std::to_string(count) + " " + kTypes[type].name;
}

// Bytes of `count` elements; far less than what an address or an offset can be, so that arithmetic on them is safe.
int64_t Bytes(DType type, int64_t count) {
  constexpr int64_t kMost = int64_t{1} << 48;
  if (count < 0 || count > kMost)
    throw JobError("a collective of " + std::to_string(count) + " elements: the count must be from 0 to 2^48");
  return count * static_cast<int64_t>(SizeOf(type));
}

// Elements of all parts together; throws when one is negative or they are more than `there`.
int64_t Sum(const std::string& who, const char* which, const std::vector<int64_t>& counts, int64_t there) {
  int64_t sum = 0;
  for (const int64_t count : counts) {
    if (count < 0 || count > there - sum)
      throw JobError(who + which + " counts that are negative or more than the " + std::to_string(there) +
                     " elements of its array");
    sum += count;
  }
  return sum;
}

int64_t Product(const std::vector<int64_t>& shape, size_t begin, size_t end) {
  int64_t product = 1;
  for (size_t i = begin; i < end; ++i) product *= shape[i];
  return product;
}

}  // namespace

void AllReduce(Job* job, const Ranks& ranks, DType type, Reduce how, const void* in, void* out, int64_t count) {
  const bool small = Bytes(type, count) <= kSmallBytes;
  Group* group = job->FindGroup(ranks);
  group->Begin({kAllReduce, type, how, 0, count}, Named("AllReduce", type, count));
  (small ? AllReduceSmall : AllReduceLarge)(group, type, how, in, out, count);
}

void AllGather(Job* job, const Ranks& ranks, DType type, const void* in, void* out, int64_t count) {
  const int64_t bytes = Bytes(type, count);
  Group* group = job->FindGroup(ranks);
  group->Begin({kAllGather, type, 0, 0, count}, Named("AllGather", type, count));
  for (int64_t start = 0; start == 0 || start < bytes; start += static_cast<int64_t>(kSlotBytes)) {
    const int64_t length = std::min(static_cast<int64_t>(kSlotBytes), bytes - start);
    std::memcpy(group->Slot(group->index()), At(in, start), length);
    group->Barrier();
    for (int i = 0; i < group->size(); ++i) {
      std::memcpy(At(out, i * bytes + start), i == group->index() ? At(in, start) : group->Slot(i), length);
    }
    group->NextSlot();
  }
}

void ReduceScatter(Job* job, const Ranks& ranks, DType type, Reduce how, const void* in, void* out, int64_t count) {
  Bytes(type, count);
  Group* group = job->FindGroup(ranks);
  group->Begin({kReduceScatter, type, how, 0, count}, Named("ReduceScatter", type, count));
  const int64_t element = static_cast<int64_t>(SizeOf(type));
  const int64_t chunk = static_cast<int64_t>(kSlotBytes) / group->size() / 64 * 64 / element;
  const int self = group->index();
  for (int64_t start = 0; start == 0 || start < count; start += chunk) {
    const int64_t length = std::min(chunk, count - start);
    for (int i = 0; i < group->size(); ++i) {
      if (i == self) continue;
      std::memcpy(group->Slot(self) + i * chunk * element, At(in, (i * count + start) * element), length * element);
    }
    group->Barrier();
    std::vector<const char*> parts;
    for (int i = 0; i < group->size(); ++i) {
      parts.push_back(i == self ? At(in, (self * count + start) * element) : group->Slot(i) + self * chunk * element);
    }
    ReduceParts(type, how, parts, At(out, start * element), length);
    group->NextSlot();
  }
}

void AllToAll(Job* job, const Ranks& ranks, DType type, const std::vector<int64_t>& shape, int split, int concat,
              const void* in, void* out) {
  Group* group = job->FindGroup(ranks);
  const int rank = static_cast<int>(shape.size());
  if (split < 0) split += rank;
  if (concat < 0) concat += rank;
  int64_t room = int64_t{1} << 48;  // for the product of all dimensions, even where one of them is 0
  for (const int64_t length : shape) {
    room /= std::max<int64_t>(1, length);
    if (length < 0 || room == 0) job->Fail("AlltoAll of a shape that no array has");
  }
  const int64_t count = Product(shape, 0, shape.size());
  const std::string what = Named("AlltoAll", type, count);
  if (split < 0 || split >= rank || concat < 0 || concat >= rank || shape[split] % group->size() != 0) {
    job->Fail(what + " cannot split dimension " + std::to_string(split) + " of " + std::to_string(rank) + " into " +
              std::to_string(group->size()) + " equal parts");
  }
  group->Begin({kAllToAll, type, split, concat, count}, what);
  std::vector<int64_t> part = shape;
  part[split] /= group->size();
  const int64_t element = static_cast<int64_t>(SizeOf(type));
  const int64_t run_in = std::max<int64_t>(1, Product(part, split, rank) * element);
  const int64_t run_out = std::max<int64_t>(1, Product(part, concat, rank) * element);
  const std::vector<int64_t> bytes(group->size(), count / group->size() * element);
  std::vector<Strided> source, target;
  for (int i = 0; i < group->size(); ++i) {
    source.push_back({const_cast<char*>(At(in, i * run_in)), run_in, run_in * group->size()});
    target.push_back({At(out, i * run_out), run_out, run_out * group->size()});
  }
  Exchange(group, source, bytes, target, bytes, bytes[0]);
}

void AllToAllV(Job* job, const Ranks& ranks, DType type, const std::vector<int64_t>& send_counts,
               const std::vector<int64_t>& recv_counts, const void* in, int64_t in_count, void* out,
               int64_t out_count) {
  Bytes(type, in_count);
  Bytes(type, out_count);
  Group* group = job->FindGroup(ranks);
  const size_t size = ranks.size();
  const std::string who = "rank " + std::to_string(job->rank()) + ": AlltoAllV ";
  if (send_counts.size() != size || recv_counts.size() != size)
    throw JobError(who + "needs one count for each of the " + std::to_string(size) + " ranks");
  const int64_t sent = Sum(who, "has send", send_counts, in_count);
  Sum(who, "has receive", recv_counts, out_count);
  group->Begin({kAllToAllV, type, 0, 0, 0}, Named("AlltoAllV", type, sent));
  std::memcpy(group->Slot(group->index()), send_counts.data(), size * sizeof(int64_t));
  group->Barrier();
  int64_t longest = 0;
  for (size_t i = 0; i < size; ++i) {
    const int64_t* counts = reinterpret_cast<const int64_t*>(group->Slot(static_cast<int>(i)));
    longest = std::max(longest, *std::max_element(counts, counts + size));
    if (counts[group->index()] == recv_counts[i]) continue;
    throw JobError(who + "expects " + std::to_string(recv_counts[i]) + " elements from rank " +
                   std::to_string(ranks[i]) + ", which sends " + std::to_string(counts[group->index()]));
  }
  group->NextSlot();
  const int64_t element = static_cast<int64_t>(SizeOf(type));
  std::vector<int64_t> send_bytes, recv_bytes;
  for (size_t i = 0; i < size; ++i) {
    send_bytes.push_back(send_counts[i] * element);
    recv_bytes.push_back(recv_counts[i] * element);
  }
  Exchange(group, Consecutive(const_cast<char*>(At(in, 0)), send_bytes), send_bytes,
           Consecutive(At(out, 0), recv_bytes), recv_bytes, longest * element);
}

void Broadcast(Job* job, const Ranks& ranks, DType type, int root, const void* in, void* out, int64_t count) {
  const int64_t bytes = Bytes(type, count);
  Group* group = job->FindGroup(ranks);
  const int owner = static_cast<int>(std::find(ranks.begin(), ranks.end(), root) - ranks.begin());
  if (owner == group->size())
    job->Fail("Broadcast from rank " + std::to_string(root) + ", which is not in " + RankList(ranks));
  group->Begin({kBroadcast, type, 0, root, count}, Named("Broadcast", type, count));
  for (int64_t start = 0; start == 0 || start < bytes; start += static_cast<int64_t>(kSlotBytes)) {
    const int64_t length = std::min(static_cast<int64_t>(kSlotBytes), bytes - start);
    if (owner == group->index()) std::memcpy(group->Slot(owner), At(in, start), length);
    group->Barrier();
    std::memcpy(At(out, start), group->Slot(owner), length);
    group->NextSlot();
  }
}

void Barrier(Job* job, const Ranks& ranks) {
  Group* group = job->FindGroup(ranks);
  group->Begin({kBarrier, 0, 0, 0, 0}, "Barrier");
  group->Barrier();
  group->NextSlot();
}

void Send(Job* job, int peer, int64_t tag, DType type, const void* in, int64_t count) {
  const uint64_t bytes = static_cast<uint64_t>(Bytes(type, count));
  const Mailbox box = job->FindMailbox(job->rank(), peer, tag, bytes);
  const std::string what =
      Named("Send", type, count) + " to rank " + std::to_string(peer) + " (tag " + std::to_string(tag) + ")";
  job->SetDoing(what);
  const uint32_t written = box.block->written.value.load();
  for (uint32_t read; written - (read = box.block->read.value.load(std::memory_order_acquire)) >= kMailboxDepth;) {
    job->Wait(&box.block->read, read, what, [peer] { return std::vector<int>{peer}; });
  }
  std::memcpy(box.data + written % kMailboxDepth * box.block->slot_bytes, in, bytes);
  Job::Publish(&box.block->written, written + 1);
}

void Receive(Job* job, int peer, int64_t tag, DType type, void* out, int64_t count) {
  const uint64_t bytes = static_cast<uint64_t>(Bytes(type, count));
  const Mailbox box = job->FindMailbox(peer, job->rank(), tag, bytes);
  const std::string what =
      Named("Receive", type, count) + " from rank " + std::to_string(peer) + " (tag " + std::to_string(tag) + ")";
  job->SetDoing(what);
  const uint32_t read = box.block->read.value.load();
  while (box.block->written.value.load(std::memory_order_acquire) == read) {
    job->Wait(&box.block->written, read, what, [peer] { return std::vector<int>{peer}; });
  }
  std::memcpy(out, box.data + read % kMailboxDepth * box.block->slot_bytes, bytes);
  Job::Publish(&box.block->read, read + 1);
}

// The shapes say how much memory there is; the collective must not ask for more.
void CheckSizes(const Request& request, int64_t in_count, int64_t out_count) {
  const std::string& name = request.collective;
  const int64_t size = static_cast<int64_t>(request.ranks.size());
  int64_t expected = out_count;
  if (name == "AllReduce" || name == "Broadcast" || name == "AlltoAll") expected = in_count;
  if (name == "AllGather") expected = in_count * size;
  if (name == "ReduceScatter") expected = size > 0 && in_count % size == 0 ? in_count / size : -1;
  if (in_count >= 0 && out_count >= 0 && out_count == expected) return;
  throw JobError(name + " of " + std::to_string(in_count) + " elements over " + std::to_string(size) +
                 " ranks cannot give " + std::to_string(out_count));
}

void Run(const Request& r, const void* in, const std::vector<int64_t>& shape, void* out, int64_t out_count) {
  Job* job = CurrentJob();
  const int64_t count = Product(shape, 0, shape.size());
  CheckSizes(r, count, out_count);
  if (r.collective == "AllReduce") return AllReduce(job, r.ranks, r.type, r.reduce, in, out, count);
  if (r.collective == "AllGather") return AllGather(job, r.ranks, r.type, in, out, count);
  if (r.collective == "ReduceScatter") return ReduceScatter(job, r.ranks, r.type, r.reduce, in, out, out_count);
  if (r.collective == "AlltoAll") return AllToAll(job, r.ranks, r.type, shape, r.split, r.concat, in, out);
  if (r.collective == "AlltoAllV")
    return AllToAllV(job, r.ranks, r.type, r.send_counts, r.recv_counts, in, count, out, out_count);
  if (r.collective == "Broadcast") return Broadcast(job, r.ranks, r.type, r.root, in, out, count);
  if (r.collective == "Barrier") return Barrier(job, r.ranks);
  if (r.collective == "Send") return Send(job, r.peer, r.tag, r.type, in, count);
  if (r.collective == "Receive") return Receive(job, r.peer, r.tag, r.type, out, out_count);
  throw JobError("'" + r.collective + "' is not a collective of this library");
}

namespace {
std::unique_ptr<Job> current_job;
std::string last_error;
}  // namespace

Job* CurrentJob() {
  if (current_job == nullptr) throw JobError("a collective ran before this process joined a job (collectives.join)");
  return current_job.get();
}

int RecordFailure(const char* message) {
  last_error = message;
  if (current_job != nullptr) current_job->Abort(last_error);
  return 1;
}

}  // namespace cpu_parallel

using cpu_parallel::Guarded;

extern "C" {

int cpu_parallel_join(const char* job, int rank, int size, double join_seconds, double wait_seconds) {
  return Guarded([&] {
    if (cpu_parallel::current_job != nullptr) throw cpu_parallel::JobError("this process has already joined a job");
    cpu_parallel::current_job = std::make_unique<cpu_parallel::Job>(job, rank, size, join_seconds, wait_seconds);
  });
}

void cpu_parallel_leave() {
  if (cpu_parallel::current_job != nullptr) cpu_parallel::current_job->Leave();
  cpu_parallel::current_job.reset();
}

void cpu_parallel_abort(const char* message) {
  if (cpu_parallel::current_job != nullptr) cpu_parallel::current_job->Abort(message);
}

const char* cpu_parallel_last_error() { return cpu_parallel::last_error.c_str(); }

// As Run; the pointers to counts are null where a collective has none.
int cpu_parallel_run(const char* collective, const char* type, const char* reduce, const int* ranks, int size,
                     int split, int concat, int root, int peer, int64_t tag, const int64_t* send_counts,
                     const int64_t* recv_counts, const int64_t* shape, int dimensions, const void* in, void* out,
                     int64_t out_count) {
  return Guarded([&] {
    cpu_parallel::Request request{collective, cpu_parallel::Ranks(ranks, ranks + size), cpu_parallel::ParseDType(type),
                                  cpu_parallel::ParseReduce(reduce), split, concat, root, peer, tag, {}, {}};
    if (send_counts != nullptr) request.send_counts.assign(send_counts, send_counts + size);
    if (recv_counts != nullptr) request.recv_counts.assign(recv_counts, recv_counts + size);
    cpu_parallel::Run(request, in, std::vector<int64_t>(shape, shape + dimensions), out, out_count);
  });
}

}  // extern "C"
