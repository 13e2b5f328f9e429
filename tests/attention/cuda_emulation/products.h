// Matrix products of warp groups on a CPU (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate
// Instructions"): d of 64 x N is a of 64 x 16 times b of 16 x N, or is added to.
//
// From its start to the wait for it, a product's accumulators are NaN. It is an error to write them meanwhile, or the
// registers of a, and to start a product of registers that were written since the last multiply_fence.
#pragma once

#include <map>

#include "copies.h"

namespace emulation {

constexpr uint32_t kPending = 0x7fc0beef;  // a NaN
constexpr unsigned kRowsOfA = 64, kDepth = 16, kWidest = 256;
typedef float Eight __attribute__((vector_size(32)));

struct Operands {
  uint64_t a, b;
  unsigned width;
  bool in_registers, transposed, bfloat16, accumulate;

  bool operator==(const Operands& o) const {
    return a == o.a && b == o.b && width == o.width && in_registers == o.in_registers && transposed == o.transposed &&
           bfloat16 == o.bfloat16 && accumulate == o.accumulate;
  }
};

struct Product {
  Operands operands;
  unsigned started = 0, waited = 0;  // threads
  int previous = -1;                 // the pending product whose accumulators this one adds to
  bool done = false;
  float* d[kWarpGroup];
  const uint32_t* a[kWarpGroup];
  uint32_t a_values[kWarpGroup][4];
  std::vector<float> result;  // [64, width]
};

struct Group {
  std::vector<std::unique_ptr<Product>> products;
  size_t done = 0;
};
inline Group groups[kMostThreads / kWarpGroup];

struct Issuer {
  size_t started = 0, waited = 0;  // products
  std::vector<size_t> committed;   // products up to the end of each group
  bool fenced = false;
  std::map<const void*, std::vector<uint32_t>> registers;  // that products have used, as they were at the last fence
};
inline Issuer issuers[kMostThreads];

// PTX ISA, "Matrix Descriptor Format": start address, leading and stride offset in units of 16 bytes, base offset, and
// the pattern, of which 1 is that of 128 bytes. CUTLASS has the same fields in cute/arch/mma_sm90_desc.hpp.
struct Descriptor {
  unsigned start, leading, stride;

  explicit Descriptor(uint64_t bits)
      : start(static_cast<unsigned>(bits & 0x3fff) << 4),
        leading(static_cast<unsigned>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<unsigned>(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) fail("a descriptor of another pattern than that of 128 bytes");
    if (bits >> 49 & 7) fail("a descriptor with a base offset, which the emulation does not know");
    if (bits >> 14 & 3 || bits >> 30 & 3 || bits >> 46 & 7 || bits >> 52 & 0x3ff) fail("a descriptor with wrong bits");
    // The base offset would be bits 7 to 9 of the address at which the pattern starts.
    if (start >> 7 & 7) fail("an operand that does not start with its pattern of 1024 bytes");
  }

  // Eight elements, contiguous in k: PTX ISA, "Canonical Layouts", K-major ((8,m),(T,2k)):((8T,SBO),(1,T)).
  unsigned along_k(unsigned row, unsigned k) const { return start + row / 8 * stride + row % 8 * 128 + k * 2; }

