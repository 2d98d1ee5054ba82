/* Whether this processor has what compiled code uses: without, it would die of an instruction that there is not. */
#include <stdio.h>
#include <string.h>

#include "call.h"

extern HIDDEN const char target_name[], target_features[]; /* features, with a space between each */

static int has_word(const char *words, const char *word, size_t length) {
  for (const char *at = words; (at = strstr(at, word)); at += length) {
    int begins = at == words || strchr(" \t:", at[-1]), ends = strchr(" \t\n", at[length]) != NULL; /* '\0' too */
    if (begins && ends) return 1;
  }
  return 0;
}

/* Writes the first of the target's features that this processor lacks; returns whether there is one. Linux tells,
 * others do not. */
static int lacks_feature(char *missing, size_t size) {
  FILE *file = fopen("/proc/cpuinfo", "r");
  if (!file) return 0;
  char line[16384];
  int found = 0, lacks = 0;
  while (!found && fgets(line, sizeof line, file))
    found = !strncmp(line, "flags", 5) || !strncmp(line, "Features", 8);
  fclose(file);
  for (const char *word = target_features; found && !lacks && *word;) {
    size_t length = strcspn(word, " ");
    snprintf(missing, size, "%.*s", (int)length, word);
    lacks = !has_word(line, missing, length);
    word += length + strspn(word + length, " ");
  }
  return lacks;
}
