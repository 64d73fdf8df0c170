// The collectives as a MindSpore AOT Custom operator: the function that lowering.py puts in the place of every
// communication operator of a rank's graph. Extends MindSpore 2.9.0, whose CPU backend has AllReduce, AllGather and
// Broadcast of the world group only; it can go when MindSpore runs sharded graphs on CPU itself.
//
// Inputs: the tensor, then any number of inputs that only order the operators. Output: the last tensor.
// With the attribute `tensors` the first so many inputs, of one type, go through one AllReduce, AllGather or
// ReduceScatter together, and as many outputs come last.
// Attributes: collective, rank_list, reduce, split_dim, concat_dim, send_counts, recv_counts, root, peer, tag.
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "collectives.h"
#include "mindspore/ccsrc/utils/custom_aot_extra.h"

namespace mindspore {
// The header declares Attr<T> over private virtual functions and leaves the specialisations to its user.
template <>
inline int64_t AotExtra::Attr<int64_t>(std::string name) const {
  return const_cast<AotExtra*>(this)->GetAttrInt(std::move(name));
}
template <>
inline std::string AotExtra::Attr<std::string>(std::string name) const {
  return const_cast<AotExtra*>(this)->GetAttrStr(std::move(name));
}
template <>
inline std::vector<int64_t> AotExtra::Attr<std::vector<int64_t>>(std::string name) const {
  return const_cast<AotExtra*>(this)->GetAttrIntVec(std::move(name));
}
}  // namespace mindspore

namespace cpu_parallel {
namespace {

struct Settings : mindspore::AotKernelData {
  std::string collective;
  Ranks ranks;
  DType type;
  Reduce reduce = kSum;
  int split = 0, concat = 0, root = -1, peer = -1, tensors = 1;
  int64_t tag = 0;
  std::vector<int64_t> send_counts, recv_counts;
};

int64_t Elements(int dimensions, const int64_t* shape) {
  int64_t count = 1;
  for (int i = 0; i < dimensions; ++i) count *= shape[i];
  return count;
}

// The graph's shapes say how much memory there is; the collective must not ask for more.
void CheckSizes(const Settings& s, int64_t in_count, int64_t out_count) {
  const int64_t size = static_cast<int64_t>(s.ranks.size());
  int64_t expected = out_count;
  if (s.collective == "AllReduce" || s.collective == "Broadcast" || s.collective == "AlltoAll") expected = in_count;
  if (s.collective == "AllGather") expected = in_count * size;
  if (s.collective == "ReduceScatter") expected = size > 0 && in_count % size == 0 ? in_count / size : -1;
  if (in_count >= 0 && out_count >= 0 && out_count == expected) return;
  throw JobError(s.collective + " of " + std::to_string(in_count) + " elements over " + std::to_string(size) +
                 " ranks cannot give " + std::to_string(out_count));
}

std::unique_ptr<Settings> Read(const char* type, mindspore::AotExtra* extra) {
  auto settings = std::make_unique<Settings>();
  const auto integer = [extra](const char* name, int64_t other) {
    return extra->HasAttr(name) ? extra->Attr<int64_t>(name) : other;
  };
  const auto integers = [extra](const char* name) {
    return extra->HasAttr(name) ? extra->Attr<std::vector<int64_t>>(name) : std::vector<int64_t>();
  };
  settings->collective = extra->Attr<std::string>("collective");
  settings->type = ParseDType(type);
  for (const int64_t rank : integers("rank_list")) settings->ranks.push_back(static_cast<int>(rank));
  if (extra->HasAttr("reduce")) settings->reduce = ParseReduce(extra->Attr<std::string>("reduce"));
  settings->split = static_cast<int>(integer("split_dim", 0));
  settings->concat = static_cast<int>(integer("concat_dim", 0));
  settings->root = static_cast<int>(integer("root", -1));
  settings->peer = static_cast<int>(integer("peer", -1));
  settings->tag = integer("tag", 0);
  settings->tensors = static_cast<int>(integer("tensors", 1));
  settings->send_counts = integers("send_counts");
  settings->recv_counts = integers("recv_counts");
  return settings;
}

void Run(const Settings& s, const void* in, const std::vector<int64_t>& shape, void* out, int64_t out_count) {
  Job* job = CurrentJob();
  const int64_t count = Elements(static_cast<int>(shape.size()), shape.data());
  CheckSizes(s, count, out_count);
  if (s.collective == "AllReduce") return AllReduce(job, s.ranks, s.type, s.reduce, in, out, count);
  if (s.collective == "AllGather") return AllGather(job, s.ranks, s.type, in, out, count);
  if (s.collective == "ReduceScatter") return ReduceScatter(job, s.ranks, s.type, s.reduce, in, out, out_count);
  if (s.collective == "AlltoAll") return AllToAll(job, s.ranks, s.type, shape, s.split, s.concat, in, out);
  if (s.collective == "AlltoAllV")
    return AllToAllV(job, s.ranks, s.type, s.send_counts, s.recv_counts, in, count, out, out_count);
  if (s.collective == "Broadcast") return Broadcast(job, s.ranks, s.type, s.root, in, out, count);
  if (s.collective == "Receive") return Receive(job, s.peer, s.tag, s.type, out, out_count);
  if (s.collective == "Send") {
    Send(job, s.peer, s.tag, s.type, in, count);
    std::memset(out, 0xFF, out_count * SizeOf(s.type));  // NaN: it only orders the graph, Ascend writes nothing
    return;
  }
  throw JobError("'" + s.collective + "' is not a collective of this library");
}

// Several tensors as one: what each of `parts` ranks takes or gives, of every tensor its part, lies together.
// Calls copy(a tensor's part, its place among all, bytes).
template <class Copy>
void EachPart(int parts, const std::vector<int64_t>& counts, size_t element, void** tensors, char* packed, Copy copy) {
  for (int part = 0; part < parts; ++part) {
    for (size_t i = 0; i < counts.size(); ++i) {
      const size_t bytes = counts[i] * element;
      copy(static_cast<char*>(tensors[i]) + part * bytes, packed, bytes);
      packed += bytes;
    }
  }
}

void Pack(int parts, const std::vector<int64_t>& counts, size_t element, void** tensors, char* packed) {
  EachPart(parts, counts, element, tensors, packed,
           [](char* tensor, char* place, size_t bytes) { std::memcpy(place, tensor, bytes); });
}

void Unpack(int parts, const std::vector<int64_t>& counts, size_t element, char* packed, void** tensors) {
  EachPart(parts, counts, element, tensors, packed,
           [](char* tensor, char* place, size_t bytes) { std::memcpy(tensor, place, bytes); });
}

// `counts`: elements of the inputs.
void RunTogether(const Settings& s, const std::vector<int64_t>& counts, void** in, void** out) {
  const int size = static_cast<int>(s.ranks.size());
  const size_t element = SizeOf(s.type);
  const bool gathers = s.collective == "AllGather", scatters = s.collective == "ReduceScatter";
  std::vector<int64_t> each = counts;  // elements of the smaller side
  for (int64_t& count : each) count /= scatters ? size : 1;
  const int64_t total = std::accumulate(each.begin(), each.end(), int64_t{0});
  const int parts_in = scatters ? size : 1, parts_out = gathers ? size : 1;
  static std::vector<char> packed_in, packed_out;  // kept for the next step; one operator runs at a time
  packed_in.resize(std::max(packed_in.size(), parts_in * total * element));
  packed_out.resize(std::max(packed_out.size(), parts_out * total * element));
  Pack(parts_in, each, element, in, packed_in.data());
  Run(s, packed_in.data(), {parts_in * total}, packed_out.data(), parts_out * total);
  Unpack(parts_out, each, element, packed_out.data(), out);
}

}  // namespace
}  // namespace cpu_parallel

