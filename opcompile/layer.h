/* What runtime.c reads of its layer. */
#pragma once
#include "call.h"

struct shape {
  int axes;
  int64_t sizes[MOST_AXES];
};
struct layer {
  kernel_fn run;
  uint8_t dtype_code, dtype_bits;
  int has_second, has_third, useful_threads; /* useful_threads for each batch element where that is dynamic */
  const char *nulls;                         /* what must be null, in words */
  struct shape first, second, third, result; /* x, w, b and y of a layer */
};

extern HIDDEN const struct layer layer;
