/* A directory of checkpoints, a save that something happens to, and what must be true afterwards. */
#ifndef CKPT_SCENE_H
#define CKPT_SCENE_H

#include "ckpt_fixture.h"

#define TINY tiny_specs, tiny_specs_count

/* What is published before (steps 10 and 20, or 20 alone), and the save that is disturbed. */
typedef struct scene {
  const char *name;
  bool ten;
  int32_t keep;
  int64_t step;
} scene;

enum { SCENES = 5, OLD = 100, NEW = 200 }; /* generations of step 20 before, and of what is saved */
extern const scene scenes[SCENES];
/* Tests that disturb a save at each of its operations go on by so many. A race hangs on how threads meet, not
 * on which operation it is, and the thread sanitizer makes a process of its own for each ten times as long.
 */
#ifdef __SANITIZE_THREAD__
enum { SCENE_STRIDE = 23 };
#else
enum { SCENE_STRIDE = 1 };
#endif

/* A writer as the scene's run has it, with memory of its own in *l. */
void scene_open(const fixture *f, const char *directory, const scene *s, layout *l, ckpt_writer **writer);
/* Makes the directory anew with what is published before. */
void scene_set(const fixture *f, const char *directory, const scene *s);
/* A new run over what the disturbed one left finds a sound checkpoint of step `oldest` or later, of
 * generation `least` (of step 20: OLD or NEW) or NEW; whatever still has a manifest is whole; and nothing
 * stays lying about after the next save. */
void scene_expect_recovery(const fixture *f, const char *directory, const scene *s, int64_t oldest,
                           uint64_t least);

#endif
