#include "stream.h"

#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace dualpipe {

namespace {

constexpr auto kLook = std::chrono::milliseconds(40);  // a send that is older is late: its memory could be free
constexpr int64_t kHeld = 8 << 20;                     // or where those of one edge hold more bytes
constexpr auto kUnasked = std::chrono::seconds(1);     // a receive is late only if nobody seems to want it
constexpr int kIdleLooks = 10;  // in a row with nothing to do, then the watcher sleeps until the next post
constexpr auto kForever = std::chrono::hours(24 * 365);

// The method has another name since torch 2.13.
template <typename G, typename... Args>
auto launch_all_to_all(int, G& group, Args&... args) -> decltype(group.all_to_all_single(args...)) {
  return group.all_to_all_single(args...);
}
template <typename G, typename... Args>
auto launch_all_to_all(long, G& group, Args&... args) {
  return group.alltoall_base(args...);
}

bool needs_host(const Group& group, c10::DeviceType device) {
  const auto name = group->getBackend(device)->getBackendName();
  return name == "gloo" || name == "mpi";
}

// The same memory in a tensor that Python has not seen: dropping the last C++ reference of one that it has takes the GIL,
// which would make threads that only complete transfers queue for it.
at::Tensor unseen(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.variable_data() : tensor;
}

at::Tensor pinned_like(const at::Tensor& tensor) {
  return at::empty(tensor.sizes(), tensor.options().device(at::kCPU).pinned_memory(true));
}

} // namespace

Lane::~Lane() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    if (current_) current_->abort();
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  for (const auto& ticket : queue_) {
    if (ticket->take()) ticket->complete("the communication stream was closed");
  }
}

void Lane::add(Shared ticket) {
  std::lock_guard<std::mutex> lock(mutex_);
  held_ += ticket->bytes;
  queue_.push_back(std::move(ticket));
  start_if_late();
}

Shared Lane::pop() {
  auto ticket = std::move(queue_.front());
  queue_.pop_front();
  held_ -= ticket->bytes;
  return ticket;
}

bool Lane::drop_taken() {
  while (!queue_.empty() && queue_.front()->taken()) pop();
  return !queue_.empty();
}

bool Lane::late() const {
  const std::chrono::nanoseconds age(now_ns() - queue_.front()->posted_ns);
  return queue_.front()->kind == kRecv ? age > kUnasked : held_ > kHeld || age > kLook;
}

bool Lane::look_after() {
  std::lock_guard<std::mutex> lock(mutex_);
  start_if_late();
  return working_ || !queue_.empty();
}

void Lane::start_if_late() {
  if (working_ || !drop_taken() || !late()) return;
  working_ = true;
  if (thread_.joinable()) {
    changed_.notify_one();
  } else {
    thread_ = std::thread([this] { run(); });
  }
}

void Lane::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return closing_ || working_; });
    while (!closing_ && drop_taken()) {
      current_ = pop();
      if (current_->take()) {
        auto ticket = current_;
        lock.unlock();
        ticket->finish(std::chrono::duration_cast<std::chrono::milliseconds>(kForever));
        lock.lock();
      }
      current_.reset();
    }
    if (closing_) return;
    working_ = false;
  }
}

CommStream::CommStream(c10::Device device) : device_(device) {
  if (device.is_cpu()) return;
  const c10::impl::VirtualGuardImpl impl(device.type());
  if (!device_.has_index()) device_ = impl.getDevice();
  stream_ = impl.getNewStream(device_, /*priority=*/-1);
}

void CommStream::close() {
  decltype(lanes_) lanes;
  std::thread watcher;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    lanes.swap(lanes_);
    watcher.swap(watcher_);
  }
  changed_.notify_all();
  if (watcher.joinable()) watcher.join();
}

void CommStream::watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  int idle = 0;
  while (!closed_) {
    bool busy = false;
    for (const auto& entry : lanes_) busy = entry.second->look_after() || busy;
    idle = busy ? 0 : idle + 1;
    if (idle < kIdleLooks) {
      changed_.wait_for(lock, kLook, [this] { return closed_; });
    } else {
      watching_ = false;
      changed_.wait(lock, [this] { return closed_ || watching_; });
      idle = 0;
    }
  }
}

void CommStream::keep(Kind kind, const Group& group, int peer, const Shared& ticket) {
  auto& lane = lanes_[{kind, group.get(), peer}];
  if (!lane) lane = std::make_unique<Lane>();
  lane->add(ticket);
  if (watching_) return;
  watching_ = true;
  if (watcher_.joinable()) {
    changed_.notify_all();
  } else {
    watcher_ = std::thread([this] { watch(); });
  }
}

