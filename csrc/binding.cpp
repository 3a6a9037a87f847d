// The one file that knows torch: the CPU kernels of the t2kernels operators, on torch's stable ABI, and the build
// report for Python. Schemas, meta kernels and gradients are in t2kernels/ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/matmul.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

t2::DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return t2::DType::f32;
    case ScalarType::BFloat16: return t2::DType::bf16;
    case ScalarType::Half: return t2::DType::f16;
    case ScalarType::Char: return t2::DType::i8;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or int8, got another dtype");
  }
  return t2::DType::f32;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, t2::RangeFn fn, void* context) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { fn(b, e, context); });
}

// A 2-D tensor is the matrix [n, k] itself, a 3-D one its panels [ceil(n / 16), k, 16].
t2::Matrix matrix(const Tensor& m, int64_t n, int64_t k, const char* name) {
  const t2::DType dtype = dtype_of(m, name);
  if (m.dim() == 2) {
    STD_TORCH_CHECK(m.size(0) == n && m.size(1) == k, name, ": expected shape [", n, ", ", k, "], got [", m.size(0),
                    ", ", m.size(1), "]");
    STD_TORCH_CHECK(dtype != t2::DType::i8, name, ": int8 needs packed panels");
    return {m.const_data_ptr(), dtype, t2::Storage::strided, n, k, m.stride(0), m.stride(1)};
  }
  STD_TORCH_CHECK(m.dim() == 3 && m.size(2) == t2::kPanel && m.size(1) == k &&
                      m.size(0) == (n + t2::kPanel - 1) / t2::kPanel && m.is_contiguous(),
                  name, ": expected contiguous panels [ceil(", n, " / 16), ", k, ", 16]");
  return {m.const_data_ptr(), dtype, t2::Storage::panels, n, k, 0, 0};
}

t2::Matrix transposed(const t2::Matrix& m) {
  const auto storage = m.storage == t2::Storage::panels ? t2::Storage::panels_transposed : t2::Storage::strided;
  return {m.data, m.dtype, storage, m.k, m.n, m.stride_k, m.stride_n};
}

const float* float_vector(const OptionalTensor& v, int64_t size, const char* name) {
  if (!v) return nullptr;
  STD_TORCH_CHECK(v->scalar_type() == ScalarType::Float && v->numel() == size && v->is_contiguous(), name,
                  ": expected ", size, " contiguous float32 values");
  return static_cast<const float*>(v->const_data_ptr());
}

struct Routing {
  Tensor scales;
  Tensor slots;
  const float* scales_data;
  const int64_t* slots_data;
  int64_t scales_stride, rows_per_slot;
};

Routing routing(const Tensor& scales, const Tensor& slots, int64_t rows, int64_t rank) {
  STD_TORCH_CHECK(scales.dim() == 2 && scales.size(1) == rank && scales.scalar_type() == ScalarType::Float,
                  "scales: expected float32 [slots, ", rank, "]");
  STD_TORCH_CHECK(slots.dim() == 1 && slots.scalar_type() == ScalarType::Long, "slots: expected int64 [rows of x]");
  const Tensor s = scales.stride(1) == 1 || rank == 1 ? scales : torch::stable::contiguous(scales);
  const Tensor i = slots.is_contiguous() ? slots : torch::stable::contiguous(slots);
  const int64_t count = i.numel();
  STD_TORCH_CHECK(count == 0 ? rows == 0 : rows % count == 0, "slots: ", count, " entries do not divide the ", rows,
                  " rows of x");
  const auto* ids = static_cast<const int64_t*>(i.const_data_ptr());
  for (int64_t b = 0; b < count; ++b)
    STD_TORCH_CHECK(ids[b] >= 0 && ids[b] < s.size(0), "slots: entry ", b, " is ", ids[b], ", expected 0 <= id < ",
                    s.size(0), ", the rows of scales");
  return {s, i, static_cast<const float*>(s.const_data_ptr()), ids, s.stride(0), count == 0 ? 1 : rows / count};
}

struct Rows {
  Tensor tensor;  // keeps the data alive
  t2::RowInput input;
  int64_t count;
};

Rows rows_of(const Tensor& x, int64_t features, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == features, name, ": expected last dimension ", features,
                  ", got ", x.dim() ? x.size(x.dim() - 1) : 0);
  const Tensor c = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const t2::DType dtype = dtype_of(c, name);
  STD_TORCH_CHECK(dtype != t2::DType::i8, name, ": expected float32, bfloat16 or float16, got int8");
  return {c, {c.const_data_ptr(), dtype, features, nullptr, 0, nullptr, 1, nullptr}, c.numel() / features};
}

t2::RowInput scaled_rows(const Tensor& t, int64_t rank, const Routing& route, const float* component_scale) {
  return {t.const_data_ptr(), t2::DType::f32,      rank,          route.scales_data, route.scales_stride,
          route.slots_data,   route.rows_per_slot, component_scale};
}

Tensor like(const Tensor& x, int64_t features) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = features;
  return torch::stable::new_empty(x, shape);
}

Tensor float_matrix(const Tensor& x, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(x, {rows, columns}, ScalarType::Float);
}

t2::RowOutput output(const Tensor& y, const float* column_scale, const OptionalTensor& bias) {
  t2::RowOutput out{y.mutable_data_ptr(), dtype_of(y, "y"), column_scale, nullptr, t2::DType::f32};
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == y.size(y.dim() - 1) && bias->is_contiguous(), "bias: expected ",
                    y.size(y.dim() - 1), " contiguous values");
    out.bias = bias->const_data_ptr();
    out.bias_dtype = dtype_of(*bias, "bias");
  }
  return out;
}

