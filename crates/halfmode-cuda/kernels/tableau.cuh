// The numbers of an explicit Runge-Kutta method of at most four stages, by definitions: A (j, k), B j and C j, those that
// are not given 0; B0 is always given.
#pragma once
#include "halfmode.cuh"

#ifndef A10
#define A10 0.0
#endif
#ifndef A20
#define A20 0.0
#endif
#ifndef A21
#define A21 0.0
#endif
#ifndef A30
#define A30 0.0
#endif
#ifndef A31
#define A31 0.0
#endif
#ifndef A32
#define A32 0.0
#endif
#ifndef B1
#define B1 0.0
#endif
#ifndef B2
#define B2 0.0
#endif
#ifndef B3
#define B3 0.0
#endif
#ifndef C1
#define C1 0.0
#endif
#ifndef C2
#define C2 0.0
#endif
#ifndef C3
#define C3 0.0
#endif

// Stage j starts from the sum over k of a_of[j][k] times slope k; a_from is its transpose.
__device__ constexpr f32 a_of[4][4] = {{0, 0, 0, 0}, {A10, 0, 0, 0}, {A20, A21, 0, 0}, {A30, A31, A32, 0}};
__device__ constexpr f32 a_from[4][4] = {{0, A10, A20, A30}, {0, 0, A21, A31}, {0, 0, 0, A32}, {0, 0, 0, 0}};
__device__ constexpr f32 b_of[4] = {B0, B1, B2, B3};
__device__ constexpr f64 c_of[4] = {0, C1, C2, C3};
