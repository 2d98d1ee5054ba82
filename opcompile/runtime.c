/* The run-time half of a compiled layer: linked with the kernel into one library that needs
 * nothing but the C library and POSIX threads.
 *
 * The kernel object expects its loader to provide five things: a parallel launcher, a barrier, two
 * workspace functions and an error function. They are defined here with hidden visibility, so the
 * library works without TVM and cannot be re-wired when TVM is in the same process.
 *
 * Exported: opcompile_run and opcompile_error (below), and the kernel itself.
 */
#define _GNU_SOURCE /* sched_getaffinity, RTLD_DEFAULT, RTLD_NODELETE */
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "layer.h"

#define MOST_THREADS 1024
#define POLL_NS 100000 /* to wake a thread takes 20 to 50 us in a virtual machine */

/* What this thread is doing. */
static __thread struct {
  int threads;          /* most threads for the running call; 0: none was given */
  int in_run;           /* inside opcompile_run */
  int is_worker;
  char kind[32], text[1024];
} self;

/* --- errors: kept for opcompile_error, and handed to TVM's FFI where a call came through it --- */

typedef void (*set_raised_fn)(const char *, const char **, int32_t);

HIDDEN void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  snprintf(self.kind, sizeof self.kind, "%s", kind);
  size_t length = 0;
  self.text[0] = '\0';
  for (int32_t i = 0; i < count && length < sizeof self.text; i++)
    if (parts[i]) length += (size_t)snprintf(self.text + length, sizeof self.text - length, "%s", parts[i]);
  if (self.in_run || self.is_worker) return;
  /* finds libtvm_ffi's function, never this one: hidden symbols are not looked up */
  set_raised_fn set_raised = (set_raised_fn)dlsym(RTLD_DEFAULT, "TVMFFIErrorSetRaisedFromCStrParts");
  if (set_raised) set_raised(kind, parts, count);
}

static void fail(const char *kind, const char *text) { TVMFFIErrorSetRaisedFromCStrParts(kind, &text, 1); }

EXPORTED const char *opcompile_error(void) { return self.text; }

#include "kernel.h" /* how a kernel is called, and what it calls */
#include "processor.h"

/* --- parallel loops: a pool of workers that grows on demand ---
 *
 * One loop at a time has the pool. A caller that finds it taken (another thread has it, or this loop
 * is inside a task) runs its own tasks one after the other: it would only wait for the cores otherwise.
 * Between two loops of a call, and at the end of one, threads poll before they sleep, for they wait less
 * than it takes to wake them; between two calls, workers sleep. */

struct job {
  task_fn run;
  void *closure;
  struct environment environment;
  int next;    /* first task that nobody has begun */
  int helpers; /* how many more workers may join */
  int running; /* workers that joined and have not finished */
  int status;
  char kind[sizeof self.kind], text[sizeof self.text]; /* of a worker's error */
};

static struct {
  pthread_mutex_t lock;
  pthread_cond_t work, done;
  int workers;
  int calls;       /* that run and may use workers */
  int events;      /* counts what a thread may wait for */
  struct job *job; /* NULL: the pool is free */
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0, 0, NULL};

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Tells threads that poll that something happened. Lock held. */
static void happened(void) { __atomic_store_n(&pool.events, pool.events + 1, __ATOMIC_RELEASE); }

/* Returns when something happened, or `condition` was signalled. Lock held, except while it waits. */
static void wait_for(pthread_cond_t *condition) {
  int seen = pool.events;
  if (pool.calls) {
    pthread_mutex_unlock(&pool.lock);
    int64_t end = now_ns() + POLL_NS;
    while (__atomic_load_n(&pool.events, __ATOMIC_ACQUIRE) == seen && now_ns() < end) sched_yield();
    pthread_mutex_lock(&pool.lock);
  }
  if (pool.events == seen) pthread_cond_wait(condition, &pool.lock);
}

/* A call begins (1) or ends (-1). After the last one workers sleep. */
static void count_call(int more) {
  pthread_mutex_lock(&pool.lock);
  pool.calls += more;
  if (!pool.calls) happened();
  pthread_mutex_unlock(&pool.lock);
}

