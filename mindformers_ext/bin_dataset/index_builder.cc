// The hot loops behind gpt_dataset.py and blended_dataset.py: shuffles, sample boundaries, blends and batched reads.
//
// The random order is NumPy's legacy RandomState (MT19937, masked rejection sampling, Fisher-Yates from the end), the
// order megatron-core uses. NumPy waits for memory at every swap; here the partners of a block of swaps are drawn and
// prefetched before the block is swapped. What the shuffle has passed is final, so a second thread follows it and cuts
// the samples. Every function releases the GIL. What callers pass, and what they read from files, is checked before it
// becomes an address: a wrong value raises and never reads or writes beside an array.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// MT19937 started from RandomState.get_state(). Outputs are made a state at a time, in loops the compiler vectorizes.
class LegacyRandom {
 public:
  LegacyRandom(const uint32_t* key, int position) : position_(position) {
    std::copy_n(key, kSize, state_);
    Temper();
  }

  uint32_t Next() {
    if (position_ == kSize) {
      Refill();
    }
    return outputs_[position_++];
  }

  // Uniform in [0, max]: draws are masked to the next power of two and rejected above max, as NumPy does.
  uint64_t Below(uint64_t max, uint64_t mask) {
    uint64_t value;
    if (max <= 0xffffffffULL) {
      do {
        value = Next() & mask;
      } while (value > max);
      return value;
    }
    do {
      const uint64_t high = Next();
      value = ((high << 32) | Next()) & mask;
    } while (value > max);
    return value;
  }

  // Partners of swap positions first, first - 1, ..., first - count + 1, all of which share one mask (32 bits).
  void Partners(uint32_t first, int count, uint32_t mask, uint32_t* out) {
    int filled = 0;
    while (filled < count) {
      if (position_ == kSize) {
        Refill();
      }
      const int end = std::min(position_ + count - filled, kSize);  // So many draws are needed even if none is rejected.
      for (; position_ < end; ++position_) {
        const uint32_t value = outputs_[position_] & mask;
        out[filled] = value;
        filled += value <= first - filled;  // A rejected draw is overwritten; no branch to mispredict.
      }
    }
  }

 private:
  static constexpr int kSize = 624;

  void Refill() {
    constexpr int kShift = 397;
    auto mix = [this](int i, int next, int far) {
      const uint32_t y = (state_[i] & 0x80000000U) | (state_[next] & 0x7fffffffU);
      state_[i] = state_[far] ^ (y >> 1) ^ (-(y & 1U) & 0x9908b0dfU);
    };
    for (int i = 0; i < kSize - kShift; ++i) {
      mix(i, i + 1, i + kShift);
    }
    for (int i = kSize - kShift; i < kSize - 1; ++i) {
      mix(i, i + 1, i + kShift - kSize);
    }
    mix(kSize - 1, 0, kShift - 1);
    Temper();
    position_ = 0;
  }

