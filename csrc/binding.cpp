// Binds the CPU kernels to the t2kernels operators on torch's stable ABI, and reports the build to Python. No other
// file includes torch. Schemas, meta kernels and gradients are in t2kernels/ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "cpu/attention.h"
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
    case ScalarType::Byte:
      if (tensor.dim() == 3 && tensor.size(2) == t2::block_bytes(t2::DType::q4)) return t2::DType::q4;
      if (tensor.dim() == 3 && tensor.size(2) == t2::block_bytes(t2::DType::q8)) return t2::DType::q8;
      [[fallthrough]];
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16, int8 or blocks, got another dtype");
  }
  return t2::DType::f32;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, t2::RangeFn fn, void* context) {
  std::atomic<bool> out_of_memory{false};  // an exception must not leave the callback, which C code calls
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) {
    try {
      fn(b, e, context);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

// A 2-D tensor is the matrix [n, k]; panels are [ceil(n / 16), k, 16], paired [ceil(n / 16), ceil(k / 2), 16, 2], and in
// blocks [ceil(n / 16), ceil(k / 32), bytes of a block].
t2::Matrix matrix(const Tensor& m, int64_t n, int64_t k, const char* name) {
  const t2::DType dtype = dtype_of(m, name);
  if (m.dim() == 2) {
    STD_TORCH_CHECK(m.size(0) == n && m.size(1) == k, name, ": expected shape [", n, ", ", k, "], got [", m.size(0),
                    ", ", m.size(1), "]");
    STD_TORCH_CHECK(t2::is_activation(dtype), name, ": 8-bit storage needs packed panels");
    return {m.const_data_ptr(), dtype, t2::Storage::strided, n, k, m.stride(0), m.stride(1)};
  }
  const bool pairs = t2::paired(dtype), blocks = t2::in_blocks(dtype);
  const int64_t terms = blocks ? t2::kBlockTerms : pairs ? 2 : 1;
  STD_TORCH_CHECK(m.dim() == (pairs ? 4 : 3) && m.size(0) == (n + t2::kPanel - 1) / t2::kPanel &&
                      m.size(1) == (k + terms - 1) / terms && m.size(2) == (blocks ? t2::block_bytes(dtype) : t2::kPanel) &&
                      (!pairs || m.size(3) == 2) && m.is_contiguous(),
                  name, ": expected contiguous panels of a matrix [", n, ", ", k, "]");
  return {m.const_data_ptr(), dtype, t2::Storage::panels, n, k, 0, 0};
}

t2::Matrix transposed(const t2::Matrix& m) {
  const auto storage = m.storage == t2::Storage::panels ? t2::Storage::panels_transposed : t2::Storage::strided;
  return {m.data, m.dtype, storage, m.k, m.n, m.stride_k, m.stride_n};
}

// Factors in one part, or in two along the rank: leading components, a multiple of 16 of them, then the rest.
constexpr int kMaxFactorParts = 2;
struct Factors {
  t2::Matrix up[kMaxFactorParts], down[kMaxFactorParts];
  int parts;
};

Factors factors(const Tensor* u, const Tensor* vh, size_t parts, int64_t out_features, int64_t rank,
                int64_t in_features) {
  STD_TORCH_CHECK(parts <= kMaxFactorParts, "u: expected at most 2 parts, got ", parts);
  STD_TORCH_CHECK(parts > 0 || rank == 0, "u: expected parts of rank ", rank, ", got none");
  Factors f{{}, {}, static_cast<int>(parts)};
  int64_t left = rank;
  for (int i = 0; i < f.parts; ++i) {
    const int64_t own = i + 1 == f.parts ? left : vh[i].size(0) * (vh[i].dim() == 2 ? 1 : t2::kPanel);
    STD_TORCH_CHECK(own <= left, "vh: expected parts of rank ", rank, " in all, got more");
    f.up[i] = matrix(u[i], out_features, own, "u");
    f.down[i] = matrix(vh[i], own, in_features, "vh");
    left -= own;
  }
  return f;
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

Rows rows_of(const Tensor& x, int64_t features, const char* name, bool bf16_products = false) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == features, name, ": expected last dimension ", features,
                  ", got ", x.dim() ? x.size(x.dim() - 1) : 0);
  const Tensor c = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const t2::DType dtype = dtype_of(c, name);
  STD_TORCH_CHECK(t2::is_activation(dtype), name, ": expected float32, bfloat16 or float16, got 8-bit storage");
  const bool round = bf16_products || dtype == t2::DType::bf16;
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < c.dim(); ++d) count *= c.size(d);
  return {c, {c.const_data_ptr(), dtype, features, nullptr, 0, nullptr, 1, nullptr, round}, count};
}

