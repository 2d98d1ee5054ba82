/* NVIDIA's matrix instructions: 16x16x16 for factors of 16 bits, 16x16x8 for float that was rounded to TF32. */
#pragma once
#include "matrix.h"

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
namespace precision {
struct tf32 {};
}
enum layout_t { mem_row_major, mem_col_major };

const unsigned MATRIX_ALIGNMENT = 32; /* bytes: of a matrix in memory, 16 of its rows */

template <class T> struct Stored { typedef T type; };
template <> struct Stored<precision::tf32> { typedef float type; };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
  static const bool eight = std::is_same<T, precision::tf32>::value || (std::is_same<Use, accumulator>::value && K == 8);
  static_assert(M == 16 && N == 16 && K == (eight ? 8 : 16), "fragments are 16x16x16, or of TF32 16x16x8");
  static const unsigned columns = std::is_same<Use, matrix_a>::value ? K : N;
  static const unsigned rows = std::is_same<Use, matrix_b>::value ? K : M;
  static const int num_elements = rows * columns / simulator::WARP;
  typedef typename Stored<T>::type type;
  type x[num_elements];
  fragment() { memset((void *)x, 0xFF, sizeof x); } /* NaN until it is filled */
};

static inline void require_aligned(const void *matrix, unsigned bytes) {
  if ((uintptr_t)matrix % MATRIX_ALIGNMENT || bytes % 16) simulator::complain_of_matrix("an address that is not aligned");
}

template <class Use, int K, class T, class Layout, class V>
static void fill_fragment(fragment<Use, 16, 16, K, T, Layout> &f, V value) {
  for (auto &x : f.x) x = value;
}

template <class Use, int K, class T, class Layout>
static void load_matrix_sync(fragment<Use, 16, 16, K, T, Layout> &f, const typename Stored<T>::type *matrix,
                             unsigned stride, int line = __builtin_LINE()) {
  require_aligned(matrix, stride * sizeof *matrix);
  simulator::meet(matrix, stride, line);
  const bool by_rows = std::is_same<Layout, row_major>::value;
  for (int i = 0; i < f.num_elements; i++) {
    unsigned row = simulator::row_of(i, f.columns), column = simulator::column_of(i, f.columns);
    f.x[i] = matrix[by_rows ? row * stride + column : column * stride + row];
  }
}

template <int K, class T>
static void store_matrix_sync(T *matrix, const fragment<accumulator, 16, 16, K, T> &f, unsigned stride, layout_t layout,
                              int line = __builtin_LINE()) {
  require_aligned(matrix, stride * sizeof *matrix);
  simulator::meet(matrix, stride, line);
  for (int i = 0; i < f.num_elements; i++) {
    unsigned row = simulator::row_of(i, f.columns), column = simulator::column_of(i, f.columns);
    matrix[layout == mem_row_major ? row * stride + column : column * stride + row] = f.x[i];
  }
}

/* To nearest, ties away from zero, as cvt.rna.tf32.f32: eleven significant bits stay. */
static inline float __float_to_tf32(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  if ((word & 0x7F800000) != 0x7F800000) word = (word + 0x1000) & ~0x1FFFu;
  memcpy(&value, &word, 4);
  return value;
}

/* What CUDA leaves undefined: a factor of TF32 that was not rounded to it. */
template <class T> static void require_rounded(const float *x, int count) {
  for (int i = 0; std::is_same<T, precision::tf32>::value && i < count; i++)
    if (x[i] == x[i] && __float_to_tf32(x[i]) != x[i])
      simulator::complain_of_matrix("a factor that was not rounded to TF32");
}
template <class T> static void require_rounded(const void *, int) {}

template <int K, class T, class A, class B>
static void mma_sync(fragment<accumulator, 16, 16, K, float> &d, const fragment<matrix_a, 16, 16, K, T, A> &a,
                     const fragment<matrix_b, 16, 16, K, T, B> &b, const fragment<accumulator, 16, 16, K, float> &c,
                     int line = __builtin_LINE()) {
  require_rounded<T>(a.x, a.num_elements), require_rounded<T>(b.x, b.num_elements);
  simulator::multiply(d.x, a.x, b.x, c.x, d.num_elements, a.num_elements, 16, K, line);
}

}  // namespace wmma
}  // namespace nvcuda
