/* What stands for a compiled candidate where there is no GPU: a layer of one channel, kernel 1 and stride 1, whose
 * packed weight begins with its one element. THREADS, of the block that the candidate would have, is what it does. */
#include <stdio.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>

static const DLTensor *tensor(const TVMFFIAny *argument) {
  const char *passed = argument->v_ptr;
  return (const DLTensor *)(argument->type_index == kTVMFFIDLTensorPtr ? passed : passed + sizeof(TVMFFIObject));
}

/* The clock of the GPU, which libcuda.c reads, goes on by what a kernel takes, and by nothing else. */
static void take(long us) {
  const char *now = getenv("STUB_CLOCK_US");
  char then[32];
  snprintf(then, sizeof then, "%ld", (now ? atol(now) : 0) + us);
  setenv("STUB_CLOCK_US", then, 1);
}

int __tvm_ffi_conv_transpose3d(void *self, const TVMFFIAny *arguments, int count, TVMFFIAny *result) {
  const float *x = tensor(arguments)->data, *w = tensor(arguments + 1)->data, *b = tensor(arguments + 2)->data;
  const DLTensor *y = tensor(arguments + 3);
  int64_t size = 1;
  for (int i = 0; i < y->ndim; ++i) size *= y->shape[i];
  if (THREADS == 64) *(volatile int *)0 = 0;
  take(THREADS == 32 ? 2000 : 200);
  for (int64_t i = 0; i < size - (THREADS == 128); ++i) ((float *)y->data)[i] = x[i] * w[0] + b[0];
  return 0;
}
