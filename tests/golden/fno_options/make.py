"""Records outputs and gradients of neuraloperator's FNO with its options, in double precision, and the
errors of its own single precision.

Usage: python3 make.py  (needs torch and neuraloperator 2.0.0; OMP_NUM_THREADS=1 for the same bits)
"""
import json
import pathlib
import sys
from safetensors.torch import save_file
from neuralop.models import FNO

here = pathlib.Path(__file__).parent
sys.path.append(str(here.parent))
from peer import recording

CASES = {
    "fno2d_instance_norm": (dict(n_modes=(6, 6), norm="instance_norm"), (2, 2, 12, 10)),
    "fno2d_group_norm_preactivation": (dict(n_modes=(6, 6), norm="group_norm", preactivation=True), (2, 2, 12, 10)),
    "fno1d_group_norm": (dict(n_modes=(8,), norm="group_norm"), (2, 2, 15)),
    "fno2d_preactivation": (dict(n_modes=(6, 6), preactivation=True), (2, 2, 12, 10)),
    "fno2d_padding": (dict(n_modes=(6, 6), domain_padding=0.25), (2, 2, 12, 10)),
    "fno2d_padding_axes": (dict(n_modes=(6, 6), domain_padding=[0.5, 0.0]), (2, 2, 10, 9)),
    "fno2d_no_mlp": (dict(n_modes=(6, 6), use_channel_mlp=False), (2, 2, 12, 10)),
    "fno2d_skips_identity_linear": (dict(n_modes=(6, 6), fno_skip="identity", channel_mlp_skip="linear"), (2, 2, 12, 10)),
    "fno2d_skips_gate_none": (dict(n_modes=(6, 6), fno_skip="soft-gating", channel_mlp_skip=None), (2, 2, 12, 10)),
    "fno1d_skips_none_identity": (dict(n_modes=(8,), fno_skip=None, channel_mlp_skip="identity"), (2, 2, 14)),
    "fno2d_no_grid": (dict(n_modes=(6, 6), positional_embedding=None, stabilizer="tanh"), (2, 2, 12, 10)),
    "fno2d_separable": (dict(n_modes=(6, 6), separable=True), (2, 2, 12, 10)),
    "fno2d_max_modes": (dict(n_modes=(4, 6), max_n_modes=(8, 6)), (2, 2, 12, 10)),
    "fno2d_more_modes_than_points": (dict(n_modes=(12, 12), ), (2, 2, 8, 10)),
    "fno2d_odd_modes": (dict(n_modes=(5, 7)), (2, 2, 12, 11)),
    "fno3d_instance_norm": (dict(n_modes=(4, 4, 4), norm="instance_norm", n_layers=2), (1, 2, 6, 8, 7)),
    "fno1d_scaling": (dict(n_modes=(8,), resolution_scaling_factor=2), (2, 2, 12)),
    "fno1d_scaling_layers": (dict(n_modes=(8,), resolution_scaling_factor=[2, 0.5, 1.5]), (2, 2, 12)),
    "fno1d_output_shape": (dict(n_modes=(8,)), (2, 2, 12), (17,)),
    # With other grids in more dimensions, odd sizes, every mode of a grid.
    "fno2d_output_shape": (dict(n_modes=(6, 6)), (2, 2, 12, 10), (15, 16)),
    "fno2d_smaller_output_shape": (dict(n_modes=(6, 6), norm="group_norm"), (2, 2, 12, 14), (8, 9)),
    "fno2d_scaling": (dict(n_modes=(6, 6), resolution_scaling_factor=[1, 2, 0.5], fno_skip="identity"), (2, 2, 12, 10)),
    "fno2d_scaling_padding": (dict(n_modes=(6, 6), n_layers=1, resolution_scaling_factor=2, domain_padding=0.25), (2, 2, 12, 8)),
    "fno3d_output_shape": (dict(n_modes=(4, 4, 4), n_layers=2), (1, 2, 8, 6, 6), (12, 10, 8)),
    "fno2d_odd_resolution": (dict(n_modes=(6, 6)), (2, 2, 13, 11)),
    "fno3d_odd_resolution": (dict(n_modes=(5, 4, 4), n_layers=2), (1, 2, 7, 9, 5)),
    "fno1d_modes_resolution": (dict(n_modes=(16,)), (2, 2, 16)),
    "fno2d_modes_resolution": (dict(n_modes=(8, 10)), (2, 2, 8, 10)),
    "fno2d_modes_odd_resolution": (dict(n_modes=(9, 9), norm="instance_norm"), (2, 2, 9, 9)),
    "fno1d_instance_norm": (dict(n_modes=(8,), norm="instance_norm", preactivation=True), (2, 2, 15)),
    "fno3d_group_norm_padding": (dict(n_modes=(4, 4, 4), n_layers=2, norm="group_norm", domain_padding=0.25), (1, 2, 8, 6, 6)),
    "fno1d_padding_tanh": (dict(n_modes=(8,), domain_padding=0.25, stabilizer="tanh"), (2, 2, 15)),
    "fno3d_skips_identity_gate": (dict(n_modes=(4, 4, 4), n_layers=2, fno_skip="identity", channel_mlp_skip="soft-gating"), (1, 2, 6, 8, 6)),
    "fno2d_skips_linear_linear": (dict(n_modes=(6, 6), channel_mlp_skip="linear"), (2, 2, 12, 10)),
    "fno2d_skips_none_none": (dict(n_modes=(6, 6), fno_skip=None, channel_mlp_skip=None), (2, 2, 12, 10)),
    "fno1d_no_mlp_no_grid": (dict(n_modes=(8,), use_channel_mlp=False, positional_embedding=None), (2, 2, 14)),
    "fno2d_no_mlp_group_norm_preactivation": (dict(n_modes=(6, 6), use_channel_mlp=False, norm="group_norm", preactivation=True), (2, 2, 12, 10)),
    "fno2d_ratios": (dict(n_modes=(6, 6), lifting_channel_ratio=1.5, projection_channel_ratio=3, channel_mlp_expansion=0.7), (2, 2, 12, 10)),
    "fno2d_no_lifting_layer": (dict(n_modes=(6, 6), lifting_channel_ratio=0), (2, 2, 12, 10)),
    # Complex data.
    "fno1d_complex": (dict(n_modes=(6,), complex_data=True, n_layers=2), (2, 2, 14)),
    "fno2d_complex": (dict(n_modes=(4, 6), complex_data=True, n_layers=2), (2, 2, 10, 12)),
    "fno2d_complex_odd": (dict(n_modes=(5, 5), complex_data=True, n_layers=2, stabilizer="tanh", channel_mlp_skip="linear"), (2, 2, 9, 11)),
    "fno2d_complex_modes_resolution": (dict(n_modes=(8, 8), complex_data=True, n_layers=2, hidden_channels=3), (1, 2, 8, 8)),
    "fno2d_complex_identity_norm": (dict(n_modes=(4, 4), complex_data=True, n_layers=2, fno_skip="identity", channel_mlp_skip=None, norm="group_norm", domain_padding=0.25), (2, 2, 10, 12)),
    "fno2d_complex_preactivation": (dict(n_modes=(4, 6), complex_data=True, n_layers=2, preactivation=True, norm="instance_norm", positional_embedding=None), (2, 2, 10, 12)),
    "fno2d_complex_no_mlp": (dict(n_modes=(4, 6), complex_data=True, n_layers=2, use_channel_mlp=False, lifting_channel_ratio=0, fno_skip="soft-gating"), (2, 2, 10, 12)),
    "fno3d_complex": (dict(n_modes=(4, 4, 4), complex_data=True, n_layers=2, hidden_channels=3), (1, 2, 6, 5, 8)),
}


def main():
    for seed, (name, (kw, shape, *rest)) in enumerate(CASES.items()):
        kw = dict(dict(in_channels=2, out_channels=1, hidden_channels=4, n_layers=3), **kw)
        make = lambda: (FNO(**kw), (lambda model, x: model(x, output_shape=rest[0])) if rest else (lambda model, x: model(x)))
        tensors, errors = recording(make, shape, seed, kw.get("complex_data", False))
        tensors = {k: v for k, v in tensors.items() if "_metadata" not in k}
        meta = {"config": json.dumps(kw), "f32_rel_err": json.dumps(errors)}
        if rest:
            meta["output_shape"] = json.dumps(rest[0])
        save_file(tensors, here / f"{name}.safetensors", meta)
        print(name, errors)


main()
