/* Blocks of a launch, one after another in random order; the threads of a block are fibres.
 *
 * A thread runs until it ends or must wait. One that ends leaves its stack to the next that has not begun, so
 * a kernel without barriers runs on one fibre. Threads that a barrier or a warp operation lets go on are put
 * in random order. When nothing can go on and threads are left, the kernel has diverged: that is reported and
 * the block is abandoned. */
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>

#include "tests/cuda_double/double_fibre.h"
#include "tests/cuda_double/double_impl.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_double {

enum class State { fresh, ready, barrier, meeting, ended };

struct Thread {
  State state;
  uint3 index;
  Fibre *fibre;
  cuda_double_site site; /* where it waits */
  uint64_t value;        /* what its last warp operation gave */
};

/* Lanes that have come to a warp operation. */
struct Meeting {
  cuda_double_meeting kind;
  unsigned mask, arrived;
  cuda_double_site site;
  uint64_t value[32];
  int source[32];
};

/* The launch that is running, and its current block. */
static struct {
  const char *kernel;
  const std::function<void()> *body;
  std::vector<Thread> thread;
  std::deque<int> ready;
  std::vector<std::vector<Meeting>> meeting; /* by warp */
  int current, waiting, ended, counted, barrier_count;
  cuda_double_site barrier_site;
  bool active, broken;
  uint64_t random;
  Fibre main;
  std::vector<Fibre *> idle, all;
} block;

static uint64_t block_random() {
  return block.random = mix(block.random);
}

static std::string coordinates(uint3 v) {
  char text[64];
  snprintf(text, sizeof text, "(%u,%u,%u)", v.x, v.y, v.z);
  return text;
}

std::string running() {
  if (!block.active) return "";
  return std::string("kernel ") + block.kernel + ", block " + coordinates(blockIdx) + ", thread " +
         coordinates(threadIdx);
}

