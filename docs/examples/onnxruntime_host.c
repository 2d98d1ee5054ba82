/* Run a model whose nodes were replaced, from C:
 *
 *   cc onnxruntime_host.c -I<the folder of opcompile/replace/ort.h> -o host -ldl -lm
 *   ./host libonnxruntime.so DIR/model.onnx DIR/opcompile_ops.so
 *
 * ONNX Runtime's library is opened by its path, and its functions are found by their numbers (see ort.h), so
 * that no header of it is needed. With its own header, onnxruntime_c_api.h, `CreateEnv` below is
 * `ort->CreateEnv`, and so on. Every input is float32 and holds ones; a size that is open counts as 1.
 */
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "ort.h"
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtRunOptions OrtRunOptions;
#define GetErrorMessage ORT_CALL(2, const char *, const OrtStatus *)
#define CreateEnv ORT_CALL(3, OrtStatus *, int, const char *, OrtEnv **)
#define CreateSession ORT_CALL(7, OrtStatus *, const OrtEnv *, const char *, const OrtSessionOptions *, OrtSession **)
#define Run                                                                                                      \
  ORT_CALL(9, OrtStatus *, OrtSession *, const OrtRunOptions *, const char *const *, const OrtValue *const *, size_t, \
           const char *const *, size_t, OrtValue **)
#define CreateSessionOptions ORT_CALL(10, OrtStatus *, OrtSessionOptions **)
#define SetIntraOpNumThreads ORT_CALL(24, OrtStatus *, OrtSessionOptions *, int)
#define RegisterCustomOpsLibrary ORT_CALL(29, OrtStatus *, OrtSessionOptions *, const char *, void **)
#define SessionGetInputCount ORT_CALL(30, OrtStatus *, const OrtSession *, size_t *)
#define SessionGetOutputCount ORT_CALL(31, OrtStatus *, const OrtSession *, size_t *)
#define SessionGetInputTypeInfo ORT_CALL(33, OrtStatus *, const OrtSession *, size_t, OrtTypeInfo **)
#define SessionGetInputName ORT_CALL(36, OrtStatus *, const OrtSession *, size_t, OrtAllocator *, char **)
#define SessionGetOutputName ORT_CALL(37, OrtStatus *, const OrtSession *, size_t, OrtAllocator *, char **)
#define CreateTensorWithDataAsOrtValue \
  ORT_CALL(49, OrtStatus *, const OrtMemoryInfo *, void *, size_t, const int64_t *, size_t, int, OrtValue **)
#define GetTensorMutableData ORT_GetTensorMutableData
#define CastTypeInfoToTensorInfo ORT_CALL(55, OrtStatus *, const OrtTypeInfo *, const OrtTensorTypeAndShapeInfo **)
#define GetDimensionsCount ORT_GetDimensionsCount
#define GetDimensions ORT_GetDimensions
#define GetTensorShapeElementCount ORT_CALL(64, OrtStatus *, const OrtTensorTypeAndShapeInfo *, size_t *)
#define GetTensorTypeAndShape ORT_GetTensorTypeAndShape
#define CreateCpuMemoryInfo ORT_CALL(69, OrtStatus *, int, int, OrtMemoryInfo **)
#define AllocatorFree ORT_CALL(76, OrtStatus *, OrtAllocator *, void *)
#define GetAllocatorWithDefaultOptions ORT_CALL(78, OrtStatus *, OrtAllocator **)
#define ReleaseEnv ORT_CALL(92, void, OrtEnv *)
#define ReleaseMemoryInfo ORT_CALL(94, void, OrtMemoryInfo *)
#define ReleaseSession ORT_CALL(95, void, OrtSession *)
#define ReleaseValue ORT_CALL(96, void, OrtValue *)
#define ReleaseTypeInfo ORT_CALL(98, void, OrtTypeInfo *)
#define ReleaseTensorTypeAndShapeInfo ORT_ReleaseTensorTypeAndShapeInfo
#define ReleaseSessionOptions ORT_CALL(100, void, OrtSessionOptions *)
enum { WARNING = 2, ARENA = 1, DEFAULT = 0, FLOAT = ORT_FLOAT, MOST = 16 };