  void Temper() {
    for (int i = 0; i < kSize; ++i) {
      uint32_t y = state_[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680U;
      y ^= (y << 15) & 0xefc60000U;
      outputs_[i] = y ^ (y >> 18);
    }
  }

  uint32_t state_[kSize];
  uint32_t outputs_[kSize];
  int position_;
};

uint64_t MaskFor(uint64_t max) {
  uint64_t mask = max;
  for (int shift = 1; shift < 64; shift *= 2) {
    mask |= mask >> shift;
  }
  return mask;
}

// Shuffles, and calls finished(begin, end) for each stretch of final values, from the last one to the first.
template <typename T, typename Finished>
void Shuffle(T* values, int64_t size, LegacyRandom* random, Finished finished) {
  constexpr int64_t kBlock = 256;
  constexpr int64_t kStretch = 1 << 18;
  int64_t i = size - 1;
  for (; i > std::numeric_limits<uint32_t>::max(); --i) {
    std::swap(values[i], values[random->Below(i, MaskFor(i))]);
  }
  int64_t told = size;
  uint32_t partners[kBlock];
  while (i > 0) {
    const uint64_t mask = MaskFor(i);
    const int64_t same_mask = i - static_cast<int64_t>(mask >> 1);
    const int64_t count = std::min(kBlock, same_mask);
    random->Partners(i, count, mask, partners);
    for (int64_t k = 0; k < count; ++k) {
      __builtin_prefetch(&values[partners[k]], 1);
    }
    for (int64_t k = 0; k < count; ++k) {
      std::swap(values[i - k], values[partners[k]]);
    }
    i -= count;
    if (told - i > kStretch) {
      finished(i + 1, told);
      told = i + 1;
    }
  }
  finished(0, told);
}

constexpr int kMostThreads = 1024;
// Counts of tokens and samples up to here leave room for the arithmetic on them.
constexpr int64_t kMost = int64_t{1} << 48;

// Runs work(begin, end, part) over [0, size) cut in parts; work must not throw. Where the machine gives no further
// thread, this one does the part.
template <typename Work>
void Parallel(int64_t size, int threads, Work work) {
  std::vector<std::thread> pool;
  pool.reserve(threads);
  for (int part = 0; part < threads; ++part) {
    const int64_t begin = size * part / threads, end = size * (part + 1) / threads;
    try {
      if (part + 1 < threads) {
        pool.emplace_back(work, begin, end, part);
        continue;
      }
    } catch (const std::system_error&) {
    }
    work(begin, end, part);
  }
  for (auto& thread : pool) {
    thread.join();
  }
}

template <typename T>
Array<T> ShuffleIndex(int64_t first, int64_t total, LegacyRandom* random, int threads) {
  Array<T> index(total);
  T* out = index.mutable_data();
  py::gil_scoped_release release;
  Parallel(total, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = static_cast<T>(i);
    }
  });
  auto ignore = [](int64_t, int64_t) {};
  Shuffle(out, first, random, ignore);
  Shuffle(out + first, total - first, random, ignore);
  return index;
}

// Sample k ends with token k * length + extra of the shuffled stream; row k holds the place in document_index of the
// document with that token and the offset the next sample starts from. Cut writes the rows of a stretch of documents;
// stretches come from the last one to the first.
template <typename T>
struct SampleCutter {
  const int32_t* lengths;
  const int32_t* documents;
  int64_t sequence_length, extra;
  T* rows;
  int64_t after = 0, row = 0;

  // Samples to `samples` at most are cut from the stretches to come, which end with token `tokens`.
  void Start(int64_t samples, int64_t tokens) {
    after = tokens;
    row = tokens < extra ? 0 : std::min(samples, (tokens - extra) / sequence_length);
  }

  void Cut(int64_t begin, int64_t end) {
    constexpr int64_t kAhead = 32;
    for (int64_t i = end - 1; i >= begin; --i) {
      __builtin_prefetch(&lengths[documents[std::max(i - kAhead, begin)]]);
      const int64_t before = after - lengths[documents[i]];
      for (; row > 0 && row * sequence_length + extra > before; --row) {
        Write(row, i, row * sequence_length - before);
      }
      after = before;
    }
  }

  void Write(int64_t place, int64_t document, int64_t offset) {
    rows[2 * place] = static_cast<T>(document);
    rows[2 * place + 1] = static_cast<T>(offset);
  }
};

// Fills out[first, last) with documents [begin, end), again and again, in random order; a second thread cuts the samples
// behind the shuffle.
template <typename T>
void ShuffleDocuments(int64_t begin, int64_t end, int32_t* out, int64_t first, int64_t last, LegacyRandom* random,
                      SampleCutter<T>* cutter, int threads) {
  Parallel(last - first, threads, [&](int64_t from, int64_t to, int) {
    int64_t document = begin + from % (end - begin);
    for (int64_t i = from; i < to; ++i) {
      out[first + i] = static_cast<int32_t>(document);
      document = document + 1 == end ? begin : document + 1;
    }
  });
  std::thread follower;
  Shuffle(out + first, last - first, random, [&](int64_t from, int64_t to) {
    if (follower.joinable()) {
      follower.join();
    }
    follower = std::thread(&SampleCutter<T>::Cut, cutter, first + from, first + to);
  });
  follower.join();
}