  // Eight elements, contiguous in n: the same, MN-major ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)).
  unsigned along_n(unsigned n, unsigned k) const {
    return start + n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128;
  }
};

inline float to_float(uint16_t bits, bool bfloat16) {
  return bfloat16 ? star::from_bfloat16(bits) : star::from_float16(bits);
}

// Writes eight elements `step` apart.
inline void read_eight(unsigned address, bool bfloat16, float* to, unsigned step) {
  const unsigned place = swizzled(address);
  if (place % 16 != 0) fail("a misaligned operand");
  uint16_t bits[8];
  std::memcpy(bits, at_address(place, 16), 16);
  if (unfenced[(place - kFirstAddress) / 16]) fail("a product reads what shared_fence has not made visible");
  for (unsigned i = 0; i < 8; ++i) to[i * step] = to_float(bits[i], bfloat16);
}

// The row and the column in d of a thread's i-th accumulator: PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16".
inline unsigned row_of(unsigned t, unsigned i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
inline unsigned column_of(unsigned t, unsigned i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

inline void multiply(Group& group, Product& product) {
  static float a[kRowsOfA][kDepth], b[kDepth][kWidest];
  const Operands& o = product.operands;
  const Descriptor in_b(o.b);
  if (o.in_registers) {
    for (unsigned t = 0; t < kWarpGroup; ++t) {
      for (unsigned i = 0; i < 8; ++i) {  // the i-th half word: rows as those of d, 8 columns further from 4 on
        const uint32_t pair = product.a_values[t][i / 2];
        a[row_of(t, i)][column_of(t, i)] = to_float(static_cast<uint16_t>(i % 2 ? pair >> 16 : pair), o.bfloat16);
      }
    }
  } else {
    const Descriptor in_a(o.a);
    for (unsigned row = 0; row < kRowsOfA; ++row) {
      for (unsigned k = 0; k < kDepth; k += 8) read_eight(in_a.along_k(row, k), o.bfloat16, &a[row][k], 1);
    }
  }
  for (unsigned n = 0; n < o.width; n += o.transposed ? 8 : 1) {
    for (unsigned k = 0; k < kDepth; k += o.transposed ? 1 : 8) {
      if (o.transposed) {
        read_eight(in_b.along_n(n, k), o.bfloat16, &b[k][n], 1);
      } else {
        read_eight(in_b.along_k(n, k), o.bfloat16, &b[k][n], kWidest);
      }
    }
  }
  if (product.previous >= 0) product.result = std::move(group.products[static_cast<size_t>(product.previous)]->result);
  for (unsigned row = 0; row < kRowsOfA; ++row) {
    for (unsigned n = 0; n < o.width; n += 8) {
      float* at = &product.result[row * o.width + n];
      Eight sum, factors;
      std::memcpy(&sum, at, sizeof sum);
      for (unsigned k = 0; k < kDepth; ++k) {
        std::memcpy(&factors, &b[k][n], sizeof factors);
        sum += a[row][k] * factors;
      }
      std::memcpy(at, &sum, sizeof sum);
    }
  }
  product.done = true;
  ++progress;
}

// Products of a group end in order.
inline void multiply_up_to(Group& group, size_t last) {
  for (; group.done <= last; ++group.done) multiply(group, *group.products[group.done]);
}

inline void remember(Issuer& issuer, const void* registers, size_t words) {
  std::vector<uint32_t>& values = issuer.registers[registers];
  values.resize(words);
  std::memcpy(values.data(), registers, 4 * words);
}

// Registers that the thread has not used in a product before are taken for fenced.
inline void check_fenced(Issuer& issuer, const void* registers, size_t words) {
  const auto known = issuer.registers.find(registers);
  if (known == issuer.registers.end() || known->second.size() != words) {
    remember(issuer, registers, words);
  } else if (std::memcmp(known->second.data(), registers, 4 * words) != 0) {
    fail("a product of registers that were written after the last multiply_fence");
  }
}

inline void multiply_fence() {
  Issuer& issuer = issuers[threadIdx.x];
  issuer.fenced = true;
  for (auto& [registers, known] : issuer.registers) {
    std::memcpy(known.data(), registers, 4 * known.size());
  }
}

inline void start_product(const Operands& operands, float* d, const uint32_t* a) {
  const unsigned t = threadIdx.x % kWarpGroup, count = operands.width / 2;
  Group& group = groups[threadIdx.x / kWarpGroup];
  Issuer& issuer = issuers[threadIdx.x];
  if (!issuer.fenced) fail("a product without multiply_fence before it");
  const size_t index = issuer.started++;
  if (index == group.products.size()) {
    group.products.push_back(std::make_unique<Product>());
    group.products.back()->operands = operands;
    group.products.back()->result.assign(size_t{kRowsOfA} * operands.width, 0.0f);
  }
  Product& product = *group.products[index];
  if (!(product.operands == operands)) fail("threads of a warp group start different products");
  int previous = -1;
  bool pending = false;  // a product with the same accumulators
  for (size_t i = issuer.waited; i < index; ++i) {
    if (group.products[i]->d[t] != d) continue;
    if (group.products[i]->operands.width != operands.width)
      fail("pending products of different widths share registers");
    pending = true;
    previous = operands.accumulate ? static_cast<int>(i) : -1;
  }
  if (product.started > 0 && product.previous != previous) fail("threads of a warp group wait differently");
  product.previous = previous;
  if (!pending) check_fenced(issuer, d, count);
  if (operands.accumulate && !pending) {
    for (unsigned i = 0; i < count; ++i) product.result[row_of(t, i) * operands.width + column_of(t, i)] = d[i];
  }
  for (unsigned i = 0; i < count; ++i) std::memcpy(d + i, &kPending, 4);
  product.d[t] = d;
  product.a[t] = a;
  if (a) {
    check_fenced(issuer, a, 4);
    std::memcpy(product.a_values[t], a, 16);
  }
  if (++product.started == kWarpGroup) do_work([&group, index] { multiply_up_to(group, index); });
  let_others_run();
}

inline void multiply_commit() {
  Issuer& issuer = issuers[threadIdx.x];
  issuer.committed.push_back(issuer.started);
}

// Gives a thread its part of a product that is over.
inline void take_result(Issuer& issuer, const Group& group, size_t index) {
  Product& product = *group.products[index];
  const unsigned t = threadIdx.x % kWarpGroup, width = product.operands.width;
  if (product.a[t] && std::memcmp(product.a[t], product.a_values[t], 16) != 0) {
    fail("registers of a pending product were written");
  }
  float* d = product.d[t];
  bool last = true;
  for (size_t i = index + 1; i < issuer.started; ++i) last = last && group.products[i]->d[t] != d;
  if (last) {  // else the next product with these accumulators takes the result
    for (unsigned i = 0; i < width / 2; ++i) {
      if (std::memcmp(d + i, &kPending, 4) != 0) fail("accumulators of a pending product were written");
      d[i] = product.result[row_of(t, i) * width + column_of(t, i)];
    }
    remember(issuer, d, width / 2);
    if (++product.waited == kWarpGroup) std::vector<float>().swap(product.result);
  }
}

inline void multiply_wait(size_t pending) {
  Issuer& issuer = issuers[threadIdx.x];
  const Group& group = groups[threadIdx.x / kWarpGroup];
  const size_t commits = issuer.committed.size();
  const size_t end = commits > pending ? issuer.committed[commits - 1 - pending] : 0;
  for (; issuer.waited < end; ++issuer.waited) {
    while (!group.products[issuer.waited]->done) {
      waits[threadIdx.x] = {"product %lld of its warp group; %lld threads have started it",
                            {static_cast<long long>(issuer.waited), group.products[issuer.waited]->started}};
      yield();
    }
    take_result(issuer, group, issuer.waited);
  }
  ++progress;
}

inline const bool products_are_part = add_part({[] {
                                                  for (Group& group : groups) group = Group();
                                                  for (Issuer& issuer : issuers) issuer = Issuer();
                                                },
                                                [] {
                                                  const Issuer& issuer = issuers[threadIdx.x];
                                                  if (issuer.waited < issuer.started) {
                                                    fail("a thread ends before its products");
                                                  }
                                                },
                                                [] {}});

}  // namespace emulation
