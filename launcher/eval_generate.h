/* How a decoder continues prompts. */
#ifndef LAUNCH_EVAL_GENERATE_H
#define LAUNCH_EVAL_GENERATE_H

#include "launcher/launcher.h"
#include "trainer/session.h"

/* Continues the prompts of the session's evaluation split by --generate tokens at most, with --temperature
 * and
 * --stop, and prints a line of JSON a sample. On one rank. ERR_ARGUMENT for a model that is no decoder. */
CORE_NODISCARD core_status launch_eval_generate(train_session *session, const launch_arguments *arguments);

#endif