// The components [first, ...) of t [rows, rank], with their scales.
t2::RowInput scaled_rows(const float* t, int64_t rank, int64_t first, const Routing& route, const float* component_scale,
                         bool round) {
  const float* own_scale = component_scale ? component_scale + first : nullptr;
  return {t + first,        t2::DType::f32,      rank,      route.scales_data + first, route.scales_stride,
          route.slots_data, route.rows_per_slot, own_scale, round};
}

Tensor like(const Tensor& x, int64_t features) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = features;
  return torch::stable::new_empty(x, shape);
}

Tensor float_matrix(const Tensor& x, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(x, {rows, columns}, ScalarType::Float);
}

void set_bias(t2::RowOutput& out, const Tensor& bias, int64_t features) {
  STD_TORCH_CHECK(bias.numel() == features && bias.is_contiguous(), "bias: expected ", features, " contiguous values");
  out.bias = bias.const_data_ptr();
  out.bias_dtype = dtype_of(bias, "bias");
}

t2::RowOutput output(const Tensor& y, const Tensor* bias) {
  const int64_t features = y.size(y.dim() - 1);
  t2::RowOutput out{y.mutable_data_ptr(), dtype_of(y, "y"), features, nullptr, t2::DType::f32};
  if (bias != nullptr) set_bias(out, *bias, features);
  return out;
}

// Columns [first, ...) of the float32 matrix t [rows, rank].
t2::RowOutput columns(float* t, int64_t rank, int64_t first) {
  return {t + first, t2::DType::f32, rank, nullptr, t2::DType::f32};
}

const Tensor* pointer(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

t2::Product product(const t2::RowInput& in, const t2::Matrix& m, const t2::RowOutput& out,
                    const float* column_scale = nullptr) {
  return {0, {{in, m}}, 1, column_scale, out};
}

void append(t2::Product& product, const t2::RowInput& in, const t2::Matrix& m) {
  product.parts[product.part_count++] = {in, m};
}

float value_at(const void* data, t2::DType dtype, int64_t i) {
  switch (dtype) {
    case t2::DType::bf16: return static_cast<const torch::headeronly::BFloat16*>(data)[i];
    case t2::DType::f16: return static_cast<const torch::headeronly::Half*>(data)[i];
    default: return static_cast<const float*>(data)[i];
  }
}

void store_at(void* data, t2::DType dtype, int64_t i, float value) {
  switch (dtype) {
    case t2::DType::bf16: static_cast<torch::headeronly::BFloat16*>(data)[i] = value; break;
    case t2::DType::f16: static_cast<torch::headeronly::Half*>(data)[i] = value; break;
    default: static_cast<float*>(data)[i] = value;
  }
}

// Products over the same rows, stage by stage, run in as few kernel calls as kMaxProducts allows. Empty ones never
// reach a kernel: without rows or columns there is nothing to do, and a sum without terms is the bias.
class Batch {
 public:
  explicit Batch(int64_t rows) : rows_(rows) {}
  void add(const t2::Product& given) {
    t2::Product p = given;
    const int64_t columns = p.parts[0].m.n;
    int parts = 0;
    for (int i = 0; i < p.part_count; ++i)
      if (p.parts[i].m.k > 0) p.parts[parts++] = p.parts[i];
    p.part_count = parts;
    if (rows_ == 0 || columns == 0) return;
    if (parts == 0) return fill(p.out, columns);
    if (count_ == t2::kMaxProducts) run();
    products_[count_++] = p;
  }
  void run() {
    if (count_ > 0) t2::kernels().matmul(products_, count_, rows_, parallel_for);
    count_ = 0;
  }

 private:
  void fill(const t2::RowOutput& out, int64_t columns) const {
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t c = 0; c < columns; ++c)
        store_at(out.data, out.dtype, row * out.stride + c, out.bias ? value_at(out.bias, out.bias_dtype, c) : 0.0f);
  }

  int64_t rows_;
  int count_ = 0;
  t2::Product products_[t2::kMaxProducts];
};

