/* What the Metal Shading Language means to the simulator: the part that TVM emits. */
#pragma once
#include "gpu.h"
#include "simdgroup.h"

#define kernel static
#define device
#define constant const
#define thread
/* where it declares an array, `opcompile.simulate` has replaced it */
#define threadgroup

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef simulator::Half half;
typedef simulator::Vector2<half> half2;
typedef simulator::Vector4<half> half4;
typedef simulator::Vector2<float> float2;
typedef simulator::Vector4<float> float4;
typedef simulator::Vector2<int> int2;
typedef simulator::Vector4<int> int4;
typedef simulator::Vector2<uint> uint2;
typedef simulator::Vector4<uint> uint4;
typedef simulator::Vector2<long> long2;
typedef simulator::Vector4<long> long4;
static inline half operator""h(long double value) { return (float)value; }

namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
#define threadgroup_barrier(flags) simulator::barrier(__LINE__)
#define simdgroup_barrier(flags) ((void)simulator::shuffle(0, 0))

template <class T> static T simd_shuffle(T value, uint lane) { return simulator::shuffle(value, lane); }
template <class T> static T simd_shuffle_down(T value, uint by) {
  return simulator::shuffle(value, simulator::lane() + by);
}
template <class T> static T simd_shuffle_xor(T value, uint mask) {
  return simulator::shuffle(value, simulator::lane() ^ mask);
}
template <class To, class From> static To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}
/* of a number and NaN both give the number, as on a device */
template <class T> static T max(T a, T b) { return a > b || b != b ? a : b; }
template <class T> static T min(T a, T b) { return a < b || b != b ? a : b; }
static inline float copysign(float value, float sign) { return copysignf(value, sign); }
static inline float exp(float value) { return expf(value); }
static inline float fabs(float value) { return fabsf(value); }
static inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
static inline float log(float value) { return logf(value); }
}  // namespace metal

#define select(no, yes, condition) ((condition) ? (yes) : (no))

/* the helpers that come with a kernel would be compiled anew at each of their many calls */
#define inline static __attribute__((noinline))
