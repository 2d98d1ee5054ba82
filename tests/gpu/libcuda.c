/* NVIDIA's driver as the tests need it where there is no GPU: host memory stands for the device's, the time
 * that kernels say they take for its clock. STUB_CAPABILITY is the GPU's compute capability, like 9.0; without it there is no GPU. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int major, minor;
static double times_ms[64];

int cuInit(unsigned flags) {
  const char *capability = getenv("STUB_CAPABILITY");
  return capability && sscanf(capability, "%d.%d", &major, &minor) == 2 ? 0 : 100;
}
int cuGetErrorString(int error, const char **words) { return *words = error == 2 ? "out of memory" : "as told", 0; }
int cuDeviceGetCount(int *count) { return *count = 2, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char *name, int size, int device) { return snprintf(name, size, "Stub %d", device), 0; }
int cuDriverGetVersion(int *version) { return *version = 13010, 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  *value = which == 75 ? major : which == 76 ? minor : which == 38 ? 4096 : -1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &major, 0; }
int cuCtxSetCurrent(void *context) { return context == &major ? 0 : 201; }

int cuMemAlloc_v2(uint64_t *address, size_t size) {
  if (size > (1ull << 34) || getenv("STUB_FULL")) return 2;
  void *memory = aligned_alloc(256, (size + 255) / 256 * 256);
  return *address = (uintptr_t)memory, memory ? 0 : 2;
}
int cuMemsetD8_v2(uint64_t address, unsigned char value, size_t size) { return memset((void *)address, value, size), 0; }
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t size, void *stream) { return 0; }
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size) { return memcpy((void *)to, from, size), 0; }
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size) {
  return getenv("STUB_FAULT") ? 700 : (memcpy(to, (void *)from, size), 0);
}

int cuEventCreate(void **event, unsigned flags) {
  static int count;
  return *event = &times_ms[count++], 0;
}
int cuEventRecord(void *event, void *stream) {
  const char *now = getenv("STUB_CLOCK_US");
  return *(double *)event = now ? atol(now) / 1e3 : 0, 0;
}
int cuEventSynchronize(void *event) { return 0; }
int cuEventElapsedTime(float *elapsed, void *begin, void *end) {
  return *elapsed = *(double *)end - *(double *)begin, 0;
}
