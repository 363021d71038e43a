"""neuraloperator 2.0.0 in double precision, with its two known misplacements of frequencies put right.

Release 2.0.0 unshifts axes of odd length by one frequency too few (later versions use `ifftshift`), and for
another output grid it cuts or pads spectra at their end, which moves negative frequencies. Here both
are where they belong, so that recordings cover odd sizes and other grids in any dimension. What is not
touched by the two is computed by the library as it is. For complex data, that includes which
frequencies it keeps.

`recording(case)` runs a case in double and in single precision and returns the tensors of a golden file and
the errors of the single run.
"""
import sys
import torch
import neuralop.layers.complex as cx
import neuralop.layers.spectral_convolution as sc


class Fft:
    """torch.fft, with shifts that are undone and spectra that are moved to other grids by frequency."""
    def __init__(self):
        self.forward = False

    def __getattr__(self, name):
        return getattr(torch.fft, name)

    def rfftn(self, x, **kw):
        self.forward = True
        return torch.fft.rfftn(x, **kw)

    def fftn(self, x, **kw):
        self.forward = True
        return torch.fft.fftn(x, **kw)

    def fftshift(self, x, dim):
        shift, self.forward = (torch.fft.fftshift if self.forward else torch.fft.ifftshift), False
        return shift(x, dim=dim)

    def irfftn(self, x, s, dim, norm):
        for axis, n in list(zip(dim, s))[:-1]:
            m = x.shape[axis]
            if n != m:
                keep = min(n, m)
                x = torch.fft.fftshift(x, dim=axis).narrow(axis, m // 2 - keep // 2, keep)
                pad = [0, 0] * (-axis - 1) + [n // 2 - keep // 2, n - keep - (n // 2 - keep // 2)]
                x = torch.fft.ifftshift(torch.nn.functional.pad(x, pad), dim=axis)
        return torch.fft.irfftn(x, s=s, dim=dim, norm=norm)


class Torch:
    """torch, with `cfloat` meaning the precision of the run."""
    def __getattr__(self, name):
        if name == "cfloat":
            return torch.cdouble if torch.get_default_dtype() == torch.float64 else torch.complex64
        return getattr(torch, name)


cx.torch = sys.modules["neuralop.layers.resample"].torch = Torch()
sc.torch = Torch()
sc.torch.fft = Fft()


def complex_apply(real_func, imag_func, x, dtype=None):
    """As `apply_complex`, whose default argument is single precision for good."""
    return torch.complex(real_func(x.real) - imag_func(x.imag), real_func(x.imag) + imag_func(x.real))


cx.apply_complex = complex_apply


def real(t):
    return (torch.view_as_real(t) if t.is_complex() else t).detach().resolve_conj().contiguous()


def rounded(t, dtype=torch.float32):
    """The same values after single precision, in double."""
    narrow = torch.complex64 if t.is_complex() else dtype
    wide = torch.complex128 if t.is_complex() else torch.float64
    return t.detach().to(narrow).to(wide)


def run(make, state, x, c, dtype):
    """Output, input gradient and parameter gradients of one run."""
    torch.set_default_dtype(dtype)
    module, call = make()
    module.double() if dtype == torch.float64 else module.float()
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    complex_dtype = torch.cdouble if dtype == torch.float64 else torch.complex64
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
    x = x.to(complex_dtype if x.is_complex() else dtype, copy=True).requires_grad_()
    y = evaluate(call, module, x)
    c = c.to(complex_dtype if c.is_complex() else dtype)
    (y * c.conj()).sum().real.backward()
    after = {k: v.detach().clone() for k, v in module.named_buffers()}
    return y, x.grad, {k: p.grad for k, p in module.named_parameters()}, after


def evaluation(make, state, x):
    """The output of the module that is not in training."""
    torch.set_default_dtype(torch.float64)
    module, call = make()
    module.double().eval()
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
        return evaluate(call, module, x)


def evaluate(call, module, x):
    """The output, with skips on other grids in three dimensions in the precision of the run: they call `float`."""
    narrow = torch.Tensor.float
    if torch.get_default_dtype() == torch.float64:
        torch.Tensor.float = lambda t: t
    try:
        return call(module, x)
    finally:
        torch.Tensor.float = narrow


def error(got, want):
    got, want = real(got).double(), real(want)
    return (got - want).norm().item(), want.norm().item()


def recording(make, shape, seed, complex_data=False, batch_statistics=False):
    """`make()` gives a module and a function of it and the input."""
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    module, call = make()
    module.double()
    state = {}
    for name, p in module.named_parameters():
        p = p.detach()
        if (p == 1).all() or (p == 0).all():
            p = p + 0.3 * torch.randn_like(p)
        state[name] = rounded(p)
    for name, b in module.named_buffers():
        if name.endswith("running_mean"):
            state[name] = rounded(0.3 * torch.randn_like(b, dtype=torch.float64))
        elif name.endswith("running_var"):
            state[name] = rounded(0.5 + torch.rand_like(b, dtype=torch.float64))
        else:
            state[name] = b.detach()
    x = rounded(torch.randn(*shape, dtype=torch.complex128 if complex_data else torch.float64))
    with torch.no_grad():
        y = evaluate(call, module, x)
    c = rounded(torch.randn_like(y))
    y, gx, grads, after = run(make, state, x, c, torch.float64)
    y32, gx32, grads32, _ = run(make, state, x, c, torch.float32)
    size = max(error(g, g)[1] for g in grads.values())
    worst = max(e / max(n, 1e-4 * size) for e, n in (error(grads32[k], g) for k, g in grads.items()))
    e, n = error(gx32, gx)
    errors = {"out": error(y32, y)[0] / error(y32, y)[1], "grad_max": max(worst, e / n)}
    tensors = {"in/x": real(x).float(), "in/cotangent": real(c).float(), "f64/out": real(y), "f64/grad_in/x": real(gx)}
    for k, v in state.items():
        tensors["param/" + k] = real(v).float() if v.is_floating_point() or v.is_complex() else real(v)
    for k, g in grads.items():
        tensors["f64/grad_param/" + k] = real(g)
    if batch_statistics:
        tensors["f64/evaluation"] = real(evaluation(make, state, x))
        for k, v in after.items():
            if v.is_floating_point():
                tensors["f64/after/" + k] = real(v)
    return tensors, errors
