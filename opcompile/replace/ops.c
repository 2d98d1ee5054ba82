/* ONNX Runtime's side of compiled kernels: a custom-operator library that needs nothing but the C library.
 *
 * table.c, generated beside this file, lists the kernels and the operators that call them. An operator is
 *   packed  one kernel; its weight arrives in the kernel's own layout, packed when the model was rewritten;
 *   open    several kernels, for one shape of X each; its weight arrives as ONNX has it and is packed once,
 *           when the session is created (in each call where it is no constant). For every other shape it
 *           calls ONNX Runtime's own ConvTranspose.
 * Whatever does not fit becomes an OrtStatus with a sentence in it.
 */
#define _GNU_SOURCE /* sched_getaffinity */
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "call.h"
#include "ort.h"
#include "table.h"

#define OR_RETURN(call)                     \
  do {                                      \
    OrtStatus *status_ = (call);            \
    if (status_) return status_;            \
  } while (0)

/* What this thread is doing. */
static __thread struct {
  OrtKernelContext *context; /* of the running call: its thread pool */
  int tasks;                 /* into how many a parallel loop is cut */
  char text[512];            /* the last error */
} self;

HIDDEN void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  size_t length = (size_t)snprintf(self.text, sizeof self.text, "%s: ", kind);
  for (int32_t i = 0; i < count && length < sizeof self.text; i++)
    if (parts[i]) length += (size_t)snprintf(self.text + length, sizeof self.text - length, "%s", parts[i]);
}

static void fail(const char *kind, const char *text) { TVMFFIErrorSetRaisedFromCStrParts(kind, &text, 1); }

#include "kernel.h" /* how a kernel is called, and what it calls */
#include "processor.h"

/* --- parallel loops: in the session's own thread pool --- */

struct job {
  task_fn run;
  void *closure;
  struct environment environment;
  _Atomic int failed;
  char text[sizeof self.text]; /* of the first task that failed */
};

static void run_task(void *of, size_t task) {
  struct job *job = of;
  struct block *before = in_use;
  if (atomic_load_explicit(&job->failed, memory_order_relaxed)) return;
  if (!job->run((int)task, &job->environment, job->closure)) return;
  release_until(before);
  if (!atomic_exchange(&job->failed, 1)) memcpy(job->text, self.text, sizeof job->text);
}

static int launch(task_fn run, void *closure, int requested) {
  struct job job = {.run = run, .closure = closure, .environment = {NULL, requested > 0 ? requested : self.tasks}};
  OrtKernelContext *context = self.context;
  if (!context || job.environment.num_task == 1) { /* inside of a task, or not worth a thread */
    if (!context && requested <= 0) job.environment.num_task = 1;
    for (int task = 0; task < job.environment.num_task && !job.failed; task++) run_task(&job, (size_t)task);
  } else {
    self.context = NULL;
    OrtStatus *status = ORT_KernelContext_ParallelFor(context, run_task, (size_t)job.environment.num_task, 0, &job);
    self.context = context;
    if (status) {
      ORT_ReleaseStatus(status);
      fail("RuntimeError", "ONNX Runtime's thread pool refused the kernel's tasks");
      return -1;
    }
  }
  if (!job.failed) return 0;
  memcpy(self.text, job.text, sizeof self.text); /* the error may have happened on another thread */
  return -1;
}

/* Several tasks a processor: the pool hands them out as threads come free. It does not tell its size. */
static int useful_tasks(const struct kernel *kernel, int64_t batch) {
  static _Atomic int cpus;
  if (!cpus) cpus = usable_cpus();
  int64_t most = 4 * (int64_t)cpus, useful = batch < most ? batch * kernel->useful_threads : most;
  return (int)(useful < most ? useful : most);
}

/* --- errors --- */

static OrtStatus *invalid(const char *format, const char *name, const char *what) {
  char text[1024];
  snprintf(text, sizeof text, format, name, what);
  return ORT_CreateStatus(ORT_INVALID_ARGUMENT, text);
}

static void write_shape(char *text, size_t size, const int64_t *shape, size_t rank) {
  size_t length = (size_t)snprintf(text, size, "(");
  for (size_t i = 0; i < rank && length < size; i++)
    length += (size_t)snprintf(text + length, size - length, i ? ", %lld" : "%lld", (long long)shape[i]);
  if (length < size) snprintf(text + length, size - length, ")");
}

/* --- tensors of ONNX Runtime --- */

struct given {
  const OrtValue *value; /* NULL: an optional input that is not there */
  char *data;
  int element_type;
  size_t rank;
  int64_t shape[MOST_AXES];
};

static OrtStatus *describe(const OrtTensorTypeAndShapeInfo *info, struct given *given) {
  OR_RETURN(ORT_GetTensorElementType(info, &given->element_type));
  OR_RETURN(ORT_GetDimensionsCount(info, &given->rank));
  if (given->rank > MOST_AXES) return ORT_CreateStatus(ORT_INVALID_ARGUMENT, "opcompile: a tensor has too many axes");
  return ORT_GetDimensions(info, given->shape, given->rank);
}

