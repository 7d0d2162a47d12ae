#include "ticket.h"

#include <ATen/ops/copy.h>
#include <c10/core/GradMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

namespace dualpipe {

namespace {

std::string message_of(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  return torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
}

} // namespace

void Ticket::finish(std::chrono::milliseconds timeout) {
  std::string error;
  try {
    if (!work_->wait(timeout)) error = "it was given up";
  } catch (const std::exception& raised) {
    error = message_of(raised);
  }
  complete(std::move(error));
}

void Ticket::land() {
  c10::AutoGradMode no_grad(false);
  c10::StreamGuard guard(*stream_);
  out_.copy_(pinned_, /*non_blocking=*/true);
  landed_.emplace(out_.device().type());
  landed_->record(*stream_);
}

void Ticket::complete(std::string error) {
  at::Tensor in, out, pinned;
  c10::intrusive_ptr<c10d::Work> work;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (state_ == kDone) return;
    if (error.empty() && pinned_.defined()) {
      try {
        land();
      } catch (const std::exception& raised) {
        error = message_of(raised);
      }
    }
    error_ = std::move(error);
    std::swap(in, in_);
    std::swap(out, out_);
    std::swap(pinned, pinned_);
    std::swap(work, work_);
    finished_ns = now_ns();
    auto& sums = counter();
    sums.flight_ns += finished_ns - posted_ns;
    sums.bytes += bytes;
    ++(error_.empty() ? sums.finished : sums.failed);
    state_ = kDone;
  }
  changed_.notify_all();
}

void Ticket::poll() {
  c10::intrusive_ptr<c10d::Work> work;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    work = work_;
  }
  if (!work || !work->isCompleted()) return;
  const auto raised = work->exception();
  std::string error;
  if (raised) {
    try {
      std::rethrow_exception(raised);
    } catch (const std::exception& caught) {
      error = message_of(caught);
    }
  }
  complete(std::move(error));
}

void Ticket::abort() {
  c10::intrusive_ptr<c10d::Work> work;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    work = work_;
  }
  if (!work || native_ || by_callback_) return;
  try {
    work->abort();
  } catch (const std::exception&) {
    // Not every backend can abort; its own timeout ends the wait then.
  }
}

void Ticket::wait_done(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto limit = std::chrono::duration<double>(seconds);
  if (!changed_.wait_for(lock, limit, [this] { return state_ == kDone; })) {
    throw TransferError(what + " failed: not done in " + std::to_string(seconds) + " s");
  }
}

void Ticket::order_behind() {
  if (landed_) {
    landed_->block(c10::impl::VirtualGuardImpl(landed_->device_type()).getStream(landed_->device()));
  }
}

Moments Ticket::moments() {
  std::lock_guard<std::mutex> lock(mutex_);
  return moments_;
}

// Orders the current stream behind the transfer. From then on the stream that posted it cannot overtake it, so if that is
// the current one, memory that is freed here is used again only after the transfer: the host may run ahead by a whole
// step without keeping the buffers of every transfer. Elsewhere `done` frees them, once the accelerator has finished.
void Ticket::wait_on_device() {
  const c10::Stream current = c10::impl::VirtualGuardImpl(poster_->device_type()).getStream(poster_->device());
  c10::intrusive_ptr<c10d::Work> work;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    work = work_;
  }
  if (!work) return;
  const auto stopped = std::make_shared<Moment>(current);
  work->wait();  // not under the lock: a process group in Python takes the GIL
  const auto resumed = std::make_shared<Moment>(current);
  at::Tensor in, out;
  std::lock_guard<std::mutex> lock(mutex_);
  if (!moments_.stopped) {
    moments_.stopped = stopped;
    moments_.resumed = resumed;
  }
  if (!moments_.finished) moments_.finished = resumed;
  if (current == *poster_) {
    std::swap(in, in_);
    std::swap(out, out_);
  }
}

void Ticket::wait(double seconds) {
  const int64_t start = now_ns();
  if (native_ && state_ != kDone) {
    try {
      wait_on_device();
    } catch (const std::exception& raised) {
      complete(message_of(raised));
    }
  } else if (!by_callback_ && take()) {
    finish(std::chrono::milliseconds(static_cast<int64_t>(seconds * 1e3) + 1));
  } else if (state_ != kDone) {
    wait_done(seconds);
  }
  const int64_t stood = now_ns() - start;
  waited_ns += stood;
  counter().waited_ns += stood;
  if (state_ == kDone) {
    if (!error_.empty()) throw TransferError(what + " failed: " + error_);
    order_behind();
  }
}

} // namespace dualpipe
