// Looks for NaN and infinity at the speed of memory: numpy makes an array of booleans, and for bfloat16 goes through
// float32 value by value.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace py = pybind11;

namespace {

constexpr ptrdiff_t kChunk = 4096;  // elements between two looks at the answer

// True when all of `bits`, which lie side by side below the sign, are set in an element: one more in the last of them
// carries into the sign then, which takes no comparison. A tensor in a file may begin at any byte: memcpy.
template <typename T>
bool AnyHasAll(const char *values, ptrdiff_t size, T bits) {
  const T last = bits & -bits, sign = bits + last;
  for (ptrdiff_t start = 0; start < size; start += kChunk) {
    const ptrdiff_t count = size - start < kChunk ? size - start : kChunk;
    const char *chunk = values + start * sizeof(T);
    T found = 0;
    for (ptrdiff_t i = 0; i < count; ++i) {
      T value;
      std::memcpy(&value, chunk + i * sizeof(T), sizeof(T));
      found |= static_cast<T>((value & bits) + last);
    }
    if (found & sign) return true;
  }
  return false;
}

template <typename T>
bool Run(const py::array &values, uint64_t bits) {
  const auto *data = static_cast<const char *>(values.data());
  const ptrdiff_t size = values.size();
  py::gil_scoped_release release;
  return AnyHasAll<T>(data, size, static_cast<T>(bits));
}

bool AnyHasAllOf(const py::array &values, uint64_t bits) {
  if (values.dtype().kind() != 'u' || !(values.flags() & py::array::c_style)) {
    throw std::invalid_argument("any_has_all needs a contiguous array of unsigned integers");
  }
  switch (values.itemsize()) {
    case 1: return Run<uint8_t>(values, bits);
    case 2: return Run<uint16_t>(values, bits);
    case 4: return Run<uint32_t>(values, bits);
    default: return Run<uint64_t>(values, bits);
  }
}

}  // namespace

PYBIND11_MODULE(_finite, module) {
  module.def("any_has_all", &AnyHasAllOf, py::arg("values"), py::arg("bits"),
             "True when an unsigned integer of a contiguous array has all of `bits`, which lie below the highest bit.");
}
