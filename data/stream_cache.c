/* Outline: a doubly linked list of the slots that nobody has pinned, from the newest to the oldest.
 *
 * A band whose every row was copied is not needed before the next epoch: it goes to the old end. So the slots
 * in use stay few and warm in the processor's caches, and what is kept is what an epoch still needs. */
#include "data/stream_impl.h"

static void unlink_slot(data_cache *cache, int32_t index) {
  const data_slot *slot = &cache->slot[index];
  if (slot->newer >= 0)
    cache->slot[slot->newer].older = slot->older;
  else
    cache->newest = slot->older;
  if (slot->older >= 0)
    cache->slot[slot->older].newer = slot->newer;
  else
    cache->oldest = slot->newer;
}

static void link_newest(data_cache *cache, int32_t index) {
  data_slot *slot = &cache->slot[index];
  slot->newer = -1;
  slot->older = cache->newest;
  if (cache->newest >= 0)
    cache->slot[cache->newest].newer = index;
  else
    cache->oldest = index;
  cache->newest = index;
}

static void link_oldest(data_cache *cache, int32_t index) {
  data_slot *slot = &cache->slot[index];
  slot->older = -1;
  slot->newer = cache->oldest;
  if (cache->oldest >= 0)
    cache->slot[cache->oldest].older = index;
  else
    cache->newest = index;
  cache->oldest = index;
}

void data_cache_reset_priv(data_cache *cache, uint8_t *rows) {
  cache->newest = cache->oldest = -1;
  for (int64_t b = 0; b < cache->bands; ++b) cache->slot_of[b] = -1;
  for (int32_t i = 0; i < cache->slots; ++i) {
    cache->slot[i] = (data_slot){.load = {.rows = rows + i * cache->band_bytes, .bad = -1}, .band = -1};
    link_newest(cache, i);
  }
}

int32_t data_cache_pin_priv(data_cache *cache, int64_t band, bool *fresh) {
  int32_t index = cache->slot_of[band];
  *fresh = index < 0;
  if (*fresh) index = cache->oldest;
  if (index < 0) return -1;
  data_slot *slot = &cache->slot[index];
  if (slot->refs == 0) unlink_slot(cache, index);
  if (*fresh) {
    if (slot->band >= 0) cache->slot_of[slot->band] = -1;
    cache->slot_of[band] = index;
    slot->band = band;
    slot->copied = 0;
  }
  ++slot->refs;
  return index;
}

bool data_cache_unpin_priv(data_cache *cache, int32_t index, int64_t copied) {
  data_slot *slot = &cache->slot[index];
  slot->copied += copied;
  if (--slot->refs > 0) return false;
  /* Where every band has a slot, nothing is ever given up. */
  if (slot->copied >= slot->load.count && cache->slots < cache->bands)
    link_oldest(cache, index);
  else
    link_newest(cache, index);
  return true;
}