static OrtStatus *look_at(const OrtValue *value, struct given *given) {
  OrtTensorTypeAndShapeInfo *info;
  given->value = value;
  OR_RETURN(ORT_GetTensorTypeAndShape(value, &info));
  OrtStatus *status = describe(info, given);
  ORT_ReleaseTensorTypeAndShapeInfo(info);
  if (!status) status = ORT_GetTensorMutableData((OrtValue *)value, (void **)&given->data);
  return status;
}

static OrtStatus *look_at_input(OrtKernelContext *context, size_t index, struct given *given) {
  const OrtValue *value = NULL;
  OR_RETURN(ORT_KernelContext_GetInput(context, index, &value));
  given->value = NULL;
  return value ? look_at(value, given) : NULL;
}

static OrtStatus *require_shape(const char *operator, const char *input, const struct given *given,
                                const int64_t *shape, size_t rank, size_t element_bytes) {
  int fits = given->value && given->rank == rank;
  for (size_t i = 0; fits && i < rank; i++)
    fits = shape[i] ? given->shape[i] == shape[i] : given->shape[i] >= 0; /* 0: any */
  if (fits && (uintptr_t)given->data % element_bytes == 0) return NULL;
  char is[256], must[256], text[768];
  if (!given->value) return invalid("%s: input %s is missing", operator, input);
  write_shape(is, sizeof is, given->shape, given->rank);
  write_shape(must, sizeof must, shape, rank);
  if (fits)
    snprintf(text, sizeof text, "%s begins at an address that is no multiple of %d bytes; align it", input,
             (int)element_bytes);
  else
    snprintf(text, sizeof text, "%s has shape %s, but this kernel was compiled for %s (0: any size)", input, is, must);
  return invalid("%s: %s", operator, text);
}

static OrtStatus *make_output(OrtKernelContext *context, const int64_t *shape, size_t rank, OrtValue **value,
                              void **data) {
  OR_RETURN(ORT_KernelContext_GetOutput(context, 0, shape, rank, value));
  if (!*value) return ORT_CreateStatus(ORT_FAIL, "opcompile: ONNX Runtime gave no output");
  return ORT_GetTensorMutableData(*value, data);
}

/* --- weights --- */

static size_t packed_elements(const struct packing *packing) {
  size_t elements = 1;
  for (int i = 0; i < IMAGE_AXES; i++) elements *= (size_t)packing->padded[i];
  return elements;
}

/* Walks through the padded weight in its own order, and beside it through the view, whose strides are the packed ones. */
static void pack(const struct packing *packing, const int64_t *shape, size_t bytes, const char *from, char *to) {
  size_t stride[MOST_AXES], step = bytes;
  for (int i = packing->axes - 1; i >= 0; i--) {
    stride[packing->order[i]] = step;
    step *= (size_t)packing->view[packing->order[i]];
  }
  int64_t at[IMAGE_AXES] = {0}, in_view[MOST_AXES] = {0};
  size_t offset = 0;
  for (size_t left = packed_elements(packing); left; left--) {
    int inside = 1;
    for (int i = 0; i < IMAGE_AXES; i++) inside &= at[i] < shape[i];
    if (inside) {
      memcpy(to + offset, from, bytes);
      from += bytes;
    } else {
      memset(to + offset, 0, bytes);
    }
    for (int i = IMAGE_AXES - 1; i >= 0 && ++at[i] == packing->padded[i]; i--) at[i] = 0;
    for (int i = packing->axes - 1; i >= 0; i--) {
      offset += stride[i];
      if (++in_view[i] < packing->view[i]) break;
      offset -= stride[i] * (size_t)packing->view[i];
      in_view[i] = 0;
    }
  }
}

static int equal_packings(const struct packing *one, const struct packing *other) {
  return one->axes == other->axes && !memcmp(one->padded, other->padded, sizeof one->padded) &&
         !memcmp(one->view, other->view, sizeof *one->view * (size_t)one->axes) &&
         !memcmp(one->order, other->order, sizeof *one->order * (size_t)one->axes);
}

static size_t element_bytes(const struct kernel *kernel) { return kernel->dtype_bits / 8; }

static OrtStatus *new_packed(const struct kernel *kernel, const struct given *w, void **packed) {
  size_t bytes = element_bytes(kernel);
  if (posix_memalign(packed, ALIGNMENT, packed_elements(&kernel->packing) * bytes)) {
    *packed = NULL;
    return ORT_CreateStatus(ORT_FAIL, "opcompile: there is no memory for packed weights");
  }
  pack(&kernel->packing, w->shape, bytes, w->data, *packed);
  return NULL;
}

/* --- calling a kernel --- */

static struct tensor of_kernel(const struct kernel *kernel, void *data, const int64_t *shape, int axes,
                               int64_t *strides) {
  return borrow(data, kernel->dtype_code, kernel->dtype_bits, (int64_t *)shape, axes, strides);
}

static size_t packed_shape(const struct packing *packing, int64_t *shape) {
  for (int i = 0; i < packing->axes; i++) shape[i] = packing->view[packing->order[i]];
  return (size_t)packing->axes;
}

static void y_shape(const struct kernel *kernel, int64_t batch, int64_t *shape) {
  shape[0] = batch, shape[1] = kernel->channels_out;
  for (int i = 0; i < SPATIAL; i++) shape[2 + i] = kernel->axes[i].out;
}

