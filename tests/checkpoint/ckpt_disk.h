/* A model of a disk that loses power. It observes the operations on files under a root, and then makes what a
 * directory may look like after a power cut behind any of them:
 *
 *   data of a file      is kept for certain once the file is synced; until then, writes and truncations may
 * be lost, kept in part, or torn into sectors some of which hold zeros; a directory's names are kept for
 * certain once the directory is synced; until then, making, renaming and removing a name may be lost, each on
 * its own, except that operations on one name keep their order. A rename happens wholly or not at all.
 *
 * Defines: disk_watch, disk_stop, disk_materialise, disk_free. */
#ifndef CKPT_DISK_H
#define CKPT_DISK_H

#include <stdint.h>

typedef struct disk disk;

/* What happens to what was not synced. */
typedef enum disk_fate { DISK_LOST, DISK_KEPT, DISK_MIXED } disk_fate;

/* Takes what lies under `root` now as safe, and observes from here on (core_file_observe). One at a time. */
disk *disk_watch(const char *root);
/* Ends the observation. */
void disk_stop(disk *d);
/* Operations so far that change a disk or make a change safe. May be asked while it is observed. */
int64_t disk_operations(disk *d);
/* Makes `target`, which is removed first, what a power cut behind the first `operations` may leave of the
 * root. seed: of the choices of DISK_MIXED. */
void disk_materialise(const disk *d, int64_t operations, disk_fate names, disk_fate data, uint64_t seed,
                      const char *target);
void disk_free(disk *d);

#endif
