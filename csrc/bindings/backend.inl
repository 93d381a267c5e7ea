// The launches of one backend as Python functions. module.cpp includes this file once per backend, with
// FASTSAM_BACKEND set to cpu or cuda, so that both define the same functions with the same arguments.

namespace fastsam::bindings::FASTSAM_BACKEND {

namespace backend = fastsam::FASTSAM_BACKEND;

inline void define(pybind11::module_ module) {
  namespace py = pybind11;

  module.def(
      "sam_scratch_bytes",
      [](const py::buffer& table) { return backend::sam_scratch_bytes(TableArgument(table).table()); },
      py::arg("table"));

  module.def(
      "sam_norm",
      [](const Execution& execution, int64_t dtype, const py::buffer& table, int64_t hyper,
         int64_t squared_norm, int64_t scratch) {
        const TableArgument argument(table);
        const py::gil_scoped_release release;
        backend::sam_norm(execution, dtype_of(dtype), argument.table(), pointer<double>(hyper),
                          pointer<double>(squared_norm), pointer<void>(scratch));
      },
      py::arg("execution"), py::arg("dtype"), py::arg("table"), py::arg("hyper"), py::arg("squared_norm"),
      py::arg("scratch"));

  module.def(
      "sam_perturb",
      [](const Execution& execution, int64_t dtype, const py::buffer& table, const SamScalars& scalars) {
        const TableArgument argument(table);
        const py::gil_scoped_release release;
        backend::sam_perturb(execution, dtype_of(dtype), argument.table(), scalars);
      },
      py::arg("execution"), py::arg("dtype"), py::arg("table"), py::arg("scalars"));

  module.def(
      "sam_check",
      [](const Execution& execution, int64_t dtype, const py::buffer& table, int64_t found_inf) {
        const TableArgument argument(table);
        const py::gil_scoped_release release;
        backend::sam_check(execution, dtype_of(dtype), argument.table(), pointer<float>(found_inf));
      },
      py::arg("execution"), py::arg("dtype"), py::arg("table"), py::arg("found_inf"));

  module.def(
      "sam_restore",
      [](const Execution& execution, int64_t dtype, const py::buffer& table) {
        const TableArgument argument(table);
        const py::gil_scoped_release release;
        backend::sam_restore(execution, dtype_of(dtype), argument.table());
      },
      py::arg("execution"), py::arg("dtype"), py::arg("table"));

  const auto define_update = [&module](const char* name, auto update) {
    module.def(
        name,
        [update](const Execution& execution, int64_t dtype, const py::buffer& table,
                 const SamScalars& scalars, int64_t scratch) {
          const TableArgument argument(table);
          const py::gil_scoped_release release;
          update(execution, dtype_of(dtype), argument.table(), scalars, pointer<void>(scratch));
        },
        py::arg("execution"), py::arg("dtype"), py::arg("table"), py::arg("scalars"), py::arg("scratch"));
  };
  define_update("sam_update_sgd", &backend::sam_update_sgd);
  define_update("sam_update_adam", &backend::sam_update_adam);

  module.def(
      "add_noise",
      [](const Execution& execution, int64_t dtype, const py::buffer& table, int64_t seed_and_step) {
        const TableArgument argument(table);
        const py::gil_scoped_release release;
        backend::add_noise(execution, dtype_of(dtype), argument.table(), pointer<int64_t>(seed_and_step));
      },
      py::arg("execution"), py::arg("dtype"), py::arg("table"), py::arg("seed_and_step"));

  module.def("orthogonalize_scratch_bytes", &backend::orthogonalize_scratch_bytes, py::arg("probes"),
             py::arg("count"), py::arg("size"));

  module.def(
      "orthogonalize",
      [](const Execution& execution, int64_t dtype, const LanczosStep& step, const Recurrence& recurrence,
         int64_t scratch) {
        const py::gil_scoped_release release;
        backend::orthogonalize(execution, dtype_of(dtype), step, recurrence, pointer<void>(scratch));
      },
      py::arg("execution"), py::arg("dtype"), py::arg("step"), py::arg("recurrence"), py::arg("scratch"));
}

}  // namespace fastsam::bindings::FASTSAM_BACKEND