/* Fills the node's output; `w` is packed. */
static OrtStatus *run(const struct kernel *kernel, OrtKernelContext *context, const struct given *x, void *w, void *b) {
  int64_t y[IMAGE_AXES], packed[MOST_AXES], strides[4][MOST_AXES], batch = x->shape[0];
  OrtValue *output;
  void *data;
  y_shape(kernel, batch, y);
  OR_RETURN(make_output(context, y, IMAGE_AXES, &output, &data));
  if (batch == 0) return NULL; /* Y has no elements */
  struct tensor tensors[4];
  int count = 0, axes = (int)packed_shape(&kernel->packing, packed);
  tensors[count] = of_kernel(kernel, x->data, x->shape, IMAGE_AXES, strides[count]), count++;
  tensors[count] = of_kernel(kernel, w, packed, axes, strides[count]), count++;
  if (kernel->has_bias) tensors[count] = of_kernel(kernel, b, &kernel->channels_out, 1, strides[count]), count++;
  tensors[count] = of_kernel(kernel, data, y, IMAGE_AXES, strides[count]), count++;
  struct value arguments[4], result = {0};
  for (int i = 0; i < count; i++) arguments[i] = (struct value){TENSOR_POINTER, 0, {.pointer = &tensors[i]}};

  struct block *before = in_use;
  self.context = context;
  self.tasks = useful_tasks(kernel, batch);
  self.text[0] = '\0';
  int status = kernel->run(NULL, arguments, count, &result);
  self.context = NULL;
  atomic_fetch_add_explicit(&calls[kernel - kernels], 1, memory_order_relaxed);
  if (!status) return NULL;
  release_until(before);
  return invalid("opcompile: %s failed: %s", kernel->spec, self.text[0] ? self.text : "the kernel gave no reason");
}

/* --- the attributes of a ConvTranspose, for open operators: any rank --- */

enum { MOST_SPATIAL = MOST_AXES - 2 };
enum { NOTSET, VALID, SAME_UPPER, SAME_LOWER };
static const char *const auto_pads[] = {"NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"};
enum { STRIDES, DILATIONS, PADS, OUTPUT_PADDING, OUTPUT_SHAPE, KERNEL_SHAPE, LISTS };
static const char *const lists[] = {"strides", "dilations", "pads", "output_padding", "output_shape", "kernel_shape"};

struct attributes {
  int auto_pad;
  int64_t group;
  size_t counts[LISTS]; /* 0: not given */
  int64_t values[LISTS][2 * MOST_SPATIAL];
};

static int64_t value_of(const struct attributes *a, int list, size_t index, int64_t otherwise) {
  return index < a->counts[list] ? a->values[list][index] : otherwise;
}

/* One axis of the layer, as ONNX Runtime understands the attributes. */
static struct axis axis_of(const struct attributes *a, size_t i, size_t axes, int64_t size, int64_t kernel) {
  struct axis axis = {size, kernel, value_of(a, STRIDES, i, 1), value_of(a, DILATIONS, i, 1), 0, 0};
  int64_t whole = (size - 1) * axis.stride + axis.dilation * (kernel - 1) + 1 + value_of(a, OUTPUT_PADDING, i, 0);
  int64_t out = whole;
  if (a->counts[OUTPUT_SHAPE] >= axes) /* older models list N and C as well */
    out = value_of(a, OUTPUT_SHAPE, a->counts[OUTPUT_SHAPE] - axes + i, whole);
  else if (a->auto_pad >= SAME_UPPER)
    out = size * axis.stride < whole ? size * axis.stride : whole;
  else {
    axis.begin = value_of(a, PADS, i, 0);
    axis.out = whole - axis.begin - value_of(a, PADS, axes + i, 0);
    return axis;
  }
  int64_t total = whole > out ? whole - out : 0;
  axis.begin = a->auto_pad == SAME_UPPER ? total / 2 : total - total / 2;
  axis.out = out;
  return axis;
}

static int auto_pad_of(const char *text) {
  if (!*text) return NOTSET;
  for (int i = NOTSET; i <= SAME_LOWER; i++)
    if (!strcmp(text, auto_pads[i])) return i;
  return -1;
}

/* An attribute that is not there keeps its default: the status that says so is dropped. */
static int is_there(OrtStatus *status) {
  if (status) ORT_ReleaseStatus(status);
  return !status;
}

/* Of an attribute of any type the integers can be asked for: it has none, if it is no list of integers. */
static int is_attribute(const OrtKernelInfo *info, const char *attribute) {
  size_t count = 0;
  return is_there(ORT_KernelInfoGetAttributeArray_int64(info, attribute, NULL, &count));
}

static int is_no_list(const OrtKernelInfo *info, const char *attribute) {
  int64_t integer;
  float real;
  size_t size = 0, count = 0;
  return is_there(ORT_KernelInfoGetAttribute_int64(info, attribute, &integer)) ||
         is_there(ORT_KernelInfoGetAttribute_float(info, attribute, &real)) ||
         is_there(ORT_KernelInfoGetAttribute_string(info, attribute, NULL, &size)) ||
         (is_there(ORT_KernelInfoGetAttributeArray_float(info, attribute, NULL, &count)) && count);
}