// Shrink: t = x Vh^T, part by part.
void add_shrink(Batch& batch, const Rows& rows, const Factors& f, float* t, int64_t rank) {
  int64_t first = 0;
  for (int i = 0; i < f.parts; ++i) {
    batch.add(product(rows.input, f.down[i], columns(t, rank, first)));
    first += f.down[i].n;
  }
}

// W beside the factors, where a layer keeps it, with the scales of its rows.
struct Base {
  t2::Matrix m;
  const float* scale;
};

std::optional<Base> base_of(const Tensor* base, const Tensor* scale, int64_t out_features, int64_t in_features) {
  if (base == nullptr) return std::nullopt;
  const OptionalTensor given = scale == nullptr ? OptionalTensor() : OptionalTensor(*scale);
  return Base{matrix(*base, out_features, in_features, "base"), float_vector(given, out_features, "base_scale")};
}

// Expand: y = x W^T + (t * scale) U^T + bias, W and the parts of U side by side.
void add_expand(Batch& batch, const Rows& rows, const std::optional<Base>& base, const Factors& f, const float* t,
                int64_t rank, const Routing& route, const float* component_scale, const t2::RowOutput& out) {
  t2::Product p{1, {}, 0, nullptr, out};
  if (base) {
    append(p, rows.input, base->m);
    p.column_scale = base->scale;
  }
  int64_t first = 0;
  for (int i = 0; i < f.parts; ++i) {
    append(p, scaled_rows(t, rank, first, route, component_scale, rows.input.round_to_bf16), f.up[i]);
    first += f.up[i].k;
  }
  STD_TORCH_CHECK(p.part_count > 0, "u: expected at least one part where there is no base, got none");
  batch.add(p);
}

std::tuple<Tensor, Tensor> factored_linear(const Tensor& x, const std::vector<Tensor>& u, const std::vector<Tensor>& vh,
                                           const OptionalTensor& component_scale, const Tensor& scales,
                                           const Tensor& slots, const OptionalTensor& bias, int64_t out_features,
                                           bool bf16_products, const OptionalTensor& base,
                                           const OptionalTensor& base_scale) {
  const int64_t rank = scales.size(scales.dim() - 1);
  const int64_t in_features = x.size(x.dim() - 1);
  STD_TORCH_CHECK(u.size() == vh.size(), "vh: expected as many parts as u, ", u.size(), ", got ", vh.size());
  const Rows rows = rows_of(x, in_features, "x", bf16_products);
  const Routing route = routing(scales, slots, rows.count, rank);
  const Factors f = factors(u.data(), vh.data(), u.size(), out_features, rank, in_features);
  const float* component = float_vector(component_scale, rank, "component_scale");
  const auto dense = base_of(pointer(base), pointer(base_scale), out_features, in_features);
  const Tensor t = float_matrix(x, rows.count, rank);
  const Tensor y = like(x, out_features);
  float* t_data = static_cast<float*>(t.mutable_data_ptr());
  Batch batch(rows.count);
  add_shrink(batch, rows, f, t_data, rank);
  add_expand(batch, rows, dense, f, t_data, rank, route, component, output(y, pointer(bias)));
  batch.run();
  return {y, t};
}

