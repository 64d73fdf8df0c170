// The collectives as a MindSpore AOT Custom operator: the function that lowering.py puts in the place of every
// communication operator of a rank's graph. Extends MindSpore 2.9.0, whose CPU backend has AllReduce, AllGather and
// Broadcast of the world group only; it can go when MindSpore runs sharded graphs on CPU itself.
//
// Inputs: the tensor, then any number of inputs that only order the operators. Output: the last tensor.
// With the attribute `tensors` the first so many inputs, of one type, go through one AllReduce, AllGather or
// ReduceScatter together, and as many outputs come last.
// With the attribute `block` AlltoAllV takes its counts from its second and third input, in blocks of so many elements;
// both tensors may be longer than what they hold, and what lies behind the received elements becomes NaN, or -1.
// Attributes: collective, rank_list, reduce, split_dim, concat_dim, send_counts, recv_counts, block, root, peer, tag.
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
  Request request;
  int tensors = 1;
  int64_t block = 0;
};

int64_t Elements(int dimensions, const int64_t* shape) {
  int64_t count = 1;
  for (int i = 0; i < dimensions; ++i) count *= shape[i];
  return count;
}

std::unique_ptr<Settings> Read(const char* type, mindspore::AotExtra* extra) {
  auto settings = std::make_unique<Settings>();
  Request& request = settings->request;
  const auto integer = [extra](const char* name, auto* place) {
    if (extra->HasAttr(name)) *place = static_cast<std::decay_t<decltype(*place)>>(extra->Attr<int64_t>(name));
  };
  const auto integers = [extra](const char* name) {
    return extra->HasAttr(name) ? extra->Attr<std::vector<int64_t>>(name) : std::vector<int64_t>();
  };
  request.collective = extra->Attr<std::string>("collective");
  request.type = ParseDType(type);
  for (const int64_t rank : integers("rank_list")) request.ranks.push_back(static_cast<int>(rank));
  if (extra->HasAttr("reduce")) request.reduce = ParseReduce(extra->Attr<std::string>("reduce"));
  integer("split_dim", &request.split);
  integer("concat_dim", &request.concat);
  integer("root", &request.root);
  integer("peer", &request.peer);
  integer("tag", &request.tag);
  integer("tensors", &settings->tensors);
  integer("block", &settings->block);
  request.send_counts = integers("send_counts");
  request.recv_counts = integers("recv_counts");
  return settings;
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
void RunTogether(const Request& s, const std::vector<int64_t>& counts, void** in, void** out) {
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

// AlltoAllV whose counts are the second and third input, in blocks of elements.
void RunCounted(const Settings& s, void** data, int* dimensions, int64_t** shapes, const char** dtypes, int out) {
  Request request = s.request;
  int64_t room[2], moved[2];
  for (int side = 0; side < 2; ++side) {
    const int tensor = side == 0 ? 0 : out, given = 1 + side;
    const int64_t members = Elements(dimensions[given], shapes[given]);
    if (ParseDType(dtypes[given]) != ParseDType("int64") || members != static_cast<int64_t>(request.ranks.size()))
      throw JobError("AlltoAllV needs an int64 count for each rank of its group");
    const auto* blocks = static_cast<const int64_t*>(data[given]);
    std::vector<int64_t>& counts = side == 0 ? request.send_counts : request.recv_counts;
    for (int64_t i = 0; i < members; ++i) counts.push_back(blocks[i] * s.block);
    room[side] = Elements(dimensions[tensor], shapes[tensor]);
    moved[side] = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    if (moved[side] > room[side])
      throw JobError("AlltoAllV moves " + std::to_string(moved[side]) + " elements, but has room for " +
                     std::to_string(room[side]));
  }
  Run(request, data[0], {moved[0]}, data[out], moved[1]);
  const size_t element = SizeOf(request.type);
  std::memset(static_cast<char*>(data[out]) + moved[1] * element, 0xFF, (room[1] - moved[1]) * element);
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
  using namespace cpu_parallel;
  return Guarded([&] {
    const auto* settings = static_cast<const Settings*>(static_cast<mindspore::AotExtra*>(extra)->KernelData());
    const Request& request = settings->request;
    const int tensors = settings->tensors, first_out = parameters - tensors, out = parameters - 1;
    if (tensors < 1 || tensors > parameters / 2)
      throw JobError(request.collective + " has not the inputs and outputs of its attribute `tensors`");
    std::vector<int64_t> counts;
    for (int i = 0; i < tensors; ++i) {
      if (ParseDType(dtypes[i]) != request.type || ParseDType(dtypes[first_out + i]) != request.type)
        throw JobError(request.collective + " has tensors of different types");
      counts.push_back(Elements(dimensions[i], shapes[i]));
      if (tensors > 1) CheckSizes(request, counts[i], Elements(dimensions[first_out + i], shapes[first_out + i]));
    }
    if (tensors > 1) return RunTogether(request, counts, data, data + first_out);
    if (settings->block > 0) return RunCounted(*settings, data, dimensions, shapes, dtypes, out);
    const int64_t out_count = Elements(dimensions[out], shapes[out]);
    Run(request, data[0], std::vector<int64_t>(shapes[0], shapes[0] + dimensions[0]), data[out], out_count);
    // A Send only orders the graph, Ascend writes nothing: NaN.
    if (request.collective == "Send") std::memset(data[out], 0xFF, out_count * SizeOf(request.type));
  });
}
