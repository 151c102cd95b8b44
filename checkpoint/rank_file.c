/* Reading one rank's file: its size, header, trailer and index are checked against the manifest before any
 * block is touched, and nothing is allocated that the file's real size does not bear out. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#define XXH_STATIC_LINKING_ONLY /* XXH64_state_t on the stack */
#include <xxhash.h>

#include "checkpoint/checkpoint_impl.h"
#include "core/file.h"

ckpt_header ckpt_header_make(int64_t step, int32_t file, int32_t files) {
  ckpt_header header = {.version = CKPT_VERSION,
                        .byte_order = CKPT_BYTE_ORDER,
                        .step = step,
                        .file = (uint32_t)file,
                        .files = (uint32_t)files,
                        .cell = CKPT_CELL};
  memcpy(header.magic, CKPT_MAGIC, sizeof header.magic);
  return header;
}

ckpt_trailer ckpt_trailer_make(const ckpt_header *header, const ckpt_entry *entry, int64_t blocks,
                               int64_t index_offset) {
  ckpt_trailer trailer = {.index_offset = index_offset, .blocks = blocks};
  memcpy(trailer.magic, CKPT_END_MAGIC, sizeof trailer.magic);
  XXH64_state_t state;
  (void)XXH64_reset(&state, 0);
  (void)XXH64_update(&state, header, sizeof *header);
  if (blocks > 0) (void)XXH64_update(&state, entry, (size_t)blocks * sizeof *entry);
  (void)XXH64_update(&state, &trailer, offsetof(ckpt_trailer, index_hash));
  trailer.index_hash = XXH64_digest(&state);
  return trailer;
}

/* ---- opening ---- */

static core_status read_ends(ckpt_rank_file *file, int64_t bytes, ckpt_header *header,
                             ckpt_trailer *trailer) {
  TRY(core_file_read_at(file->fd, file->path, header, sizeof *header, 0));
  CHECK(memcmp(header->magic, CKPT_MAGIC, sizeof header->magic) == 0, CORE_ERR_CORRUPT,
        "%s does not begin as a checkpoint file", file->path);
  /* The manifest, which carries a hash, has said that the version is this program's: another one here is
   * damage. */
  CHECK(header->byte_order == CKPT_BYTE_ORDER && header->version == CKPT_VERSION, CORE_ERR_CORRUPT,
        "%s has format version %u and byte order %08x, its manifest says version %d", file->path,
        header->version, header->byte_order, CKPT_VERSION);
  TRY(core_file_read_at(file->fd, file->path, trailer, sizeof *trailer, bytes - (int64_t)sizeof *trailer));
  CHECK(memcmp(trailer->magic, CKPT_END_MAGIC, sizeof trailer->magic) == 0, CORE_ERR_CORRUPT,
        "%s does not end as a checkpoint file: cut off or damaged", file->path);
  return CORE_OK;
}

static core_status read_index(ckpt_rank_file *file, const ckpt_manifest *m, int64_t bytes) {
  const ckpt_file *expected = &m->file[file->number];
  ckpt_header header, made = ckpt_header_make(m->step, file->number, m->files);
  ckpt_trailer trailer;
  TRY(read_ends(file, bytes, &header, &trailer));
  CHECK(memcmp(&header, &made, sizeof header) == 0, CORE_ERR_CORRUPT,
        "%s is file %u of %u of step %lld, expected file %d of %d of step %lld", file->path, header.file,
        header.files, (long long)header.step, file->number, m->files, (long long)m->step);
  int64_t index = bytes - (int64_t)sizeof trailer - expected->blocks * (int64_t)sizeof(ckpt_entry);
  CHECK(trailer.blocks == expected->blocks && trailer.index_offset == index, CORE_ERR_CORRUPT,
        "%s has %lld blocks and its index at %lld, expected %lld blocks and the index at %lld", file->path,
        (long long)trailer.blocks, (long long)trailer.index_offset, (long long)expected->blocks,
        (long long)index);
  file->blocks = expected->blocks;
  file->entry = malloc(((size_t)file->blocks + 1) * sizeof *file->entry);
  file->offset = malloc(((size_t)file->blocks + 1) * sizeof *file->offset);
  CHECK(file->entry != NULL && file->offset != NULL, CORE_ERR_MEMORY,
        "no memory for the index of %s (%lld blocks)", file->path, (long long)file->blocks);
  TRY(core_file_read_at(file->fd, file->path, file->entry, (size_t)file->blocks * sizeof *file->entry,
                        index));
  made = header;
  ckpt_trailer again = ckpt_trailer_make(&made, file->entry, file->blocks, index);
  CHECK(memcmp(&again, &trailer, sizeof again) == 0 && again.index_hash == expected->index_hash,
        CORE_ERR_CORRUPT, "%s: index has hash %016llx, trailer says %016llx, manifest says %016llx",
        file->path, (unsigned long long)again.index_hash, (unsigned long long)trailer.index_hash,
        (unsigned long long)expected->index_hash);
  return CORE_OK;
}