// (document_index, sample_index) of documents [begin, end). A separate final epoch is shuffled after the others.
template <typename T>
py::tuple DocumentAndSampleIndex(const int32_t* lengths, int64_t begin, int64_t end, int64_t epochs,
                                 bool separate_final, int64_t sequence_length, int64_t extra, int64_t samples,
                                 LegacyRandom* random, int threads) {
  Array<int32_t> document_index((end - begin) * epochs);
  Array<T> sample_index({samples + 1, int64_t{2}});
  int32_t* documents = document_index.mutable_data();
  SampleCutter<T> cutter{lengths, documents, sequence_length, extra, sample_index.mutable_data()};
  {
    py::gil_scoped_release release;
    const int64_t tokens = std::accumulate(lengths + begin, lengths + end, int64_t{0});
    cutter.Write(0, 0, 0);
    int64_t done = 0;
    for (const int64_t part : {epochs - separate_final, int64_t{separate_final}}) {
      cutter.Start(samples, tokens * (done + part));
      ShuffleDocuments(begin, end, documents, (end - begin) * done, (end - begin) * (done + part), random, &cutter,
                       threads);
      done += part;
    }
    // A last, partial sample (drop-last off) ends with the last document that has tokens.
    int64_t last = document_index.size() - 1;
    while (last > 0 && lengths[documents[last]] == 0) {
      --last;
    }
    const int64_t whole = tokens * epochs < extra ? 0 : (tokens * epochs - extra) / sequence_length;
    for (int64_t row = whole + 1; row <= samples; ++row) {
      cutter.Write(row, last, lengths[documents[last]] - extra);
    }
  }
  return py::make_tuple(document_index, sample_index);
}

// (document_index, sample_index, shuffle_index) of one GPTDataset. The state is RandomState(seed)'s.
py::tuple BuildGptIndices(const Array<int32_t>& lengths, int64_t begin, int64_t end, int64_t epochs,
                          bool separate_final, int64_t sequence_length, int64_t extra, int64_t samples,
                          int64_t samples_first, const Array<uint32_t>& key, int position, int threads) {
  if (begin < 0 || end > lengths.size() || begin >= end || end > std::numeric_limits<int32_t>::max() || epochs < 1 ||
      epochs > kMost / (end - begin) || sequence_length < 1 || sequence_length > kMost || extra < 0 || extra > kMost ||
      samples < 0 || samples > kMost || samples_first < 0 || samples_first > samples) {
    throw std::invalid_argument("build_gpt_indices: documents, epochs or sample counts out of range");
  }
  if (key.size() != 624 || position < 0 || position > 624 || threads < 1 || threads > kMostThreads) {
    throw std::invalid_argument(
        "build_gpt_indices: the state must be RandomState's 624 numbers and a position in them, threads 1 to 1024");
  }
  const int32_t* first = lengths.data() + begin;
  const int32_t* last = lengths.data() + end;
  if (*std::min_element(first, last) < 0 ||
      std::accumulate(first, last, int64_t{0}) > std::numeric_limits<int64_t>::max() / 4 / epochs) {
    throw std::invalid_argument("build_gpt_indices: a document's length is negative, or the epochs have too many tokens");
  }
  LegacyRandom random(key.data(), position);
  const int32_t longest = *std::max_element(lengths.data(), lengths.data() + lengths.size());
  const bool wide = std::max<int64_t>((end - begin) * epochs, longest) > std::numeric_limits<int32_t>::max();
  const auto build = wide ? DocumentAndSampleIndex<int64_t> : DocumentAndSampleIndex<int32_t>;
  const py::tuple indices = build(lengths.data(), begin, end, epochs, separate_final, sequence_length, extra, samples,
                                  &random, threads);
  py::object shuffle_index;
  if (samples >= std::numeric_limits<uint32_t>::max() - 1LL) {
    shuffle_index = ShuffleIndex<int64_t>(samples_first, samples, &random, threads);
  } else {
    shuffle_index = ShuffleIndex<uint32_t>(samples_first, samples, &random, threads);
  }
  return py::make_tuple(indices[0], indices[1], shuffle_index);
}