static void check(OrtStatus *status) {
  if (!status) return;
  fprintf(stderr, "%s\n", GetErrorMessage(status));
  exit(1);
}

/* A tensor of ones, of the shape that input `index` has; it borrows `*data`, which is the caller's to free. */
static OrtValue *ones(const OrtSession *session, size_t index, const OrtMemoryInfo *memory, float **data) {
  OrtTypeInfo *type;
  const OrtTensorTypeAndShapeInfo *info;
  int64_t shape[MOST];
  size_t rank, elements = 1;
  check(SessionGetInputTypeInfo(session, index, &type));
  check(CastTypeInfoToTensorInfo(type, &info));
  check(GetDimensionsCount(info, &rank));
  if (rank > MOST) exit(1);
  check(GetDimensions(info, shape, rank));
  ReleaseTypeInfo(type);
  for (size_t i = 0; i < rank; i++) elements *= (size_t)(shape[i] = shape[i] < 0 ? 1 : shape[i]);
  *data = malloc(elements * sizeof **data);
  if (!*data) exit(1);
  for (size_t i = 0; i < elements; i++) (*data)[i] = 1;
  OrtValue *value;
  check(CreateTensorWithDataAsOrtValue(memory, *data, elements * sizeof **data, shape, rank, FLOAT, &value));
  return value;
}

static void print(const char *name, OrtValue *value) {
  OrtTensorTypeAndShapeInfo *info;
  float *data;
  size_t elements;
  double sum = 0;
  check(GetTensorTypeAndShape(value, &info));
  check(GetTensorShapeElementCount(info, &elements));
  ReleaseTensorTypeAndShapeInfo(info);
  check(GetTensorMutableData(value, (void **)&data));
  for (size_t i = 0; i < elements; i++) sum += fabs(data[i]);
  printf("%s: %zu elements, sum of magnitudes %.9g\n", name, elements, sum);
}

int main(int count, char **arguments) {
  if (count < 4) return 2;
  void *runtime = dlopen(arguments[1], RTLD_NOW);
  if (!runtime) return fprintf(stderr, "%s\n", dlerror()), 1;
  const OrtApiBase *(*base)(void);
  *(void **)&base = dlsym(runtime, "OrtGetApiBase");
  ort = base()->GetApi(ORT_API_VERSION);
  OrtEnv *env;
  OrtSessionOptions *options;
  OrtSession *session;
  OrtMemoryInfo *memory;
  OrtAllocator *allocator;
  void *library;
  check(CreateEnv(WARNING, "host", &env));
  check(CreateSessionOptions(&options));
  check(SetIntraOpNumThreads(options, 2));
  check(RegisterCustomOpsLibrary(options, arguments[3], &library));
  check(CreateSession(env, arguments[2], options, &session));
  check(CreateCpuMemoryInfo(ARENA, DEFAULT, &memory));
  check(GetAllocatorWithDefaultOptions(&allocator));

  char *inputs[MOST], *outputs[MOST];
  float *data[MOST];
  OrtValue *given[MOST], *results[MOST] = {0};
  size_t in, out;
  check(SessionGetInputCount(session, &in));
  check(SessionGetOutputCount(session, &out));
  if (in > MOST || out > MOST) return 1;
  for (size_t i = 0; i < in; i++) {
    check(SessionGetInputName(session, i, allocator, &inputs[i]));
    given[i] = ones(session, i, memory, &data[i]);
  }
  for (size_t i = 0; i < out; i++) check(SessionGetOutputName(session, i, allocator, &outputs[i]));
  check(Run(session, NULL, (const char *const *)inputs, (const OrtValue *const *)given, in,
            (const char *const *)outputs, out, results));
  for (size_t i = 0; i < out; i++) print(outputs[i], results[i]);

  for (size_t i = 0; i < in; i++) {
    ReleaseValue(given[i]);
    free(data[i]);
    check(AllocatorFree(allocator, inputs[i]));
  }
  for (size_t i = 0; i < out; i++) {
    ReleaseValue(results[i]);
    check(AllocatorFree(allocator, outputs[i]));
  }
  ReleaseMemoryInfo(memory);
  ReleaseSession(session);
  ReleaseSessionOptions(options);
  ReleaseEnv(env);
  return 0;
}
