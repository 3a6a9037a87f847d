// The one file that knows torch: t2kernels::decode_linear_group on CUDA, on torch's stable ABI. It takes what
// t2kernels::factored_linear_group takes, factors as contiguous matrices, and returns an empty list, having launched
// nothing, where this kernel does not do the job (`unsupported` in decode.h, x other than bfloat16, panels): the
// caller has to choose another one.
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "decode.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::optional<t2::cuda::Storage> storage_of(const Tensor& factor) {
  switch (factor.scalar_type()) {
    case ScalarType::BFloat16: return t2::cuda::Storage::bf16;
    case ScalarType::Half: return t2::cuda::Storage::f16;
    case ScalarType::Char: return t2::cuda::Storage::i8;
    default: return std::nullopt;
  }
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

void check_device(const Tensor& tensor, int32_t device, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, ": expected the device of x");
}

// False where the factors' storage is not one this kernel reads.
bool add_parts(t2::cuda::Layer& layer, const Tensor* u, const Tensor* vh, size_t parts, int64_t rank,
               int64_t in_features, int32_t device) {
  int64_t left = rank;
  for (size_t p = 0; p < parts; ++p) {
    const auto storage = storage_of(vh[p]);
    if (!storage || u[p].scalar_type() != vh[p].scalar_type() || u[p].dim() != 2 || vh[p].dim() != 2) return false;
    if (!u[p].is_contiguous() || !vh[p].is_contiguous()) return false;
    check_device(u[p], device, "u");
    check_device(vh[p], device, "vh");
    const int64_t own = vh[p].size(0);
    left -= own;
    STD_TORCH_CHECK(vh[p].size(1) == in_features, "vh: expected shape [", own, ", ", in_features, "]");
    STD_TORCH_CHECK(u[p].size(0) == layer.out && u[p].size(1) == own, "u: expected shape [", layer.out, ", ", own, "]");
    layer.parts[p] = {vh[p].const_data_ptr(), u[p].const_data_ptr(), own, *storage};
  }
  STD_TORCH_CHECK(left == 0, "vh: expected parts of rank ", rank, " in all, got ", rank - left);
  layer.part_count = static_cast<int>(parts);
  return true;
}

std::vector<Tensor> decode_linear_group(const Tensor& x, const std::vector<Tensor>& u, const std::vector<Tensor>& vh,
                                        const std::vector<Tensor>& component_scales, const std::vector<Tensor>& scales,
                                        const Tensor& slots, const std::vector<Tensor>& biases,
                                        const std::vector<int64_t>& out_features, bool /*bf16_products*/) {
  const size_t layers = scales.size();
  STD_TORCH_CHECK(layers > 0 && u.size() == vh.size() && u.size() % layers == 0 && out_features.size() == layers &&
                      (component_scales.empty() || component_scales.size() == layers) &&
                      (biases.empty() || biases.size() == layers),
                  "scales: expected one entry per layer, as in u, vh and out_features; got ", layers);
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected shape [..., in], got a scalar");
  STD_TORCH_CHECK(slots.dim() == 1 && slots.scalar_type() == ScalarType::Long, "slots: expected int64 [rows of x]");
  const size_t parts = u.size() / layers;
  const int32_t device = x.get_device_index();
  const int64_t in_features = x.size(x.dim() - 1), count = slots.numel();
  const int64_t rows = in_features == 0 ? 0 : x.numel() / in_features;
  if (x.scalar_type() != ScalarType::BFloat16 || rows < 1 || rows > t2::cuda::kMaxRows || parts < 1 ||
      parts > t2::cuda::kMaxParts || layers > t2::cuda::kMaxLayers)
    return {};
  STD_TORCH_CHECK(count > 0 && rows % count == 0, "slots: ", count, " entries do not divide the ", rows, " rows of x");
  check_device(slots, device, "slots");

  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<Tensor> kept = {as_contiguous(x), as_contiguous(slots)};  // what the group points to
  t2::cuda::Group group{};
  group.x = kept[0].const_data_ptr();
  group.rows = rows;
  group.in = in_features;
  group.slots = static_cast<const int64_t*>(kept[1].const_data_ptr());
  group.slot_count = std::numeric_limits<int>::max();
  group.rows_per_slot = rows / count;
  group.layer_count = static_cast<int>(layers);
  for (size_t l = 0; l < layers; ++l) {
    t2::cuda::Layer& layer = group.layers[l];
    const Tensor& own = scales[l];
    STD_TORCH_CHECK(own.dim() == 2 && own.scalar_type() == ScalarType::Float, "scales: expected float32 [slots, r]");
    check_device(own, device, "scales");
    const int64_t rank = own.size(1);
    group.slot_count = std::min(group.slot_count, own.size(0));
    layer.out = out_features[l];
    if (!add_parts(layer, &u[l * parts], &vh[l * parts], parts, rank, in_features, device)) return {};
    kept.push_back(own.stride(1) == 1 ? own : torch::stable::contiguous(own));
    layer.scales = static_cast<const float*>(kept.back().const_data_ptr());
    layer.scales_stride = kept.back().stride(0);
    if (!component_scales.empty()) {
      const Tensor& c = component_scales[l];
      STD_TORCH_CHECK(c.scalar_type() == ScalarType::Float && c.numel() == rank && c.is_contiguous(),
                      "component_scales: expected ", rank, " contiguous float32 values");
      check_device(c, device, "component_scales");
      layer.component_scale = static_cast<const float*>(c.const_data_ptr());
    }
    if (!biases.empty() && biases[l].numel() > 0) {
      const Tensor& b = biases[l];
      if (b.scalar_type() != ScalarType::BFloat16) return {};
      STD_TORCH_CHECK(b.numel() == layer.out && b.is_contiguous(), "biases: expected ", layer.out,
                      " contiguous values");
      check_device(b, device, "biases");
      layer.bias = b.const_data_ptr();
    }
  }
  kept.push_back(torch::stable::new_empty(x, {t2::cuda::workspace_bytes(group) / 2}));
  group.workspace = kept.back().mutable_data_ptr();
  if (t2::cuda::unsupported(group) != nullptr) return {};

  std::vector<Tensor> ys;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  for (size_t l = 0; l < layers; ++l) {
    shape.back() = out_features[l];
    ys.push_back(torch::stable::new_empty(x, shape));
    group.layers[l].y = ys.back().mutable_data_ptr();
  }
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "x: no current stream on device ", device);
  const char* error = t2::cuda::launch(group, stream);
  STD_TORCH_CHECK(error == nullptr, "decode_linear_group: ", error == nullptr ? "" : error);
  return ys;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(t2kernels, CUDA, m) { m.impl("decode_linear_group", TORCH_BOX(&decode_linear_group)); }

PYBIND11_MODULE(_cuda, m) { m.doc() = "CUDA kernels of the t2kernels operators; importing it registers them."; }
