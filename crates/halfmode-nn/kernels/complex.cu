// archs: sm_80 sm_90a
// variants: S=f16,R=f16,T=f16 S=bf16,R=bf16,T=bf16 S=f32,R=f32,T=f32 S=f64,R=f64,T=f64 S=f32,R=f32,T=f16
//
// Complex fields from two real ones and back, turned by e^(2 pi i turns j / points) at point j of the last grid axis,
// which `inner` channels share. S and R are the types that are read, T the one that is written.
#include "halfmode.cuh"

using A = wider<wider<S, R>::type, T>::type;

struct Phase {
    A cosine = 1, sine = 0;
    __device__ Phase(long long at, long long inner, int points, int turns) {
        if (!turns) return;
        long long j = at / inner % points, turned = ((turns * j) % points + points) % points;
        f64 s, c;
        sincospi(2.0 * f64(turned) / f64(points), &s, &c);
        cosine = A(c);
        sine = A(s);
    }
};

// z = (re + i im) phase; an absent part is zero.
extern "C" __global__ void join_parts(const S* re, const R* im, T* z, long long n, long long inner, int points,
                                      int turns) {
    for (long long at = grid_start(); at < n; at += grid_stride()) {
        Phase phase(at, inner, points, turns);
        A a = re ? widen<A>(re[at]) : A(0), b = im ? widen<A>(im[at]) : A(0);
        Pack<T, 2> out;
        out.at[0] = narrow<T>(a * phase.cosine - b * phase.sine);
        out.at[1] = narrow<T>(a * phase.sine + b * phase.cosine);
        reinterpret_cast<Pack<T, 2>*>(z)[at] = out;
    }
}

// re + i im = z phase
extern "C" __global__ void split_parts(const S* z, T* re, T* im, long long n, long long inner, int points, int turns) {
    for (long long at = grid_start(); at < n; at += grid_stride()) {
        Phase phase(at, inner, points, turns);
        Pack<S, 2> in = reinterpret_cast<const Pack<S, 2>*>(z)[at];
        A a = widen<A>(in.at[0]), b = widen<A>(in.at[1]);
        re[at] = narrow<T>(a * phase.cosine - b * phase.sine);
        im[at] = narrow<T>(a * phase.sine + b * phase.cosine);
    }
}
