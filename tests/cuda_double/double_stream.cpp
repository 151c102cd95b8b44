/* Streams are queues; work is done when somebody waits or asks, and then in an order that is as unhelpful as
 * events allow. A missing event, a missing wait or a buffer that is used again too early then shows as a
 * wrong result instead of passing by luck. */
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstring>
#include <deque>

#include "tests/cuda_double/double_impl.h"

struct CUstream_st {
  std::deque<std::unique_ptr<cuda_double::Operation>> queue;
  bool destroyed;
};

/* What lives on while operations refer to the event. */
struct EventState {
  uint64_t recorded, done; /* counts: of calls, and of those that the stream has come to */
  double time;
};

struct CUevent_st {
  std::shared_ptr<EventState> state;
  cudaStream_t stream; /* of the last record */
  bool timed;
};

namespace cuda_double {

static std::vector<cudaStream_t> streams; /* in order of creation; destroyed ones until they are empty */
static std::vector<cudaEvent_t> events;

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static bool known(cudaStream_t stream) {
  return std::find(streams.begin(), streams.end(), stream) != streams.end();
}

bool is_stream(cudaStream_t stream) {
  if (known(stream) && !stream->destroyed) return true;
  if (!stream) report(false, "the legacy stream is used");
  return false;
}

static bool is_event(cudaEvent_t event) {
  return std::find(events.begin(), events.end(), event) != events.end();
}

cudaError_t enqueue(cudaStream_t stream, std::unique_ptr<Operation> operation) {
  if (!is_stream(stream)) return result(cudaErrorInvalidResourceHandle);
  if (context_error() != cudaSuccess) return result(context_error());
  stream->queue.push_back(std::move(operation));
  return result(cudaSuccess);
}

struct Work : Operation {
  std::function<void()> work;
  bool run() override {
    Access access;
    work();
    return true;
  }
};

cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) {
  auto operation = std::make_unique<Work>();
  operation->work = std::move(work);
  return enqueue(stream, std::move(operation));
}

/* ---- doing work ---- */

static bool step(cudaStream_t stream) {
  if (!stream || stream->queue.empty()) return false;
  if (context_error() != cudaSuccess)
    stream->queue.clear();
  else if (!stream->queue.front()->run())
    return false;
  else
    stream->queue.pop_front();
  if (stream->destroyed && stream->queue.empty()) {
    streams.erase(std::find(streams.begin(), streams.end(), stream));
    delete stream;
  }
  return true;
}

/* The stream on which `target` waits in the end. */
static cudaStream_t needed(cudaStream_t target) {
  for (size_t i = 0; i < streams.size() && target && !target->queue.empty(); i++) {
    cudaStream_t next = target->queue.front()->needs();
    if (!next || !known(next) || next->queue.empty()) break;
    target = next;
  }
  return target;
}

static bool step_some(cudaStream_t target, cuda_double_order order) {
  std::vector<cudaStream_t> list(streams.rbegin(), streams.rend());
  if (order == CUDA_DOUBLE_LAZY && target) return step(needed(target));
  if (order == CUDA_DOUBLE_EAGER) list.erase(std::remove(list.begin(), list.end(), target), list.end());
  if (order == CUDA_DOUBLE_RANDOM)
    for (size_t i = list.size(); i > 1; i--) std::swap(list[i - 1], list[random_u64() % i]);
  for (cudaStream_t stream : list)
    if (step(stream)) return true;
  return order == CUDA_DOUBLE_EAGER && target && step(needed(target));
}

static cuda_double_order draw_order() {
  static const cuda_double_order all[] = {CUDA_DOUBLE_LAZY, CUDA_DOUBLE_EAGER, CUDA_DOUBLE_RANDOM};
  return settings().order != CUDA_DOUBLE_RANDOM ? settings().order : all[random_u64() % 3];
}

static bool all_empty() {
  return std::all_of(streams.begin(), streams.end(), [](cudaStream_t s) { return s->queue.empty(); });
}

/* Works until `done`, at most so many steps. Memory stays open from one operation to the next. */
static void work(cudaStream_t target, int64_t steps, const std::function<bool()> &done) {
  if (all_empty()) return;
  Access access;
  cuda_double_order order = draw_order();
  while (steps-- > 0 && !done())
    if (!step_some(target, order)) return;
}

