// For instruction sets without dot products of bfloat16: their matrices are multiplied in fp32.
#pragma once

namespace {

constexpr bool kBf16Products = false;
struct DotBf16;

}  // namespace
