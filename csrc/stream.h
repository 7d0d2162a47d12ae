// The communication stream: posts transfers of c10d process groups in the caller's order, on a high-priority stream of
// the accelerator or, on the CPU, on the process group's own threads.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "ticket.h"

namespace dualpipe {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using Shared = std::shared_ptr<Ticket>;

// Waits for the transfers of one kind over one directed edge in their order, on a thread of its own, since nothing but a
// blocking wait tells when gloo has finished one. Only for those that are late, which no caller has waited for: who waits
// for the process group itself runs on one change of threads earlier, and a thread that wakes up takes a core from others.
class Lane {
 public:
  ~Lane();
  void add(Shared ticket);
  // Sets the thread to work where it is needed; returns whether anything is left to look after.
  bool look_after();

 private:
  void run();
  void start_if_late();
  bool late() const;
  bool drop_taken();
  Shared pop();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Shared> queue_;
  int64_t held_ = 0;  // bytes in the queue
  Shared current_;
  bool working_ = false;
  bool closing_ = false;
  std::thread thread_;
};

class CommStream {
 public:
  explicit CommStream(c10::Device device);
  ~CommStream() { close(); }

  // Each posts at once and returns a ticket; call them without the GIL. `what` names the transfer in errors.
  Shared send(const Group& group, const at::Tensor& tensor, int peer, int tag, std::string what);
  Shared recv(const Group& group, const at::Tensor& tensor, int peer, int tag, std::string what);
  // `behind` false: behind what this stream was given before alone, not behind the current stream: `in` is there, as the
  // caller has seen, and the memory of `out` is another stream's.
  Shared all_to_all(const Group& group, const at::Tensor& out, const at::Tensor& in, std::vector<int64_t> receive,
                    std::vector<int64_t> send, std::string what, bool behind);

  // Gives up open sends and receives and ends the threads. Later posts fail.
  void close();

  const Counters& counters() const { return *counters_; }

 private:
  template <typename Launch>
  Shared post(Kind kind, const Group& group, const at::Tensor& given, const at::Tensor& taken, int peer,
              std::string what, Launch launch, bool behind = true);
  void stage(Ticket& ticket, at::Tensor& in, at::Tensor& out);
  void watch();
  void keep(Kind kind, const Group& group, int peer, const Shared& ticket);

  c10::Device device_;
  std::optional<c10::Stream> stream_;
  std::shared_ptr<Counters> counters_ = std::make_shared<Counters>();
  std::mutex mutex_;
  std::condition_variable changed_;
  bool closed_ = false;
  bool watching_ = false;
  std::thread watcher_;  // looks after the lanes every kLook while there are transfers
  std::map<std::tuple<Kind, void*, int>, std::unique_ptr<Lane>> lanes_;
  std::deque<Shared> native_;  // kept until the accelerator is done with their tensors
};

} // namespace dualpipe
