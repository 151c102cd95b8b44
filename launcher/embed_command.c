/* antiphon embed */
#include <string.h>

#include "core/log.h"
#include "launcher/embedder.h"

static const launch_option options[] = {
    {"--key", true}, {"--query", true}, {"-o", true}, {"--dtype", true}, {NULL, false}};

/* The command line, checked before anything is opened. */
static core_status check(const launch_arguments *arguments, core_dtype *dtype) {
  const char *text = launch_own(arguments, "--dtype");
  *dtype = text ? core_dtype_parse(text) : CORE_FLOAT32;
  CHECK(launch_own(arguments, "-o"), CORE_ERR_USAGE, "expected -o FILE: where the vectors go");
  CHECK(!launch_own(arguments, "--key") != !launch_own(arguments, "--query"), CORE_ERR_USAGE,
        "expected either --key MODALITY or --query FROM:TOWARD");
  CHECK(*dtype == CORE_FLOAT32 || *dtype == CORE_FLOAT16, CORE_ERR_USAGE,
        "--dtype %s: expected float16 or float32", text);
  return CORE_OK;
}

static void report(const train_embedder *embedder, const char *path, core_dtype dtype,
                   const train_embed_figures *f) {
  const train_vectors_about *about = train_embedder_about(embedder);
  if (f->state == TRAIN_VECTORS_DONE) {
    LOG_INFO("%s is there already, made from the same things", path);
    return;
  }
  if (about->rows == 0) LOG_WARNING("no sample of the split has '%s': %s is empty", about->modality, path);
  LOG_INFO("%s: %lld %s vectors of width %lld, %s, from %lld samples in %.1f s", path, (long long)about->rows,
           train_vectors_kind_text(about->kind), (long long)about->width, core_dtype_text(dtype),
           (long long)train_embedder_samples(embedder), f->seconds);
}

static core_status embed(comm_world *world, launch_arguments *arguments, int *code) {
  launch_embedder e;
  train_embed_figures figures;
  core_dtype dtype;
  const char *path = launch_own(arguments, "-o");
  launch_embed want = {.checkpoint = arguments->positional[0],
                       .shards = arguments->positional_count > 1 ? arguments->positional[1] : NULL,
                       .key = launch_own(arguments, "--key"),
                       .query = launch_own(arguments, "--query")};
  TRY(check(arguments, &dtype));
  TRY(launch_embedder_open(world, &want, arguments, &e));
  core_status status = train_embedder_write(e.embedder, path, dtype, &figures);
  if (status == CORE_OK && comm_rank(comm_world_group(world)) == 0) report(e.embedder, path, dtype, &figures);
  launch_embedder_close(&e);
  if (status == CORE_ERR_STOPPED) {
    if (comm_rank(comm_world_group(world)) == 0)
      LOG_INFO("stopped on request; what is done is kept, start again to go on");
    *code = LAUNCH_STOPPED;
    return CORE_OK;
  }
  if (status != CORE_OK) return core_error_trace(status, __func__, __FILE__, __LINE__);
  return CORE_OK;
}

static int run(const launch_command *command, int argc, char **argv) {
  return launch_collective_own(command, options, argc, argv, 1, 2, embed);
}

const launch_command launch_embed_command = {
    "embed", "vectors of a latent set, for search: keys, queries, embeddings",
    "usage: antiphon embed CHECKPOINT [SHARDS] --key MODALITY|--query FROM:TOWARD -o FILE.h5 [--split NAME]\n"
    "                      [--dtype float32|float16] [--set key=value]...\n\n"
    "CHECKPOINT is a step-NNNNNNNN directory or a run directory (its newest sound checkpoint).\n"
    "SHARDS is a directory of splits (--split, or the one that validated), or of the modality's shards;\n"
    "left out, the one the run was trained on. Only shards of the modality at hand are needed.\n\n"
    "--key MODALITY       what is looked for: a connector's keys of that modality, which serve every\n"
    "                     direction toward it; of a tower, the one kind of vector there is\n"
    "--query FROM:TOWARD  what looks: a connector's queries of that direction\n\n"
    "Vectors have length 1; samples that lack the modality are left out. Noise is off and no token is "
    "dropped.\n"
    "Under mpirun the ranks share the samples, one thread each (mpirun -n CORES); the file is the same, "
    "byte\n"
    "for byte, on any number of ranks. Killed or stopped, the same command goes on from FILE.h5.part, on as\n"
    "many ranks as you like; FILE.h5 appears when it is whole. With --set run.threads=N a rank takes more\n"
    "threads; last bits may then differ.\n",
    run};