static OrtStatus *read_list(const OrtKernelInfo *info, int list, struct attributes *a) {
  size_t count = 2 * MOST_SPATIAL;
  if (!is_attribute(info, lists[list])) return NULL;
  if (is_no_list(info, lists[list])) return invalid("ConvTranspose: %s must be a list of integers%s", lists[list], "");
  if (!is_there(ORT_KernelInfoGetAttributeArray_int64(info, lists[list], a->values[list], &count)))
    return invalid("ConvTranspose: %s has more values than %s", lists[list], "a tensor has axes");
  a->counts[list] = count;
  for (size_t i = 0; i < count; i++)
    if (a->values[list][i] != (int32_t)a->values[list][i])
      return invalid("ConvTranspose: %s has a value that does not fit into 32 bits%s", lists[list], "");
  return NULL;
}

static OrtStatus *read_attributes(const OrtKernelInfo *info, struct attributes *a) {
  *a = (struct attributes){.group = 1};
  for (int list = 0; list < LISTS; list++) OR_RETURN(read_list(info, list, a));
  char text[32] = "?";
  size_t size = sizeof text;
  if (is_attribute(info, "auto_pad")) {
    a->auto_pad = is_there(ORT_KernelInfoGetAttribute_string(info, "auto_pad", text, &size)) ? auto_pad_of(text) : -1;
    if (a->auto_pad < 0)
      return invalid("ConvTranspose: auto_pad is %s, but must be NOTSET, VALID, SAME_UPPER or SAME_LOWER%s", text, "");
  }
  if (is_attribute(info, "group") && !is_there(ORT_KernelInfoGetAttribute_int64(info, "group", &a->group)))
    return invalid("ConvTranspose: %s must be an integer%s", "group", "");
  return NULL;
}

/* The same while shapes are inferred, before there is a node to ask. */
static void read_attributes_early(const OrtShapeInferContext *context, struct attributes *a) {
  *a = (struct attributes){.group = 1};
  const OrtOpAttr *attribute;
  size_t bytes;
  for (int list = 0; list < LISTS; list++)
    if (is_there(ORT_ShapeInferContext_GetAttribute(context, lists[list], &attribute)) && attribute &&
        is_there(ORT_ReadOpAttr(attribute, ORT_ATTRIBUTE_INTS, a->values[list], sizeof a->values[list], &bytes)))
      a->counts[list] = bytes / sizeof(int64_t);
  char text[32] = "";
  if (is_there(ORT_ShapeInferContext_GetAttribute(context, "auto_pad", &attribute)) && attribute &&
      is_there(ORT_ReadOpAttr(attribute, ORT_ATTRIBUTE_STRING, text, sizeof text - 1, &bytes)))
    a->auto_pad = auto_pad_of(text);
  if (is_there(ORT_ShapeInferContext_GetAttribute(context, "group", &attribute)) && attribute)
    is_there(ORT_ReadOpAttr(attribute, ORT_ATTRIBUTE_INT, &a->group, sizeof a->group, &bytes));
}

/* --- one node of a session --- */

struct node {
  const struct operator *operator;
  struct attributes attributes; /* from here on: of open operators */
  size_t inputs;
  OrtOp *own;     /* ONNX Runtime's kernel */
  void *packed[]; /* of each of the operator's kernels, where the weight is a constant it takes; or NULL */
};

/* Whether `kernel` computes this layer for an X of this shape. */
static int computes(const struct kernel *kernel, const struct node *node, const struct given *x, const struct given *w,
                    const struct given *b) {
  if (x->rank != IMAGE_AXES || w->rank != IMAGE_AXES || x->element_type != kernel->element_type) return 0;
  if (x->shape[0] < 1 || (kernel->batch && kernel->batch != x->shape[0])) return 0;
  if (x->shape[1] != kernel->channels_in || w->shape[0] != kernel->channels_in) return 0;
  if (node->attributes.group != kernel->groups || w->shape[1] * kernel->groups != kernel->channels_out) return 0;
  if ((b->value != NULL) != kernel->has_bias) return 0;
  if (b->value && (b->rank != 1 || b->shape[0] != kernel->channels_out)) return 0;
  for (int i = 0; i < SPATIAL; i++) {
    struct axis axis = axis_of(&node->attributes, (size_t)i, SPATIAL, x->shape[2 + i], w->shape[2 + i]);
    if (value_of(&node->attributes, KERNEL_SHAPE, (size_t)i, axis.kernel) != axis.kernel) return 0;
    if (memcmp(&axis, &kernel->axes[i], sizeof axis)) return 0;
  }
  return 1;
}

/* Whether `kernel` could compute it for some X. */
static int may_compute(const struct kernel *kernel, const struct node *node, const struct given *w,
                       const struct given *b) {
  struct given x = {.value = w->value, .element_type = kernel->element_type, .rank = IMAGE_AXES};
  x.shape[0] = kernel->batch ? kernel->batch : 1;
  x.shape[1] = kernel->channels_in;
  for (int i = 0; i < SPATIAL; i++) x.shape[2 + i] = kernel->axes[i].size;
  return computes(kernel, node, &x, w, b);
}

