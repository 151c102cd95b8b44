/* Messages between the processes of a job, over an MPI communicator of the emulation's own. */
#ifndef CUDA_DOUBLE_WIRE_H
#define CUDA_DOUBLE_WIRE_H

#include <cstdint>
#include <memory>
#include <vector>

namespace cuda_double {

using Bytes = std::vector<char>;

int wire_rank();
int wire_size();
std::string wire_host();

/* A message on its way; it has arrived when its receiver has taken it, not before. */
struct Sending;
std::shared_ptr<Sending> wire_send(int to, int tag, Bytes bytes);
bool wire_arrived(Sending &sending);
/* The next message from this rank with this tag (-1: any rank; then *from is set); false: none yet. */
bool wire_take(int *from, int tag, Bytes *out);

}  // namespace cuda_double

#endif
