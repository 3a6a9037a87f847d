#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "decode.cuh"

namespace t2::cuda {
namespace {

constexpr int kMaxDevices = 64;

// Blocks of a kernel that the current device runs side by side, asked for once per device.
template <class Kernel>
cudaError_t resident_blocks(Kernel kernel, std::atomic<int> (&known)[kMaxDevices], int* blocks) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::atomic<int>* kept = device < kMaxDevices ? &known[device] : nullptr;
  *blocks = kept == nullptr ? 0 : kept->load(std::memory_order_relaxed);
  if (*blocks > 0) return cudaSuccess;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, kThreads, 0);
  if (error != cudaSuccess) return error;
  *blocks *= processors;
  if (kept != nullptr) kept->store(*blocks, std::memory_order_relaxed);
  return cudaSuccess;
}

template <int kRowTiles, int kColumnTiles>
cudaError_t run(const Plan& plan, cudaStream_t stream) {
  static std::atomic<int> known[kMaxDevices];
  int blocks = 0;
  const cudaError_t error = resident_blocks(decode<kRowTiles, kColumnTiles>, known, &blocks);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = std::min(blocks, std::max(plan.phases[0].tiles, plan.phases[1].tiles));
  config.blockDim = kThreads;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, decode<kRowTiles, kColumnTiles>, plan);
}

}  // namespace

const char* launch(const Group& group, void* stream) {
  const Plan plan = make_plan(group);
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = tile_rows(group.rows) == 16 ? run<1, 1>(plan, on) : run<2, 2>(plan, on);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace t2::cuda
