// The shared memory of one job: N processes on one machine that run the ranks of a parallel graph.
//
// The memory is an anonymous memfd, so nothing ever appears in /dev/shm and the kernel frees it with the last
// process, however that ends. Rank 0 creates it and hands the descriptor to the others over an abstract unix socket
// (also gone with its process); both sides ask the kernel whether the other is the same user, as any local user can find
// such a socket, and the memfd is for its owner only and cannot be made smaller under the others. Every rank holds a POSIX lock on one byte of the memfd: the kernel drops it the moment
// the process dies (even while it is still a zombie), and that is how a waiting rank learns that its peer is dead.
#pragma once
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace cpu_parallel {

constexpr int kMaxRanks = 64;
constexpr int kMaxGroups = 512;
constexpr int kMaxMailboxes = 8192;
constexpr int kSlots = 3;                 // see Group::NextSlot
constexpr uint64_t kSlotBytes = 1 << 20;  // one rank's part of one round of a collective
constexpr int kYields = 50;  // before sleeping: with fewer cores than ranks, a yield hands the core to the late peer
constexpr uint32_t kMailboxDepth = 2;  // messages a sender may be ahead of its receiver

struct JobError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What one rank asks of one collective; all members must ask for the same.
struct Signature {
  int32_t op, dtype, reduce, root;
  int64_t count;
  bool operator==(const Signature& o) const {
    return op == o.op && dtype == o.dtype && reduce == o.reduce && root == o.root && count == o.count;
  }
};

// A futex word and how many processes sleep on it.
struct Event {
  std::atomic<uint32_t> value;
  std::atomic<uint32_t> sleepers;
};

struct GroupBlock {
  int32_t size;
  int32_t ranks[kMaxRanks];
  uint64_t data_offset;
  alignas(64) std::atomic<uint32_t> arrived;
  alignas(64) Event round;
  alignas(64) std::atomic<uint32_t> rounds_done[kMaxRanks];
  Signature asked[2][kMaxRanks];  // by parity of the operation's number
};

struct MailboxBlock {
  int32_t source, target;
  int64_t tag;
  uint64_t slot_bytes, data_offset;
  alignas(64) Event written;
  alignas(64) Event read;
};

// One communication group as this process sees it.
class Job;
class Group {
 public:
  Group(Job* job, GroupBlock* block, char* data, int index) : job_(job), block_(block), data_(data), index_(index) {}
  int size() const { return block_->size; }
  int index() const { return index_; }
  // Begins an operation: publishes what this rank asks and returns after the first Barrier has compared it.
  void Begin(const Signature& asked, const std::string& what);
  // Waits until every member has arrived.
  void Barrier();
  // Moves on to the next of the three slots. Whoever writes slot k knows that all readers of its former content have
  // passed two barriers since, so neither a round nor the next operation ever needs a closing barrier.
  void NextSlot() { slot_ = (slot_ + 1) % kSlots; }
  char* Slot(int member) const { return SlotAt(slot_, member); }
  char* FollowingSlot(int member) const { return SlotAt((slot_ + 1) % kSlots, member); }
  const std::string& what() const { return what_; }

 private:
  char* SlotAt(int slot, int member) const {
    return data_ + (static_cast<uint64_t>(slot) * block_->size + member) * kSlotBytes;
  }
  void CompareSignatures() const;
  Job* job_;
  GroupBlock* block_;
  char* data_;
  int index_;
  int slot_ = 0;
  uint32_t number_ = 0;
  bool compare_ = false;
  std::string what_;
};

struct Mailbox {
  MailboxBlock* block;
  char* data = nullptr;
};

struct JobBlock;

class Job {
 public:
  // Joins the job `name` as `rank` of `size`; returns when all ranks have joined, throws JobError after join_seconds.
  Job(const std::string& name, int rank, int size, double join_seconds, double wait_seconds);
  ~Job();
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  Group* FindGroup(const std::vector<int>& ranks);
  Mailbox FindMailbox(int source, int target, int64_t tag, uint64_t bytes);
  // Tells the other ranks (and the message of a later failure) what this rank is doing.
  void SetDoing(const std::string& what);
  // Waits until event.value differs from `old`; `late` lists the ranks still waited for.
  template <class Late>
  void Wait(Event* event, uint32_t old, const std::string& what, Late late);
  // Publishes a new value and wakes the sleepers.
  static void Publish(Event* event, uint32_t value);
  // Makes every rank stop in its current or next operation. Only the first failure is kept.
  void Abort(const std::string& message);
  // The first failure of the job, "rank R: message", or an empty string.
  std::string FirstFailure() const;
  // Declares that this rank ends normally.
  void Leave();
  // Throws a JobError that begins with this rank.
  [[noreturn]] void Fail(const std::string& message) const;

 private:
  void Create(const std::string& name, double seconds);
  void Attach(const std::string& name, double seconds);
  void Map();
  void WaitForAll(int listener, double deadline);
  char* Allocate(uint64_t bytes, const std::string& what, uint64_t* offset);
  char* MapData(uint64_t offset, uint64_t bytes);
  void CheckPeers(const std::vector<int>& late, const std::string& what, double waited) const;
  bool Alive(int rank) const;
  std::string Describe(int rank) const;

  int rank_, size_, fd_ = -1, spins_;
  double wait_seconds_;
  JobBlock* block_ = nullptr;
  std::vector<std::pair<std::vector<int>, Group*>> groups_;
  std::vector<std::pair<std::vector<int64_t>, Mailbox>> mailboxes_;
};

double Now();
void FutexWait(std::atomic<uint32_t>* word, uint32_t old, double seconds);
void SpinPause();
void YieldCore();

template <class Late>
void Job::Wait(Event* event, uint32_t old, const std::string& what, Late late) {
  for (int i = 0; i < spins_; ++i) {
    if (event->value.load(std::memory_order_acquire) != old) return;
    SpinPause();
  }
  for (int i = 0; i < kYields; ++i) {
    YieldCore();
    if (event->value.load(std::memory_order_acquire) != old) return;
  }
  const double start = Now();
  event->sleepers.fetch_add(1);
  while (event->value.load() == old) {
    FutexWait(&event->value, old, 0.1);
    if (event->value.load() != old) break;
    try {
      CheckPeers(late(), what, Now() - start);
    } catch (...) {
      event->sleepers.fetch_sub(1);
      throw;
    }
  }
  event->sleepers.fetch_sub(1);
}

std::string RankList(const std::vector<int>& ranks);

}  // namespace cpu_parallel
