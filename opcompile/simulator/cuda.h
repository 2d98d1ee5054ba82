/* What CUDA C means to the simulator: the part that TVM emits. */
#pragma once
#include "gpu.h"
#include "mma.h"
#include "wmma.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __syncthreads() simulator::barrier(__LINE__)
#define __syncwarp(...) ((void)simulator::shuffle(0, 0))
#define threadIdx (simulator::current->at)
#define blockIdx (simulator::block)
#define blockDim (simulator::block_size)
#define __ldg(address) (*(address))

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef simulator::Half half;
typedef simulator::BFloat nv_bfloat16, __nv_bfloat16;
typedef simulator::Vector2<half> half2;
typedef simulator::Vector4<half> half4;
typedef simulator::Vector2<nv_bfloat16> nv_bfloat162;
typedef simulator::Vector4<nv_bfloat16> nv_bfloat164;
typedef simulator::Vector2<float> float2;
typedef simulator::Vector4<float> float4;
typedef simulator::Vector2<double> double2;
typedef simulator::Vector4<double> double4, double4_16a, double4_32a;
typedef simulator::Vector2<int> int2;
typedef simulator::Vector4<int> int4;
typedef simulator::Vector2<uint> uint2;
typedef simulator::Vector4<uint> uint4;
typedef simulator::Vector2<ushort> ushort2;
typedef simulator::Vector4<ushort> ushort4;
typedef simulator::Vector2<long long> longlong2;
typedef simulator::Vector4<long long> longlong4;

static inline half2 make_half2(half a, half b) { return {a, b}; }
static inline half4 make_half4(half a, half b, half c, half d) { return {a, b, c, d}; }
static inline nv_bfloat162 make_nv_bfloat162(nv_bfloat16 a, nv_bfloat16 b) { return {a, b}; }
static inline nv_bfloat164 make_nv_bfloat164(nv_bfloat16 a, nv_bfloat16 b, nv_bfloat16 c, nv_bfloat16 d) {
  return {a, b, c, d};
}
static inline float2 make_float2(float a, float b) { return {a, b}; }
static inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
static inline double2 make_double2(double a, double b) { return {a, b}; }
static inline int2 make_int2(int a, int b) { return {a, b}; }
static inline int4 make_int4(int a, int b, int c, int d) { return {a, b, c, d}; }
static inline uint2 make_uint2(uint a, uint b) { return {a, b}; }
static inline uint4 make_uint4(uint a, uint b, uint c, uint d) { return {a, b, c, d}; }
static inline ushort2 make_ushort2(ushort a, ushort b) { return {a, b}; }
static inline ushort4 make_ushort4(ushort a, ushort b, ushort c, ushort d) { return {a, b, c, d}; }
static inline longlong2 make_longlong2(long long a, long long b) { return {a, b}; }
static inline longlong4 make_longlong4(long long a, long long b, long long c, long long d) { return {a, b, c, d}; }
static inline unsigned __pack_half2(half a, half b) { return (unsigned)b.bits << 16 | a.bits; }
static inline unsigned __pack_nv_bfloat162(nv_bfloat16 a, nv_bfloat16 b) { return (unsigned)b.bits << 16 | a.bits; }
static inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
static inline float __half2float(half value) { return value; }
static inline half __float2half_rn(float value) { return value; }
static inline float __bfloat162float(nv_bfloat16 value) { return value; }
static inline nv_bfloat16 __float2bfloat16(float value) { return value; }
static inline nv_bfloat16 __float2bfloat16_rn(float value) { return value; }

template <class T> static T __shfl_sync(unsigned, T value, unsigned lane, int = 32) {
  return simulator::shuffle(value, lane);
}
template <class T> static T __shfl_down_sync(unsigned, T value, unsigned by, int = 32) {
  return simulator::shuffle(value, simulator::lane() + by);
}
static inline unsigned __activemask() { return 0xFFFFFFFFu; }

/* of a number and NaN both give the number, as on a device */
template <class T> static T max(T a, T b) { return a > b || b != b ? a : b; }
template <class T> static T min(T a, T b) { return a < b || b != b ? a : b; }
