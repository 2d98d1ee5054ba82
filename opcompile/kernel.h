/* What every host of a compiled kernel shares: how a kernel is called, and where its workspaces come from.
 *
 * Whoever includes this has a `static void fail(const char *kind, const char *text)`, which sets the error; and
 * defines `launch`, which runs a kernel's tasks.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "call.h"
#include "cpus.h"

/* --- parallel loops, as a kernel asks for them --- */

struct environment {
  void *sync_handle;
  int32_t num_task;
};
typedef int (*task_fn)(int task, struct environment *, void *closure);

/* --- workspaces: freed ones are kept, because a fresh large one costs a page fault every 4 KiB ---
 *
 * What is kept and what is in use never exceed together what was once in use at the same time, but for
 * what is left of a chunk.
 *
 * They are cut from chunks of huge pages. Small pages lie anywhere in memory, so that parts of what a task
 * works on may compete for the same places of the second cache: up to 40 % of a layer's time, different in
 * every process. */

#define ALIGNMENT 64
#define HUGE_PAGE ((size_t)1 << 21)

struct chunk {
  size_t bytes, cut; /* all, and how many have been given away */
  int blocks;        /* that are not freed */
};
struct block {
  size_t bytes; /* of the data, which begins ALIGNMENT bytes after the block */
  struct block *next;
  struct chunk *chunk;
};

static __thread struct block *in_use; /* by this thread, newest first */

static pthread_mutex_t cache_lock = PTHREAD_MUTEX_INITIALIZER;
static struct block *cache; /* newest first */
static struct chunk *cut_from; /* the chunk for new blocks; or NULL */
static size_t cached, used, most_used;

static void *data_of(struct block *block) { return (char *)block + ALIGNMENT; }
static struct block *block_of(void *data) { return (struct block *)((char *)data - ALIGNMENT); }

/* The smallest kept block that is large enough, taken out of the cache; or NULL. Lock held. */
static struct block *take_kept(size_t bytes) {
  struct block **best = NULL;
  for (struct block **at = &cache; *at; at = &(*at)->next)
    if ((*at)->bytes >= bytes && (!best || (*at)->bytes < (*best)->bytes)) best = at;
  if (!best) return NULL;
  struct block *block = *best;
  *best = block->next;
  cached -= block->bytes;
  return block;
}

static struct chunk *new_chunk(size_t least) {
  void *memory = NULL;
  size_t bytes = (least + ALIGNMENT + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  if (posix_memalign(&memory, HUGE_PAGE, bytes)) return NULL;
#ifdef MADV_HUGEPAGE
  madvise(memory, bytes, MADV_HUGEPAGE); /* advice: a system that does not take it is only slower */
#endif
  struct chunk *chunk = memory;
  chunk->bytes = bytes, chunk->cut = ALIGNMENT, chunk->blocks = 0;
  return chunk;
}

/* Lock held. */
static struct block *new_block(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return NULL;
  size_t whole = ALIGNMENT + (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  if (!cut_from || cut_from->bytes - cut_from->cut < whole) {
    struct chunk *chunk = new_chunk(whole);
    if (!chunk) return NULL;
    cut_from = chunk;
  }
  struct block *block = (struct block *)((char *)cut_from + cut_from->cut);
  block->bytes = bytes, block->chunk = cut_from;
  cut_from->cut += whole, cut_from->blocks++;
  return block;
}

/* Lock held. */
static void free_block(struct block *block) {
  struct chunk *chunk = block->chunk;
  if (--chunk->blocks) return;
  if (cut_from == chunk) cut_from = NULL;
  free(chunk);
}

/* Frees kept blocks, oldest first, until at most `most` bytes are kept. Lock held. */
static void shrink_cache(size_t most) {
  while (cache && cached > most) {
    struct block **oldest = &cache;
    while ((*oldest)->next) oldest = &(*oldest)->next;
    cached -= (*oldest)->bytes;
    struct block *gone = *oldest;
    *oldest = NULL;
    free_block(gone);
  }
}

static void *allocate(int device, int device_id, uint64_t bytes, int dtype_code, int dtype_bits) {
  (void)device, (void)device_id, (void)dtype_code, (void)dtype_bits;
  pthread_mutex_lock(&cache_lock);
  struct block *block = take_kept((size_t)bytes);
  if (!block) {
    size_t needed = used + (size_t)bytes;
    shrink_cache(needed < most_used ? most_used - needed : 0);
    block = new_block((size_t)bytes);
    if (!block) {
      shrink_cache(0);
      block = new_block((size_t)bytes);
    }
  }
  if (block) {
    used += block->bytes;
    if (used > most_used) most_used = used;
  }
  pthread_mutex_unlock(&cache_lock);
  if (!block) {
    char text[96];
    snprintf(text, sizeof text, "%llu bytes of workspace are needed and cannot be allocated", (unsigned long long)bytes);
    fail("MemoryError", text);
    return NULL; /* the kernel returns -1 at once */
  }
  block->next = in_use;
  in_use = block;
  return data_of(block);
}

static void keep(struct block *block) {
  pthread_mutex_lock(&cache_lock);
  used -= block->bytes;
  cached += block->bytes;
  block->next = cache;
  cache = block;
  pthread_mutex_unlock(&cache_lock);
}

static int release(int device, int device_id, void *data) {
  (void)device, (void)device_id;
  struct block *block = block_of(data);
  for (struct block **at = &in_use; *at; at = &(*at)->next)
    if (*at == block) {
      *at = block->next;
      break;
    }
  keep(block);
  return 0;
}

/* A kernel that fails returns without freeing its workspaces: those newer than `before`. */
static void release_until(struct block *before) {
  while (in_use != before) {
    struct block *block = in_use;
    in_use = block->next;
    keep(block);
  }
}

/* --- what a kernel object expects of its host --- */

/* Runs `requested` tasks, or as many as there are threads when 0 is requested. */
static int launch(task_fn run, void *closure, int requested);

/* Tasks may run one after the other on one thread, where a barrier would never be reached by all. */
static int barrier(int task, struct environment *environment) {
  (void)task, (void)environment;
  fail("RuntimeError", "the kernel waits at a barrier, which this library does not have");
  return -1;
}

/* The object holds weak, empty variables of these names. */
HIDDEN int (*__TVMBackendParallelLaunch)(task_fn, void *, int) = launch;
HIDDEN int (*__TVMBackendParallelBarrier)(int, struct environment *) = barrier;
HIDDEN void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
HIDDEN int (*__TVMBackendFreeWorkspace)(int, int, void *) = release;

/* A contiguous tensor; `strides` holds room for one of each axis. */
static struct tensor borrow(void *data, uint8_t code, uint8_t bits, int64_t *shape, int axes, int64_t *strides) {
  int64_t stride = 1;
  for (int axis = axes - 1; axis >= 0; axis--) {
    strides[axis] = stride;
    if (axis) stride *= shape[axis];
  }
  return (struct tensor){.data = data,
                         .device_type = ON_CPU,
                         .ndim = axes,
                         .dtype_code = code,
                         .dtype_bits = bits,
                         .dtype_lanes = 1,
                         .shape = shape,
                         .strides = strides};
}