// Which dataset, and which of its samples, each of `size` blended samples comes from: always the dataset whose share
// lags most behind its weight. With `sizes` (one per dataset) a dataset leaves once it has given that many.
py::tuple BuildBlendIndices(const Array<double>& weights, int64_t size, const Array<int64_t>& sizes) {
  const int64_t datasets = weights.size();
  if (datasets < 1 || datasets > std::numeric_limits<int16_t>::max() || size < 0 ||
      (sizes.size() != 0 && sizes.size() != datasets)) {
    throw std::invalid_argument("build_blend_indices: 1 to 32767 weights, as many sizes or none, size >= 0");
  }
  for (int64_t d = 0; d < datasets; ++d) {
    if (!std::isfinite(weights.data()[d]) || weights.data()[d] < 0) {
      throw std::invalid_argument("build_blend_indices: weight " + std::to_string(d) + " is " +
                                  std::to_string(weights.data()[d]) + ", but must be a finite number of at least 0");
    }
  }
  int64_t missing = sizes.size() == 0 ? 0 : size;  // what the datasets before do not give
  for (int64_t d = 0; d < sizes.size(); ++d) {
    if (sizes.data()[d] < 0) {
      throw std::invalid_argument("build_blend_indices: size " + std::to_string(d) + " is negative");
    }
    missing -= std::min(missing, sizes.data()[d]);
  }
  if (missing > 0) {
    throw std::invalid_argument("build_blend_indices: the sizes are " + std::to_string(missing) + " fewer than the " +
                                std::to_string(size) + " samples asked for");
  }
  Array<int16_t> dataset_index(size);
  Array<int64_t> sample_index(size);
  int16_t* dataset_out = dataset_index.mutable_data();
  int64_t* sample_out = sample_index.mutable_data();
  const double* weight = weights.data();
  {
    py::gil_scoped_release release;
    std::vector<int64_t> taken(datasets, 0);
    std::vector<int64_t> limit(datasets, std::numeric_limits<int64_t>::max());
    std::copy_n(sizes.data(), sizes.size(), limit.begin());
    for (int64_t i = 0; i < size; ++i) {
      const double position = std::max(static_cast<double>(i), 1.0);
      int64_t chosen = -1;
      double worst = std::numeric_limits<double>::lowest();
      for (int64_t d = 0; d < datasets; ++d) {
        const double lag = weight[d] * position - static_cast<double>(taken[d]);
        if (lag > worst && taken[d] < limit[d]) {
          worst = lag;
          chosen = d;
        }
      }
      dataset_out[i] = static_cast<int16_t>(chosen);
      sample_out[i] = taken[chosen]++;
    }
  }
  return py::make_tuple(dataset_index, sample_index);
}

struct SampleSource {
  const char* tokens;
  int64_t bytes;
  const int64_t* pointers;
  const int32_t* lengths;
  int64_t sequences;
  const int32_t* documents;
  int64_t documents_count;
};

enum class Sample { kPlain, kPadded, kOutside };

// Copies the tokens of one sample and says whether a `pad` is among them, or the index points outside the files.
template <typename In, typename Out>
Sample ReadSample(const SampleSource& source, const int64_t* begin, const int64_t* end, int64_t extra, int64_t width,
                Out pad, Out* out) {
  if (begin[0] < 0 || begin[0] > end[0] || end[0] >= source.documents_count) {
    return Sample::kOutside;
  }
  int64_t filled = 0;
  for (int64_t i = begin[0]; i <= end[0]; ++i) {
    const int64_t sequence = source.documents[i];
    if (sequence < 0 || sequence >= source.sequences) {
      return Sample::kOutside;
    }
    const int64_t length = source.lengths[sequence], pointer = source.pointers[sequence];
    const int64_t from = i == begin[0] ? begin[1] : 0;
    if (i == end[0] && end[1] > length - extra) {  // before it is added to
      return Sample::kOutside;
    }
    const int64_t to = i == end[0] ? end[1] + extra : length;
    if (from < 0 || to < from || to - from > width - filled || pointer < 0 || pointer > source.bytes ||
        to > (source.bytes - pointer) / static_cast<int64_t>(sizeof(In))) {
      return Sample::kOutside;
    }
    const int64_t count = to - from;
    const char* in = source.tokens + pointer + from * static_cast<int64_t>(sizeof(In));
    if constexpr (std::is_same_v<In, Out>) {
      std::memcpy(out + filled, in, count * sizeof(In));
    } else {
      for (int64_t k = 0; k < count; ++k) {  // a pointer of the file may be odd
        In token;
        std::memcpy(&token, in + k * sizeof(In), sizeof(In));
        out[filled + k] = token;
      }
    }
    filled += count;
  }
  std::fill(out + filled, out + width, pad);
  bool padded = false;
  for (int64_t i = 0; i < width; ++i) {
    padded |= out[i] == pad;
  }
  return padded ? Sample::kPadded : Sample::kPlain;
}

