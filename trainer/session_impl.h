/* What the files of a session share. */
#ifndef TRAIN_SESSION_IMPL_H
#define TRAIN_SESSION_IMPL_H

#include "trainer/session.h"

/* session_stream.c: data.non_finite in the words of the data. Local. */
data_non_finite train_session_non_finite_priv(const train_session *session);

#endif