static _Atomic int alive; /* nodes of all sessions */

static void destroy(void *of) {
  struct node *node = of;
  if (atomic_fetch_sub(&alive, 1) == 1) { /* nobody is left who would use a kept workspace */
    pthread_mutex_lock(&cache_lock);
    shrink_cache(0);
    pthread_mutex_unlock(&cache_lock);
  }
  if (node->own) ORT_ReleaseOp(node->own);
  for (int i = 0; i < node->operator->count; i++) {
    for (int j = i + 1; j < node->operator->count; j++) /* equal packings share one copy */
      if (node->packed[j] == node->packed[i]) node->packed[j] = NULL;
    free(node->packed[i]);
  }
  free(node);
}

/* ONNX Runtime's ConvTranspose with this node's attributes. */
static OrtStatus *create_own(const OrtKernelInfo *info, struct node *node) {
  const struct attributes *a = &node->attributes;
  OrtOpAttr *given[LISTS + 2];
  int count = 0;
  OrtStatus *status = NULL;
  for (int list = 0; list < LISTS && !status; list++)
    if (a->counts[list])
      status = ORT_CreateOpAttr(lists[list], a->values[list], (int)a->counts[list], ORT_ATTRIBUTE_INTS, &given[count]),
      count += !status;
  if (!status) status = ORT_CreateOpAttr("group", &a->group, 1, ORT_ATTRIBUTE_INT, &given[count]), count += !status;
  const char *text = auto_pads[a->auto_pad];
  if (!status)
    status = ORT_CreateOpAttr("auto_pad", text, (int)strlen(text), ORT_ATTRIBUTE_STRING, &given[count]),
    count += !status;
  const char *constraints[] = {"T"};
  const int types[] = {ORT_FLOAT};
  if (!status)
    status = ORT_CreateOp(info, "ConvTranspose", "", 11, constraints, types, 1, (const OrtOpAttr *const *)given, count,
                          (int)node->inputs, 1, &node->own);
  while (count) ORT_ReleaseOpAttr(given[--count]);
  return status;
}

/* Packs a weight that is a constant, for every kernel that this node may call. */
static OrtStatus *pack_constant(const OrtKernelInfo *info, struct node *node) {
  const struct operator *operator = node->operator;
  struct given w = {0}, b = {0};
  int is_constant = 0;
  const OrtValue *value = NULL;
  OR_RETURN(ORT_KernelInfoGetConstantInput_tensor(info, 1, &is_constant, &value));
  if (!is_constant || !value) return NULL;
  OR_RETURN(look_at(value, &w));
  for (int i = 0; i < operator->count; i++) {
    const struct kernel *kernel = &kernels[operator->first + i];
    /* whether there is a bias, and of which shape, each call tells */
    b.value = kernel->has_bias ? value : NULL, b.rank = 1, b.shape[0] = kernel->channels_out;
    if (w.element_type != kernel->element_type || (size_t)kernel->has_bias + 2 > node->inputs) continue;
    if (!may_compute(kernel, node, &w, &b)) continue;
    for (int j = 0; j < i && !node->packed[i]; j++)
      if (node->packed[j] && equal_packings(&kernel->packing, &kernels[operator->first + j].packing))
        node->packed[i] = node->packed[j];
    if (!node->packed[i]) OR_RETURN(new_packed(kernel, &w, &node->packed[i]));
  }
  return NULL;
}

/* How many inputs the node has. One at the end that is left out has an empty name, and is none to ONNX Runtime's
 * own kernel: up to 1.20 it would look for a tensor there. */
static OrtStatus *count_inputs(const OrtKernelInfo *info, size_t *count) {
  OR_RETURN(ORT_KernelInfo_GetInputCount(info, count));
  while (*count) {
    size_t size = 0; /* of the name and its end */
    OR_RETURN(ORT_KernelInfo_GetInputName(info, *count - 1, NULL, &size));
    if (size > 1) return NULL;
    --*count;
  }
  return NULL;
}

/* --- what ONNX Runtime calls --- */

struct custom {
  OrtCustomOp functions; /* first: ONNX Runtime hands back its address */
  const struct operator *operator;
  int element_type;
  int type_only; /* the model may have this type, but no kernel does */
};

static const struct operator *operator_of(const OrtCustomOp *op) { return ((const struct custom *)op)->operator; }

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **created) {
  (void)api;
  const struct operator *operator = operator_of(op);
  struct node *node = calloc(1, sizeof *node + (size_t)operator->count * sizeof *node->packed);
  if (!node) return ORT_CreateStatus(ORT_FAIL, "opcompile: there is no memory for a node");
  atomic_fetch_add(&alive, 1);
  node->operator = operator;
  OrtStatus *status = count_inputs(info, &node->inputs);
  if (!status && !node->operator->is_packed) {
    status = read_attributes(info, &node->attributes);
    if (!status) status = create_own(info, node);
    if (!status) status = pack_constant(info, node);
  }
  if (status)
    destroy(node);
  else
    *created = node;
  return status;
}

