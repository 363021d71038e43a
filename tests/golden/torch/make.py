"""Writes small.pt for the tests of the reader: python3 make.py small.pt (needs torch)."""
import sys
import torch
base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) / 4
torch.save({"x": base > 2, "y": base, "turned": base.permute(2, 0, 1), "row": base[1, 1:], "half": base.half(),
            "wide": base.double() / 3, "long": torch.tensor([1, -2, 2**40]), "scalar": torch.tensor(2.5),
            "nested": [{"a": base[0, 0]}], "text": "no tensor", "rate": 0.5, 7: base[0, :, 0],
            "parameter": torch.nn.Parameter(base[0]), "empty": torch.zeros(0, 3)}, sys.argv[1])
