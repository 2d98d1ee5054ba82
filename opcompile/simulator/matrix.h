/* What all matrix instructions have in common: the 32 threads of a warp (of a simdgroup) execute them together, each
 * with its share of the elements.
 *
 * Which thread has which element is specified by PTX alone (mma.h). Products are added one by one in float; tensor
 * cores cut a sum off where this rounds it.
 */
#pragma once
#include "gpu.h"

namespace simulator {

const unsigned MOST_ELEMENTS = 16 * 16;

/* Factors that the threads of a warp show each other. Two in turns: whoever comes to the next product but one knows
 * that all have read this one. */
struct Factors {
  float a[MOST_ELEMENTS], b[MOST_ELEMENTS];
};
static Factors factors[MOST_THREADS / WARP][2];
static unsigned products[MOST_THREADS];

[[noreturn]] static void complain_of_matrix(const char *what) {
  fprintf(stderr, "a matrix instruction with %s", what);
  say_where();
  _exit(DIVERGENT);
}

/* Wait for the whole warp, which must mean the same matrix, of rows that are `stride` elements apart. */
static void meet(const void *matrix, unsigned stride, int line) {
  unsigned thread = current->number, first = thread / WARP * WARP;
  uint64_t mine = (uint64_t)(uintptr_t)matrix * 31 + stride;
  exchanged[thread] = mine;
  wait(IN_SHUFFLE, line);
  if (exchanged[first] != mine) complain_of_matrix("another matrix than the first thread of the warp");
  wait(IN_SHUFFLE, -line);
}

/* The element that is number `i` of this thread's share of a matrix, in the order of its rows. Backwards, so that a
 * thread which reads in that order what the warp has stored reads what others have. */
static unsigned element(int i) { return i * WARP + WARP - 1 - lane(); }
static unsigned row_of(int i, unsigned columns) { return element(i) / columns; }
static unsigned column_of(int i, unsigned columns) { return element(i) % columns; }

/* d = a b + c, of matrices with `inner` columns (a) and rows (b), where d has `columns`. */
template <class D, class A, class B, class C>
static void multiply(D &d, const A &a, const B &b, const C &c, int sums, int factors_each, unsigned columns,
                     unsigned inner, int line) {
  unsigned thread = current->number;
  Factors &shown = factors[thread / WARP][products[thread]++ % 2];
  for (int i = 0; i < factors_each; i++) {
    shown.a[element(i)] = a[i];
    shown.b[element(i)] = b[i];
  }
  wait(IN_SHUFFLE, line);
  for (int i = 0; i < sums; i++) {
    float sum = c[i];
    for (unsigned k = 0; k < inner; k++)
      sum += shown.a[row_of(i, columns) * inner + k] * shown.b[k * columns + column_of(i, columns)];
    d[i] = sum;
  }
}

}  // namespace simulator
