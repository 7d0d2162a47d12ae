// A ticket: one send, receive or all-to-all under way. It keeps the tensors alive until the transfer is done, takes the
// error that ended it, and counts bytes and nanoseconds.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

namespace dualpipe {

enum Kind : int { kSend, kRecv, kAllToAll, kKinds };
inline constexpr std::array<const char*, kKinds> kKindNames{"send", "recv", "all_to_all"};

// Becomes dualpipe_engine.errors.PipelineRuntimeError in Python.
struct TransferError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Nanoseconds of the clock that Python calls time.monotonic().
inline int64_t now_ns() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

// An instant on a stream of an accelerator: an event that keeps its time. Shared with Python.
class Moment {
 public:
  explicit Moment(const c10::Stream& stream) : event_(stream.device_type(), c10::EventFlag::BACKEND_DEFAULT) {
    event_.record(stream);
  }

  void block(const c10::Stream& stream) const { event_.block(stream); }

  // Seconds since an earlier event of the same device; both must have happened.
  double since(const c10::Event& earlier) const { return earlier.elapsedTime(event_) * 1e-3; }

 private:
  c10::Event event_;
};

// Where the transfer of a process group that works on the accelerator's streams by itself stood, for the times of its
// ticket: the host only queues such a transfer, so its own clock says nothing.
struct Moments {
  std::shared_ptr<Moment> posted;   // what came before it on the stream that posted it was done
  std::shared_ptr<Moment> finished; // of a receive or send: seen by the stream that waited
  std::shared_ptr<Moment> stopped;  // the waiting stream had nothing else to do
  std::shared_ptr<Moment> resumed;
};

// Sums over the tickets of one kind.
struct Counter {
  std::atomic<int64_t> posted{0}, finished{0}, failed{0}, bytes{0}, flight_ns{0}, waited_ns{0};
};
using Counters = std::array<Counter, kKinds>;

// What the threads of one transfer share. Whoever completes it releases the tensors, outside of the lock: the last
// reference of a storage that Python has seen takes the GIL.
class Ticket {
 public:
  Ticket(Kind kind, std::string what, int64_t bytes, std::shared_ptr<Counters> counters)
      : kind(kind), what(std::move(what)), bytes(bytes), posted_ns(now_ns()), counters_(std::move(counters)) {
    ++counter().posted;
  }

  // Waits (call it without the GIL): on the CPU until the transfer is done. On an accelerator the current stream is
  // ordered behind it and the host goes on at once; `seconds` then counts for what goes through host memory only.
  // Throws TransferError when the transfer failed or `seconds` passed.
  void wait(double seconds);

  // Whether the transfer has ended, well or not. Takes no lock.
  bool done() {
    if (state_ != kDone && native_) poll();
    return state_ == kDone;
  }

  // Ends the ticket; an empty `error` means success. The first call counts, and frees what the ticket keeps.
  void complete(std::string error);

  // Waits for the work itself and completes. Call it after take().
  void finish(std::chrono::milliseconds timeout);

  // True for the one thread that may wait for the work: gloo hands out each completion once.
  bool take() {
    State expected = kPosted;
    return state_.compare_exchange_strong(expected, kTaken);
  }

  bool taken() const { return state_ != kPosted; }

  // Ends the wait of a thread that is in finish().
  void abort();

  // Times on the accelerator; empty where host times hold.
  Moments moments();

  const Kind kind;
  const std::string what;
  const int64_t bytes;
  const int64_t posted_ns;
  std::atomic<int64_t> finished_ns{0};
  std::atomic<int64_t> waited_ns{0};

 private:
  friend class CommStream;
  enum State { kPosted, kTaken, kDone };

  Counter& counter() { return (*counters_)[static_cast<size_t>(kind)]; }
  void land();
  void poll();
  void wait_done(double seconds);
  void wait_on_device();
  void order_behind();

  std::shared_ptr<Counters> counters_;
  std::atomic<State> state_{kPosted};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string error_;
  c10::intrusive_ptr<c10d::Work> work_;
  at::Tensor in_, out_;      // the caller's memory
  at::Tensor pinned_;        // what arrives for out_, with pinned staging
  bool native_ = false;      // the process group works on the accelerator's streams by itself
  std::optional<c10::Stream> poster_;  // of a native transfer: whose op made in_, and may take the memory again
  Moments moments_;
  bool by_callback_ = false; // the process group calls complete()
  std::optional<c10::Stream> stream_;  // of the staging copies
  std::optional<c10::Event> landed_;   // after the copy into out_
};

} // namespace dualpipe
