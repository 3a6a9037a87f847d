// A program of AOTInductor as a Python object whose passes run without the interpreter's lock, so that a server's other
// threads go on meanwhile. torch's own binding keeps the lock.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/extension.h>

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

class Program {
 public:
  explicit Program(const std::string& path) : loader_(path, "model", /*run_single_threaded=*/true) {}

  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) { return loader_.boxed_run(std::move(inputs)); }

  std::vector<std::string> weights() { return loader_.get_constant_fqns(); }

  // The program keeps addresses alone: whoever calls keeps the tensors.
  void take_weights(std::unordered_map<std::string, at::Tensor> tensors) {
    loader_.load_constants(tensors, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  }

 private:
  torch::inductor::AOTIModelPackageLoader loader_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  pybind11::class_<Program>(m, "Program")
      .def(pybind11::init<const std::string&>())
      .def("run", &Program::run, pybind11::call_guard<pybind11::gil_scoped_release>())
      .def("weights", &Program::weights)
      .def("take_weights", &Program::take_weights);
}
