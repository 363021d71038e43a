"""Records neuraloperator's FNO of complex fields in training, in double precision: losses, gradients, and the
weights after three steps of both AdamWs; the losses of complex fields alone; torch's mean and deviation; and
complex arrays of numpy.

Release 2.0.0 squares differences without the modulus where p is 2, in LpLoss and in H1Loss: of complex tensors both
are complex numbers, which have no gradient. Here the first is LpLoss of real and imaginary part as a last
axis, and the second takes the moduli of H1Loss's own terms. LpLoss with p of 1 and 3 is as it is.

Usage: python3 make.py  (needs torch and neuraloperator 2.0.0; OMP_NUM_THREADS=1 for the same bits)
"""
import json
import pathlib
import sys
import numpy as np
import torch
from safetensors.torch import save_file
from neuralop.losses import H1Loss, LpLoss
from neuralop.models import FNO
from neuralop.training import AdamW

here = pathlib.Path(__file__).parent
sys.path.append(str(here.parent))
from peer import evaluate, real, rounded

CASES = {
    "fno1d": (dict(n_modes=(4,)), (2, 2, 10)),
    "fno2d": (dict(n_modes=(4, 4), stabilizer="tanh"), (2, 2, 6, 8)),
}


def l2(x, y):
    return LpLoss(d=x.ndim - 1, p=2).rel(torch.view_as_real(x.resolve_conj()), torch.view_as_real(y))


def h1_terms(x, y):
    loss = H1Loss(d=x.ndim - 2)
    return loss, *loss.compute_terms(x, y, loss.uniform_quadrature(x))


def h1(x, y):
    loss, x, y = h1_terms(x, y)
    size = lambda terms: sum(torch.sum(term.abs() ** 2, dim=-1) for term in terms) ** 0.5
    return (size([x[j] - y[j] for j in x]) / (size(y.values()) + loss.eps)).sum()


def train(kw, state, x, y, loss, optimiser, steps):
    model = FNO(**kw).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state[name])
    optimiser = optimiser(model.parameters(), lr=0.01, weight_decay=0.01)
    values, first = [], None
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss(evaluate(lambda model, x: model(x), model, x), y)
        value.backward()
        values.append(value.item())
        first = first or {k: p.grad.clone() for k, p in model.named_parameters()}
        optimiser.step()
    return values, first, dict(model.named_parameters())


def arrays():
    """Complex arrays as numpy writes them, each beside its real and imaginary parts."""
    z = np.random.default_rng(0).standard_normal((2, 3, 4, 2)).astype(np.float32)
    named = lambda name, z: {name: z, name + "_parts": np.stack([z.real, z.imag], axis=-1)}
    z = z[..., 0] + 1j * z[..., 1]
    files = named("c8", z) | named("c16", z.astype(np.complex128) / 3) | named("big_endian", z.astype(">c8"))
    np.savez(here / "arrays.npz", **files | named("fortran", np.asfortranarray(z)))


def main():
    arrays()
    torch.set_default_dtype(torch.float64)
    for seed, (name, (kw, shape)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        d = len(shape) - 2
        kw = dict(kw, in_channels=shape[1], out_channels=1, hidden_channels=3, n_layers=2, complex_data=True)
        state = {k: rounded(p) for k, p in FNO(**kw).double().named_parameters()}
        x, y = (rounded(torch.randn(shape[0], c, *shape[2:], dtype=torch.complex128)) for c in (shape[1], 1))
        tensors = {"in/x": real(x).float(), "in/y": real(y).float()}
        tensors |= {"param/" + k: real(p).float() for k, p in state.items()}
        dims = [0, *range(2, x.ndim)]
        tensors["f64/mean"] = real(torch.mean(x, dim=dims))
        tensors["f64/std"] = torch.std(x, dim=dims)
        for key, loss in ("l2", l2), ("h1", h1):
            values, grads, _ = train(kw, state, x, y, loss, torch.optim.AdamW, 1)
            tensors[f"f64/{key}"] = torch.tensor(values)
            tensors |= {f"f64/grad_{key}/{k}": real(g) for k, g in grads.items()}
        for key, optimiser in ("torch", torch.optim.AdamW), ("neuralop", AdamW):
            values, _, after = train(kw, state, x, y, l2, optimiser, 3)
            tensors[f"f64/losses_{key}"] = torch.tensor(values)
            tensors |= {f"f64/after_{key}/{k}": real(p) for k, p in after.items()}
        # The losses alone, of two fields on one grid.
        a, b = x[:, :1], y
        losses = {"lp2_rel_sum": l2, "h1_rel_sum": h1}
        for p in 1, 3:
            losses |= {f"lp{p}_rel_sum": LpLoss(d=d, p=p).rel, f"lp{p}_abs_mean": LpLoss(d=d, p=p, reduction="mean").abs}
        for key, loss in losses.items():
            leaf = a.clone().requires_grad_()
            value = loss(leaf, b).reshape(1)
            value.backward()
            tensors |= {"loss/" + key: value.detach(), "loss_grad/" + key: real(leaf.grad)}
        save_file(tensors, here / f"{name}.safetensors", {"config": json.dumps(kw)})
        print(name, {k: v.tolist() for k, v in tensors.items() if v.ndim == 1 and not k.startswith(("param", "f64/grad", "f64/after"))})


main()
