// The Python module _native. Only csrc/bindings uses pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "arguments.h"
#include "fastsam/lanczos.h"
#include "fastsam/noise.h"
#include "fastsam/sam.h"
#if defined(FASTSAM_WITH_CUDA) && !defined(FASTSAM_SIMT)
#include <cuda_runtime_api.h>
#endif

#define FASTSAM_BACKEND cpu
#include "backend.inl"
#undef FASTSAM_BACKEND

#if defined(FASTSAM_WITH_CUDA)
#define FASTSAM_BACKEND cuda
#include "backend.inl"
#undef FASTSAM_BACKEND
#endif

namespace py = pybind11;

namespace {

using fastsam::bindings::pointer;

void define_structs(py::module_& module) {
  py::class_<fastsam::Execution>(module, "Execution", py::module_local())
      .def(py::init([](int device, int64_t stream, int threads) {
             return fastsam::Execution{device, pointer<void>(stream), threads};
           }),
           py::arg("device"), py::arg("stream"), py::arg("threads"));

  py::class_<fastsam::SamScalars>(module, "SamScalars", py::module_local())
      .def(py::init([](int64_t hyper, int64_t group_count, int64_t squared_norms, int64_t norm_count,
                       int64_t found_inf, int64_t grad_scale, int64_t skipped_steps, int64_t unchanged) {
             return fastsam::SamScalars{pointer<double>(hyper),          group_count,
                                        pointer<double>(squared_norms),  norm_count,
                                        pointer<float>(found_inf),       pointer<float>(grad_scale),
                                        pointer<int64_t>(skipped_steps), pointer<int64_t>(unchanged)};
           }),
           py::kw_only(), py::arg("hyper"), py::arg("group_count"), py::arg("squared_norms"),
           py::arg("norm_count"), py::arg("found_inf"), py::arg("grad_scale") = 0,
           py::arg("skipped_steps") = 0, py::arg("unchanged") = 0);

  py::class_<fastsam::LanczosStep>(module, "LanczosStep", py::module_local())
      .def(py::init([](int64_t rows, int64_t probe_stride, int64_t row_stride, int64_t vector,
                       int64_t successor, int64_t successor_stride, int64_t probes, int64_t count,
                       int64_t size, int64_t step, double eps) {
             return fastsam::LanczosStep{pointer<void>(rows),
                                         probe_stride,
                                         row_stride,
                                         pointer<void>(vector),
                                         pointer<void>(successor),
                                         successor_stride,
                                         probes,
                                         count,
                                         size,
                                         step,
                                         eps};
           }),
           py::kw_only(), py::arg("rows"), py::arg("probe_stride"), py::arg("row_stride"), py::arg("vector"),
           py::arg("successor"), py::arg("successor_stride"), py::arg("probes"), py::arg("count"),
           py::arg("size"), py::arg("step"), py::arg("eps"));

  py::class_<fastsam::Recurrence>(module, "Recurrence", py::module_local())
      .def(py::init([](int64_t alpha, int64_t beta, int64_t bound, int64_t active, int64_t steps_taken,
                       int64_t steps) {
             return fastsam::Recurrence{pointer<double>(alpha),        pointer<double>(beta),
                                        pointer<double>(bound),        pointer<uint8_t>(active),
                                        pointer<int64_t>(steps_taken), steps};
           }),
           py::kw_only(), py::arg("alpha"), py::arg("beta"), py::arg("bound"), py::arg("active"),
           py::arg("steps_taken"), py::arg("steps"));
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = FASTSAM_COMPILER;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(FASTSAM_WITH_CUDA) && !defined(FASTSAM_SIMT)
  int driver = 0;
  int devices = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  if (driver == 0 || cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
  info["cuda"] = true;
  info["cuda_runtime"] = CUDART_VERSION;
  info["cuda_driver"] = driver;
  info["cuda_devices"] = devices;
  info["cuda_architectures"] = FASTSAM_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(FASTSAM_MODULE, module) {
  module.doc() =
      "Fused SAM and Lanczos kernels on raw addresses. Call them through fastsam.kernels, which checks.";
#define FASTSAM_NAME(enumerator) fastsam::bindings::python_name(#enumerator),
  module.attr("TABLE_COLUMNS") =
      py::tuple(py::cast(std::vector<std::string>{FASTSAM_TABLE_COLUMNS(FASTSAM_NAME)}));
  module.attr("HYPER_COLUMNS") =
      py::tuple(py::cast(std::vector<std::string>{FASTSAM_HYPER_COLUMNS(FASTSAM_NAME)}));
#undef FASTSAM_NAME
  module.attr("ADAPTIVE") = static_cast<int64_t>(fastsam::kAdaptive);
  module.attr("STOCHASTIC") = static_cast<int64_t>(fastsam::kStochastic);
  module.def("build_info", &build_info);
  define_structs(module);
  fastsam::bindings::cpu::define(module.def_submodule("cpu"));
#if defined(FASTSAM_WITH_CUDA)
  fastsam::bindings::cuda::define(module.def_submodule("cuda"));
#endif
}
