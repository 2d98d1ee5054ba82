/* The part of ONNX Runtime's C ABI that a custom operator needs, declared anew.
 *
 * OrtApi is a table of functions that is only ever appended to, so that a number names a function in
 * every version since it was added. Version 17 of the table is asked for, the first that has
 * KernelContext_ParallelFor: ONNX Runtime 1.17 and every later one has it.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define ORT_API_VERSION 17

typedef struct OrtStatus OrtStatus;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtValue OrtValue;
typedef struct OrtOp OrtOp;
typedef struct OrtOpAttr OrtOpAttr;

typedef void *OrtApi; /* one entry of the table */
typedef struct {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };                  /* OrtErrorCode */
enum { ORT_UNDEFINED = 0, ORT_FLOAT = 1, ORT_FLOAT16 = 10, ORT_DOUBLE = 11, ORT_BFLOAT16 = 16 };
enum { ORT_ATTRIBUTE_INT = 1, ORT_ATTRIBUTE_INTS = 2, ORT_ATTRIBUTE_STRING = 5 }; /* OrtOpAttrType */
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };                      /* OrtCustomOpInputOutputCharacteristic */

typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *);
  int (*GetInputType)(const OrtCustomOp *, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp *);
  int (*GetOutputType)(const OrtCustomOp *, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *);
  void (*KernelCompute)(void *, OrtKernelContext *);
  void (*KernelDestroy)(void *);
  int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
  OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
  OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, OrtShapeInferContext *);
  int (*GetStartVersion)(const OrtCustomOp *);
  int (*GetEndVersion)(const OrtCustomOp *);
};

static const OrtApi *ort; /* the table, once the library is registered */

#define ORT_CALL(number, result, ...) ((result(*)(__VA_ARGS__))ort[number])

#define ORT_CreateStatus ORT_CALL(0, OrtStatus *, int, const char *)
#define ORT_CreateCustomOpDomain ORT_CALL(26, OrtStatus *, const char *, OrtCustomOpDomain **)
#define ORT_CustomOpDomain_Add ORT_CALL(27, OrtStatus *, OrtCustomOpDomain *, const OrtCustomOp *)
#define ORT_AddCustomOpDomain ORT_CALL(28, OrtStatus *, OrtSessionOptions *, OrtCustomOpDomain *)
#define ORT_GetTensorMutableData ORT_CALL(51, OrtStatus *, OrtValue *, void **)
#define ORT_CreateTensorTypeAndShapeInfo ORT_CALL(57, OrtStatus *, OrtTensorTypeAndShapeInfo **)
#define ORT_SetTensorElementType ORT_CALL(58, OrtStatus *, OrtTensorTypeAndShapeInfo *, int)
#define ORT_SetDimensions ORT_CALL(59, OrtStatus *, OrtTensorTypeAndShapeInfo *, const int64_t *, size_t)
#define ORT_GetTensorElementType ORT_CALL(60, OrtStatus *, const OrtTensorTypeAndShapeInfo *, int *)
#define ORT_GetDimensionsCount ORT_CALL(61, OrtStatus *, const OrtTensorTypeAndShapeInfo *, size_t *)
#define ORT_GetDimensions ORT_CALL(62, OrtStatus *, const OrtTensorTypeAndShapeInfo *, int64_t *, size_t)
#define ORT_GetSymbolicDimensions ORT_CALL(63, OrtStatus *, const OrtTensorTypeAndShapeInfo *, const char **, size_t)
#define ORT_GetTensorTypeAndShape ORT_CALL(65, OrtStatus *, const OrtValue *, OrtTensorTypeAndShapeInfo **)
#define ORT_KernelInfoGetAttribute_float ORT_CALL(85, OrtStatus *, const OrtKernelInfo *, const char *, float *)
#define ORT_KernelInfoGetAttribute_int64 ORT_CALL(86, OrtStatus *, const OrtKernelInfo *, const char *, int64_t *)
#define ORT_KernelInfoGetAttribute_string \
  ORT_CALL(87, OrtStatus *, const OrtKernelInfo *, const char *, char *, size_t *)
#define ORT_KernelContext_GetInputCount ORT_CALL(88, OrtStatus *, const OrtKernelContext *, size_t *)
#define ORT_KernelContext_GetInput ORT_CALL(90, OrtStatus *, const OrtKernelContext *, size_t, const OrtValue **)
#define ORT_KernelContext_GetOutput \
  ORT_CALL(91, OrtStatus *, OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **)
#define ORT_ReleaseStatus ORT_CALL(93, void, OrtStatus *)
#define ORT_ReleaseTensorTypeAndShapeInfo ORT_CALL(99, void, OrtTensorTypeAndShapeInfo *)
#define ORT_ReleaseCustomOpDomain ORT_CALL(101, void, OrtCustomOpDomain *)
#define ORT_KernelInfoGetAttributeArray_float \
  ORT_CALL(162, OrtStatus *, const OrtKernelInfo *, const char *, float *, size_t *)
#define ORT_KernelInfoGetAttributeArray_int64 \
  ORT_CALL(163, OrtStatus *, const OrtKernelInfo *, const char *, int64_t *, size_t *)
#define ORT_CreateOpAttr ORT_CALL(211, OrtStatus *, const char *, const void *, int, int, OrtOpAttr **)
#define ORT_ReleaseOpAttr ORT_CALL(212, void, OrtOpAttr *)
#define ORT_CreateOp                                                                                               \
  ORT_CALL(213, OrtStatus *, const OrtKernelInfo *, const char *, const char *, int, const char **, const int *, int, \
           const OrtOpAttr *const *, int, int, int, OrtOp **)
#define ORT_InvokeOp \
  ORT_CALL(214, OrtStatus *, const OrtKernelContext *, const OrtOp *, const OrtValue *const *, int, OrtValue *const *, int)
#define ORT_ReleaseOp ORT_CALL(215, void, OrtOp *)
#define ORT_KernelInfo_GetInputCount ORT_CALL(230, OrtStatus *, const OrtKernelInfo *, size_t *)
#define ORT_KernelInfo_GetInputName ORT_CALL(232, OrtStatus *, const OrtKernelInfo *, size_t, char *, size_t *)
#define ORT_KernelInfoGetConstantInput_tensor \
  ORT_CALL(249, OrtStatus *, const OrtKernelInfo *, size_t, int *, const OrtValue **)
#define ORT_ShapeInferContext_GetInputCount ORT_CALL(267, OrtStatus *, const OrtShapeInferContext *, size_t *)
#define ORT_ShapeInferContext_GetInputTypeShape \
  ORT_CALL(268, OrtStatus *, const OrtShapeInferContext *, size_t, OrtTensorTypeAndShapeInfo **)
#define ORT_ShapeInferContext_GetAttribute \
  ORT_CALL(269, OrtStatus *, const OrtShapeInferContext *, const char *, const OrtOpAttr **)
#define ORT_ShapeInferContext_SetOutputTypeShape \
  ORT_CALL(270, OrtStatus *, const OrtShapeInferContext *, size_t, const OrtTensorTypeAndShapeInfo *)
#define ORT_SetSymbolicDimensions ORT_CALL(271, OrtStatus *, OrtTensorTypeAndShapeInfo *, const char **, size_t)
#define ORT_ReadOpAttr ORT_CALL(272, OrtStatus *, const OrtOpAttr *, int, void *, size_t, size_t *)
#define ORT_KernelContext_ParallelFor \
  ORT_CALL(274, OrtStatus *, const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *)
