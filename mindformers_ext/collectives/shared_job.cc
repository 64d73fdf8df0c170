#include "shared_job.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <thread>

namespace cpu_parallel {
namespace {

constexpr uint64_t kPage = 4096;

uint64_t RoundUp(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

std::string ErrnoText() { return std::strerror(errno); }

// A socket that is closed where its block ends.
struct Socket {
  const int fd;
  ~Socket() {
    if (fd >= 0) close(fd);
  }
};

// Holds the job's robust lock: a rank that dies inside leaves it to the next one.
class Locked {
 public:
  explicit Locked(pthread_mutex_t* mutex) : mutex_(mutex) {
    if (pthread_mutex_lock(mutex_) == EOWNERDEAD) pthread_mutex_consistent(mutex_);
  }
  ~Locked() { pthread_mutex_unlock(mutex_); }

 private:
  pthread_mutex_t* mutex_;
};

sockaddr_un Address(const std::string& job, socklen_t* length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string name = "cpu_parallel." + std::to_string(getuid()) + "." + job;
  if (name.size() + 1 > sizeof(address.sun_path)) throw JobError("the job name '" + job + "' is too long (80 at most)");
  std::memcpy(address.sun_path + 1, name.data(), name.size());  // a leading zero byte: no file, ends with its owner
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

// True when the process at the other end of a connected socket runs as this user.
bool IsSameUser(int socket) {
  ucred peer{};
  socklen_t length = sizeof(peer);
  return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 && peer.uid == geteuid();
}

// A message of a number that has room for a descriptor.
struct Envelope {
  char control[CMSG_SPACE(sizeof(int))] = {};
  iovec data;
  msghdr message{};

  explicit Envelope(int32_t* number) : data{number, sizeof(*number)} {
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
  }
};

void SendDescriptor(int socket, int descriptor, int32_t size) {
  Envelope envelope(&size);
  cmsghdr* header = CMSG_FIRSTHDR(&envelope.message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &descriptor, sizeof(int));
  sendmsg(socket, &envelope.message, MSG_NOSIGNAL);  // a joiner that died meanwhile is noticed as missing
}

int ReceiveDescriptor(int socket, int32_t* size) {
  Envelope envelope(size);
  if (recvmsg(socket, &envelope.message, MSG_CMSG_CLOEXEC) <= 0) return -1;
  cmsghdr* header = CMSG_FIRSTHDR(&envelope.message);
  if (header == nullptr || header->cmsg_type != SCM_RIGHTS) return -1;
  int descriptor = -1;
  std::memcpy(&descriptor, CMSG_DATA(header), sizeof(int));
  return descriptor;
}

// The byte of the memfd that a rank holds as long as it lives.
struct flock ByteOf(int rank) {
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}

uint64_t AvailableMemory() {
  std::FILE* file = std::fopen("/proc/meminfo", "r");
  if (file == nullptr) return UINT64_MAX;
  char line[128];
  unsigned long long kilobytes = ULLONG_MAX / 1024;
  while (std::fgets(line, sizeof(line), file) != nullptr) {
    if (std::sscanf(line, "MemAvailable: %llu kB", &kilobytes) == 1) break;
  }
  std::fclose(file);
  return kilobytes * 1024;
}

}  // namespace

enum RankState : int32_t { kAbsent, kJoined, kLeft };

struct RankBlock {
  std::atomic<int32_t> state, pid;
  char doing[248];  // written by its rank only, read for error messages
};

struct JobBlock {
  pthread_mutex_t lock;  // guards the tables and `used`
  uint64_t used;
  int32_t size, groups, mailboxes;
  std::atomic<int32_t> failed_rank;  // -1, or the rank whose failure came first
  std::atomic<int32_t> failure_ready;
  char failure[1024];
  Event joined;
  RankBlock ranks[kMaxRanks];
  GroupBlock group[kMaxGroups];
  MailboxBlock mailbox[kMaxMailboxes];
};

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void FutexWait(std::atomic<uint32_t>* word, uint32_t old, double seconds) {
  const timespec limit{static_cast<time_t>(seconds), static_cast<long>((seconds - static_cast<long>(seconds)) * 1e9)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, old, &limit, nullptr, 0);
}

void SpinPause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void YieldCore() { sched_yield(); }

std::string RankList(const std::vector<int>& ranks) {
  std::string text = "[";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i != 0 ? ", " : "") + std::to_string(ranks[i]);
  return text + "]";
}

void Job::Publish(Event* event, uint32_t value) {
  event->value.store(value);
  if (event->sleepers.load() != 0) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&event->value), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

Job::Job(const std::string& name, int rank, int size, double join_seconds, double wait_seconds)
    : rank_(rank), size_(size), wait_seconds_(wait_seconds) {
  if (size < 1 || size > kMaxRanks || rank < 0 || rank >= size) {
    throw JobError("rank " + std::to_string(rank) + " of " + std::to_string(size) + ": a job has 1 to " +
                   std::to_string(kMaxRanks) + " ranks numbered from 0");
  }
  // A core that spins is a core a peer cannot work on: with fewer cores than ranks, sleep almost at once.
  spins_ = static_cast<int>(std::thread::hardware_concurrency()) >= size ? 20000 : 50;
  try {
    rank == 0 ? Create(name, join_seconds) : Attach(name, join_seconds);
  } catch (const JobError& error) {
    if (block_ != nullptr && block_->ranks[rank].pid.load() == getpid()) Abort(error.what());
    throw;
  }
}

Job::~Job() {
  for (auto& entry : groups_) delete entry.second;
  if (block_ != nullptr) munmap(block_, RoundUp(sizeof(JobBlock), kPage));
  if (fd_ >= 0) close(fd_);
}

void Job::Fail(const std::string& message) const { throw JobError("rank " + std::to_string(rank_) + ": " + message); }

void Job::Create(const std::string& name, double seconds) {
  const double deadline = Now() + seconds;
  socklen_t length = 0;
  const sockaddr_un address = Address(name, &length);
  const Socket listener{socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)};
  if (listener.fd < 0) Fail("cannot open a unix socket: " + ErrnoText());
  if (bind(listener.fd, reinterpret_cast<const sockaddr*>(&address), length) != 0) {
    Fail("job '" + name + "' is already starting on this machine (" + ErrnoText() +
         "): wait for it, end it, or choose another job name");
  }
  listen(listener.fd, kMaxRanks);
  fd_ = memfd_create(("cpu_parallel." + name).c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  const uint64_t bytes = RoundUp(sizeof(JobBlock), kPage);
  const int error = fd_ < 0 ? errno : posix_fallocate(fd_, 0, static_cast<off_t>(bytes));
  if (error == 0 && (fchmod(fd_, S_IRUSR | S_IWUSR) != 0 || fcntl(fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_SEAL) != 0))
    Fail("cannot keep the shared memory to this user: " + ErrnoText());
  if (error != 0) {
    Fail("shared memory is full: " + std::to_string(bytes) + " bytes for job '" + name +
         "': " + std::strerror(error));
  }
  Map();
  pthread_mutexattr_t attribute;
  pthread_mutexattr_init(&attribute);
  pthread_mutexattr_setpshared(&attribute, PTHREAD_PROCESS_SHARED);
  pthread_mutexattr_setrobust(&attribute, PTHREAD_MUTEX_ROBUST);
  pthread_mutex_init(&block_->lock, &attribute);
  block_->used = bytes;
  block_->size = size_;
  block_->failed_rank = -1;
  block_->ranks[0].pid = getpid();
  block_->ranks[0].state = kJoined;
  block_->joined.value = 1;
  WaitForAll(listener.fd, deadline);
}

void Job::WaitForAll(int listener, double deadline) {
  while (static_cast<int>(block_->joined.value.load()) < size_) {
    const std::string failure = FirstFailure();
    if (!failure.empty()) Fail("stopped while the ranks were joining because " + failure);
    pollfd waiting{listener, POLLIN, 0};
    if (poll(&waiting, 1, 50) > 0) {
      const Socket peer{accept4(listener, nullptr, nullptr, SOCK_CLOEXEC)};
      if (peer.fd >= 0 && IsSameUser(peer.fd)) SendDescriptor(peer.fd, fd_, size_);
    }
    if (Now() < deadline) continue;
    std::vector<int> missing;
    for (int i = 0; i < size_; ++i) {
      if (block_->ranks[i].state.load() == kAbsent) missing.push_back(i);
    }
    if (missing.empty()) continue;
    const std::string message =
        "ranks " + RankList(missing) + " of " + std::to_string(size_) + " did not join the job in time";
    Abort(message);
    Fail(message);
  }
}

void Job::Attach(const std::string& name, double seconds) {
  const double deadline = Now() + seconds;
  socklen_t length = 0;
  const sockaddr_un address = Address(name, &length);
  int32_t job_size = 0;
  while (fd_ < 0) {
    const Socket peer{socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)};
    if (peer.fd >= 0 && connect(peer.fd, reinterpret_cast<const sockaddr*>(&address), length) == 0) {
      if (!IsSameUser(peer.fd))
        Fail("another user of this machine has taken the name of job '" + name + "': choose another job name");
      fd_ = ReceiveDescriptor(peer.fd, &job_size);
    }
    if (fd_ >= 0) break;
    if (Now() > deadline)
      Fail("rank 0 did not open job '" + name + "' in " + std::to_string(static_cast<int>(seconds)) + " s");
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  if (job_size != size_) {
    Fail("job '" + name + "' has " + std::to_string(job_size) + " ranks, this process expects " +
         std::to_string(size_));
  }
  Map();
  RankBlock& self = block_->ranks[rank_];
  int32_t absent = kAbsent;
  if (!self.state.compare_exchange_strong(absent, kJoined)) {
    Fail("process " + std::to_string(self.pid.load()) + " is already this rank of job '" + name + "'");
  }
  self.pid = getpid();
  uint32_t seen = block_->joined.value.fetch_add(1) + 1;
  Publish(&block_->joined, seen);
  while (static_cast<int>(seen = block_->joined.value.load()) < size_) {
    FutexWait(&block_->joined.value, seen, 0.05);
    const std::string failure = FirstFailure();
    if (!failure.empty()) Fail("stopped while the ranks were joining because " + failure);
    if (!Alive(0))
      Fail("rank 0 (process " + std::to_string(block_->ranks[0].pid.load()) + ") died while the ranks were joining");
    if (Now() > deadline + 5) Fail("the other ranks did not join job '" + name + "' in time");
  }
}

void Job::Map() {
  void* memory = mmap(nullptr, RoundUp(sizeof(JobBlock), kPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  if (memory == MAP_FAILED) Fail("cannot map the shared memory: " + ErrnoText());
  block_ = static_cast<JobBlock*>(memory);
  struct flock lock = ByteOf(rank_);
  if (fcntl(fd_, F_SETLK, &lock) != 0) Fail("another process already runs as this rank of the same job");
}

bool Job::Alive(int rank) const {
  if (rank == rank_) return true;
  struct flock lock = ByteOf(rank);
  return fcntl(fd_, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

std::string Job::Describe(int rank) const {
  const RankBlock& peer = block_->ranks[rank];
  return "rank " + std::to_string(rank) + " (process " + std::to_string(peer.pid.load()) +
         ", last in: " + (peer.doing[0] != 0 ? peer.doing : "no collective yet") + ")";
}

void Job::CheckPeers(const std::vector<int>& late, const std::string& what, double waited) const {
  const std::string failure = FirstFailure();
  if (!failure.empty()) Fail("stopped in " + what + " because " + failure);
  for (int peer : late) {
    if (block_->ranks[peer].state.load() == kLeft) Fail("in " + what + ": " + Describe(peer) + " has already ended");
    if (!Alive(peer)) Fail("in " + what + ": " + Describe(peer) + " has died");
  }
  if (waited < wait_seconds_) return;
  std::string names;
  for (int peer : late) names += (names.empty() ? "" : "; ") + Describe(peer);
  Fail("waited " + std::to_string(static_cast<int>(waited)) + " s in " + what + " for " + names);
}

void Job::SetDoing(const std::string& what) {
  char* doing = block_->ranks[rank_].doing;
  const size_t length = std::min(what.size(), sizeof(RankBlock::doing) - 1);
  std::memcpy(doing, what.data(), length);
  doing[length] = 0;
}

void Job::Abort(const std::string& message) {
  int32_t nobody = -1;
  if (!block_->failed_rank.compare_exchange_strong(nobody, rank_)) return;
  std::snprintf(block_->failure, sizeof(block_->failure), "%s", message.c_str());
  block_->failure_ready.store(1, std::memory_order_release);
}

std::string Job::FirstFailure() const {
  if (block_->failure_ready.load(std::memory_order_acquire) == 0) return "";
  const int rank = block_->failed_rank.load();
  const std::string prefix = "rank " + std::to_string(rank) + ": ";
  const std::string message = block_->failure;
  return message.compare(0, prefix.size(), prefix) == 0 ? message : prefix + message;
}

void Job::Leave() { block_->ranks[rank_].state.store(kLeft); }

char* Job::MapData(uint64_t offset, uint64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, static_cast<off_t>(offset));
  if (memory == MAP_FAILED) Fail("cannot map " + std::to_string(bytes) + " bytes of shared memory: " + ErrnoText());
  return static_cast<char*>(memory);
}

char* Job::Allocate(uint64_t bytes, const std::string& what, uint64_t* offset) {
  const uint64_t available = AvailableMemory();
  const int error =
      bytes > available ? ENOSPC : posix_fallocate(fd_, static_cast<off_t>(block_->used), static_cast<off_t>(bytes));
  if (error != 0) {
    Fail("shared memory is full: " + what + " needs " + std::to_string(bytes >> 10) + " KiB more (" +
         std::to_string(block_->used >> 10) + " KiB in use, " + std::to_string(available >> 10) +
         " KiB of memory available): " + std::strerror(error));
  }
  *offset = block_->used;
  block_->used += bytes;
  return MapData(*offset, bytes);
}

Group* Job::FindGroup(const std::vector<int>& ranks) {
  for (auto& entry : groups_) {
    if (entry.first == ranks) return entry.second;
  }
  int index = -1;
  bool seen[kMaxRanks] = {};
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] < 0 || ranks[i] >= size_)
      Fail("group " + RankList(ranks) + " has a rank outside the job of " + std::to_string(size_));
    if (seen[ranks[i]]) Fail("group " + RankList(ranks) + " has rank " + std::to_string(ranks[i]) + " twice");
    seen[ranks[i]] = true;
    if (ranks[i] == rank_) index = static_cast<int>(i);
  }
  if (index < 0) Fail("this rank is not a member of group " + RankList(ranks));
  const Locked guard(&block_->lock);
  const uint64_t bytes = kSlots * ranks.size() * kSlotBytes;
  GroupBlock* end = block_->group + block_->groups;
  GroupBlock* found = std::find_if(block_->group, end, [&ranks](const GroupBlock& known) {
    return std::equal(ranks.begin(), ranks.end(), known.ranks, known.ranks + known.size);
  });
  char* data = nullptr;
  if (found != end) {
    data = MapData(found->data_offset, bytes);
  } else {
    if (block_->groups == kMaxGroups)
      Fail("more than " + std::to_string(kMaxGroups) + " communication groups in one job");
    data = Allocate(bytes, "group " + RankList(ranks), &found->data_offset);
    found->size = static_cast<int>(ranks.size());
    std::copy(ranks.begin(), ranks.end(), found->ranks);
    ++block_->groups;
  }
  groups_.emplace_back(ranks, new Group(this, found, data, index));
  return groups_.back().second;
}

Mailbox Job::FindMailbox(int source, int target, int64_t tag, uint64_t bytes) {
  const std::vector<int64_t> key{source, target, tag};
  const std::string name = "messages from rank " + std::to_string(source) + " to rank " + std::to_string(target) +
                           " (tag " + std::to_string(tag) + ")";
  const uint64_t slot_bytes = RoundUp(std::max<uint64_t>(bytes, 1), 64);
  for (auto& entry : mailboxes_) {
    if (entry.first != key) continue;
    if (entry.second.block->slot_bytes == slot_bytes) return entry.second;
    Fail(name + " have " + std::to_string(bytes) + " bytes here and about " +
         std::to_string(entry.second.block->slot_bytes) + " before");
  }
  if (source < 0 || source >= size_ || target < 0 || target >= size_ || source == target)
    Fail(name + " are impossible in a job of " + std::to_string(size_));
  const Locked guard(&block_->lock);
  const uint64_t total = RoundUp(slot_bytes * kMailboxDepth, kPage);
  MailboxBlock* end = block_->mailbox + block_->mailboxes;
  Mailbox found{std::find_if(block_->mailbox, end, [&](const MailboxBlock& known) {
    return known.source == source && known.target == target && known.tag == tag;
  })};
  if (found.block != end) {
    if (found.block->slot_bytes != slot_bytes) {
      Fail(name + " have " + std::to_string(bytes) + " bytes here and about " +
           std::to_string(found.block->slot_bytes) + " on the other side");
    }
    found.data = MapData(found.block->data_offset, total);
  } else {
    if (block_->mailboxes == kMaxMailboxes)
      Fail("more than " + std::to_string(kMaxMailboxes) + " Send/Receive pairs in one job");
    found.data = Allocate(total, name, &found.block->data_offset);
    found.block->source = source;
    found.block->target = target;
    found.block->tag = tag;
    found.block->slot_bytes = slot_bytes;
    ++block_->mailboxes;
  }
  mailboxes_.emplace_back(key, found);
  return found;
}

void Group::Begin(const Signature& asked, const std::string& what) {
  ++number_;
  what_ = what + " (operation " + std::to_string(number_) + " of group " +
          RankList(std::vector<int>(block_->ranks, block_->ranks + block_->size)) + ")";
  block_->asked[number_ % 2][index_] = asked;
  compare_ = true;
  job_->SetDoing(what_);
}

void Group::Barrier() {
  const uint32_t size = static_cast<uint32_t>(block_->size);
  const uint32_t round = block_->round.value.load(std::memory_order_acquire);
  block_->rounds_done[index_].store(round + 1, std::memory_order_release);
  if (block_->arrived.fetch_add(1) + 1 == size) {
    block_->arrived.store(0);
    Job::Publish(&block_->round, round + 1);
  } else {
    job_->Wait(&block_->round, round, what_, [this, round] {
      std::vector<int> late;
      for (int i = 0; i < block_->size; ++i) {
        if (block_->rounds_done[i].load() != round + 1) late.push_back(block_->ranks[i]);
      }
      return late;
    });
  }
  if (compare_) CompareSignatures();
  compare_ = false;
}

void Group::CompareSignatures() const {
  const Signature* asked = block_->asked[number_ % 2];
  for (int i = 0; i < block_->size; ++i) {
    if (asked[i] == asked[index_]) continue;
    job_->Fail("the ranks disagree: here " + what_ + ", on rank " + std::to_string(block_->ranks[i]) +
               " another operation, type, size or root (operation code " + std::to_string(asked[i].op) + " against " +
               std::to_string(asked[index_].op) + ", " + std::to_string(asked[i].count) + " elements against " +
               std::to_string(asked[index_].count) + ")");
  }
}

}  // namespace cpu_parallel
