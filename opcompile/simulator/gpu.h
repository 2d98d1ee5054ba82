/* A GPU on a CPU: each thread of a block is a fiber, and runs until it waits for the others.
 *
 * What a real GPU would do in silence ends the program here, with a message on stderr and a `Status`.
 */
#pragma once
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
/* C's functions alone: what libstdc++ wraps around them takes half the time of a compilation */
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <sys/mman.h>
#include <type_traits>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

namespace simulator {

enum Status { FINE = 0, WRONG_USE = 64, OUT_OF_BOUNDS = 65, DIVERGENT = 66 };

struct Index {
  unsigned x, y, z;
};

/* --- memory between pages that must not be touched --- */

struct Buffer {
  char name[32];
  char *first, *pages;
  size_t bytes, reserved;
};

const int MOST_BUFFERS = 64;
const size_t GUARD = 1 << 20;   /* bytes on either side of a buffer that must not be touched */
const size_t ALIGNMENT = 16; /* what callers promise: the longest vector a kernel moves at once */
const size_t SHARED_ALIGNMENT = 64; /* what arrays in shared memory declare */
const char SLACK = (char)0xFF;  /* around a buffer: NaN where it is read */
static Buffer buffers[MOST_BUFFERS];
static int buffer_count;

/* At the upper end of its pages an index too large is seen, at the lower end one too small. */
static char *guarded(const char *name, size_t bytes, bool upper, size_t alignment = ALIGNMENT) {
  size_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
  char *all = (char *)mmap(nullptr, inside + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char *pages = (char *)mmap(all + GUARD, inside, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (all == MAP_FAILED || pages == MAP_FAILED || buffer_count == MOST_BUFFERS) {
    fprintf(stderr, "no memory for %s, %zu bytes\n", name, bytes);
    _exit(WRONG_USE);
  }
  char *first = pages + (upper ? (inside - bytes) / alignment * alignment : 0);
  Buffer &b = buffers[buffer_count++];
  snprintf(b.name, sizeof b.name, "%s", name);
  b.first = first, b.pages = pages, b.bytes = bytes, b.reserved = inside;
  memset(pages, SLACK, first - pages);
  memset(first + bytes, SLACK, pages + inside - first - bytes);
  return first;
}

static bool untouched(const char *from, const char *to) {
  for (; from < to; from++)
    if (*from != SLACK) return false;
  return true;
}

/* What lies between a buffer and the ends of its pages can be reached: a write there is seen afterwards. */
static void require_untouched() {
  for (int i = 0; i < buffer_count; i++) {
    const Buffer &b = buffers[i];
    if (untouched(b.pages, b.first) && untouched(b.first + b.bytes, b.pages + b.reserved)) continue;
    fprintf(stderr, "a write close to %s, which has %zu bytes\n", b.name, b.bytes);
    _exit(OUT_OF_BOUNDS);
  }
}

/* --- threads --- */

enum State { READY, AT_BARRIER, IN_SHUFFLE, DONE };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool entered;
  State state;
  int line;
  unsigned number;
  Index at;
};

const unsigned WARP = 32, MOST_THREADS = 1024;
const size_t STACK = 256 << 10;
static Fiber fibers[MOST_THREADS];
static Fiber *current;
static jmp_buf scheduler;
static ucontext_t scheduler_context;
static Index block, block_size, grid_size;
static bool upper_end, backwards;
static void (*body)();
static uint64_t exchanged[MOST_THREADS];

static void say_where() {
  fprintf(stderr, " in thread (%u, %u, %u) of block (%u, %u, %u)\n", current->at.x, current->at.y, current->at.z,
          block.x, block.y, block.z);
}

static size_t distance(const Buffer &b, char *address) {
  return address < b.pages ? b.pages - address : address < b.pages + b.reserved ? 0 : address - b.pages - b.reserved;
}

static void fault(int number, siginfo_t *info, void *) {
  char *address = (char *)info->si_addr;
  if (number == SIGILL || number == SIGTRAP) {
    fprintf(stderr, "an index beyond an array of registers or of shared memory, or a vector that is not aligned");
  } else {
    const Buffer *nearest = nullptr;
    for (int i = 0; i < buffer_count; i++) {
      const Buffer &b = buffers[i];
      if (address >= b.pages - GUARD && address < b.pages + b.reserved + GUARD) {
        if (!nearest || distance(b, address) < distance(*nearest, address)) nearest = &b;
      }
    }
    if (nearest)
      fprintf(stderr, "an access %td bytes from the start of %s, which has %zu, or a write to what is only read",
              address - nearest->first, nearest->name, nearest->bytes);
    else
      fprintf(stderr, "an access to %p, which is no buffer's memory", (void *)address);
  }
  say_where();
  _exit(OUT_OF_BOUNDS);
}

/* The first start of a fiber goes through its context, which costs system calls; every other switch is a jump. */
static void enter() {
  body();
  current->state = DONE;
  _longjmp(scheduler, 1);
}

static void wait(State state, int line) {
  current->state = state, current->line = line;
  if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}

static void run(Fiber &f) {
  current = &f;
  if (_setjmp(scheduler)) return;
  if (f.entered) _longjmp(f.resume, 1);
  f.entered = true;
  setcontext(&f.start);
}

static void barrier(int line) { wait(AT_BARRIER, line); }

/* Every lane of the warp gives a value, then each takes that of another lane. */
template <class T> static T shuffle(T value, unsigned lane) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  unsigned warp = current->number / WARP * WARP;
  memcpy(&exchanged[current->number], &value, sizeof value);
  wait(IN_SHUFFLE, 0);
  T result;
  memcpy(&result, &exchanged[warp + (lane < WARP ? lane : current->number % WARP)], sizeof result);
  wait(IN_SHUFFLE, 1);
  return result;
}

static unsigned lane() { return current->number % WARP; }

/* --- shared memory: a static array of the kernel becomes a reference to guarded memory, poisoned for each block --- */

struct Shared {
  char *memory;
  size_t bytes;
};
static Shared shared_arrays[MOST_BUFFERS];

template <class Array> static Array &shared(int number, const char *name) {
  Shared &s = shared_arrays[number];
  if (!s.memory) {
    s.bytes = sizeof(Array);
    s.memory = guarded(name, s.bytes, upper_end, SHARED_ALIGNMENT);
    memset(s.memory, 0xFF, s.bytes);
  }
  return *(Array *)s.memory;
}

/* A NaN in every floating-point type: what is read before it was written shows in the output. */
static void poison_shared() {
  for (Shared &s : shared_arrays)
    if (s.memory) memset(s.memory, 0xFF, s.bytes);
}

/* --- blocks --- */

/* Run a warp as far as it comes without the others: they meet at barriers alone. Whether it came any further. */
static bool run_warp(unsigned first, unsigned end) {
  bool ran = false;
  for (bool all = true; all;) {
    for (unsigned i = first; i < end; i++) {
      Fiber &f = fibers[backwards ? first + end - 1 - i : i];
      if (f.state == READY) run(f), ran = true;
    }
    for (unsigned i = first; i < end; i++) all &= fibers[i].state == IN_SHUFFLE && fibers[i].line == fibers[first].line;
    for (unsigned i = first; all && i < end; i++) fibers[i].state = READY;
  }
  return ran;
}

static void complain_of_divergence(unsigned threads) {
  unsigned waiting = 0, done = 0;
  for (unsigned i = 0; i < threads; i++) {
    waiting += fibers[i].state == AT_BARRIER || fibers[i].state == IN_SHUFFLE;
    done += fibers[i].state == DONE;
    if (fibers[i].state != DONE) current = &fibers[i];
  }
  fprintf(stderr, "a barrier that not every thread reaches: %u of %u threads wait, %u have ended; the last waits",
          waiting, threads, done);
  say_where();
  _exit(DIVERGENT);
}

static void run_block(char *stacks) {
  unsigned threads = block_size.x * block_size.y * block_size.z;
  poison_shared();
  for (unsigned i = 0; i < threads; i++) {
    Fiber &f = fibers[i];
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stacks + i * STACK, f.start.uc_stack.ss_size = STACK, f.start.uc_link = nullptr;
    makecontext(&f.start, enter, 0);
    f.entered = false, f.state = READY, f.number = i;
    f.at = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
  }
  for (;;) {
    bool ran = false;
    unsigned warps = (threads + WARP - 1) / WARP;
    for (unsigned i = 0; i < warps; i++) {
      unsigned first = (backwards ? warps - 1 - i : i) * WARP;
      ran |= run_warp(first, first + WARP < threads ? first + WARP : threads);
    }
    unsigned done = 0, waiting = 0;
    for (unsigned i = 0; i < threads; i++) {
      done += fibers[i].state == DONE;
      waiting += fibers[i].state == AT_BARRIER && fibers[i].line == fibers[0].line;
    }
    if (done == threads) return;
    if (waiting == threads) {
      for (unsigned i = 0; i < threads; i++) fibers[i].state = READY;
      continue;
    }
    if (!ran) complain_of_divergence(threads);
  }
}

/* --- the program: NAME FILE BYTES r|w for each argument, after the sizes --- */

static void run_grid(int worker, int workers) {
  stack_t alternate = {};
  alternate.ss_sp = malloc(1 << 16), alternate.ss_size = 1 << 16;
  sigaltstack(&alternate, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP}) sigaction(number, &action, nullptr);
  char *stacks = (char *)mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  uint64_t blocks = (uint64_t)grid_size.x * grid_size.y * grid_size.z;
  for (uint64_t i = worker; i < blocks; i += workers) {
    uint64_t b = backwards ? blocks - 1 - i : i;
    block = {(unsigned)(b % grid_size.x), (unsigned)(b / grid_size.x % grid_size.y),
             (unsigned)(b / grid_size.x / grid_size.y)};
    run_block(stacks);
  }
  require_untouched();
}

