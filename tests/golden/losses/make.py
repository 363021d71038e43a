"""Records values and gradients of neuraloperator's losses in one and three dimensions, in double precision.

Usage: python3 make.py  (needs torch and neuraloperator 2.0.0)
"""
import math
import pathlib
import torch
from safetensors.torch import save_file
from neuralop.losses import H1Loss, LpLoss

here = pathlib.Path(__file__).parent
torch.set_default_dtype(torch.float64)


def variants(d):
    lp = lambda p, reduction, measure=1.0: LpLoss(d=d, p=p, reduction=reduction, measure=measure)
    open_ends = {f"periodic_in_{axis}": False for axis in "xyz"[:d]}
    return {
        "lp2_rel_sum": lp(2, "sum").rel,
        "lp2_rel_mean": lp(2, "mean").rel,
        "lp2_abs_mean": lp(2, "mean").abs,
        "lp1_rel_mean": lp(1, "mean").rel,
        "lp3_abs_sum": lp(3, "sum").abs,
        "lp2_abs_measure2pi": lp(2, "mean", 2 * math.pi).abs,
        "h1_rel_sum": H1Loss(d=d, reduction="sum").rel,
        "h1_abs_mean": H1Loss(d=d, reduction="mean").abs,
        "h1_rel_nonperiodic": H1Loss(d=d, reduction="mean", **open_ends).rel,
    }


for d, grid in (1, (15,)), (3, (6, 5, 7)):
    torch.manual_seed(d)
    x, y = (torch.randn(3, 2, *grid).float().double() for _ in range(2))
    tensors = {"in/x": x, "in/y": y}
    for name, loss in variants(d).items():
        leaf = x.clone().requires_grad_()
        value = loss(leaf, y).reshape(1)
        value.sum().backward()
        tensors["f64/" + name] = value.detach()
        tensors["f64/grad_in/" + name] = leaf.grad
    save_file(tensors, here / f"losses_{d}d.safetensors", {"config": "{}"})
    print(d, {k: v.item() for k, v in tensors.items() if v.numel() == 1})