void progress() {
  work(nullptr, (int64_t)(random_u64() % 4), [] { return false; });
}

bool drain(double seconds) {
  double end = now() + seconds;
  while (!all_empty()) {
    work(nullptr, 1 << 20, all_empty);
    if (now() > end) return false;
    sched_yield();
  }
  return true;
}

/* A question lets a few steps be done, sometimes none. */
static int64_t steps_of_a_query() {
  return random_u64() % 4 == 0 ? (int64_t)(random_u64() % 3) : 64;
}

static void wait_until(cudaStream_t target, const std::function<bool()> &done) {
  for (;;) {
    work(target, 1 << 20, done);
    if (done() || context_error() != cudaSuccess) return;
    sched_yield();
  }
}

/* ---- events ---- */

struct Record : Operation {
  std::shared_ptr<EventState> state;
  uint64_t count;
  bool run() override {
    state->done = std::max(state->done, count);
    state->time = now();
    return true;
  }
};

struct WaitEvent : Operation {
  std::shared_ptr<EventState> state;
  uint64_t count;
  cudaStream_t stream;
  bool run() override {
    return state->done >= count;
  }
  CUstream_st *needs() override {
    return state->done >= count ? nullptr : stream;
  }
};

/* ---- copies ---- */

static bool direction_fits(cudaMemcpyKind kind, Kind target, Kind source) {
  bool to_device = target == Kind::device, from_device = source == Kind::device;
  if (kind == cudaMemcpyDefault) return true;
  return to_device == (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) &&
         from_device == (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice);
}

static void finish(cudaStream_t stream) {
  wait_until(stream, [stream] { return stream->queue.empty(); });
}

static cudaError_t copy(void *target, const void *source, size_t bytes, cudaMemcpyKind kind,
                        cudaStream_t stream) {
  Kind to = kind_of(target), from = kind_of(source);
  if (bytes == 0) return result(is_stream(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle);
  if (!target || !source) return result(cudaErrorInvalidValue);
  if (!direction_fits(kind, to, from)) return result(cudaErrorInvalidMemcpyDirection);
  if (!inside(target, bytes, "a copy") || !inside(source, bytes, "a copy"))
    return result(cudaErrorInvalidValue);
  cudaError_t error = cudaSuccess;
  if (from == Kind::pageable && to != Kind::pageable) { /* as CUDA does: read at the call */
    std::vector<char> kept((const char *)source, (const char *)source + bytes);
    return enqueue(stream, [target, kept = std::move(kept)] { memcpy(target, kept.data(), kept.size()); });
  }
  error = enqueue(stream, [target, source, bytes] { memmove(target, source, bytes); });
  if (error == cudaSuccess && (from == Kind::pageable || to == Kind::pageable)) finish(stream);
  return result(error);
}

}  // namespace cuda_double

using namespace cuda_double;

int64_t cuda_double_pending(void) {
  Guard guard(lock());
  int64_t count = 0;
  for (cudaStream_t stream : streams) count += (int64_t)stream->queue.size();
  return count;
}

cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  Guard guard(lock());
  return copy(target, source, bytes, kind, stream);
}

cudaError_t cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  Guard guard(lock());
  if (width > target_pitch || width > source_pitch) return result(cudaErrorInvalidValue);
  cudaError_t error = cudaSuccess;
  for (size_t row = 0; row < height && error == cudaSuccess; row++)
    error = copy((char *)target + row * target_pitch, (const char *)source + row * source_pitch, width, kind,
                 stream);
  return error;
}