static int simulate(int count, char **words, char **arguments) {
  const int sizes = 10;
  if (count < sizes) return WRONG_USE;
  grid_size = {(unsigned)atoll(words[1]), (unsigned)atoll(words[2]), (unsigned)atoll(words[3])};
  block_size = {(unsigned)atoll(words[4]), (unsigned)atoll(words[5]), (unsigned)atoll(words[6])};
  backwards = atoi(words[7]), upper_end = atoi(words[8]);
  int workers = atoi(words[9]), buffer = 0;
  if (block_size.x * block_size.y * block_size.z > MOST_THREADS) return WRONG_USE;
  for (int i = sizes; i + 3 < count; i += 4, buffer++) {
    size_t bytes = atoll(words[i + 2]);
    char *memory = arguments[buffer] = guarded(words[i], bytes, upper_end);
    FILE *file = fopen(words[i + 1], "rb");
    if (!file || fread(memory, 1, bytes, file) != bytes) return WRONG_USE;
    fclose(file);
    if (*words[i + 3] == 'r') mprotect(buffers[buffer].pages, buffers[buffer].reserved, PROT_READ);
  }
  int given = buffer_count;
  for (int worker = 0; worker < workers; worker++)
    if (!fork()) {
      run_grid(worker, workers);
      _exit(FINE);
    }
  int worst = FINE;
  for (int worker = 0, status; worker < workers; worker++)
    if (::wait(&status) > 0 && (!WIFEXITED(status) || WEXITSTATUS(status)))
      worst = WIFEXITED(status) ? WEXITSTATUS(status) : OUT_OF_BOUNDS;
  for (int i = sizes, b = 0; !worst && i + 3 < count && b < given; i += 4, b++) {
    if (*words[i + 3] == 'r') continue;
    FILE *file = fopen(words[i + 1], "wb");
    if (!file || fwrite(buffers[b].first, 1, buffers[b].bytes, file) != buffers[b].bytes || fclose(file)) return WRONG_USE;
  }
  return worst;
}