static std::string place(cuda_double_site site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

static bool same(cuda_double_site a, cuda_double_site b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

/* ---- threads ---- */

static void thread_loop();

static Fibre *idle_fibre() {
  if (block.idle.empty()) {
    block.idle.push_back(fibre_create());
    block.all.push_back(block.idle.back());
  }
  Fibre *fibre = block.idle.back();
  block.idle.pop_back();
  fibre_begin(fibre, thread_loop);
  return fibre;
}

static Thread *next_thread() {
  if (block.ready.empty() || block.broken) return nullptr;
  block.current = block.ready.front();
  block.ready.pop_front();
  Thread *thread = &block.thread[(size_t)block.current];
  threadIdx = thread->index;
  return thread;
}

/* Goes on with another thread, or with the launch when there is none. `own`: the fibre that stops. */
static void leave(Fibre *own) {
  Thread *next = next_thread();
  if (!next) {
    fibre_switch(own, &block.main);
    return;
  }
  if (next->state == State::fresh) next->fibre = idle_fibre();
  next->state = State::ready;
  fibre_switch(own, next->fibre);
}

static void thread_loop() {
  for (;;) {
    Thread *own = &block.thread[(size_t)block.current];
    (*block.body)();
    own = &block.thread[(size_t)block.current];
    own->state = State::ended;
    block.ended++;
    Fibre *fibre = own->fibre;
    own->fibre = nullptr;
    Thread *next = block.ready.empty() ? nullptr : &block.thread[(size_t)block.ready.front()];
    if (next && next->state == State::fresh && !block.broken) {
      next_thread()->fibre = fibre;
      next->state = State::ready;
      continue;
    }
    block.idle.push_back(fibre);
    leave(fibre); /* does not come back: an idle fibre begins anew */
  }
}

static void give_up() {
  block.broken = true;
  leave(block.thread[(size_t)block.current].fibre);
}

static void wait_as(State state, cuda_double_site site) {
  Thread *own = &block.thread[(size_t)block.current];
  own->state = state;
  own->site = site;
  leave(own->fibre);
}

/* Random order, and randomly before or after those that were ready already. */
static void release(std::vector<int> threads) {
  for (size_t i = threads.size(); i > 1; i--) std::swap(threads[i - 1], threads[block_random() % i]);
  bool front = block_random() & 1;
  for (int t : threads) {
    block.thread[(size_t)t].state = State::ready;
    if (front)
      block.ready.push_front(t);
    else
      block.ready.push_back(t);
  }
}

/* ---- what is wrong ---- */

static void diverged() {
  std::map<std::string, std::pair<int, std::string>> groups; /* place: how many, the first */
  for (const Thread &thread : block.thread) {
    std::string where = thread.state == State::ended     ? "ended"
                        : thread.state == State::barrier ? "wait at the barrier " + place(thread.site)
                                                         : "wait in the warp operation " + place(thread.site);
    auto [at, fresh] = groups.try_emplace(where, 0, coordinates(thread.index));
    at->second.first++;
  }
  std::string text;
  for (const auto &[where, threads] : groups)
    text += "; " + std::to_string(threads.first) + " threads " + where + ", the first is " + threads.second;
  report(true, "kernel %s, block %s: threads have diverged%s", block.kernel, coordinates(blockIdx).c_str(),
         text.c_str());
}

/* ---- one block ---- */

static void poison(unsigned char *dynamic, size_t bytes) {
  memset(dynamic, 0xff, bytes);
  memset(dynamic + bytes, 0xa5, 64);
  for (Range range : shared_variables()) memset(range.data, 0xff, range.bytes);
}

static unsigned char *dynamic_shared() {
  alignas(128) static unsigned char bytes[(227 << 10) + 64];
  return bytes;
}

static void begin_block() {
  size_t count = block.thread.size();
  std::vector<int> order(count);
  for (size_t t = 0; t < count; t++) {
    Thread &thread = block.thread[t];
    thread.state = State::fresh;
    thread.fibre = nullptr;
    order[t] = (int)t;
  }
  for (size_t i = count; i > 1; i--) std::swap(order[i - 1], order[block_random() % i]);
  block.ready.assign(order.begin(), order.end());
  for (auto &warp : block.meeting) warp.clear();
  block.waiting = block.ended = block.counted = 0;
  block.broken = false;
}

static void run_block(size_t shared) {
  begin_block();
  poison(dynamic_shared(), shared);
  block.active = true;
  leave(&block.main);
  if (!block.broken && block.ended < (int)block.thread.size()) {
    diverged();
    block.broken = true;
  }
  for (int i = 0; i < 64 && !block.broken; i++)
    if (dynamic_shared()[shared + (size_t)i] != 0xa5) {
      report(true, "kernel %s, block %s wrote past its %zu bytes of dynamic shared memory", block.kernel,
             coordinates(blockIdx).c_str(), shared);
      block.broken = true;
    }
  block.active = false;
  if (block.broken) block.idle = block.all; /* whatever they were doing */
}

static uint64_t greatest_divisor(uint64_t a, uint64_t b) {
  return b == 0 ? a : greatest_divisor(b, a % b);
}

struct Launch : Operation {
  std::string kernel;
  dim3 grid, block_size;
  size_t shared;
  std::function<void()> body;

  void set_threads() const {
    block.kernel = kernel.c_str();
    block.body = &body;
    blockDim = block_size;
    gridDim = grid;
    block.thread.clear();
    for (unsigned z = 0; z < block_size.z; z++)
      for (unsigned y = 0; y < block_size.y; y++)
        for (unsigned x = 0; x < block_size.x; x++)
          block.thread.push_back({State::fresh, {x, y, z}, nullptr, {"", 0}, 0});
    block.meeting.resize((block.thread.size() + 31) / 32);
  }

  bool run() override {
    Access access;
    set_threads();
    block.random = random_u64();
    uint64_t count = (uint64_t)grid.x * grid.y * grid.z;
    uint64_t stride = block_random() % count + 1, first = block_random() % count;
    while (greatest_divisor(stride, count) != 1) stride++;
    for (uint64_t i = 0; i < count && context_error() == cudaSuccess; i++) {
      uint64_t b = (uint64_t)(((unsigned __int128)i * stride + first) % count);
      blockIdx = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
      run_block(shared);
    }
    return true;
  }
};

static std::map<const void *, int> dynamic_limit; /* bytes that a kernel may ask for, where raised */

}  // namespace cuda_double

using namespace cuda_double;

unsigned char *antiphon_emulated_shared(void) {
  return dynamic_shared();
}

int cuda_double_lane(void) {
  return block.current & 31;
}

void cuda_double_trap(cuda_double_site site) {
  report(true, "%s: __trap at %s", running().c_str(), place(site).c_str());
  give_up();
}

int cuda_double_barrier(int predicate, cuda_double_site site) {
  if (block.waiting > 0 && !same(site, block.barrier_site)) {
    report(true, "%s is at the barrier %s while %d threads wait at the barrier %s", running().c_str(),
           place(site).c_str(), block.waiting, place(block.barrier_site).c_str());
    give_up();
  }
  block.barrier_site = site;
  block.counted += predicate != 0;
  if (++block.waiting < (int)block.thread.size()) {
    wait_as(State::barrier, site);
    return block.barrier_count;
  }
  std::vector<int> others;
  for (int t = 0; t < (int)block.thread.size(); t++)
    if (t != block.current) others.push_back(t);
  block.barrier_count = block.counted;
  block.waiting = block.counted = 0;
  release(others);
  int count = block.barrier_count;
  if (!others.empty() && (block_random() & 1)) { /* the last to come is not always the first to go on */
    block.ready.push_back(block.current);
    Thread *own = &block.thread[(size_t)block.current];
    leave(own->fibre);
  }
  return count;
}

static Meeting *meeting_of(std::vector<Meeting> *open, cuda_double_meeting kind, unsigned mask,
                           cuda_double_site site) {
  for (Meeting &meeting : *open)
    if (meeting.kind == kind && meeting.mask == mask && same(meeting.site, site)) return &meeting;
  open->push_back({kind, mask, 0, site, {}, {}});
  return &open->back();
}

static void give_values(const Meeting &meeting, int first) {
  uint64_t vote = 0;
  bool said = false;
  for (int lane = 0; lane < 32; lane++)
    if (meeting.mask >> lane & 1) vote |= (uint64_t)(meeting.value[lane] != 0) << lane;
  for (int lane = 0; lane < 32; lane++) {
    if (!(meeting.mask >> lane & 1)) continue;
    int source = meeting.source[lane] & 31;
    bool named = meeting.mask >> source & 1;
    if (meeting.kind == CUDA_DOUBLE_SHUFFLE && !named && !said)
      report(true, "%s: the shuffle %s reads lane %d, which its mask %08x does not name", running().c_str(),
             place(meeting.site).c_str(), source, meeting.mask);
    said |= !named;
    block.thread[(size_t)(first + lane)].value =
        meeting.kind == CUDA_DOUBLE_SHUFFLE ? meeting.value[source] : vote;
  }
}

uint64_t cuda_double_meet(cuda_double_meeting kind, unsigned mask, uint64_t value, int source,
                          cuda_double_site site) {
  int lane = cuda_double_lane(), first = block.current - lane;
  int lanes = std::min(32, (int)block.thread.size() - first);
  Thread *own = &block.thread[(size_t)block.current];
  if (!(mask >> lane & 1) || (lanes < 32 && mask >> lanes != 0)) {
    report(true, "%s: the mask %08x of the warp operation %s %s", running().c_str(), mask,
           place(site).c_str(),
           mask >> lane & 1 ? "names lanes that the block does not have"
                            : "does not name the lane that calls it");
    give_up();
  }
  std::vector<Meeting> *open = &block.meeting[(size_t)(first / 32)];
  Meeting *meeting = meeting_of(open, kind, mask, site);
  meeting->value[lane] = value;
  meeting->source[lane] = source;
  meeting->arrived |= 1u << lane;
  if (meeting->arrived != mask) {
    wait_as(State::meeting, site);
    return own->value;
  }
  std::vector<int> others;
  for (int l = 0; l < 32; l++)
    if ((mask >> l & 1) && l != lane) others.push_back(first + l);
  give_values(*meeting, first);
  open->erase(open->begin() + (meeting - open->data()));
  release(others);
  return own->value;
}

bool cuda_double_check_argument(const void *kernel, int index, const void *pointer) {
  Guard guard(lock());
  if (!pointer || kind_of(pointer) != Kind::pageable) return true;
  report(true, "kernel %s: argument %d is the address of pageable host memory", symbol_of(kernel).c_str(),
         index);
  return false;
}

cudaError_t cuda_double_attribute(const void *kernel, cudaFuncAttribute attribute, int value) {
  Guard guard(lock());
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return result(cudaSuccess);
  if (value < 0 || value > 227 << 10) return result(cudaErrorInvalidValue);
  dynamic_limit[kernel] = value;
  return result(cudaSuccess);
}

cudaError_t cuda_double_launch(const void *kernel, const cudaLaunchConfig_t &config,
                               std::function<void()> body) {
  Guard guard(lock());
  const dim3 &grid = config.gridDim, &size = config.blockDim;
  uint64_t threads = (uint64_t)size.x * size.y * size.z;
  bool fits = grid.x > 0 && grid.x <= 0x7fffffff && grid.y > 0 && grid.y <= 65535 && grid.z > 0 &&
              grid.z <= 65535 && size.x <= 1024 && size.y <= 1024 && size.z <= 64 && threads > 0 &&
              threads <= 1024;
  if (!fits) return result(cudaErrorInvalidConfiguration);
  auto limit = dynamic_limit.find(kernel);
  size_t most = limit == dynamic_limit.end() ? 48 << 10 : (size_t)limit->second;
  if (config.dynamicSmemBytes > most) return result(cudaErrorInvalidValue);
  auto launch = std::make_unique<Launch>();
  launch->kernel = symbol_of(kernel);
  launch->grid = grid;
  launch->block_size = size;
  launch->shared = config.dynamicSmemBytes;
  launch->body = std::move(body);
  return enqueue(config.stream, std::move(launch));
}