// Tokens of many samples: (B, width) <- places (B, 4) = (first document, offset, last document, offset). Returns
// whether any token is `pad`.
template <typename In, typename Out>
bool ReadSamples(const Array<In>& tokens, const Array<int64_t>& pointers, const Array<int32_t>& lengths,
                 const Array<int32_t>& documents, const Array<int64_t>& places, int64_t extra, int64_t pad,
                 Array<Out> out, int threads) {
  if (places.ndim() != 2 || places.shape(1) != 4 || out.ndim() != 2 || out.shape(0) != places.shape(0) ||
      pointers.size() != lengths.size()) {
    throw std::invalid_argument("read_samples: arrays of different sizes");
  }
  if (extra < 0 || extra > kMost || threads < 1 || threads > kMostThreads) {
    throw std::invalid_argument("read_samples: extra must be at least 0 and threads 1 to 1024");
  }
  const int64_t rows = places.shape(0);
  const SampleSource source{reinterpret_cast<const char*>(tokens.data()), static_cast<int64_t>(tokens.nbytes()),
                            pointers.data(), lengths.data(), lengths.size(), documents.data(), documents.size()};
  const int64_t width = out.shape(1);
  const int64_t* place = places.data();
  Out* out_data = out.mutable_data();
  std::vector<int64_t> failed(threads, -1);
  std::vector<char> padded(threads, 0);
  {
    py::gil_scoped_release release;
    Parallel(rows, threads, [&](int64_t begin, int64_t end, int part) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t* p = place + 4 * row;
        const Sample sample =
            ReadSample<In, Out>(source, p, p + 2, extra, width, static_cast<Out>(pad), out_data + row * width);
        if (sample == Sample::kOutside) {
          failed[part] = row;
          return;
        }
        padded[part] |= sample == Sample::kPadded;
      }
    });
  }
  for (const int64_t row : failed) {
    if (row >= 0) {
      throw py::index_error("sample " + std::to_string(row) + " of the batch points outside the token file");
    }
  }
  return std::find(padded.begin(), padded.end(), 1) != padded.end();
}

template <typename In, typename Out>
void DefineReader(py::module_* module) {
  module->def("read_samples", &ReadSamples<In, Out>, py::arg("tokens").noconvert(), py::arg("pointers").noconvert(),
              py::arg("lengths").noconvert(), py::arg("documents").noconvert(), py::arg("places").noconvert(),
              py::arg("extra"), py::arg("pad"), py::arg("out").noconvert(), py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_index_builder, module) {
  module.doc() = "Shuffles, sample boundaries, blends and batched reads for Megatron datasets";
  module.def("build_gpt_indices", &BuildGptIndices, py::arg("lengths").noconvert(), py::arg("begin"), py::arg("end"),
             py::arg("epochs"), py::arg("separate_final"), py::arg("sequence_length"), py::arg("extra"),
             py::arg("samples"), py::arg("samples_first"), py::arg("key"), py::arg("position"), py::arg("threads"));
  module.def("build_blend_indices", &BuildBlendIndices, py::arg("weights"), py::arg("size"), py::arg("sizes"));
  DefineReader<uint8_t, int32_t>(&module);
  DefineReader<int8_t, int32_t>(&module);
  DefineReader<int16_t, int32_t>(&module);
  DefineReader<uint16_t, int32_t>(&module);
  DefineReader<int32_t, int32_t>(&module);
  DefineReader<int64_t, int64_t>(&module);
}