/* --- 16-bit types, computed in float as the hardware's conversions do --- */

template <int EXPONENT, int MANTISSA> struct Narrow {
  uint16_t bits;
  Narrow() = default;
  Narrow(float value) : bits(rounded(value)) {}
  Narrow(double value) : Narrow((float)value) {}
  Narrow(int value) : Narrow((float)value) {}
  operator float() const { return widened(bits); }

  __attribute__((noinline)) static float widened(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits >> 15) << 31, rest = bits & 0x7FFF;
    int exponent = rest >> MANTISSA, bias = (1 << (EXPONENT - 1)) - 1;
    uint32_t mantissa = rest & ((1u << MANTISSA) - 1), result;
    if (exponent == (1 << EXPONENT) - 1) {
      result = 0x7F800000u | mantissa << (23 - MANTISSA);
    } else if (exponent || EXPONENT == 8) {
      result = (uint32_t)(exponent - bias + 127) << 23 | mantissa << (23 - MANTISSA);
    } else {
      float value = ldexpf((float)mantissa, 1 - bias - MANTISSA);
      memcpy(&result, &value, 4);
    }
    result |= sign;
    float value;
    memcpy(&value, &result, 4);
    return value;
  }

  __attribute__((noinline)) static uint16_t rounded(float value) {  // to nearest, ties to even
    uint32_t word;
    memcpy(&word, &value, 4);
    uint16_t sign = word >> 16 & 0x8000;
    if (value != value) return sign | 0x7FFF;
    if (EXPONENT == 8) return (word + 0x7FFF + (word >> 16 & 1)) >> 16;
    const int bias = (1 << (EXPONENT - 1)) - 1;
    float magnitude = fabsf(value), unit = ldexpf(1.0f, 1 - bias - MANTISSA);
    if (magnitude < ldexpf(1.0f, 1 - bias)) return sign | (uint16_t)nearbyintf(magnitude / unit);
    uint32_t m = (word & 0x7FFFFFFF) - ((uint32_t)(127 - bias) << 23);
    m = (m + ((1u << (22 - MANTISSA)) - 1) + (m >> (23 - MANTISSA) & 1)) >> (23 - MANTISSA);
    uint32_t infinity = ((1u << EXPONENT) - 1) << MANTISSA;
    return sign | (uint16_t)(m < infinity ? m : infinity);
  }
};

