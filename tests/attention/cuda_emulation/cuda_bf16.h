// 16-bit numbers, which the emulation only tells apart.
#pragma once

struct __nv_bfloat16 {
  unsigned short bits;
};