static OrtStatus *compute_packed(const struct operator *operator, OrtKernelContext *context) {
  const struct kernel *kernel = &kernels[operator->first];
  struct given x, w, b = {0};
  size_t bytes = element_bytes(kernel);
  int64_t shape[MOST_AXES] = {kernel->batch, kernel->channels_in};
  for (int i = 0; i < SPATIAL; i++) shape[2 + i] = kernel->axes[i].size;
  OR_RETURN(look_at_input(context, 0, &x));
  OR_RETURN(require_shape(operator->name, "X", &x, shape, IMAGE_AXES, bytes));
  OR_RETURN(look_at_input(context, 1, &w));
  OR_RETURN(require_shape(operator->name, "W", &w, shape, packed_shape(&kernel->packing, shape), bytes));
  if (kernel->has_bias) {
    OR_RETURN(look_at_input(context, 2, &b));
    OR_RETURN(require_shape(operator->name, "B", &b, &kernel->channels_out, 1, bytes));
  }
  return run(kernel, context, &x, w.data, b.data);
}

/* What ONNX Runtime's own kernel trusts in older versions, and then reads past the end of. */
static OrtStatus *require_sound(const struct attributes *a, const struct given *x, const struct given *w,
                                const struct given *b) {
  if (x->rank < 3 || x->rank != w->rank)
    return ORT_CreateStatus(ORT_INVALID_ARGUMENT, "ConvTranspose: X and W must have the same number of axes, at least 3");
  size_t axes = x->rank - 2;
  char text[128];
  for (int list = 0; list < LISTS; list++) {
    size_t count = a->counts[list], must = list == PADS ? 2 * axes : axes;
    if (!count || count == must || (list == OUTPUT_SHAPE && count == axes + 2)) continue;
    snprintf(text, sizeof text, "has %d values, but X has %d spatial axes", (int)count, (int)axes);
    return invalid("ConvTranspose: %s %s", lists[list], text);
  }
  for (size_t i = 0; i < axes; i++)
    if (value_of(a, STRIDES, i, 1) < 1 || value_of(a, DILATIONS, i, 1) < 1 || value_of(a, OUTPUT_PADDING, i, 0) < 0)
      return ORT_CreateStatus(ORT_INVALID_ARGUMENT, "ConvTranspose: strides and dilations must be at least 1, and "
                                                    "output_padding at least 0");
  if (a->group < 1 || a->group > INT32_MAX)
    return ORT_CreateStatus(ORT_INVALID_ARGUMENT, "ConvTranspose: group must be at least 1, and fit into 32 bits");
  int64_t channels = w->shape[1] * a->group;
  if (b->value && (b->rank != 1 || b->shape[0] != channels)) {
    write_shape(text, sizeof text, b->shape, b->rank);
    return invalid("ConvTranspose: B has shape %s, but must have one value for each channel of Y%s", text, "");
  }
  return NULL;
}

/* ONNX Runtime's own kernel, on the same tensors: the result is its own to the bit. */
static OrtStatus *compute_by_own(const struct node *node, OrtKernelContext *context, const struct given *inputs) {
  const struct given *x = &inputs[0], *w = &inputs[1];
  int64_t shape[MOST_AXES];
  shape[0] = x->shape[0];
  shape[1] = w->shape[1] * node->attributes.group;
  for (size_t i = 2; i < x->rank; i++) {
    struct axis axis = axis_of(&node->attributes, i - 2, x->rank - 2, x->shape[i], w->shape[i]);
    shape[i] = axis.out;
    if (x->shape[i] < 1 || axis.out < 1 || w->shape[i] < 1) { /* ONNX Runtime would crash */
      char text[256];
      write_shape(text, sizeof text, x->shape, x->rank);
      return invalid("ConvTranspose: X has shape %s: every spatial size must be at least 1, of %s too", text, "the output");
    }
    /* its 2-D kernel works back from the output to how many columns it reads: there may be more than X has */
    int64_t reach = (axis.size - 1) * axis.stride + axis.dilation * (axis.kernel - 1) + 1;
    int64_t end = reach + value_of(&node->attributes, OUTPUT_PADDING, i - 2, 0);
    if (x->rank == 4 && (end > axis.out ? end : axis.out) - reach >= axis.stride)
      return ORT_CreateStatus(ORT_INVALID_ARGUMENT,
                              "ConvTranspose: the output ends a whole stride or more after the last tap; make "
                              "output_padding smaller than the stride, or output_shape smaller");
  }
  OrtValue *output;
  void *data;
  OR_RETURN(make_output(context, shape, x->rank, &output, &data));
  atomic_fetch_add_explicit(&calls[kernel_count], 1, memory_order_relaxed);
  const OrtValue *values[] = {inputs[0].value, inputs[1].value, inputs[2].value};
  return ORT_InvokeOp(context, node->own, values, (int)node->inputs, &output, 1);
}

