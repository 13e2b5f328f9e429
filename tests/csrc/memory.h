// Memory of the test driver's tensors, filled at random, and checks of what a kernel wrote.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "arguments.h"

namespace {

using star::DType;
using star::View;
[[noreturn]] void fail(const std::string& problem) {
  std::fprintf(stderr, "%s\n", problem.c_str());
  std::exit(1);
}

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool chance(int percent) { return below(100) < percent; }
  float unit() { return static_cast<float>(next() >> 40) * 0x1p-24f; }
  float centred() { return 2.0f * unit() - 1.0f; }
};

constexpr uint32_t kUnwritten = 0x7fa5a5a5u;  // NaN that arithmetic does not make
constexpr uint16_t kUnwrittenHalf = 0x7fa5u;

// A tensor [B, C, P] or [B, H, S] (of runs of `width` elements) in memory that ends where its strides do.
struct Memory {
  std::vector<uint32_t> words;
  std::vector<uint16_t> halves;
  View view;
  int64_t extent = 0;

  Memory(DType dtype, int64_t batch, int64_t channels, int64_t positions, View strides, int64_t width = 1) {
    view = strides;
    view.dtype = dtype;
    extent = (batch - 1) * view.batch + (channels - 1) * view.channel + (positions - 1) * view.position + width;
    if (dtype == DType::kFloat32) {
      words.assign(static_cast<size_t>(extent), kUnwritten);
      words.shrink_to_fit();
      view.data = words.data();
    } else {
      halves.assign(static_cast<size_t>(extent), kUnwrittenHalf);
      halves.shrink_to_fit();
      view.data = halves.data();
    }
  }

  void set(int64_t at, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (view.dtype == DType::kFloat32) {
      words[static_cast<size_t>(at)] = bits;
    } else if (view.dtype == DType::kBFloat16) {
      halves[static_cast<size_t>(at)] = static_cast<uint16_t>(bits >> 16);
    } else {  // of float16 a number between 2^-14 and 1
      const uint32_t magnitude = 0x400u + (bits >> 5) % (0x3c00u - 0x400u);
      halves[static_cast<size_t>(at)] = static_cast<uint16_t>((bits >> 31 << 15) | magnitude);
    }
  }

  bool written(int64_t at) const {
    if (view.dtype == DType::kFloat32) return words[static_cast<size_t>(at)] != kUnwritten;
    return halves[static_cast<size_t>(at)] != kUnwrittenHalf;
  }
};

struct Shape {
  int64_t batch, channels, positions;
};

enum Layout { kPlanes, kPacked, kBatchInnermost, kGaps, kOneForAll, kLayouts };

View strides_of(Layout layout, const Shape& s) {
  View v;
  v.batch = s.channels * s.positions, v.channel = s.positions, v.position = 1;
  if (layout == kPacked) v.channel = 1, v.position = s.channels;
  if (layout == kBatchInnermost) v.batch = 1, v.position = s.batch, v.channel = s.positions * s.batch;
  if (layout == kGaps) v.batch = 3 * v.batch + 1, v.channel = 3 * v.channel, v.position = 3;
  if (layout == kOneForAll) v.batch = 0;
  return v;
}

DType some_dtype(Random& random) { return static_cast<DType>(random.below(3)); }

Memory input(Random& random, const Shape& s) {
  const DType dtype = some_dtype(random);  // in this order with every compiler
  const Layout layout = static_cast<Layout>(random.below(kLayouts));
  Memory memory(dtype, s.batch, s.channels, s.positions, strides_of(layout, s));
  for (int64_t i = 0; i < memory.extent; ++i) memory.set(i, random.centred());
  return memory;
}

Memory output(DType dtype, const Shape& s, Layout layout) {
  return Memory(dtype, s.batch, s.channels, s.positions, strides_of(layout, s));
}

std::vector<float> floats(Random& random, int64_t n, float low, float high) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = low + (high - low) * random.unit();
  return values;
}

std::vector<float> unwritten(int64_t n) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) std::memcpy(&value, &kUnwritten, sizeof value);
  return values;
}

void check_written(const char* name, const std::vector<float>& values) {
  for (const float& value : values) {
    if (std::memcmp(&value, &kUnwritten, sizeof value) == 0) fail(std::string(name) + " is not written throughout");
  }
}

// Every element is written, and nothing between them.
void check_written(const char* name, const Memory& memory, const Shape& s) {
  int64_t written = 0;
  for (int64_t i = 0; i < memory.extent; ++i) written += memory.written(i);
  if (written != s.batch * s.channels * s.positions) fail(std::string(name) + " is written between its elements");
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t p = 0; p < s.positions; ++p) {
        const int64_t at = b * memory.view.batch + c * memory.view.channel + p * memory.view.position;
        if (!memory.written(at)) fail(std::string(name) + " is not written throughout");
      }
    }
  }
}

constexpr int kThreads[] = {1, 2, 3, 5};
std::FILE* results = nullptr;  // receives the outputs of every call: a length and the bytes of each

// Runs a call with every number of threads; its outputs must not depend on it.
void with_threads(const char* name, const std::function<std::vector<std::string>(int)>& call) {
  const std::vector<std::string> expected = call(1);
  for (int threads : kThreads) {
    if (call(threads) != expected) fail(std::string(name) + " depends on the number of threads");
  }
  if (results == nullptr) return;
  for (const std::string& output : expected) {
    const uint64_t size = output.size();
    std::fwrite(&size, sizeof size, 1, results);
    std::fwrite(output.data(), 1, size, results);
  }
}

// The letter of a dtype and the values.
std::string bytes(char dtype, const void* data, size_t size) {
  return std::string(1, dtype).append(static_cast<const char*>(data), size);
}

std::string bytes(const std::vector<float>& values) { return bytes('f', values.data(), values.size() * sizeof(float)); }

std::string bytes(const Memory& memory) {
  if (memory.view.dtype == DType::kFloat32) {
    return bytes('f', memory.words.data(), memory.words.size() * sizeof(uint32_t));
  }
  const char dtype = memory.view.dtype == DType::kFloat16 ? 'h' : 'b';
  return bytes(dtype, memory.halves.data(), memory.halves.size() * sizeof(uint16_t));
}

}  // namespace
