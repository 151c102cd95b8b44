/* antiphon eval --generate: how a decoder continues the prompts of a split. */
#include "launcher/eval_generate.h"

#include <stdio.h>
#include <stdlib.h>

#include "trainer/generate.h"

/* A line of JSON a sample. Where the vocabulary is that of bytes, also what they say. */
static core_status print_tokens(void *context, uint64_t id, const int32_t *token, int64_t count) {
  const train_session *session = context;
  printf("{\"id\":%llu,\"tokens\":[", (unsigned long long)id);
  for (int64_t i = 0; i < count; i++) printf("%s%d", i ? "," : "", token[i]);
  printf("]");
  if (session->model->decoder.V == 256) {
    printf(",\"text\":\"");
    for (int64_t i = 0; i < count; i++) {
      bool plain = token[i] >= 32 && token[i] < 127 && token[i] != '"' && token[i] != '\\';
      printf(plain ? "%c" : "\\u%04x", token[i]);
    }
    printf("\"");
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