std::tuple<Tensor, Tensor> factored_linear(const Tensor& x, const Tensor& u, const Tensor& vh,
                                           const OptionalTensor& component_scale, const Tensor& scales,
                                           const Tensor& slots, const OptionalTensor& bias, int64_t out_features) {
  const int64_t rank = scales.size(scales.dim() - 1);
  const int64_t in_features = x.size(x.dim() - 1);
  const Rows rows = rows_of(x, in_features, "x");
  const Routing route = routing(scales, slots, rows.count, rank);
  const t2::Matrix down = matrix(vh, rank, in_features, "vh");
  const t2::Matrix up = matrix(u, out_features, rank, "u");
  const float* component = float_vector(component_scale, rank, "component_scale");
  const auto& k = t2::kernels();
  const Tensor t = float_matrix(x, rows.count, rank);
  const Tensor y = like(x, out_features);
  k.matmul(rows.input, down, output(t, nullptr, std::nullopt), rows.count, parallel_for);
  k.matmul(scaled_rows(t, rank, route, component), up, output(y, nullptr, bias), rows.count, parallel_for);
  return {y, t};
}

std::tuple<Tensor, Tensor> factored_linear_backward(const Tensor& grad_y, const Tensor& t, const Tensor& u,
                                                    const Tensor& vh, const OptionalTensor& component_scale,
                                                    const Tensor& scales, const Tensor& slots, int64_t in_features,
                                                    bool need_dx, bool need_dscales) {
  const int64_t rank = scales.size(scales.dim() - 1);
  const int64_t out_features = grad_y.size(grad_y.dim() - 1);
  const Rows rows = rows_of(grad_y, out_features, "grad_y");
  const Routing route = routing(scales, slots, rows.count, rank);
  const float* component = float_vector(component_scale, rank, "component_scale");
  const auto& k = t2::kernels();
  const Tensor h = float_matrix(grad_y, rows.count, rank);
  k.matmul(rows.input, transposed(matrix(u, out_features, rank, "u")), output(h, nullptr, std::nullopt), rows.count,
           parallel_for);
  Tensor dscales = float_matrix(grad_y, need_dscales ? scales.size(0) : 0, rank);
  if (need_dscales) {
    torch::stable::zero_(dscales);
    k.reduce_scales(static_cast<const float*>(t.const_data_ptr()), static_cast<const float*>(h.const_data_ptr()),
                    component, route.slots_data, route.rows_per_slot, rows.count, rank,
                    static_cast<float*>(dscales.mutable_data_ptr()), parallel_for);
  }
  if (!need_dx) return {torch::stable::new_empty(grad_y, {0}), dscales};
  const Tensor dx = like(grad_y, in_features);
  k.matmul(scaled_rows(h, rank, route, component), transposed(matrix(vh, rank, in_features, "vh")),
           output(dx, nullptr, std::nullopt), rows.count, parallel_for);
  return {dx, dscales};
}

Tensor dense_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& row_scale, const OptionalTensor& bias,
                    int64_t out_features) {
  const int64_t in_features = x.size(x.dim() - 1);
  const Rows rows = rows_of(x, in_features, "x");
  const t2::Matrix m = matrix(weight, out_features, in_features, "weight");
  const float* scale = float_vector(row_scale, out_features, "row_scale");
  const Tensor y = like(x, out_features);
  t2::kernels().matmul(rows.input, m, output(y, scale, bias), rows.count, parallel_for);
  return y;
}

Tensor dense_linear_backward(const Tensor& grad_y, const Tensor& weight, const OptionalTensor& row_scale,
                             int64_t in_features) {
  const int64_t out_features = grad_y.size(grad_y.dim() - 1);
  Rows rows = rows_of(grad_y, out_features, "grad_y");
  const t2::Matrix m = transposed(matrix(weight, out_features, in_features, "weight"));
  rows.input.component_scale = float_vector(row_scale, out_features, "row_scale");
  const Tensor dx = like(grad_y, in_features);
  t2::kernels().matmul(rows.input, m, output(dx, nullptr, std::nullopt), rows.count, parallel_for);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(t2kernels, CPU, m) {
  m.impl("factored_linear", TORCH_BOX(&factored_linear));
  m.impl("factored_linear_backward", TORCH_BOX(&factored_linear_backward));
  m.impl("dense_linear", TORCH_BOX(&dense_linear));
  m.impl("dense_linear_backward", TORCH_BOX(&dense_linear_backward));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of the t2kernels extension is, and which CPU kernels it runs.";
  m.def("compiler", [] {
#if defined(__clang__)
    return std::string("clang ") + __clang_version__;
#else
    return std::string("gcc ") + __VERSION__;
#endif
  });
  m.def("compiled_isas", [] {
#if defined(__x86_64__)
    return std::vector<std::string>{"portable", "avx2", "avx512"};
#else
    return std::vector<std::string>{"portable"};
#endif
  });
  m.def("supported", [](const std::string& isa) { return t2::supported(isa.c_str()); }, pybind11::arg("isa"));
  m.def("chosen_isa", [] { return std::string(t2::kernels().isa); });
  m.def("select_isa", [](const std::string& isa) { return t2::select_kernels(isa.c_str()); }, pybind11::arg("isa"));
  m.def("has_cuda", [] { return false; });
}
