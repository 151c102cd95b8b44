/* Weights to and from the files of other programs: safetensors with a config.json, as Hugging Face
 * repositories hold them.
 *
 * A parameter of a decoder and the published tensors that it consists of, one below the other (block i,
 * expert j; parameters of a GELU have no gate):
 *
 *   embedding.weight                     model.embed_tokens.weight
 *   blocks.i.attention_norm.weight       model.layers.i.input_layernorm.weight
 *   blocks.i.attention.qkv.weight        model.layers.i.self_attn.{q,k,v}_proj.weight       (and .bias)
 *   blocks.i.attention.out.weight        model.layers.i.self_attn.o_proj.weight
 *   blocks.i.forward_norm.weight         model.layers.i.post_attention_layernorm.weight
 *   blocks.i.feed_forward.in.weight      model.layers.i.mlp.{gate,up}_proj.weight
 *   blocks.i.feed_forward.out.weight     model.layers.i.mlp.down_proj.weight
 *   blocks.i.router.weight               model.layers.i.mlp.gate.weight                     (and .bias)
 *   blocks.i.experts.j.in.weight         model.layers.i.mlp.experts.j.{gate,up}_proj.weight (and .bias)
 *   blocks.i.experts.j.out.weight        model.layers.i.mlp.experts.j.down_proj.weight      (and .bias)
 *   final_norm.weight                    model.norm.weight
 *   output.weight                        lm_head.weight
 *
 * Everything else (connectors, columns of added experts and their calibration, and all of a tower or
 * connector) keeps its name behind "antiphon."; the
 * standardisation of modality m is antiphon.latent_shift.m and antiphon.latent_scale.m. */
#ifndef TRAIN_EXCHANGE_H
#define TRAIN_EXCHANGE_H

#include "checkpoint/safetensors.h"
#include "comm/comm.h"
#include "trainer/settings.h"

enum { TRAIN_EXCHANGE_PIECES = 3 };

/* One parameter and its pieces: rows of them below one another are the parameter. */
typedef struct train_exchange_entry {
  char name[CORE_NAME];
  int32_t rank;
  int64_t shape[CORE_MAX_RANK];
  int32_t pieces;
  char piece[TRAIN_EXCHANGE_PIECES][CKPT_SAFETENSORS_NAME];
  int64_t rows[TRAIN_EXCHANGE_PIECES];
} train_exchange_entry;

/* Fills pieces and rows of an entry whose name, rank and shape are given. ERR_MISMATCH when the rows are not
 * what the settings say. */
CORE_NODISCARD core_status train_exchange_map(const train_settings *settings, train_exchange_entry *entry);
/* The parameters of a dense decoder, mapped; *list is malloc'ed. */
CORE_NODISCARD core_status train_exchange_list(const train_settings *settings, train_exchange_entry **list,
                                               int32_t *count);
/* exchange_own.c: whether files are what train_export wrote: some tensor's name begins with "antiphon.". */
bool train_exchange_is_own(const ckpt_safetensors *files);
/* All parameters and standardisations of a model of any kind, mapped; the widths of its latents are what the
 * files say. *list is malloc'ed. ERR_MISMATCH: a modality without standardisation. Local. */
CORE_NODISCARD core_status train_exchange_list_own(const core_config *config, const ckpt_safetensors *files,
                                                   train_exchange_entry **list, int32_t *count);
/* What an entry is called in a checkpoint: "parameter/<name>", or "latent_shift/<modality>". */
void train_exchange_stored_name(const char *name, char *out, size_t capacity);

/* A configuration (YAML, malloc'ed) from a config.json of LlamaForCausalLM or Qwen2ForCausalLM. ERR_FORMAT,
 * ERR_UNSUPPORTED (another architecture, another scaling of positions, another activation, ...), naming file
 * and field. */
CORE_NODISCARD core_status train_exchange_read_config(const char *path, char **yaml);
/* The config.json (malloc'ed) of a decoder that is one of these; NULL for any other model. */
CORE_NODISCARD core_status train_exchange_write_config(const train_settings *settings, core_dtype dtype,
                                                       char **json);

/* Reads the weights at `source` (a safetensors file, an index, or a directory; config.json lies beside them,
 * or the config.yaml of train_export, whose models come back whole and, exported as float32, bit for bit)
 * into <directory>/step-00000000 and writes a configuration for it to config_path. Both must not be there
 * yet; on failure there is no configuration, and no checkpoint (but a whole one where only the last sync of
 * its directory failed). Errors besides those of safetensors.h: ERR_MISMATCH for a tensor that is missing,
 * too many, or of another shape. `control`: of a world of one rank. */
CORE_NODISCARD core_status train_import(comm_group *control, const char *source, const char *config_path,
                                        const char *directory);
/* Writes a checkpoint's parameters and standardisation as <directory>/model.safetensors in `dtype`, with
 * config.yaml, and config.json where the model has one. The directory must not be there yet; it appears whole
 * or not at all. `control`: of a world of one rank. */
CORE_NODISCARD core_status train_export(comm_group *control, const char *checkpoint, const char *directory,
                                        core_dtype dtype);

#endif