std::tuple<Tensor, Tensor> factored_linear_backward(const Tensor& grad_y, const Tensor& t, const std::vector<Tensor>& u,
                                                    const std::vector<Tensor>& vh,
                                                    const OptionalTensor& component_scale, const Tensor& scales,
                                                    const Tensor& slots, int64_t in_features, bool need_dx,
                                                    bool need_dscales, bool bf16_products, const OptionalTensor& base,
                                                    const OptionalTensor& base_scale) {
  const int64_t rank = scales.size(scales.dim() - 1);
  const int64_t out_features = grad_y.size(grad_y.dim() - 1);
  STD_TORCH_CHECK(u.size() == vh.size(), "vh: expected as many parts as u, ", u.size(), ", got ", vh.size());
  const Rows rows = rows_of(grad_y, out_features, "grad_y", bf16_products);
  const Routing route = routing(scales, slots, rows.count, rank);
  const Factors f = factors(u.data(), vh.data(), u.size(), out_features, rank, in_features);
  const float* component = float_vector(component_scale, rank, "component_scale");
  const Tensor h = float_matrix(grad_y, rows.count, rank);
  float* h_data = static_cast<float*>(h.mutable_data_ptr());
  Batch batch(rows.count);
  int64_t first = 0;
  for (int i = 0; i < f.parts; ++i) {
    batch.add(product(rows.input, transposed(f.up[i]), columns(h_data, rank, first)));
    first += f.up[i].k;
  }
  const Tensor dx = need_dx ? like(grad_y, in_features) : torch::stable::new_empty(grad_y, {0});
  if (need_dx) {
    t2::Product p{1, {}, 0, nullptr, output(dx, nullptr)};
    if (const auto dense = base_of(pointer(base), pointer(base_scale), out_features, in_features)) {
      t2::RowInput in = rows.input;
      in.component_scale = dense->scale;
      append(p, in, transposed(dense->m));
    }
    first = 0;
    for (int i = 0; i < f.parts; ++i) {
      append(p, scaled_rows(h_data, rank, first, route, component, rows.input.round_to_bf16), transposed(f.down[i]));
      first += f.down[i].n;
    }
    batch.add(p);
  }
  batch.run();
  Tensor dscales = float_matrix(grad_y, need_dscales ? scales.size(0) : 0, rank);
  if (need_dscales) torch::stable::zero_(dscales);
  if (need_dscales && rows.count > 0 && rank > 0) {
    t2::kernels().reduce_scales(static_cast<const float*>(t.const_data_ptr()), h_data, component, route.slots_data,
                                route.rows_per_slot, rows.count, rank, static_cast<float*>(dscales.mutable_data_ptr()),
                                parallel_for);
  }
  return {dx, dscales};
}

// Storage of t between shrink and expand: thread-local and reused while small, else a tensor.
class Intermediate {
 public:
  Intermediate(const Tensor& x, int64_t floats) {
    constexpr int64_t kKept = 1 << 20;
    thread_local std::vector<float> kept;
    if (floats > kKept) {
      tensor_ = float_matrix(x, 1, floats);
      data_ = static_cast<float*>(tensor_->mutable_data_ptr());
      return;
    }
    if (static_cast<int64_t>(kept.size()) < floats) kept.resize(static_cast<size_t>(floats));
    data_ = kept.data();
  }
  float* data() const { return data_; }

 private:
  OptionalTensor tensor_;
  float* data_;
};

// Layers that share their input, as lists with an entry for each; `parts` matrices of u and vh belong to each.
struct Group {
  const std::vector<Tensor>&u, &vh, &component_scales, &scales, &biases, &bases, &base_scales;
  const std::vector<int64_t>& out_features;

  size_t layers() const { return scales.size(); }
  size_t parts() const { return u.size() / scales.size(); }
  void check() const {
    const size_t n = scales.size();
    STD_TORCH_CHECK(n > 0 && u.size() == vh.size() && u.size() % n == 0 && out_features.size() == n &&
                        (component_scales.empty() || component_scales.size() == n) &&
                        (biases.empty() || biases.size() == n) && (bases.empty() || bases.size() == n) &&
                        (base_scales.empty() || base_scales.size() == n),
                    "scales: expected one entry per layer, as in u, vh and out_features; got ", n);
  }
  const Tensor* bias(size_t l) const { return !biases.empty() && biases[l].numel() > 0 ? &biases[l] : nullptr; }
};

