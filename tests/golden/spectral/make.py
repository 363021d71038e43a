"""Records outputs and gradients of neuraloperator's spectral convolution alone, in double precision, and the
errors of its own single precision.

Usage: python3 make.py  (needs torch and neuraloperator 2.0.0; OMP_NUM_THREADS=1 for the same bits)
"""
import json
import pathlib
import sys
from safetensors.torch import save_file
from neuralop.layers.spectral_convolution import SpectralConv

here = pathlib.Path(__file__).parent
sys.path.append(str(here.parent))
from peer import recording

# Arguments, input shape, then what happens after the constructor: other modes, another output grid.
CASES = {
    "1d": (dict(n_modes=(8,)), (2, 3, 15), {}),
    "1d_more_modes_than_points": (dict(n_modes=(20,)), (2, 3, 12), {}),
    "1d_output_shape": (dict(n_modes=(6,)), (2, 3, 12), dict(output_shape=(17,))),
    "1d_ortho_scaling": (dict(n_modes=(6,), fft_norm="ortho", resolution_scaling_factor=1.5), (2, 3, 12), {}),
    "1d_backward_output_shape": (dict(n_modes=(6,), fft_norm="backward"), (2, 3, 12), dict(output_shape=(9,))),
    "2d_more_modes_than_points": (dict(n_modes=(12, 14)), (2, 3, 9, 10), {}),
    "2d_reduced_modes": (dict(n_modes=(8, 8)), (2, 3, 12, 14), dict(n_modes=(5, 6))),
    "2d_max_modes": (dict(n_modes=(4, 6), max_n_modes=(8, 7)), (2, 3, 12, 14), {}),
    "2d_output_shape": (dict(n_modes=(6, 8)), (2, 3, 12, 14), dict(output_shape=(15, 20))),
    "2d_smaller_output_shape": (dict(n_modes=(5, 6)), (2, 3, 12, 14), dict(output_shape=(9, 8))),
    "2d_scaling": (dict(n_modes=(6, 8), resolution_scaling_factor=2), (2, 3, 9, 14), {}),
    "2d_ortho": (dict(n_modes=(6, 8), fft_norm="ortho"), (2, 3, 12, 14), {}),
    "2d_ortho_output_shape": (dict(n_modes=(6, 8), fft_norm="ortho"), (2, 3, 12, 14), dict(output_shape=(18, 15))),
    "2d_backward": (dict(n_modes=(6, 8), fft_norm="backward"), (2, 3, 11, 14), {}),
    "2d_separable_odd_ortho": (dict(n_modes=(5, 7), separable=True, fft_norm="ortho"), (2, 3, 13, 11), dict(output_shape=(14, 12))),
    "2d_no_bias": (dict(n_modes=(6, 8), bias=False), (2, 3, 12, 14), {}),
    "3d": (dict(n_modes=(4, 5, 6)), (1, 3, 7, 8, 9), {}),
    "3d_separable_output_shape": (dict(n_modes=(4, 4, 4), separable=True), (1, 3, 6, 7, 8), dict(output_shape=(9, 6, 7))),
    "2d_modes_resolution": (dict(n_modes=(8, 10)), (2, 3, 8, 10), {}),
}


def main():
    for seed, (name, (kw, shape, then)) in enumerate(CASES.items()):
        c_out = shape[1] if kw.get("separable") else 4
        then = dict(then)
        modes = then.pop("n_modes", None)

        def make():
            conv = SpectralConv(shape[1], c_out, **kw)
            if modes:
                conv.n_modes = modes
            return conv, lambda conv, x: conv(x, **then)

        tensors, errors = recording(make, shape, seed)
        meta = {"config": json.dumps(dict(kw, set_n_modes_after_init=modes)), "f32_rel_err": json.dumps(errors)}
        if then:
            meta["output_shape"] = json.dumps(then["output_shape"])
        save_file(tensors, here / f"{name}.safetensors", meta)
        print(name, errors)


main()
