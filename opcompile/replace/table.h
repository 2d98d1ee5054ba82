/* What a library holds: the kernels that are linked in, and the operators that call them. table.c is generated. */
#pragma once
#include <stdatomic.h>

#include "call.h"

enum { SPATIAL = 3, IMAGE_AXES = 5 };

struct axis {
  int64_t size, kernel, stride, dilation, begin, out;
};
/* How a weight is packed: filled up to `padded`, seen as `view`, its axes put into `order`. */
struct packing {
  int64_t padded[IMAGE_AXES], view[MOST_AXES];
  int axes, order[MOST_AXES];
};
struct kernel {
  const char *spec; /* its text form */
  kernel_fn run;
  int element_type; /* ONNX's number */
  uint8_t dtype_code, dtype_bits;
  int has_bias, useful_threads; /* useful_threads for each image */
  int64_t batch;                /* 0: any */
  int64_t channels_in, channels_out, groups;
  struct axis axes[SPATIAL];
  struct packing packing;
};
struct operator {
  const char *domain, *name;
  int is_packed, inputs; /* inputs: the most there may be */
  int first, count;      /* of its kernels */
};

extern HIDDEN const int kernel_count, operator_count;
extern HIDDEN const struct kernel kernels[];
extern HIDDEN const struct operator operators[];
extern HIDDEN _Atomic uint64_t calls[]; /* of each kernel; the last one: of ONNX Runtime's */