// Swaps tensors of the accelerator for pinned ones. The copy waits for the op that made `in`, and the host for the copy.
void CommStream::stage(Ticket& ticket, at::Tensor& in, at::Tensor& out) {
  c10::StreamGuard guard(*stream_);
  ticket.stream_ = stream_;
  if (in.defined()) {
    at::Tensor host = pinned_like(in);
    host.copy_(in, /*non_blocking=*/true);
    c10::Event copied(device_.type());
    copied.record(*stream_);
    copied.synchronize();
    in = host;
  }
  if (out.defined()) out = ticket.pinned_ = pinned_like(out);
}

template <typename Launch>
Shared CommStream::post(Kind kind, const Group& group, const at::Tensor& given, const at::Tensor& taken, int peer,
                        std::string what, Launch launch, bool behind) {
  const at::Tensor in = unseen(given), out = unseen(taken);
  const at::Tensor& counted = in.defined() ? in : out;
  auto ticket = std::make_shared<Ticket>(kind, std::move(what), static_cast<int64_t>(counted.nbytes()), counters_);
  ticket->in_ = in;
  ticket->out_ = out;
  const c10::AutoGradMode no_grad(false);
  std::lock_guard<std::mutex> lock(mutex_);  // one order of posting, whoever posts
  try {
    TORCH_CHECK(!closed_, "the communication stream is closed");
    at::Tensor from = in, to = out;
    std::optional<c10::StreamGuard> guard;
    if (!counted.is_cpu()) {
      TORCH_CHECK(stream_, "a stream of the CPU was given a tensor on ", counted.device());
      const c10::Stream current = c10::impl::VirtualGuardImpl(device_.type()).getStream(device_);
      const auto produced = std::make_shared<Moment>(behind ? current : *stream_);
      if (behind) {
        produced->block(*stream_);
      } else {
        out.record_stream(*stream_);
        out.record_stream(current);
      }
      ticket->native_ = !needs_host(group, device_.type());
      if (ticket->native_) {
        ticket->poster_ = current;
        ticket->moments_.posted = produced;
        guard.emplace(*stream_);
      } else {
        stage(*ticket, from, to);
      }
    }
    ticket->work_ = launch(to, from);
    if (ticket->native_ && kind == kAllToAll) {
      // Exchanges of one group are one queue anyway, so this stream may follow them and tell when each ended. Receives
      // that are posted ahead would hold back what this stream has to send.
      ticket->work_->wait();
      ticket->moments_.finished = std::make_shared<Moment>(*stream_);
    }
  } catch (const c10::Error& error) {
    ticket->complete(error.what_without_backtrace());
    return ticket;
  } catch (const std::exception& error) {
    ticket->complete(error.what());
    return ticket;
  }
  if (ticket->native_) {
    while (!native_.empty() && native_.front()->done()) native_.pop_front();
    native_.push_back(ticket);
  } else if (kind == kAllToAll) {
    ticket->by_callback_ = true;
    ticket->work_->getFuture()->addCallback([ticket](c10::ivalue::Future& future) {
      ticket->complete(future.hasError() ? future.tryRetrieveErrorMessage() : std::string());
    });
  } else {
    keep(kind, group, peer, ticket);
  }
  return ticket;
}

Shared CommStream::send(const Group& group, const at::Tensor& tensor, int peer, int tag, std::string what) {
  return post(kSend, group, tensor, {}, peer, std::move(what), [&](at::Tensor&, at::Tensor& from) {
    std::vector<at::Tensor> tensors{from};
    return group->send(tensors, peer, tag);
  });
}

Shared CommStream::recv(const Group& group, const at::Tensor& tensor, int peer, int tag, std::string what) {
  return post(kRecv, group, {}, tensor, peer, std::move(what), [&](at::Tensor& to, at::Tensor&) {
    std::vector<at::Tensor> tensors{to};
    return group->recv(tensors, peer, tag);
  });
}

Shared CommStream::all_to_all(const Group& group, const at::Tensor& out, const at::Tensor& in,
                              std::vector<int64_t> receive, std::vector<int64_t> send, std::string what,
                              bool behind) {
  const auto launch = [&](at::Tensor& to, at::Tensor& from) {
    return launch_all_to_all(0, *group, to, from, receive, send);
  };
  return post(kAllToAll, group, in, out, -1, std::move(what), launch, behind);
}

} // namespace dualpipe