using Half = Narrow<5, 10>;
using BFloat = Narrow<8, 7>;

/* --- short vectors --- */

template <class T> struct alignas(2 * sizeof(T)) Vector2 {
  T x, y;
  Vector2() = default;
  Vector2(T a, T b) : x(a), y(b) {}
  explicit Vector2(T a) : x(a), y(a) {}
  T &operator[](int i) { return (&x)[i]; }
};
template <class T> struct Vector3 {
  T x, y, z;
};
template <class T> struct alignas(4 * sizeof(T) < ALIGNMENT ? 4 * sizeof(T) : ALIGNMENT) Vector4 {
  T x, y, z, w;
  Vector4() = default;
  Vector4(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  explicit Vector4(T a) : x(a), y(a), z(a), w(a) {}
  T &operator[](int i) { return (&x)[i]; }
};

#define SIMULATOR_OPERATOR(o)                                                                                  \
  template <class T> Vector2<T> operator o(Vector2<T> a, Vector2<T> b) { return {T(a.x o b.x), T(a.y o b.y)}; } \
  template <class T> Vector4<T> operator o(Vector4<T> a, Vector4<T> b) {                                       \
    return {T(a.x o b.x), T(a.y o b.y), T(a.z o b.z), T(a.w o b.w)};                                           \
  }
SIMULATOR_OPERATOR(+) SIMULATOR_OPERATOR(-) SIMULATOR_OPERATOR(*) SIMULATOR_OPERATOR(/)
#undef SIMULATOR_OPERATOR

}  // namespace simulator
