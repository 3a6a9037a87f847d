// csrc/cuda/decode.cuh on the CPU, for tests/t2kernels/test_cuda.py.
#include <vector>

#include "decode.cuh"

namespace {

using namespace t2::cuda;

std::vector<emulation::Range> arrays(const Group& group) {
  std::vector<emulation::Range> all;
  const auto add = [&](const void* p, int64_t bytes) { all.push_back({static_cast<const char*>(p), bytes}); };
  add(group.x, group.rows * group.in * 2);
  add(group.workspace, workspace_bytes(group));
  for (int i = 0; i < group.layer_count; ++i)
    for (int p = 0; p < group.layers[i].part_count; ++p) {
      const Part& part = group.layers[i].parts[p];
      add(part.vh, part.rank * group.in * bytes_of(part.storage));
      add(part.u, part.rank * group.layers[i].out * bytes_of(part.storage));
    }
  return all;
}

}  // namespace

extern "C" {

int64_t t2_group_bytes() { return sizeof(Group); }

const char* t2_unsupported(const Group* group) { return unsupported(*group); }

const char* t2_emulate(const Group* group, int blocks) {
  const Plan plan = make_plan(*group);
  const auto kernel = [&] { tile_rows(group->rows) == 16 ? decode<1, 1>(plan) : decode<2, 2>(plan); };
  return emulation::machine().run(static_cast<unsigned>(blocks), kThreads, kernel, arrays(*group));
}

// Of the last t2_emulate: 16-byte chunks of weights that were asked for before the last thread came to the grid
// barrier.
int64_t t2_chunks_before_grid_barrier() { return emulation::machine().chunks_before_grid_barrier(); }

}  // extern "C"
