/* How a kernel is called: DLPack's DLTensor and TVM FFI's tagged value.
 *
 * Both are stable ABIs, and repeating them here spares the host two third-party headers. */
#pragma once
#include <stdint.h>

#define HIDDEN __attribute__((visibility("hidden")))
#define EXPORTED __attribute__((visibility("default")))

struct tensor {
  void *data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct value {
  int32_t type_index;
  uint32_t unused;
  union {
    int64_t integer;
    void *pointer;
  } content;
};
enum { ON_CPU = 1, TENSOR_POINTER = 7, MOST_AXES = 16 };

typedef int (*kernel_fn)(void *handle, const struct value *arguments, int32_t count, struct value *result);
