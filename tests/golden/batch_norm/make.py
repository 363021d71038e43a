"""Records neuraloperator's FNO with batch norm: a training pass with its gradients and the running statistics
behind it, and an evaluation before it.

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
    "fno1d": (dict(n_modes=(8,)), (3, 2, 15)),
    "fno2d": (dict(n_modes=(6, 6), preactivation=True), (3, 2, 12, 10)),
    "fno3d": (dict(n_modes=(4, 4, 4), n_layers=2), (2, 2, 6, 8, 6)),
    "fno2d_complex": (dict(n_modes=(4, 4), n_layers=2, complex_data=True), (2, 2, 8, 10)),
}


def main():
    for seed, (name, (kw, shape)) in enumerate(CASES.items()):
        kw = dict(dict(in_channels=2, out_channels=1, hidden_channels=4, n_layers=3, norm="batch_norm"), **kw)
        make = lambda: (FNO(**kw), lambda model, x: model(x))
        tensors, errors = recording(make, shape, seed, kw.get("complex_data", False), batch_statistics=True)
        save_file(tensors, here / f"{name}.safetensors", {"config": json.dumps(kw), "f32_rel_err": json.dumps(errors)})
        print(name, errors)


main()
