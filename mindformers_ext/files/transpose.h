// Matrices written transposed, in squares that stay in vector registers of kBytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace transposing {

constexpr ptrdiff_t kStrip = 64;  // input rows of a strip: every output row gets whole cache lines of it

template <typename T, int kBytes>
struct Square {
  static constexpr int lanes = kBytes / sizeof(T);
  typedef T Row __attribute__((vector_size(kBytes)));
  typedef std::make_signed_t<std::conditional_t<sizeof(T) == 2, int16_t, int32_t>> Place;
  typedef Place Places __attribute__((vector_size(kBytes)));

  // Elements of a and b by turns, beginning with element `first` of each.
  template <int... i>
  static Row Interleave(Row a, Row b, int first, std::integer_sequence<int, i...>) {
    return first == 0 ? __builtin_shuffle(a, b, Places{(i % 2 * lanes + i / 2)...})
                      : __builtin_shuffle(a, b, Places{(i % 2 * lanes + i / 2 + lanes / 2)...});
  }

  // As many rows as a row has lanes: each interleaving of the two halves shifts the index by one bit, and after
  // log2(lanes) of them rows and columns have changed places.
  static void Write(const T *in, ptrdiff_t in_stride, T *out, ptrdiff_t out_stride) {
    constexpr auto order = std::make_integer_sequence<int, lanes>();
    Row rows[lanes], mixed[lanes];
    for (int i = 0; i < lanes; ++i) std::memcpy(&rows[i], in + i * in_stride, sizeof(Row));
    for (int half = lanes; half > 1; half /= 2) {
      for (int i = 0; i < lanes / 2; ++i) {
        mixed[2 * i] = Interleave(rows[i], rows[i + lanes / 2], 0, order);
        mixed[2 * i + 1] = Interleave(rows[i], rows[i + lanes / 2], lanes / 2, order);
      }
      std::memcpy(rows, mixed, sizeof(rows));
    }
    for (int i = 0; i < lanes; ++i) std::memcpy(out + i * out_stride, &rows[i], sizeof(Row));
  }
};

// out (columns, rows) <- in (rows, columns); strides in elements. A tensor in a file may begin at any byte: memcpy.
template <int kBytes, typename T>
void Transpose(const T *in, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t in_stride, T *out, ptrdiff_t out_stride) {
  using Square = Square<T, kBytes>;
  constexpr ptrdiff_t lanes = Square::lanes;
  const ptrdiff_t even_rows = rows / lanes * lanes, even_columns = columns / lanes * lanes;
  for (ptrdiff_t strip = 0; strip < even_rows; strip += kStrip) {
    const ptrdiff_t end = strip + kStrip < even_rows ? strip + kStrip : even_rows;
    for (ptrdiff_t column = 0; column < even_columns; column += lanes) {
      for (ptrdiff_t row = strip; row < end; row += lanes) {
        Square::Write(in + row * in_stride + column, in_stride, out + column * out_stride + row, out_stride);
      }
    }
  }
  for (ptrdiff_t row = 0; row < rows; ++row) {
    for (ptrdiff_t column = row < even_rows ? even_columns : 0; column < columns; ++column) {
      std::memcpy(out + column * out_stride + row, in + row * in_stride + column, sizeof(T));
    }
  }
}

}  // namespace transposing
