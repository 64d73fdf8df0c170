// Matrices written transposed, in tiles that stay in registers: the layout of experts changes when checkpoints are
// converted, and numpy's strided copy is several times slower than a disk.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace py = pybind11;

namespace {

constexpr ptrdiff_t kStrip = 64;  // input rows of a strip: every output row gets whole cache lines of it

template <typename T>
struct Tile;

template <>
struct Tile<uint16_t> {
  typedef uint16_t Row __attribute__((vector_size(16)));
  static Row Low(Row a, Row b) { return __builtin_shuffle(a, b, Row{0, 8, 1, 9, 2, 10, 3, 11}); }
  static Row High(Row a, Row b) { return __builtin_shuffle(a, b, Row{4, 12, 5, 13, 6, 14, 7, 15}); }
};

template <>
struct Tile<uint32_t> {
  typedef uint32_t Row __attribute__((vector_size(16)));
  static Row Low(Row a, Row b) { return __builtin_shuffle(a, b, Row{0, 4, 1, 5}); }
  static Row High(Row a, Row b) { return __builtin_shuffle(a, b, Row{2, 6, 3, 7}); }
};

// A square of as many rows as a row has lanes: each interleaving of the two halves shifts the index by one bit, and
// after log2(lanes) of them rows and columns have changed places.
template <typename T>
void TransposeTile(const T *in, ptrdiff_t in_stride, T *out, ptrdiff_t out_stride) {
  using Row = typename Tile<T>::Row;
  constexpr int lanes = sizeof(Row) / sizeof(T);
  Row rows[lanes], mixed[lanes];
  for (int i = 0; i < lanes; ++i) std::memcpy(&rows[i], in + i * in_stride, sizeof(Row));
  for (int half = lanes; half > 1; half /= 2) {
    for (int i = 0; i < lanes / 2; ++i) {
      mixed[2 * i] = Tile<T>::Low(rows[i], rows[i + lanes / 2]);
      mixed[2 * i + 1] = Tile<T>::High(rows[i], rows[i + lanes / 2]);
    }
    std::memcpy(rows, mixed, sizeof(rows));
  }
  for (int i = 0; i < lanes; ++i) std::memcpy(out + i * out_stride, &rows[i], sizeof(Row));
}

// out (columns, rows) <- in (rows, columns); strides in elements. A tensor in a file may begin at any byte: memcpy.
template <typename T>
void Transpose(const T *in, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t in_stride, T *out, ptrdiff_t out_stride) {
  constexpr ptrdiff_t lanes = sizeof(typename Tile<T>::Row) / sizeof(T);
  const ptrdiff_t even_rows = rows / lanes * lanes, even_columns = columns / lanes * lanes;
  for (ptrdiff_t strip = 0; strip < even_rows; strip += kStrip) {
    const ptrdiff_t end = strip + kStrip < even_rows ? strip + kStrip : even_rows;
    for (ptrdiff_t column = 0; column < even_columns; column += lanes) {
      for (ptrdiff_t row = strip; row < end; row += lanes) {
        TransposeTile(in + row * in_stride + column, in_stride, out + column * out_stride + row, out_stride);
      }
    }
  }
  for (ptrdiff_t row = 0; row < rows; ++row) {
    for (ptrdiff_t column = row < even_rows ? even_columns : 0; column < columns; ++column) {
      std::memcpy(out + column * out_stride + row, in + row * in_stride + column, sizeof(T));
    }
  }
}

template <typename T>
void Run(const py::array &place, const py::array &value) {
  constexpr ptrdiff_t size = sizeof(T);
  const auto *in = static_cast<const T *>(value.data());
  auto *out = static_cast<T *>(const_cast<void *>(place.data()));
  const ptrdiff_t rows = value.shape(0), columns = value.shape(1);
  const ptrdiff_t in_stride = value.strides(0) / size, out_stride = place.strides(0) / size;
  py::gil_scoped_release release;
  Transpose(in, rows, columns, in_stride, out, out_stride);
}

void TransposeInto(const py::array &place, const py::array &value) {
  if (place.ndim() != 2 || value.ndim() != 2 || place.shape(0) != value.shape(1) || place.shape(1) != value.shape(0)) {
    throw std::invalid_argument("transpose_into needs two matrices, the first of the second's transposed shape");
  }
  const ptrdiff_t size = value.itemsize();
  if (place.itemsize() != size || (size != 2 && size != 4) || !place.writeable()) {
    throw std::invalid_argument("transpose_into needs elements of 2 or 4 bytes, the same in both, and a place to write");
  }
  if (value.size() == 0) return;
  // The stride of an axis of one element says nothing.
  const auto contiguous = [size](const py::array &a) { return a.shape(1) < 2 || a.strides(1) == size; };
  const auto whole_stride = [size](const py::array &a) { return a.shape(0) < 2 || a.strides(0) % size == 0; };
  if (!contiguous(place) || !contiguous(value) || !whole_stride(place) || !whole_stride(value)) {
    throw std::invalid_argument("transpose_into needs rows whose elements lie side by side");
  }
  size == 2 ? Run<uint16_t>(place, value) : Run<uint32_t>(place, value);
}

}  // namespace

PYBIND11_MODULE(_transpose, module) {
  module.def("transpose_into", &TransposeInto, py::arg("place"), py::arg("value"),
             "place (columns, rows) = value (rows, columns) transposed, bit for bit; elements of 2 or 4 bytes.");
}
