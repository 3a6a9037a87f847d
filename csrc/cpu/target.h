// Compiles the rest of a file for an instruction set beyond the build's baseline; the file's functions may only run
// after dispatch.cpp has asked the processor. Standard headers come first, so that none of their inline functions is
// emitted for the wider set and picked by the linker for everyone.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define T2_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define T2_TARGET_BEGIN(isa) T2_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define T2_TARGET_END _Pragma("clang attribute pop")
#else
#define T2_TARGET_BEGIN(isa) _Pragma("GCC push_options") T2_PRAGMA(GCC target(isa))
#define T2_TARGET_END _Pragma("GCC pop_options")
#endif