void run_group(const Tensor& x, const Group& g, const Tensor& slots, bool bf16_products,
               const std::vector<t2::RowOutput>& outs) {
  const int64_t in_features = x.size(x.dim() - 1);
  const size_t layers = g.layers(), parts = g.parts();
  const Rows rows = rows_of(x, in_features, "x", bf16_products);
  int64_t ranks = 0;
  for (const Tensor& s : g.scales) ranks += s.size(s.dim() - 1);
  const Intermediate intermediate(x, rows.count * ranks);
  float* t = intermediate.data();
  Batch batch(rows.count);
  std::vector<Routing> routes;  // they keep what the products point to
  routes.reserve(layers);
  for (size_t l = 0; l < layers; ++l) {
    const int64_t rank = g.scales[l].size(g.scales[l].dim() - 1);
    const Factors f =
        factors(g.u.data() + l * parts, g.vh.data() + l * parts, parts, g.out_features[l], rank, in_features);
    add_shrink(batch, rows, f, t, rank);
    t += rows.count * rank;
  }
  t = intermediate.data();
  for (size_t l = 0; l < layers; ++l) {
    const int64_t rank = g.scales[l].size(g.scales[l].dim() - 1);
    const Factors f =
        factors(g.u.data() + l * parts, g.vh.data() + l * parts, parts, g.out_features[l], rank, in_features);
    routes.push_back(routing(g.scales[l], slots, rows.count, rank));
    const float* component = nullptr;
    if (!g.component_scales.empty()) component = float_vector(g.component_scales[l], rank, "component_scales");
    const auto dense = base_of(g.bases.empty() ? nullptr : &g.bases[l],
                               g.base_scales.empty() ? nullptr : &g.base_scales[l], g.out_features[l], in_features);
    add_expand(batch, rows, dense, f, t, rank, routes.back(), component, outs[l]);
    t += rows.count * rank;
  }
  batch.run();
}

std::vector<Tensor> factored_linear_group(const Tensor& x, const std::vector<Tensor>& u, const std::vector<Tensor>& vh,
                                          const std::vector<Tensor>& component_scales,
                                          const std::vector<Tensor>& scales, const Tensor& slots,
                                          const std::vector<Tensor>& biases, const std::vector<int64_t>& out_features,
                                          bool bf16_products, const std::vector<Tensor>& bases,
                                          const std::vector<Tensor>& base_scales) {
  const Group group{u, vh, component_scales, scales, biases, bases, base_scales, out_features};
  group.check();
  std::vector<Tensor> ys;
  std::vector<t2::RowOutput> outs;
  ys.reserve(group.layers());
  for (size_t l = 0; l < group.layers(); ++l) {
    ys.push_back(like(x, out_features[l]));
    outs.push_back(output(ys.back(), group.bias(l)));
  }
  run_group(x, group, slots, bf16_products, outs);
  return ys;
}

// Lists one after the other, of which `counts` says the lengths: u, vh, component_scales, scales, biases, bases,
// base_scales.
std::vector<std::vector<Tensor>> split(const std::vector<Tensor>& tensors, const std::vector<int64_t>& counts) {
  std::vector<std::vector<Tensor>> lists;
  auto next = tensors.begin();
  for (const int64_t count : counts) {
    STD_TORCH_CHECK(count >= 0 && count <= tensors.end() - next, "counts: expected a sum of ", tensors.size());
    lists.emplace_back(next, next + count);
    next += count;
  }
  STD_TORCH_CHECK(lists.size() == 7 && next == tensors.end(), "counts: expected 7 that add up to ", tensors.size());
  return lists;
}

// The same with all lists in one: AOTInductor's executor takes no empty ones.
std::vector<Tensor> factored_linear_group_flat(const Tensor& x, const Tensor& slots, const std::vector<Tensor>& tensors,
                                               const std::vector<int64_t>& counts,
                                               const std::vector<int64_t>& out_features, bool bf16_products) {
  const auto lists = split(tensors, counts);
  return factored_linear_group(x, lists[0], lists[1], lists[2], lists[3], slots, lists[4], out_features, bf16_products,
                               lists[5], lists[6]);
}

// Groups whose tensors stay where they are, with scales that may be written to: handed in once, called by number.
struct KeptGroup {
  std::vector<std::vector<Tensor>> lists;
  std::vector<int64_t> out_features;
  bool bf16_products;

