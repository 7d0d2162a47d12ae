// dualpipe_engine._comm: see comm/stream.py for the interface and its Python twin.
#include <torch/csrc/Event.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "stream.h"

namespace py = pybind11;
using dualpipe::CommStream;
using dualpipe::Ticket;
using no_gil = py::call_guard<py::gil_scoped_release>;

namespace {

constexpr double kNanoseconds = 1e-9;

py::dict counters(const CommStream& stream) {
  py::dict all;
  for (size_t kind = 0; kind < dualpipe::kKinds; ++kind) {
    const auto& sums = stream.counters()[kind];
    py::dict one;
    one["posted"] = sums.posted.load();
    one["finished"] = sums.finished.load();
    one["failed"] = sums.failed.load();
    one["bytes"] = sums.bytes.load();
    one["flight_ns"] = sums.flight_ns.load();
    one["waited_ns"] = sums.waited_ns.load();
    all[dualpipe::kKindNames[kind]] = one;
  }
  return all;
}

double since(const dualpipe::Moment& moment, py::handle earlier) {
  TORCH_CHECK_TYPE(THPEvent_Check(earlier.ptr()), "a torch.Event is needed");
  return moment.since(reinterpret_cast<THPEvent*>(earlier.ptr())->event);
}

py::object moments(Ticket& ticket) {
  dualpipe::Moments all;
  {
    py::gil_scoped_release release;
    all = ticket.moments();
  }
  if (!all.posted) return py::none();
  return py::make_tuple(all.posted, all.finished, all.stopped, all.resumed);
}

} // namespace

// The last reference may go while Python holds the GIL, and a thread that is joined may need it to free a tensor.
struct Closing {
  void operator()(CommStream* stream) const {
    py::gil_scoped_release release;
    delete stream;
  }
};

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.attr("TORCH_VERSION") = TORCH_VERSION;
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      std::rethrow_exception(raised);
    } catch (const dualpipe::TransferError& error) {
      const auto type = py::module_::import("dualpipe_engine.errors").attr("PipelineRuntimeError");
      PyErr_SetString(type.ptr(), error.what());
    }
  });

  py::class_<dualpipe::Moment, std::shared_ptr<dualpipe::Moment>>(module, "Moment", py::module_local())
      .def("since", &since, py::arg("earlier"));

  py::class_<Ticket, std::shared_ptr<Ticket>>(module, "Ticket", py::module_local())
      .def("wait", &Ticket::wait, py::arg("timeout_s"), no_gil())
      .def("done", &Ticket::done, no_gil())
      .def("finished_at",
           [](const Ticket& ticket) -> py::object {
             const int64_t at = ticket.finished_ns;
             return at == 0 ? py::none() : py::object(py::float_(static_cast<double>(at) * kNanoseconds));
           })
      .def("moments", &moments)
      .def_property_readonly("kind", [](const Ticket& t) { return dualpipe::kKindNames[t.kind]; })
      .def_readonly("what", &Ticket::what)
      .def_readonly("size", &Ticket::bytes)
      .def_readonly("posted_ns", &Ticket::posted_ns)
      .def_property_readonly("finished_ns", [](const Ticket& t) { return t.finished_ns.load(); })
      .def_property_readonly("waited_ns", [](const Ticket& t) { return t.waited_ns.load(); });

  py::class_<CommStream, std::unique_ptr<CommStream, Closing>>(module, "CommStream", py::module_local())
      .def(py::init([](const std::string& device) {
             return std::unique_ptr<CommStream, Closing>(new CommStream(c10::Device(device)));
           }),
           py::arg("device"))
      .def("send", &CommStream::send, py::arg("group"), py::arg("tensor"), py::arg("peer"), py::arg("tag"),
           py::arg("what"), no_gil())
      .def("recv", &CommStream::recv, py::arg("group"), py::arg("tensor"), py::arg("peer"), py::arg("tag"),
           py::arg("what"), no_gil())
      .def("all_to_all", &CommStream::all_to_all, py::arg("group"), py::arg("out"), py::arg("rows"),
           py::arg("receive"), py::arg("send"), py::arg("what"), py::arg("behind") = true, no_gil())
      .def("close", &CommStream::close, no_gil())
      .def("counters", &counters);
}
