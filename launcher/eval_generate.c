/* antiphon eval --generate: how a decoder continues the prompts of a split. */
#include "launcher/eval_generate.h"

#include <stdio.h>
#include <stdlib.h>

#include "trainer/generate.h"

/* How many bytes the character of UTF-8 that begins at token[0] has (RFC 3629, section 4); 0: none begins
 * there. */
static int32_t character(const int32_t *token, int64_t count) {
  int32_t first = token[0], bytes = 0;
  if (first < 0x80) bytes = 1;
  if (first >= 0xc2 && first <= 0xdf) bytes = 2;
  if (first >= 0xe0 && first <= 0xef) bytes = 3;
  if (first >= 0xf0 && first <= 0xf4) bytes = 4;
  if (bytes > count) return 0;
  for (int32_t i = 1; i < bytes; i++)
    if (token[i] < 0x80 || token[i] > 0xbf) return 0;
  bool overlong = (first == 0xe0 && token[1] < 0xa0) || (first == 0xf0 && token[1] < 0x90);
  bool surrogate = first == 0xed && token[1] > 0x9f, beyond = first == 0xf4 && token[1] > 0x8f;
  return overlong || surrogate || beyond ? 0 : bytes;
}

/* Bytes as a string of JSON; one that belongs to no character becomes U+FFFD. */
static void print_text(const int32_t *token, int64_t count) {
  printf("\"");
  for (int64_t i = 0, bytes; i < count; i += bytes) {
    bytes = character(token + i, count - i);
    bool plain = token[i] >= 32 && token[i] != 127 && token[i] != '"' && token[i] != '\\';
    if (bytes == 0) printf("\\ufffd");
    if (bytes == 1) printf(plain ? "%c" : "\\u%04x", token[i]);
    for (int64_t j = 0; bytes > 1 && j < bytes; j++) putchar(token[i + j]);
    if (bytes == 0) bytes = 1;
  }
  printf("\"");
}

/* A line of JSON a sample. Where the vocabulary is that of bytes, also what they say. */
static core_status print_tokens(void *context, uint64_t id, const int32_t *token, int64_t count) {
  const train_session *session = context;
  printf("{\"id\":%llu,\"tokens\":[", (unsigned long long)id);
  for (int64_t i = 0; i < count; i++) printf("%s%d", i ? "," : "", token[i]);
  printf("]");
  if (session->model->decoder.V == 256) {
    printf(",\"text\":");
    print_text(token, count);
  }
  CHECK(printf("}\n") > 0, CORE_ERR_IO, "the tokens cannot be printed");
  return CORE_OK;
}

static core_status read_number(const char *text, const char *option, double *out) {
  char *end = NULL;
  if (!text) return CORE_OK;
  *out = strtod(text, &end);
  CHECK(end != text && *end == '\0' && *out >= 0 && *out <= 1 << 24, CORE_ERR_USAGE,
        "%s: expected a number from 0 to %d, got '%s'", option, 1 << 24, text);
  return CORE_OK;
}

core_status launch_eval_generate(train_session *session, const launch_arguments *arguments) {
  double tokens = 0, temperature = 0, stop = -1;
  CHECK(session->env.settings->model.kind == TRAIN_KIND_DECODER, CORE_ERR_ARGUMENT,
        "--generate: only a decoder continues prompts");
  TRY(read_number(launch_own(arguments, "--generate"), "--generate", &tokens));
  TRY(read_number(launch_own(arguments, "--temperature"), "--temperature", &temperature));
  TRY(read_number(launch_own(arguments, "--stop"), "--stop", &stop));
  const train_generate_options options = {(int64_t)tokens, temperature, (int32_t)stop};
  TRY(train_generate_run(session, &options, print_tokens, session));
  return CORE_OK;
}