/* Sizes of the stored planes must be possible and must fill the space between header and index exactly. */
static core_status place_blocks(ckpt_rank_file *file, const ckpt_manifest *m, int64_t bytes) {
  int64_t at = (int64_t)sizeof(ckpt_header), block = 0;
  for (int64_t o = m->begin[file->number]; o < m->begin[file->number + 1]; o++) {
    const ckpt_part *part = &m->part[m->order[o]];
    core_dtype dtype = m->item[part->tensor].dtype;
    int32_t planes = ckpt_plane_count(dtype);
    for (int64_t done = 0; done < part->count; done += CKPT_CELL, block++) {
      int64_t count = part->count - done < CKPT_CELL ? part->count - done : CKPT_CELL;
      uint32_t most = (uint32_t)(count * (int64_t)core_dtype_size(dtype) / planes);
      for (int32_t p = 0; p < CKPT_PLANES; p++) {
        uint32_t size = file->entry[block].size[p];
        CHECK(p < planes ? size > 0 && size <= most : size == 0, CORE_ERR_CORRUPT,
              "%s: block %lld has an impossible stored size", file->path, (long long)block);
      }
      file->offset[block] = at;
      at += (int64_t)ckpt_entry_bytes(&file->entry[block]);
    }
  }
  file->offset[block] = at;
  int64_t end = bytes - (int64_t)sizeof(ckpt_trailer) - file->blocks * (int64_t)sizeof(ckpt_entry);
  CHECK(at == end, CORE_ERR_CORRUPT, "%s: blocks end at %lld, the index begins at %lld", file->path,
        (long long)at, (long long)end);
  return CORE_OK;
}

core_status ckpt_rank_file_open(const char *path, const ckpt_manifest *manifest, int32_t number,
                                ckpt_rank_file *out) {
  int64_t bytes, expected = manifest->file[number].bytes;
  out->fd = -1;
  out->number = number;
  out->blocks = 0;
  out->entry = NULL;
  out->offset = NULL;
  TRY(ckpt_path(out->path, "%s/rank-%05d.ckpt", path, number));
  CHECK(core_file_exists(out->path), CORE_ERR_CORRUPT, "%s is missing", out->path);
  TRY(core_file_size(out->path, &bytes));
  CHECK(bytes == expected, CORE_ERR_CORRUPT, "%s has %lld bytes, the manifest says %lld", out->path,
        (long long)bytes, (long long)expected);
  TRY(core_file_open(out->path, O_RDONLY, &out->fd));
  TRY(read_index(out, manifest, bytes));
  TRY(place_blocks(out, manifest, bytes));
  return CORE_OK;
}

void ckpt_rank_file_close(ckpt_rank_file *file) {
  if (file->fd >= 0 && core_file_close(file->fd, file->path) != CORE_OK) {
    core_error_clear(); /* it was only read: everything that came out of it has been checked */
  }
  free(file->entry);
  free(file->offset);
  file->fd = -1;
  file->entry = NULL;
  file->offset = NULL;
}

/* ---- blocks ---- */

core_status ckpt_rank_file_read(const ckpt_rank_file *file, const ckpt_manifest *manifest,
                                const ckpt_part *part, int64_t cell, ckpt_codec *codec, uint8_t *stored,
                                void *raw) {
  const ckpt_item *item = &manifest->item[part->tensor];
  int64_t block = part->block + cell, left = part->count - cell * CKPT_CELL;
  const ckpt_entry *entry = &file->entry[block];
  TRY(core_file_read_at(file->fd, file->path, stored, ckpt_entry_bytes(entry), file->offset[block]));
  core_status status =
      ckpt_block_decode(codec, item->dtype, entry, stored, left < CKPT_CELL ? left : CKPT_CELL, raw);
  if (status != CORE_OK) {
    (void)core_error_context(status, "%s, block %lld at byte %lld (%s)", file->path, (long long)block,
                             (long long)file->offset[block], item->name);
  }
  TRY(status);
  return CORE_OK;
}
