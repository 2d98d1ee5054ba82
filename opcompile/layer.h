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
  int has_w, has_bias, useful_threads; /* useful_threads for each batch element where that is dynamic */
  const char *nulls;                   /* what must be null, in words */
  struct shape x, w, b, y;
};

extern HIDDEN const struct layer layer;
