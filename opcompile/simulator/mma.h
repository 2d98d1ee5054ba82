/* NVIDIA's matrix instructions as PTX has them, for factors of 16 bits: its manual says which thread has what. */
#pragma once
#include "matrix.h"

namespace simulator {

/* Each thread gives a row of eight, threads 8 i to 8 i + 7 those of matrix `i`; it gets two elements of every matrix:
 * of row `lane / 4`, or, turned, of that column. */
static void load_matrices(unsigned *to, const void *row, bool turned, int line) {
  unsigned thread = current->number, first = thread / WARP * WARP, near = lane() % 4 * 2, far = lane() / 4;
  if ((uintptr_t)row % 16) complain_of_matrix("an address that is not aligned");
  exchanged[thread] = (uint64_t)(uintptr_t)row;
  wait(IN_SHUFFLE, line);
  for (int i = 0; i < 4; i++) {
    const uint64_t *rows = exchanged + first + 8 * i;
    auto element = [&](unsigned j) {
      return (unsigned)((const uint16_t *)(uintptr_t)rows[turned ? near + j : far])[turned ? far : near + j];
    };
    to[i] = element(0) | element(1) << 16;
  }
  wait(IN_SHUFFLE, -line);
}

/* sums += a b: 16x8, of 16x16 and 16x8. `T` is the type of the factors. */
template <class T> static void multiply_16x8x16(float *sums, const unsigned *a, const unsigned *b, int line) {
  unsigned thread = current->number, near = lane() % 4 * 2, far = lane() / 4;
  Factors &shown = factors[thread / WARP][products[thread]++ % 2];
  auto half = [](unsigned word, int i) {
    T value;
    value.bits = word >> 16 * i;
    return (float)value;
  };
  for (int j = 0; j < 2; j++) {
    for (int i = 0; i < 4; i++) shown.a[(far + i % 2 * 8) * 16 + near + i / 2 * 8 + j] = half(a[i], j);
    for (int i = 0; i < 2; i++) shown.b[(near + i * 8 + j) * 8 + far] = half(b[i], j);
  }
  wait(IN_SHUFFLE, line);
  for (int i = 0; i < 4; i++)
    for (unsigned k = 0; k < 16; k++) sums[i] += shown.a[(far + i / 2 * 8) * 16 + k] * shown.b[k * 8 + near + i % 2];
}

}  // namespace simulator

static inline void opcompile_ldmatrix(unsigned *to, const void *row, int line = __builtin_LINE()) {
  simulator::load_matrices(to, row, false, line);
}
static inline void opcompile_ldmatrix_trans(unsigned *to, const void *row, int line = __builtin_LINE()) {
  simulator::load_matrices(to, row, true, line);
}
static inline void opcompile_mma_f16(float *sums, const unsigned *a, const unsigned *b, int line = __builtin_LINE()) {
  simulator::multiply_16x8x16<simulator::Half>(sums, a, b, line);
}
static inline void opcompile_mma_bf16(float *sums, const unsigned *a, const unsigned *b, int line = __builtin_LINE()) {
  simulator::multiply_16x8x16<simulator::BFloat>(sums, a, b, line);
}