  Group group() const {
    return {lists[0], lists[1], lists[2], lists[3], lists[4], lists[5], lists[6], out_features};
  }
};
std::mutex kept_mutex;
std::unordered_map<int64_t, std::shared_ptr<const KeptGroup>> kept_groups;
int64_t kept_count = 0;

int64_t keep_group(const std::vector<Tensor>& tensors, const std::vector<int64_t>& counts,
                   const std::vector<int64_t>& out_features, bool bf16_products) {
  auto kept = std::make_shared<KeptGroup>(KeptGroup{split(tensors, counts), out_features, bf16_products});
  kept->group().check();
  const std::lock_guard<std::mutex> lock(kept_mutex);
  kept_groups[++kept_count] = std::move(kept);
  return kept_count;
}

void release_group(int64_t number) {
  const std::lock_guard<std::mutex> lock(kept_mutex);
  kept_groups.erase(number);
}

std::shared_ptr<const KeptGroup> kept_group(int64_t number) {
  const std::lock_guard<std::mutex> lock(kept_mutex);
  const auto found = kept_groups.find(number);
  STD_TORCH_CHECK(found != kept_groups.end(), "group: expected one that is kept, got ", number);
  return found->second;
}

// The outputs of all layers of a group side by side, from row `first` of y on.
void run_kept_group(const Tensor& x, const Tensor& slots, const KeptGroup& kept, const Tensor& y, int64_t first) {
  const Group group = kept.group();
  const t2::DType dtype = dtype_of(y, "y");
  const int64_t bytes = dtype == t2::DType::f32 ? 4 : 2, width = y.size(y.dim() - 1);
  char* data = static_cast<char*>(y.mutable_data_ptr()) + first * width * bytes;
  std::vector<t2::RowOutput> outs;
  int64_t total = 0;
  for (size_t l = 0; l < group.layers(); ++l) {
    t2::RowOutput out{data + total * bytes, dtype, width, nullptr, t2::DType::f32};
    if (const Tensor* bias = group.bias(l)) set_bias(out, *bias, kept.out_features[l]);
    outs.push_back(out);
    total += kept.out_features[l];
  }
  STD_TORCH_CHECK(total == width, "out_features: expected ", total, ", got ", width);
  run_group(x, group, slots, kept.bf16_products, outs);
}

Tensor kept_group_linear(const Tensor& x, const Tensor& slots, int64_t number, int64_t out_features) {
  const Tensor y = like(x, out_features);
  run_kept_group(x, slots, *kept_group(number), y, 0);
  return y;
}

// A group for each stretch of rows: the rows offsets[i] to offsets[i + 1] of x [rows, in] go through groups[i]. A slot a
// row. The groups' outputs are equally wide. Groups run one after the other, each over all threads: a group of few rows
// is limited by the bytes of its weights, which no other group shares.
Tensor kept_groups_linear(const Tensor& x, const Tensor& slots, const std::vector<int64_t>& offsets,
                          const std::vector<int64_t>& groups, int64_t out_features) {
  const int64_t rows = x.size(0);
  STD_TORCH_CHECK(x.dim() == 2 && slots.dim() == 1 && slots.size(0) == rows, "slots: expected one for each of ", rows,
                  " rows");
  STD_TORCH_CHECK(offsets.size() == groups.size() + 1 && offsets.front() == 0 && offsets.back() == rows,
                  "offsets: expected ", groups.size() + 1, " from 0 to ", rows);
  const Tensor y = like(x, out_features);
  Tensor all_rows = x, all_slots = slots;
  for (size_t i = 0; i < groups.size(); ++i) {
    const int64_t first = offsets[i], count = offsets[i + 1] - first;
    STD_TORCH_CHECK(count >= 0, "offsets: expected increasing ones, got ", first, " before ", offsets[i + 1]);
    if (count == 0) continue;
    run_kept_group(torch::stable::narrow(all_rows, 0, first, count), torch::stable::narrow(all_slots, 0, first, count),
                   *kept_group(groups[i]), y, first);
  }
  return y;
}

