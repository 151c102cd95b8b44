/* Stands between the program and MPI (its profiling interface): a communicator is made when MPI starts, what
 * nobody took is thrown away when it ends, and while the program waits for MPI the devices go on working, as
 * real ones would. */
#include <mpi.h>
#include <unistd.h>

#include <string>

#include "tests/cuda_double/double_impl.h"
#include "tests/cuda_double/double_wire.h"

namespace cuda_double {

static MPI_Comm wire = MPI_COMM_NULL;

struct Sending {
  Bytes bytes;
  MPI_Request request;
  bool arrived;
};

int wire_rank() {
  int rank = 0;
  if (wire != MPI_COMM_NULL) PMPI_Comm_rank(wire, &rank);
  return rank;
}

int wire_size() {
  int size = 1;
  if (wire != MPI_COMM_NULL) PMPI_Comm_size(wire, &size);
  return size;
}

std::string wire_host() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

std::shared_ptr<Sending> wire_send(int to, int tag, Bytes bytes) {
  auto sending = std::make_shared<Sending>();
  sending->bytes = std::move(bytes);
  PMPI_Issend(sending->bytes.data(), (int)sending->bytes.size(), MPI_BYTE, to, tag, wire, &sending->request);
  return sending;
}

bool wire_arrived(Sending &sending) {
  int done = 0;
  if (!sending.arrived) PMPI_Test(&sending.request, &done, MPI_STATUS_IGNORE);
  return sending.arrived |= done != 0;
}

bool wire_take(int *from, int tag, Bytes *out) {
  int there = 0, count = 0;
  MPI_Status status;
  if (wire == MPI_COMM_NULL) return false;
  PMPI_Iprobe(*from < 0 ? MPI_ANY_SOURCE : *from, tag, wire, &there, &status);
  if (!there) return false;
  PMPI_Get_count(&status, MPI_BYTE, &count);
  out->resize((size_t)count);
  *from = status.MPI_SOURCE;
  PMPI_Recv(out->data(), count, MPI_BYTE, *from, tag, wire, MPI_STATUS_IGNORE);
  return true;
}

static void begin() {
  PMPI_Comm_dup(MPI_COMM_WORLD, &wire);
}

/* Until all ranks have come here, whatever still arrives is for nobody. */
static void end() {
  MPI_Request barrier;
  int done = 0;
  PMPI_Ibarrier(wire, &barrier);
  while (!done) {
    int there = 0, count = 0;
    MPI_Status status;
    PMPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, wire, &there, &status);
    if (there) {
      PMPI_Get_count(&status, MPI_BYTE, &count);
      Bytes bytes((size_t)count);
      PMPI_Recv(bytes.data(), count, MPI_BYTE, status.MPI_SOURCE, status.MPI_TAG, wire, MPI_STATUS_IGNORE);
    }
    PMPI_Test(&barrier, &done, MPI_STATUS_IGNORE);
  }
  PMPI_Comm_free(&wire);
}

static void devices_go_on() {
  if (!lock().try_lock()) return;
  progress();
  lock().unlock();
}

}  // namespace cuda_double

extern "C" {

int MPI_Init(int *argc, char ***argv) {
  int code = PMPI_Init(argc, argv);
  if (code == MPI_SUCCESS) cuda_double::begin();
  return code;
}

int MPI_Init_thread(int *argc, char ***argv, int required, int *provided) {
  int code = PMPI_Init_thread(argc, argv, required, provided);
  if (code == MPI_SUCCESS) cuda_double::begin();
  return code;
}

int MPI_Finalize(void) {
  cuda_double::end();
  return PMPI_Finalize();
}

int MPI_Testall(int count, MPI_Request requests[], int *flag, MPI_Status statuses[]) {
  cuda_double::devices_go_on();
  return PMPI_Testall(count, requests, flag, statuses);
}

int MPI_Iprobe(int source, int tag, MPI_Comm comm, int *flag, MPI_Status *status) {
  cuda_double::devices_go_on();
  return PMPI_Iprobe(source, tag, comm, flag, status);
}
}
