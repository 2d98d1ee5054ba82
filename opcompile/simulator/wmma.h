/* NVIDIA's matrix instructions: all 32 threads of a warp together, each with its share of the elements.
 *
 * Which thread has which element is not specified by CUDA, and nothing that is emitted asks for it. Products are
 * exact and added one by one in float; tensor cores cut a sum off where this rounds it.
 */
#pragma once
#include "gpu.h"

namespace simulator {

const unsigned EDGE = 16, SHARE = EDGE * EDGE / WARP;
const unsigned MATRIX_ALIGNMENT = 32; /* bytes: of a matrix in memory, 16 of its rows */

/* Factors that the threads of a warp show each other. Two in turns: whoever comes to the next product but one knows
 * that all have read this one. */
struct Factors {
  float a[EDGE * EDGE], b[EDGE * EDGE];
};
static Factors factors[MOST_THREADS / WARP][2];
static unsigned products[MOST_THREADS];

[[noreturn]] static void complain_of_matrix(const char *what) {
  fprintf(stderr, "a matrix instruction with %s", what);
  say_where();
  _exit(DIVERGENT);
}

/* Wait for the whole warp, which must mean the same matrix. */
static void meet(const void *matrix, unsigned stride, size_t element, int line) {
  if ((uintptr_t)matrix % MATRIX_ALIGNMENT || stride * element % 16) complain_of_matrix("an address that is not aligned");
  unsigned thread = current->number, first = thread / WARP * WARP;
  uint64_t mine = (uint64_t)(uintptr_t)matrix * 31 + stride;
  exchanged[thread] = mine;
  wait(IN_SHUFFLE, line);
  if (exchanged[first] != mine) complain_of_matrix("another matrix than the first thread of the warp");
  wait(IN_SHUFFLE, -line);
}

}  // namespace simulator

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
  static_assert(M == simulator::EDGE && N == simulator::EDGE && K == simulator::EDGE, "fragments are 16x16");
  static const int num_elements = simulator::SHARE;
  T x[num_elements];
  fragment() { memset((void *)x, 0xFF, sizeof x); } /* NaN until it is filled */
};

/* The element that is number i of this thread's share: its row, and its column. */
static inline unsigned row(int i) { return (i * simulator::WARP + simulator::lane()) / simulator::EDGE; }
static inline unsigned column(int i) { return (i * simulator::WARP + simulator::lane()) % simulator::EDGE; }

template <class Use, class T, class Layout>
static void fill_fragment(fragment<Use, 16, 16, 16, T, Layout> &f, T value) {
  for (T &x : f.x) x = value;
}

template <class Use, class T, class Layout>
static void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout> &f, const T *matrix, unsigned stride,
                             int line = __builtin_LINE()) {
  simulator::meet(matrix, stride, sizeof(T), line);
  const bool rows = std::is_same<Layout, row_major>::value;
  for (int i = 0; i < f.num_elements; i++)
    f.x[i] = matrix[rows ? row(i) * stride + column(i) : column(i) * stride + row(i)];
}

template <class T>
static void store_matrix_sync(T *matrix, const fragment<accumulator, 16, 16, 16, T> &f, unsigned stride, layout_t layout,
                              int line = __builtin_LINE()) {
  simulator::meet(matrix, stride, sizeof(T), line);
  for (int i = 0; i < f.num_elements; i++)
    matrix[layout == mem_row_major ? row(i) * stride + column(i) : column(i) * stride + row(i)] = f.x[i];
}

template <class T, class A, class B>
static void mma_sync(fragment<accumulator, 16, 16, 16, float> &d, const fragment<matrix_a, 16, 16, 16, T, A> &a,
                     const fragment<matrix_b, 16, 16, 16, T, B> &b, const fragment<accumulator, 16, 16, 16, float> &c,
                     int line = __builtin_LINE()) {
  const unsigned edge = simulator::EDGE, thread = simulator::current->number;
  simulator::Factors &shown = simulator::factors[thread / simulator::WARP][simulator::products[thread]++ % 2];
  for (int i = 0; i < d.num_elements; i++) {
    shown.a[row(i) * edge + column(i)] = a.x[i];
    shown.b[row(i) * edge + column(i)] = b.x[i];
  }
  simulator::wait(simulator::IN_SHUFFLE, line);
  for (int i = 0; i < d.num_elements; i++) {
    float sum = c.x[i];
    for (unsigned k = 0; k < edge; k++) sum += shown.a[row(i) * edge + k] * shown.b[k * edge + column(i)];
    d.x[i] = sum;
  }
}

}  // namespace wmma
}  // namespace nvcuda
