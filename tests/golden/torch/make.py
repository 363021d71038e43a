"""Writes small.pt and darcy/*.pt beside itself, for the tests of the reader: python3 make.py (needs torch)."""
import pathlib
import torch
here = pathlib.Path(__file__).parent
base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) / 4
torch.save({"x": base > 2, "y": base, "turned": base.permute(2, 0, 1), "row": base[1, 1:], "half": base.half(),
            "wide": base.double() / 3, "long": torch.tensor([1, -2, 2**40]), "scalar": torch.tensor(2.5),
            "nested": [{"a": base[0, 0]}], "text": "no tensor", "rate": 0.5, 7: base[0, :, 0],
            "parameter": torch.nn.Parameter(base[0]), "empty": torch.zeros(0, 3)}, here / "small.pt")

# Files in the form of neuraloperator's Darcy data, with fields that are not a solution of anything.
(here / "darcy").mkdir(exist_ok=True)
for split, resolution, samples in ("train", 16, 6), ("test", 16, 3), ("test", 32, 3):
    at = (torch.arange(resolution) + 0.5) / resolution
    phase = torch.arange(samples)[:, None, None] + (3 if split == "test" else 0)
    wave = torch.sin(6 * at[:, None] + phase) * torch.cos(5 * at[None] - phase)
    torch.save({"x": wave > 0, "y": 0.01 * wave + 0.02}, here / "darcy" / f"darcy_{split}_{resolution}.pt")
