// A CPU in place of a GPU: memory whose traffic is counted, and types that it lacks.
#pragma once

#include <cstring>

#include "fused_update.h"

namespace tbcm {

struct BFloat16 { // rounds to nearest even; NaN is left out
  uint16_t bits;
  explicit BFloat16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    bits = static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
};

struct Memory { // as csrc/device.cuh
  static inline double bytes = 0;

  template <typename T> static void load(float (&to)[kVector], const T *from, int count) {
    for (int k = 0; k < kVector; ++k) to[k] = k < count ? static_cast<float>(from[k]) : 0.0f;
    bytes += count * sizeof(T);
  }

  template <typename T> static void store(T *to, const float (&from)[kVector], int count) {
    for (int k = 0; k < count; ++k) to[k] = static_cast<T>(from[k]);
    bytes += count * sizeof(T);
  }

  static void load(float (&to)[kVector], const void *from, int64_t at, int type, int count) {
    if (type == kFloat32) load(to, static_cast<const float *>(from) + at, count);
    if (type == kBFloat16) load(to, static_cast<const BFloat16 *>(from) + at, count);
    if (type == kFloat16) load(to, static_cast<const _Float16 *>(from) + at, count);
  }

  static void store(void *to, int64_t at, int type, const float (&from)[kVector], int count) {
    if (type == kBFloat16) store(static_cast<BFloat16 *>(to) + at, from, count);
    if (type == kFloat16) store(static_cast<_Float16 *>(to) + at, from, count);
  }

  static float get(const float *from) {
    bytes += sizeof(float);
    return *from;
  }

  static float get_together(const float *from) { // called for every thread, read once
    bytes += sizeof(float) / static_cast<double>(kLanes);
    return *from;
  }

  static void put(float *to, float value) {
    bytes += sizeof(float);
    *to = value;
  }
};

} // namespace tbcm