static OrtStatus *compute_open(const struct node *node, OrtKernelContext *context) {
  const struct operator *operator = node->operator;
  struct given inputs[3] = {{0}};
  for (size_t i = 0; i < node->inputs && i < 3; i++) OR_RETURN(look_at_input(context, i, &inputs[i]));
  const struct given *x = &inputs[0], *w = &inputs[1], *b = &inputs[2];
  if (!x->value || !w->value) return ORT_CreateStatus(ORT_INVALID_ARGUMENT, "ConvTranspose: X and W must be given");
  OR_RETURN(require_sound(&node->attributes, x, w, b));
  for (int i = 0; i < operator->count; i++) {
    const struct kernel *kernel = &kernels[operator->first + i];
    if (!computes(kernel, node, x, w, b)) continue;
    if ((uintptr_t)x->data % element_bytes(kernel) || (uintptr_t)b->data % element_bytes(kernel)) continue;
    if (node->packed[i]) return run(kernel, context, x, node->packed[i], b->data);
    void *packed;
    OR_RETURN(new_packed(kernel, w, &packed));
    OrtStatus *status = run(kernel, context, x, packed, b->data);
    free(packed);
    return status;
  }
  return compute_by_own(node, context, inputs);
}

static OrtStatus *compute(void *of, OrtKernelContext *context) {
  const struct node *node = of;
  return node->operator->is_packed ? compute_packed(node->operator, context) : compute_open(node, context);
}

/* A shape while the model is loaded: a size that is not known is -1 and has a name, a known one has none. */
struct inferred {
  size_t rank; /* 0: nothing is known */
  int element_type;
  int64_t sizes[MOST_AXES];
  const char *names[MOST_AXES];
  char new_names[MOST_AXES][48];
};

/* ONNX Runtime takes sizes of the same name, or of the same value, for equal: what is unknown needs a new name. */
static void name_unknown(struct inferred *y, size_t axis) {
  static _Atomic unsigned made;
  y->names[axis] = y->new_names[axis];
  snprintf(y->new_names[axis], sizeof *y->new_names, "opcompile_unknown_%u", atomic_fetch_add(&made, 1));
}

static OrtStatus *infer_shape(const struct operator *operator, OrtShapeInferContext *context, struct inferred *y) {
  struct given inputs[2];
  const char *names[MOST_AXES];
  OrtTensorTypeAndShapeInfo *info; /* ONNX Runtime owns it */
  y->rank = 0;
  OR_RETURN(ORT_ShapeInferContext_GetInputTypeShape(context, 1, &info));
  OR_RETURN(describe(info, &inputs[1]));
  OR_RETURN(ORT_ShapeInferContext_GetInputTypeShape(context, 0, &info));
  OR_RETURN(describe(info, &inputs[0]));
  OR_RETURN(ORT_GetSymbolicDimensions(info, names, inputs[0].rank));
  const struct given *x = &inputs[0], *w = &inputs[1];
  y->element_type = x->element_type;
  for (size_t i = 0; i < MOST_AXES; i++) y->names[i] = "";
  if (operator->is_packed) {
    const struct kernel *kernel = &kernels[operator->first];
    y_shape(kernel, kernel->batch ? kernel->batch : -1, y->sizes);
    y->rank = IMAGE_AXES;
  } else {
    if (x->rank < 3 || x->rank != w->rank) return NULL;
    struct attributes attributes;
    read_attributes_early(context, &attributes);
    y->sizes[0] = -1;
    y->sizes[1] = w->shape[1] > 0 ? w->shape[1] * attributes.group : -1;
    for (size_t i = 2; i < x->rank; i++) {
      struct axis axis = axis_of(&attributes, i - 2, x->rank - 2, x->shape[i], w->shape[i]);
      y->sizes[i] = x->shape[i] > 0 && w->shape[i] > 0 ? axis.out : -1;
    }
    y->rank = x->rank;
  }
  if (y->sizes[0] < 0 && x->rank) { /* the batch is that of X */
    y->sizes[0] = x->shape[0];
    if (x->shape[0] < 0 && *names[0]) y->names[0] = names[0];
  }
  for (size_t i = 0; i < y->rank; i++)
    if (y->sizes[i] < 0 && !*y->names[i]) name_unknown(y, i);
  return NULL;
}