/* Runs tasks until none is left to begin, or one failed. Lock held, except while a task runs. */
static void run_tasks(struct job *job) {
  while (job->next < job->environment.num_task && !job->status) {
    int task = job->next++;
    pthread_mutex_unlock(&pool.lock);
    int status = job->run(task, &job->environment, job->closure);
    pthread_mutex_lock(&pool.lock);
    if (status && !job->status) {
      job->status = status;
      memcpy(job->kind, self.kind, sizeof self.kind);
      memcpy(job->text, self.text, sizeof self.text);
    }
  }
}

static void *work(void *unused) {
  (void)unused;
  self.is_worker = 1;
  pthread_mutex_lock(&pool.lock);
  for (;;) {
    struct job *job = pool.job;
    if (!job || !job->helpers || job->status || job->next >= job->environment.num_task) {
      wait_for(&pool.work);
      continue;
    }
    job->helpers--;
    job->running++;
    run_tasks(job);
    release_until(NULL);
    if (--job->running == 0) {
      happened();
      pthread_cond_signal(&pool.done);
    }
  }
  return NULL;
}

#ifdef __APPLE__
/* ELF libraries are linked with -z nodelete instead: workers must not outlive their code. */
static void stay_loaded(void) {
  Dl_info info;
  if (dladdr((void *)work, &info)) dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
}
#else
static void stay_loaded(void) {}
#endif

/* Starts workers up to `wanted`; fewer when the system refuses, then those at hand do the work. Lock held. */
static void grow(int wanted) {
  if (pool.workers >= wanted) return;
  stay_loaded();
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes)) return;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, 2u << 20); /* musl's default of 128 KiB is tight */
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to the host's threads */
  pthread_t thread;
  while (pool.workers < wanted && !pthread_create(&thread, &attributes, work, NULL)) pool.workers++;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
}

static char lacking[64];         /* the first feature of the target that this processor has not */
static int environment_threads; /* OPCOMPILE_NUM_THREADS when the library was loaded; 0: unset, -1: malformed */

/* The most threads a call may use when it names none; 0 with an error set. */
static int default_threads(void) {
  if (environment_threads < 0) {
    fail("ValueError", "OPCOMPILE_NUM_THREADS must be a whole number from 1 to 1024");
    return 0;
  }
  int threads = environment_threads ? environment_threads : usable_cpus();
  return threads < MOST_THREADS ? threads : MOST_THREADS;
}

static int run_serially(task_fn run, void *closure, int tasks) {
  struct environment environment = {NULL, tasks};
  int status = 0;
  for (int task = 0; task < tasks && !status; task++) status = run(task, &environment, closure);
  return status;
}

static int launch(task_fn run, void *closure, int requested) {
  int threads = self.threads ? self.threads : default_threads();
  if (threads == 0) return -1;
  int tasks = requested > 0 ? requested : threads;
  if (threads == 1 || tasks == 1) return run_serially(run, closure, tasks);

  pthread_mutex_lock(&pool.lock);
  if (pool.job) {
    pthread_mutex_unlock(&pool.lock);
    return run_serially(run, closure, requested > 0 ? requested : 1);
  }
  int helpers = (tasks < threads ? tasks : threads) - 1;
  struct job job = {.run = run, .closure = closure, .environment = {NULL, tasks}, .helpers = helpers};
  grow(helpers);
  pool.job = &job;
  happened();
  for (int i = 0; i < helpers; i++) pthread_cond_signal(&pool.work);
  run_tasks(&job);
  while (job.running) wait_for(&pool.done);
  pool.job = NULL;
  pthread_mutex_unlock(&pool.lock);
  if (job.status) fail(job.kind, job.text); /* again: the error may have happened on another thread */
  return job.status;
}

/* --- fork: the child has no workers, and whatever other threads were doing is gone --- */

static void before_fork(void) {
  pthread_mutex_lock(&pool.lock);
  pthread_mutex_lock(&cache_lock);
}

static void after_fork_in_parent(void) {
  pthread_mutex_unlock(&cache_lock);
  pthread_mutex_unlock(&pool.lock);
}