extern "C" int CollectiveInit(int*, int64_t**, const char** dtypes, mindspore::AotExtra* extra) {
  return cpu_parallel::Guarded([&] {
    cpu_parallel::LimitKernelThreads();
    extra->SetKernelData(cpu_parallel::Read(dtypes[0], extra).release());
  });
}

extern "C" int Collective(int parameters, void** data, int* dimensions, int64_t** shapes, const char** dtypes, void*,
                          void* extra) {
  return cpu_parallel::Guarded([&] {
    const auto* settings =
        static_cast<const cpu_parallel::Settings*>(static_cast<mindspore::AotExtra*>(extra)->KernelData());
    const int tensors = settings->tensors, first_out = parameters - tensors;
    if (tensors < 1 || tensors > parameters / 2)
      throw cpu_parallel::JobError(settings->collective + " has not the inputs and outputs of its attribute `tensors`");
    std::vector<int64_t> counts;
    for (int i = 0; i < tensors; ++i) {
      if (cpu_parallel::ParseDType(dtypes[i]) != settings->type ||
          cpu_parallel::ParseDType(dtypes[first_out + i]) != settings->type)
        throw cpu_parallel::JobError(settings->collective + " has tensors of different types");
      counts.push_back(cpu_parallel::Elements(dimensions[i], shapes[i]));
      if (tensors > 1)
        CheckSizes(*settings, counts[i], cpu_parallel::Elements(dimensions[first_out + i], shapes[first_out + i]));
    }
    if (tensors > 1) return cpu_parallel::RunTogether(*settings, counts, data, data + first_out);
    const int out = parameters - 1;
    cpu_parallel::Run(*settings, data[0], std::vector<int64_t>(shapes[0], shapes[0] + dimensions[0]), data[out],
                      cpu_parallel::Elements(dimensions[out], shapes[out]));
  });
}