Tensor dense_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& row_scale, const OptionalTensor& bias,
                    int64_t out_features, bool bf16_products) {
  const int64_t in_features = x.size(x.dim() - 1);
  const Rows rows = rows_of(x, in_features, "x", bf16_products);
  const t2::Matrix m = matrix(weight, out_features, in_features, "weight");
  const float* scale = float_vector(row_scale, out_features, "row_scale");
  const Tensor y = like(x, out_features);
  Batch batch(rows.count);
  batch.add(product(rows.input, m, output(y, pointer(bias)), scale));
  batch.run();
  return y;
}

Tensor dense_linear_backward(const Tensor& grad_y, const Tensor& weight, const OptionalTensor& row_scale,
                             int64_t in_features, bool bf16_products) {
  const int64_t out_features = grad_y.size(grad_y.dim() - 1);
  Rows rows = rows_of(grad_y, out_features, "grad_y", bf16_products);
  const t2::Matrix m = transposed(matrix(weight, out_features, in_features, "weight"));
  rows.input.component_scale = float_vector(row_scale, out_features, "row_scale");
  const Tensor dx = like(grad_y, in_features);
  Batch batch(rows.count);
  batch.add(product(rows.input, m, output(dx, nullptr)));
  batch.run();
  return dx;
}

Tensor last_contiguous(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

t2::HeadStrides head_strides(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

Tensor decode_attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& allowed,
                        double scale, const OptionalTensor& key_rows, const OptionalTensor& key_ranges) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && query.size(2) == 1,
                  "query: expected [rows, heads, 1, head_dim], key and value [rows, key heads, length, head_dim]");
  const int64_t rows = query.size(0), heads = query.size(1), dim = query.size(3), key_heads = key.size(1);
  STD_TORCH_CHECK((key_rows || key.size(0) == rows) && key.size(3) == dim && key_heads > 0 && heads % key_heads == 0 &&
                      dim % t2::kPanel == 0,
                  "key: expected [", rows, ", a divisor of ", heads, ", length, ", dim, ", a multiple of 16]");
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(value.size(i) == key.size(i), "value: expected the shape of key");
  const t2::DType dtype = dtype_of(query, "query");
  STD_TORCH_CHECK(t2::is_activation(dtype) && key.scalar_type() == query.scalar_type() &&
                      value.scalar_type() == query.scalar_type(),
                  "key: expected query, key and value of one dtype: float32, bfloat16 or float16");
  const Tensor q = last_contiguous(query), k = last_contiguous(key), v = last_contiguous(value);
  const Tensor out = torch::stable::new_empty(q, {rows, 1, heads, dim});
  t2::DecodeAttention a{q.const_data_ptr(),
                        k.const_data_ptr(),
                        v.const_data_ptr(),
                        out.mutable_data_ptr(),
                        dtype,
                        head_strides(q),
                        head_strides(k),
                        head_strides(v),
                        nullptr,
                        0,
                        0,
                        nullptr,
                        nullptr,
                        rows,
                        heads,
                        key_heads,
                        key.size(2),
                        dim,
                        static_cast<float>(scale)};
  if (allowed) {
    STD_TORCH_CHECK(allowed->dim() == 2 && allowed->size(0) == rows && allowed->size(1) == a.length &&
                        allowed->scalar_type() == ScalarType::Bool,
                    "allowed: expected bool [", rows, ", ", a.length, "]");
    a.allowed = static_cast<const uint8_t*>(allowed->const_data_ptr());
    a.allowed_row_stride = allowed->stride(0);
    a.allowed_stride = allowed->stride(1);
  }
  if (key_rows) {
    STD_TORCH_CHECK(key_rows->dim() == 1 && key_rows->numel() == rows && key_rows->is_contiguous() &&
                        key_rows->scalar_type() == ScalarType::Long,
                    "key_rows: expected contiguous int64 [", rows, "]");
    a.key_rows = static_cast<const int64_t*>(key_rows->const_data_ptr());
    for (int64_t row = 0; row < rows; ++row)
      STD_TORCH_CHECK(a.key_rows[row] >= 0 && a.key_rows[row] < key.size(0), "key_rows: entry ", row, " is ",
                      a.key_rows[row], ", expected 0 <= row < ", key.size(0));
  }
  if (key_ranges) {
    STD_TORCH_CHECK(key_ranges->dim() == 2 && key_ranges->size(0) == rows && key_ranges->size(1) == 2 &&
                        key_ranges->is_contiguous() && key_ranges->scalar_type() == ScalarType::Long,
                    "key_ranges: expected contiguous int64 [", rows, ", 2]");
    a.key_ranges = static_cast<const int64_t*>(key_ranges->const_data_ptr());
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t begin = a.key_ranges[2 * row], end = a.key_ranges[2 * row + 1];
      STD_TORCH_CHECK(0 <= begin && begin <= end && end <= a.length, "key_ranges: entry ", row, " is ", begin, ", ", end,
                      "; expected 0 <= begin <= end <= ", a.length);
    }
  }
  if (rows > 0 && heads > 0 && dim > 0) t2::kernels().attend(a, parallel_for);
  return out;
}

