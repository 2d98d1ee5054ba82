/* One layer, in the words of its header. */
#include "conv_transpose3d.h"
#include "layer.h"

#define AXES(...) ((int)(sizeof((int64_t[])__VA_ARGS__) / sizeof(int64_t)))
#define SHAPE(...) {AXES(__VA_ARGS__), __VA_ARGS__}

_Static_assert(AXES(OPCOMPILE_SECOND_SHAPE) <= MOST_AXES, "packed weights have too many axes");

int OPCOMPILE_KERNEL(void *handle, const struct value *arguments, int32_t count, struct value *result);

const struct layer layer = {.run = OPCOMPILE_KERNEL,
                            .dtype_code = OPCOMPILE_DTYPE_CODE,
                            .dtype_bits = OPCOMPILE_DTYPE_BITS,
                            .has_second = OPCOMPILE_HAS_SECOND,
                            .has_third = OPCOMPILE_HAS_THIRD,
                            .useful_threads = OPCOMPILE_USEFUL_THREADS,
                            .nulls = OPCOMPILE_NULLS,
                            .first = SHAPE(OPCOMPILE_FIRST_SHAPE),
                            .second = SHAPE(OPCOMPILE_SECOND_SHAPE),
                            .third = SHAPE(OPCOMPILE_THIRD_SHAPE),
                            .result = SHAPE(OPCOMPILE_RESULT_SHAPE)};
