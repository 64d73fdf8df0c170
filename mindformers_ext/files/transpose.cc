// Transposed copies for Python: the layout of experts changes when checkpoints are converted, and numpy's strided copy
// is several times slower than a disk.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "transpose.h"

namespace py = pybind11;

namespace {

constexpr int kVector = 16;  // bytes that every machine can shuffle

constexpr ptrdiff_t kTile = 64;  // rows and columns that go through a place of their own, in the first cache
constexpr ptrdiff_t kLine = 64;  // bytes

// As transposing::Transpose, for matrices far larger than a cache: rows of the output may lie a power of two apart,
// where few of them fit into the cache at a time, and the input's lines are asked for before they are needed.
template <typename T>
void TransposeLarge(const T *in, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t in_stride, T *out,
                    ptrdiff_t out_stride) {
  using Square = transposing::Square<T, kVector>;
  alignas(kLine) T tile[kTile * kTile];
  const ptrdiff_t whole_rows = rows / kTile * kTile, whole_columns = columns / kTile * kTile;
  for (ptrdiff_t top = 0; top < whole_rows; top += kTile) {
    for (ptrdiff_t left = 0; left < whole_columns; left += kTile) {
      for (ptrdiff_t row = 0; row < kTile; row += Square::lanes) {
        const T *from = in + (top + row) * in_stride + left;
        for (ptrdiff_t i = 0; left + kTile < whole_columns && i < Square::lanes; ++i) {
          for (ptrdiff_t k = 0; k < kTile; k += kLine / sizeof(T)) {
            __builtin_prefetch(from + i * in_stride + kTile + k);
          }
        }
        for (ptrdiff_t column = 0; column < kTile; column += Square::lanes) {
          Square::Write(from + column, in_stride, tile + column * kTile + row, kTile);
        }
      }
      for (ptrdiff_t column = 0; column < kTile; ++column) {
        std::memcpy(out + (left + column) * out_stride + top, tile + column * kTile, kTile * sizeof(T));
      }
    }
  }
  transposing::Transpose<kVector>(in + whole_columns, whole_rows, columns - whole_columns, in_stride,
                                  out + whole_columns * out_stride, out_stride);
  transposing::Transpose<kVector>(in + whole_rows * in_stride, rows - whole_rows, columns, in_stride,
                                  out + whole_rows, out_stride);
}

template <typename T>
void Run(const py::array &place, const py::array &value) {
  constexpr ptrdiff_t size = sizeof(T);
  const auto *in = static_cast<const T *>(value.data());
  auto *out = static_cast<T *>(const_cast<void *>(place.data()));
  const ptrdiff_t rows = value.shape(0), columns = value.shape(1);
  const ptrdiff_t in_stride = value.strides(0) / size, out_stride = place.strides(0) / size;
  py::gil_scoped_release release;
  TransposeLarge(in, rows, columns, in_stride, out, out_stride);
}

// First byte of a matrix and the one behind its last.
std::pair<const char *, const char *> Extent(const py::array &a) {
  const char *first = static_cast<const char *>(a.data());
  const char *last = first + a.itemsize();
  for (int axis = 0; axis < 2; ++axis) {
    const ptrdiff_t reach = (a.shape(axis) - 1) * a.strides(axis);
    (reach < 0 ? first : last) += reach;
  }
  return {first, last};
}

void TransposeInto(const py::array &place, const py::array &value) {
  if (place.ndim() != 2 || value.ndim() != 2 || place.shape(0) != value.shape(1) || place.shape(1) != value.shape(0)) {
    throw std::invalid_argument("transpose_into needs two matrices, the first of the second's transposed shape");
  }
  const ptrdiff_t size = value.itemsize();
  if (place.itemsize() != size || (size != 2 && size != 4) || !place.writeable()) {
    throw std::invalid_argument("transpose_into needs elements of the same 2 or 4 bytes, and a place to write");
  }
  if (!place.dtype().attr("isnative").equal(value.dtype().attr("isnative"))) {
    throw std::invalid_argument("transpose_into needs elements of the same byte order");
  }
  if (value.size() == 0) return;
  // The stride of an axis of one element says nothing.
  const auto contiguous = [size](const py::array &a) { return a.shape(1) < 2 || a.strides(1) == size; };
  const auto whole_stride = [size](const py::array &a) { return a.shape(0) < 2 || a.strides(0) % size == 0; };
  if (!contiguous(place) || !contiguous(value) || !whole_stride(place) || !whole_stride(value)) {
    throw std::invalid_argument("transpose_into needs rows whose elements lie side by side");
  }
  const auto [place_first, place_last] = Extent(place);
  const auto [value_first, value_last] = Extent(value);
  if (place_first < value_last && value_first < place_last) {
    throw std::invalid_argument("transpose_into needs two matrices that share no memory");
  }
  size == 2 ? Run<uint16_t>(place, value) : Run<uint32_t>(place, value);
}

}  // namespace

PYBIND11_MODULE(_transpose, module) {
  module.def("transpose_into", &TransposeInto, py::arg("place"), py::arg("value"),
             "place (columns, rows) = value (rows, columns) transposed, bit for bit; elements of 2 or 4 bytes.");
}