static OrtStatus *infer(const OrtCustomOp *op, OrtShapeInferContext *context) {
  struct inferred y;
  OR_RETURN(infer_shape(operator_of(op), context, &y));
  if (!y.rank) return NULL;
  OrtTensorTypeAndShapeInfo *info;
  OR_RETURN(ORT_CreateTensorTypeAndShapeInfo(&info));
  OrtStatus *status = ORT_SetTensorElementType(info, y.element_type);
  if (!status) status = ORT_SetDimensions(info, y.sizes, y.rank);
  if (!status) status = ORT_SetSymbolicDimensions(info, y.names, y.rank);
  if (!status) status = ORT_ShapeInferContext_SetOutputTypeShape(context, 0, info);
  ORT_ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

static const char *name(const OrtCustomOp *op) { return operator_of(op)->name; }
static const char *provider(const OrtCustomOp *op) {
  return ((const struct custom *)op)->type_only ? "OpcompileNoProvider" : "CPUExecutionProvider";
}
static int type(const OrtCustomOp *op, size_t i) { return (void)i, ((const struct custom *)op)->element_type; }
static size_t inputs(const OrtCustomOp *op) { return (size_t)operator_of(op)->inputs; }
static size_t one_output(const OrtCustomOp *op) { return (void)op, 1; }
static int need(const OrtCustomOp *op, size_t i) {
  return !operator_of(op)->is_packed && i == 2 ? ORT_OPTIONAL : ORT_REQUIRED;
}
static int required(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_REQUIRED; }
static int any_memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int one(const OrtCustomOp *op) { return (void)op, 1; }
/* Of ONNX's own operator version 0: ONNX Runtime then finds no kernel of its own for a node of another type, and
 * inserts Casts around it as ever. With a version that its kernels have it would hold their types against ours. */
static int since(const OrtCustomOp *op) { return *operator_of(op)->domain ? 1 : 0; }
static int every_later(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

static const OrtCustomOp functions = {
    .version = ORT_API_VERSION,
    .GetName = name,
    .GetExecutionProviderType = provider,
    .GetInputType = type,
    .GetInputTypeCount = inputs,
    .GetOutputType = type,
    .GetOutputTypeCount = one_output,
    .KernelDestroy = destroy,
    .GetInputCharacteristic = need,
    .GetOutputCharacteristic = required,
    .GetInputMemoryType = any_memory,
    .GetVariadicInputMinArity = one,
    .GetVariadicInputHomogeneity = one,
    .GetVariadicOutputMinArity = one,
    .GetVariadicOutputHomogeneity = one,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .InferOutputShapeFn = infer,
    .GetStartVersion = since,
    .GetEndVersion = every_later,
};

/* --- the door --- */

static pthread_mutex_t door = PTHREAD_MUTEX_INITIALIZER;
static OrtCustomOpDomain *domain; /* sessions refer to it: made once, and kept as long as the process */

static const int onnx_types[] = {ORT_FLOAT, ORT_FLOAT16, ORT_DOUBLE, ORT_BFLOAT16};

/* ONNX Runtime 1.20 to 1.23 crash before they ask for a shape, where a node leaves its last input out. Nodes of ONNX's
 * own operator may; there the shape stays unknown in every version that was not seen to be sound, which costs nothing
 * but the knowledge. */
static int may_infer(const struct operator *operator, const char *version) {
  int major = 0, minor = 0;
  return *operator->domain || (sscanf(version, "%d.%d", &major, &minor) == 2 && (major > 1 || minor >= 31));
}

static OrtStatus *make_domain(const char *version) {
  char missing[64], text[256];
  if (lacks_feature(missing, sizeof missing)) {
    snprintf(text, sizeof text,
             "opcompile: this library was compiled for %s, and this processor has no %s; compile it for this machine",
             target_name, missing);
    return ORT_CreateStatus(ORT_FAIL, text);
  }
  OrtCustomOpDomain *made;
  OR_RETURN(ORT_CreateCustomOpDomain(operators[0].domain, &made));
  const size_t most_types = sizeof onnx_types / sizeof *onnx_types;
  struct custom *customs = calloc((size_t)operator_count * most_types, sizeof *customs); /* the domain's, from here on */
  OrtStatus *status = customs ? NULL : ORT_CreateStatus(ORT_FAIL, "opcompile: there is no memory for the operators");
  int count = 0;
  for (int i = 0; i < operator_count && !status; i++) {
    /* ONNX's own operator has more types than our kernels: ONNX Runtime inserts Casts, if the operator allows */
    int types = *operators[i].domain ? 1 : (int)most_types;
    for (int j = 0; j < types && !status; j++) {
      int type = *operators[i].domain ? kernels[operators[i].first].element_type : onnx_types[j];
      customs[count] = (struct custom){functions, &operators[i], type, j > 0};
      if (!may_infer(&operators[i], version)) customs[count].functions.InferOutputShapeFn = NULL;
      status = ORT_CustomOpDomain_Add(made, &customs[count++].functions);
    }
  }
  if (status) {
    ORT_ReleaseCustomOpDomain(made);
    free(customs);
    return status;
  }
  domain = made;
  return NULL;
}

EXPORTED OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  const OrtApi *api = base->GetApi(ORT_API_VERSION);
  /* the first function of the table makes a status in every version */
  OrtStatus *(*create_status)(int, const char *) = (OrtStatus * (*)(int, const char *)) base->GetApi(1)[0];
  if (!api) return create_status(ORT_FAIL, "opcompile: this library needs ONNX Runtime 1.17 or later");
  OrtStatus *status = NULL;
  pthread_mutex_lock(&door);
  if (ort && ort != api) {
    status = create_status(ORT_FAIL, "opcompile: another ONNX Runtime of this process has registered this library");
  } else {
    ort = api;
    if (!domain) status = make_domain(base->GetVersionString());
  }
  pthread_mutex_unlock(&door);
  return status ? status : ORT_AddCustomOpDomain(options, domain);
}

/* How often each kernel was called since the library was loaded; the last entry counts ONNX Runtime's own.
 * Returns 0 where there is no such entry. */
EXPORTED int opcompile_calls(int index, const char **spec, uint64_t *count) {
  if (index < 0 || index > kernel_count) return 0;
  *spec = index < kernel_count ? kernels[index].spec : "onnxruntime";
  *count = atomic_load_explicit(&calls[index], memory_order_relaxed);
  return 1;
}