static void after_fork_in_child(void) {
  pthread_mutex_init(&pool.lock, NULL);
  pthread_mutex_init(&cache_lock, NULL);
  pthread_cond_init(&pool.work, NULL);
  pthread_cond_init(&pool.done, NULL);
  pool.workers = pool.calls = 0;
  pool.job = NULL;
  used = 0;
}

__attribute__((constructor)) static void loaded(void) {
  pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  if (!lacks_feature(lacking, sizeof lacking)) lacking[0] = '\0';
  const char *given = getenv("OPCOMPILE_NUM_THREADS");
  if (!given || !*given) return;
  char *end;
  long threads = strtol(given, &end, 10);
  environment_threads = *end || threads < 1 || threads > MOST_THREADS ? -1 : (int)threads;
}

/* --- the entry for everybody who holds four pointers --- */

/* A tensor of the layer; `sizes` holds room for MOST_AXES sizes and as many strides. */
static struct tensor of_layer(const void *data, struct shape shape, int64_t batch, int64_t *sizes) {
  for (int axis = 0; axis < shape.axes; axis++)
    sizes[axis] = shape.sizes[axis] ? shape.sizes[axis] : batch; /* size 0 stands for a dynamic batch */
  return borrow((void *)data, layer.dtype_code, layer.dtype_bits, sizes, shape.axes, sizes + MOST_AXES);
}

/* Whether a tensor of so many images has more bytes than there are addresses. */
static int overflows(struct shape shape, int64_t batch) {
  int64_t bytes = layer.dtype_bits / 8;
  for (int axis = 0; axis < shape.axes; axis++)
    if (__builtin_mul_overflow(bytes, shape.sizes[axis] ? shape.sizes[axis] : batch, &bytes)) return 1;
  return 0;
}

static void fail_here(void) {
  char text[256];
  snprintf(text, sizeof text, "this library was compiled for %s, and this processor has no %s; compile it for this one",
           target_name, lacking);
  fail("RuntimeError", text);
}

EXPORTED int opcompile_run(int threads, int64_t batch, const void *first, const void *second, const void *third,
                           void *result) {
  self.text[0] = '\0';
  self.in_run = 1;
  int status = -1;
  if (lacking[0])
    fail_here();
  else if (threads < 0 || threads > MOST_THREADS)
    fail("ValueError", "threads must be 0 (the default) or from 1 to 1024");
  else if (batch < 1 || (layer.first.sizes[0] && batch != layer.first.sizes[0]))
    fail("ValueError", "batch is not the one this layer was compiled for (at least 1 where that is dynamic)");
  else if (overflows(layer.first, batch) || overflows(layer.second, batch) || overflows(layer.third, batch) ||
           overflows(layer.result, batch))
    fail("ValueError", "batch is so large that a tensor would have more than 2^63 bytes");
  else if (!first || !second != !layer.has_second || !third != !layer.has_third || !result)
    fail("ValueError", layer.nulls);
  else if ((self.threads = threads ? threads : default_threads())) {
    int64_t useful = batch < MOST_THREADS ? batch * layer.useful_threads : MOST_THREADS;
    if (self.threads > useful) self.threads = (int)useful;
    int64_t sizes[4][2 * MOST_AXES];
    struct tensor tensors[4];
    int count = 0;
    tensors[count] = of_layer(first, layer.first, batch, sizes[count]), count++;
    if (layer.has_second) tensors[count] = of_layer(second, layer.second, batch, sizes[count]), count++;
    if (layer.has_third) tensors[count] = of_layer(third, layer.third, batch, sizes[count]), count++;
    tensors[count] = of_layer(result, layer.result, batch, sizes[count]), count++;
    struct value arguments[4], returned = {0};
    for (int i = 0; i < count; i++) arguments[i] = (struct value){TENSOR_POINTER, 0, {.pointer = &tensors[i]}};
    int parallel = self.threads > 1;
    if (parallel) count_call(1);
    status = layer.run(NULL, arguments, count, &returned);
    if (parallel) count_call(-1);
    if (status) release_until(NULL);
    if (status && !self.text[0]) fail("RuntimeError", "the kernel failed without a message");
  }
  self.threads = self.in_run = 0;
  return status;
}
