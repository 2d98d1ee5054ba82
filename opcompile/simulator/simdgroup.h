/* Apple's matrix instructions: 8x8 matrices of a simdgroup, which is 32 threads. */
#pragma once
#include "matrix.h"

namespace metal {

template <class T, int Columns, int Rows> struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup matrices are 8x8");
  static const int own = 64 / simulator::WARP;
  T x[own];
  simdgroup_matrix() { memset((void *)x, 0xFF, sizeof x); } /* NaN until it is filled */
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<simulator::Half, 8, 8> simdgroup_half8x8;

template <class T, int Columns, int Rows> static simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> filled;
  for (T &x : filled.x) x = value;
  return filled;
}

template <class T>
static void simdgroup_load(simdgroup_matrix<T, 8, 8> &d, const T *matrix, unsigned long row, int origin, bool transpose,
                           int line = __builtin_LINE()) {
  simulator::meet(matrix, row, line);
  for (int i = 0; i < d.own; i++) {
    unsigned r = simulator::row_of(i, 8), c = simulator::column_of(i, 8);
    d.x[i] = matrix[origin + (transpose ? c * row + r : r * row + c)];
  }
}

template <class T>
static void simdgroup_store(const simdgroup_matrix<T, 8, 8> &a, T *matrix, unsigned long row, int origin, bool transpose,
                            int line = __builtin_LINE()) {
  simulator::meet(matrix, row, line);
  for (int i = 0; i < a.own; i++) {
    unsigned r = simulator::row_of(i, 8), c = simulator::column_of(i, 8);
    matrix[origin + (transpose ? c * row + r : r * row + c)] = a.x[i];
  }
}

template <class T>
static void simdgroup_multiply_accumulate(simdgroup_float8x8 &d, const simdgroup_matrix<T, 8, 8> &a,
                                          const simdgroup_matrix<T, 8, 8> &b, const simdgroup_float8x8 &c,
                                          int line = __builtin_LINE()) {
  simulator::multiply(d.x, a.x, b.x, c.x, d.own, a.own, 8, 8, line);
}

}  // namespace metal