cudaError_t cudaMemsetAsync(void *target, int value, size_t bytes, cudaStream_t stream) {
  Guard guard(lock());
  if (bytes == 0) return result(is_stream(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle);
  if (kind_of(target) == Kind::pageable || !inside(target, bytes, "a fill"))
    return result(cudaErrorInvalidValue);
  return enqueue(stream, [target, value, bytes] { memset(target, value, bytes); });
}

cudaError_t cudaMemcpy(void *, const void *, size_t, cudaMemcpyKind) {
  report(false, "cudaMemcpy uses the legacy stream");
  return result(cudaErrorNotSupported);
}

cudaError_t cudaMemset(void *, int, size_t) {
  report(false, "cudaMemset uses the legacy stream");
  return result(cudaErrorNotSupported);
}

/* ---- streams ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned) {
  Guard guard(lock());
  if (context_error() != cudaSuccess) return result(context_error());
  *out = new CUstream_st{};
  streams.push_back(*out);
  return result(cudaSuccess);
}

cudaError_t cudaStreamCreate(cudaStream_t *out) {
  return cudaStreamCreateWithFlags(out, cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int) {
  return cudaStreamCreateWithFlags(out, flags);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return result(cudaSuccess);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Guard guard(lock());
  if (!is_stream(stream)) return result(cudaErrorInvalidResourceHandle);
  stream->destroyed = true;
  if (!stream->queue.empty()) return result(cudaSuccess);
  streams.erase(std::find(streams.begin(), streams.end(), stream));
  delete stream;
  return result(cudaSuccess);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Guard guard(lock());
  if (!is_stream(stream)) return result(cudaErrorInvalidResourceHandle);
  finish(stream);
  return result(cudaSuccess);
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Guard guard(lock());
  if (!is_stream(stream)) return result(cudaErrorInvalidResourceHandle);
  work(stream, steps_of_a_query(), [stream] { return stream->queue.empty(); });
  return result(stream->queue.empty() ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaDeviceSynchronize(void) {
  Guard guard(lock());
  wait_until(nullptr, all_empty);
  return result(cudaSuccess);
}

cudaError_t cudaDeviceReset(void) {
  return cudaDeviceSynchronize();
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  struct Call : Operation {
    cudaHostFn_t function;
    void *data;
    bool run() override {
      function(data);
      return true;
    }
  };
  Guard guard(lock());
  auto call = std::make_unique<Call>();
  call->function = function;
  call->data = data;
  return enqueue(stream, std::move(call));
}

/* ---- events ---- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
  Guard guard(lock());
  if (context_error() != cudaSuccess) return result(context_error());
  *out = new CUevent_st{std::make_shared<EventState>(), nullptr, !(flags & cudaEventDisableTiming)};
  events.push_back(*out);
  return result(cudaSuccess);
}

cudaError_t cudaEventCreate(cudaEvent_t *out) {
  return cudaEventCreateWithFlags(out, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Guard guard(lock());
  if (!is_event(event)) return result(cudaErrorInvalidResourceHandle);
  events.erase(std::find(events.begin(), events.end(), event));
  delete event;
  return result(cudaSuccess);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Guard guard(lock());
  if (!is_event(event) || !is_stream(stream)) return result(cudaErrorInvalidResourceHandle);
  auto record = std::make_unique<Record>();
  record->state = event->state;
  record->count = ++event->state->recorded;
  event->stream = stream;
  return enqueue(stream, std::move(record));
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  Guard guard(lock());
  if (!is_event(event) || !is_stream(stream)) return result(cudaErrorInvalidResourceHandle);
  if (event->state->recorded == 0) return result(cudaSuccess); /* as CUDA: nothing to wait for */
  auto wait = std::make_unique<WaitEvent>();
  wait->state = event->state;
  wait->count = event->state->recorded;
  wait->stream = event->stream;
  return enqueue(stream, std::move(wait));
}

static bool event_done(cudaEvent_t event) {
  return event->state->done >= event->state->recorded;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  Guard guard(lock());
  if (!is_event(event)) return result(cudaErrorInvalidResourceHandle);
  cudaStream_t target = known(event->stream) ? event->stream : nullptr;
  work(target, steps_of_a_query(), [event] { return event_done(event); });
  return result(event_done(event) ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Guard guard(lock());
  if (!is_event(event)) return result(cudaErrorInvalidResourceHandle);
  wait_until(known(event->stream) ? event->stream : nullptr, [event] { return event_done(event); });
  return result(cudaSuccess);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  Guard guard(lock());
  if (!is_event(from) || !is_event(to) || !from->timed || !to->timed)
    return result(cudaErrorInvalidResourceHandle);
  if (!event_done(from) || !event_done(to)) return result(cudaErrorNotReady);
  *milliseconds = (float)(1e3 * (to->state->time - from->state->time));
  return result(cudaSuccess);
}
