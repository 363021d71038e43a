"""Records outputs and gradients of neuraloperator 2.0.0's FNO with its options, in double precision.

Usage: python3 make.py OUT_DIR  (needs torch and neuraloperator 2.0.0)

Axes but the last have even sizes: this release unshifts odd ones by one frequency. Of the cases with
another output grid only those in one dimension are recorded: in more, the release misplaces negative
frequencies.
"""
import json, sys, torch
from safetensors.torch import save_file
import neuralop.layers.spectral_convolution as sc
from neuralop.models import FNO

# The library hard-codes single precision complex buffers.
torch.set_default_dtype(torch.float64)


class DoubleTorch:
    """torch with `cfloat` meaning double precision."""
    def __getattr__(self, name):
        return torch.cdouble if name == "cfloat" else getattr(torch, name)


sc.torch = DoubleTorch()

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
}


def main(out):
    for seed, (name, (kw, shape, *rest)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        kw = dict(dict(in_channels=2, out_channels=1, hidden_channels=4, n_layers=3), **kw)
        model = FNO(**kw).double()
        state = {k: v for k, v in model.state_dict().items() if k != "_metadata"}
        with torch.no_grad():
            for p in model.parameters():
                if (p == 1).all() or (p == 0).all():
                    p.add_(0.3 * torch.randn_like(p))
                p.copy_(p.to(torch.complex64 if p.is_complex() else torch.float32).to(p.dtype))
        x = torch.randn(*shape).float().double().requires_grad_()
        y = model(x, output_shape=rest[0]) if rest else model(x)
        c = torch.randn_like(y).float().double()
        (y * c).sum().backward()
        real = lambda t: (torch.view_as_real(t) if t.is_complex() else t).detach().contiguous()
        tensors = {"in/x": real(x).float(), "in/cotangent": c.float(), "f64/out": real(y), "f64/grad_in/x": real(x.grad)}
        for k, p in model.named_parameters():
            tensors["param/" + k] = real(p).float()
            tensors["f64/grad_param/" + k] = real(p.grad)
        config = {k: (list(v) if isinstance(v, tuple) else v) for k, v in kw.items()}
        meta = {"config": json.dumps(config)}
        if rest:
            meta["output_shape"] = json.dumps(list(rest[0]))
        save_file(tensors, f"{out}/{name}.safetensors", meta)
        print(name, sum(t.numel() * t.element_size() for t in tensors.values()))


main(sys.argv[1])
