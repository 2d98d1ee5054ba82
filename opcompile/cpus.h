/* How many processors are this process's: those that it may run on, and no more than its share of their time is worth.
 *
 * A container may see 64 processors and be granted the time of two: with 64 threads it would stand still most of it. */
#include <limits.h>
#ifdef __linux__
#include <sched.h>
#include <stdio.h>
#include <string.h>
#endif
#include <unistd.h>

#ifdef __linux__

#ifndef CGROUPS /* where Linux says which groups of processes this one is in, and what they are granted */
#define CGROUPS "/sys/fs/cgroup"
#define CGROUPS_OF_PROCESS "/proc/self/cgroup"
#endif

/* Reads up to two numbers from a file in `folder`; returns how many there are. */
static int read_numbers(const char *folder, const char *file, long long *first, long long *second) {
  char path[8300], text[64];
  snprintf(path, sizeof path, "%s/%s", folder, file);
  FILE *opened = fopen(path, "r");
  if (!opened) return 0;
  int found = fgets(text, sizeof text, opened) ? sscanf(text, "%lld %lld", first, second) : 0;
  fclose(opened);
  return found;
}

/* Whole processors, one at least, that the group in `folder` and those above it may use; `folder` is cut down to its
 * first `root` characters. Version 2 of these groups says "max" where there is no limit, version 1 a quota of -1. */
static int granted(char *folder, size_t root) {
  for (int least = INT_MAX;;) {
    long long quota = 0, period = 0, none;
    if (!read_numbers(folder, "cpu.max", &quota, &period) && read_numbers(folder, "cpu.cfs_quota_us", &quota, &none))
      read_numbers(folder, "cpu.cfs_period_us", &period, &none);
    if (quota > 0 && period > 0 && quota / period < least) least = quota < period ? 1 : (int)(quota / period);
    char *slash = strrchr(folder + root, '/');
    if (!slash) return least;
    *slash = '\0';
  }
}

/* The least that any group of this process is granted. */
static int granted_to_process(void) {
  int least = INT_MAX;
  FILE *groups = fopen(CGROUPS_OF_PROCESS, "r");
  if (!groups) return least;
  char line[4096], kinds[4096], folder[8192];
  while (fgets(line, sizeof line, groups)) { /* like 4:cpu,cpuacct:/a/b, or of version 2 0::/a/b */
    char *kind = strchr(line, ':'), *path = kind ? strchr(kind + 1, ':') : NULL;
    if (!path) continue;
    *path++ = '\0';
    path[strcspn(path, "\n")] = '\0';
    snprintf(kinds, sizeof kinds, ",%s,", kind + 1);
    int unified = !kind[1];
    if (!unified && !strstr(kinds, ",cpu,")) continue;
    const char *mounted = unified ? CGROUPS : CGROUPS "/cpu";
    snprintf(folder, sizeof folder, "%s%s", mounted, path);
    int here = granted(folder, strlen(mounted));
    if (here < least) least = here;
  }
  fclose(groups);
  return least;
}

/* Processors that this process may run on; 0 where the machine has more than a set of them holds. */
static int allowed(void) {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) ? 0 : CPU_COUNT(&set);
}

#else
static int granted_to_process(void) { return INT_MAX; }
static int allowed(void) { return 0; }
#endif

static int usable_cpus(void) {
  static int most; /* read once: whoever comes at the same time finds the same */
  int known = __atomic_load_n(&most, __ATOMIC_RELAXED);
  if (!known) __atomic_store_n(&most, known = granted_to_process(), __ATOMIC_RELAXED);
  long usable = allowed();
  if (!usable) usable = sysconf(_SC_NPROCESSORS_ONLN);
  return usable < 1 ? 1 : usable < known ? (int)usable : known;
}