// Machine limits for benchmarks and the planner's cost model; the caller takes the time.

int64_t multiply_adds(t2::Arithmetic kind, int64_t threads, int64_t steps) {
  const auto work = t2::kernels().multiply_adds;
  std::vector<int64_t> per_step(static_cast<size_t>(threads));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) per_step[static_cast<size_t>(i)] = work(kind, steps);
  });
  return per_step[0] * steps * threads;
}

void read_bytes(uint64_t address, int64_t bytes, int64_t threads) {
  const char* data = reinterpret_cast<const char*>(address);
  const int64_t share = bytes / threads;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) t2::kernels().read(data + i * share, share);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(t2kernels, CPU, m) {
  m.impl("factored_linear", TORCH_BOX(&factored_linear));
  m.impl("factored_linear_group", TORCH_BOX(&factored_linear_group));
  m.impl("factored_linear_group_flat", TORCH_BOX(&factored_linear_group_flat));
  m.impl("keep_group", TORCH_BOX(&keep_group));
  m.impl("kept_group_linear", TORCH_BOX(&kept_group_linear));
  m.impl("kept_groups_linear", TORCH_BOX(&kept_groups_linear));
  m.impl("factored_linear_backward", TORCH_BOX(&factored_linear_backward));
  m.impl("dense_linear", TORCH_BOX(&dense_linear));
  m.impl("dense_linear_backward", TORCH_BOX(&dense_linear_backward));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build report of the t2kernels extension, choice of CPU kernels, machine limits.";
  m.def("compiler", [] {
#if defined(__clang__)
    return std::string("clang ") + __clang_version__;
#else
    return std::string("gcc ") + __VERSION__;
#endif
  });
  m.def("compiled_isas", [] {
#if defined(__x86_64__)
    return std::vector<std::string>{"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
#elif defined(__aarch64__)
    return std::vector<std::string>{"portable", "neon", "neon_bf16"};
#else
    return std::vector<std::string>{"portable"};
#endif
  });
  m.def("supported", [](const std::string& isa) { return t2::supported(isa.c_str()); }, pybind11::arg("isa"));
  m.def("chosen_isa", [] { return std::string(t2::kernels().isa); });
  m.def("select_isa", [](const std::string& isa) { return t2::select_kernels(isa.c_str()); }, pybind11::arg("isa"));
  m.def("release_group", &release_group, pybind11::arg("number"));
  m.def("bf16_products", [] { return t2::kernels().bf16_products; });
  m.def(
      "multiply_adds",
      [](const std::string& arithmetic, int64_t threads, int64_t steps) {
        const auto kind = arithmetic == "bfloat16" ? t2::Arithmetic::bf16
                          : arithmetic == "int16"  ? t2::Arithmetic::i16
                          : arithmetic == "int8"   ? t2::Arithmetic::i8
                                                   : t2::Arithmetic::f32;
        return multiply_adds(kind, threads, steps);
      },
      pybind11::arg("arithmetic"), pybind11::arg("threads"), pybind11::arg("steps"));
  m.def("read_bytes", &read_bytes, pybind11::arg("address"), pybind11::arg("bytes"), pybind11::arg("threads"));
}
