// pyfused._C: what this build is and what it runs on. Ops do not go through here; they are torch ops of _ops.
//
// pybind11 is PyPI's, not torch's copy, and no torch header is included: the stable ABI keeps _ops free of both.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

py::list split(const std::string& text) {
  py::list result;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = text.find(',', begin);
    if (end == std::string::npos) end = text.size();
    result.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return result;
}

py::object or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

template <typename Predicate>
py::list names(Predicate predicate) {
  py::list result;
  for (pyfused::Capability capability : pyfused::kCapabilities) {
    if (predicate(capability)) result.append(pyfused::name(capability));
  }
  return result;
}

py::dict build_info() {
  py::dict info;
  info["version"] = PYFUSED_VERSION;
  info["torch"] = PYFUSED_TORCH_VERSION;
  info["compiler"] = PYFUSED_COMPILER;
  info["cxx_standard"] = __cplusplus / 100 % 100;
  info["build_type"] = PYFUSED_BUILD_TYPE;
  info["cuda_toolkit"] = or_none(PYFUSED_CUDA_VERSION);
  info["cuda_architectures"] = split(PYFUSED_CUDA_ARCHITECTURES);
  info["cutlass"] = or_none(PYFUSED_CUTLASS_VERSION);
  info["cpu_capabilities"] = names(pyfused::compiled);
  info["cpu_capabilities_emulated"] = names(pyfused::emulated);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of pyfused and the CPU capability in use.";
  m.def("build_info", &build_info, "How this copy of pyfused was built: a dict of strings, lists and None.");
  m.def(
      "cpu_capability", [] { return std::string(pyfused::name(pyfused::chosen_capability())); },
      "Name of the CPU capability in use; RuntimeError where PYFUSED_CPU_CAPABILITY asks for one that is not there.");
  m.def(
      "available_cpu_capabilities", [] { return names(pyfused::available); },
      "Names of the CPU capabilities that PYFUSED_CPU_CAPABILITY may have on this machine, lowest first.");
  m.def(
      "cuda_architectures", [] { return split(PYFUSED_CUDA_ARCHITECTURES); },
      "CUDA architectures compiled into _ops_cuda; empty without it.");
}
