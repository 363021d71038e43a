"""Records `ode_conv_node.safetensors`: logits, loss and gradients of a small classifier that solves three equations,
in double precision, and the errors of single precision, by PyTorch's autograd through torchdiffeq's fixed-step `rk4`.

    python3 ode_conv_node.py ode_conv_node.safetensors      (torch, torchdiffeq, safetensors)
"""
import json
import sys
import torch
import torch.nn.functional as nnf
import torchdiffeq
from safetensors.torch import save_file

CONFIG = dict(channels=3, image=[8, 12], batch=2, n_steps=2, n_classes=4)


def velocity(weights, biases):
    def at(t, y):
        idx = min(int(float(t) * len(weights)), len(weights) - 1)
        hidden = nnf.conv2d(y, weights[idx], biases[idx], padding=1).relu()
        return -nnf.conv_transpose2d(nnf.instance_norm(hidden), weights[idx], padding=1)
    return at


def classify(p, x, grid):
    def block(x, number):
        names = range(len(grid) - 1)
        field = velocity([p[f"f{number}.w.{i}"] for i in names], [p[f"f{number}.b.{i}"] for i in names])
        return torchdiffeq.odeint(field, x, grid, method="rk4")[-1]

    def layer(x, conv, norm, padding):
        x = nnf.conv2d(x, p[conv + ".weight"], p[conv + ".bias"], padding=padding)
        return nnf.instance_norm(x, weight=p[norm + ".weight"], bias=p[norm + ".bias"]).relu()

    x = block(layer(x, "stem", "n1", 1), 1)
    x = block(nnf.avg_pool2d(layer(x, "c1", "n3", 0), 2), 2)
    x = block(nnf.avg_pool2d(layer(x, "c2", "n4", 0), 2), 3)
    return nnf.linear(x.mean((2, 3)), p["head.weight"], p["head.bias"])


def main(path):
    torch.manual_seed(3)
    c, steps = CONFIG["channels"], CONFIG["n_steps"]
    shapes = {}
    for number, (conv, norm, width, fan, k) in enumerate(
            [("stem", "n1", c, 3, 3), ("c1", "n3", 2 * c, c, 1), ("c2", "n4", 4 * c, 2 * c, 1)], 1):
        shapes |= {conv + ".weight": (width, fan, k, k), conv + ".bias": (width,)}
        shapes |= {norm + ".weight": (width,), norm + ".bias": (width,)}
        for i in range(steps):
            shapes |= {f"f{number}.w.{i}": (width, width, 3, 3), f"f{number}.b.{i}": (width,)}
    shapes |= {"head.weight": (CONFIG["n_classes"], 4 * c), "head.bias": (CONFIG["n_classes"],)}
    params = {name: 0.15 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(CONFIG["batch"], 3, *CONFIG["image"], dtype=torch.float64)
    labels = [1, 3]

    def run(dtype):
        p = {name: value.clone().to(dtype).requires_grad_() for name, value in params.items()}
        grid = torch.linspace(0, 1, steps + 1, dtype=dtype)
        logits = classify(p, x.to(dtype), grid)
        loss = nnf.cross_entropy(logits, torch.tensor(labels))
        loss.backward()
        return logits.detach(), loss.detach(), {name: value.grad for name, value in p.items()}

    logits, loss, grads = run(torch.float64)
    arrays = {"in/x": x, "f64/out": logits, "f64/loss": loss.reshape(1)}
    for name, value in params.items():
        arrays |= {"param/" + name: value, "f64/grad/" + name: grads[name]}
    out32, _, grads32 = run(torch.float32)
    largest = max(grad.norm() for grad in grads.values())
    errors = {name: float((grads32[name] - grad).norm() / max(grad.norm(), 1e-4 * largest)) for name, grad in grads.items()}
    error = {"out": float((out32 - logits).norm() / logits.norm()), "grad_max": max(errors.values())}
    made = f"torch {torch.__version__}, torchdiffeq {torchdiffeq.__version__}, rk4"
    facts = {"config": json.dumps(CONFIG | {"labels": labels}), "made_by": made, "f32_rel_err": json.dumps(error)}
    save_file({name: value.contiguous() for name, value in arrays.items()}, path, metadata=facts)


main(sys.argv[1])
