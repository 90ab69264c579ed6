"""Keep the weights of checkpoints, in half precision, without the optimizers, in data/weights:
python .github/weights.py out/sudoku-6/scdm-s0.pt out/sudoku-6/mtp-causal-random-s0.pt"""
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent.parent / "data" / "weights"
FOLDER.mkdir(exist_ok=True)
for path in map(Path, sys.argv[1:]):
    saved = torch.load(path, map_location="cpu", weights_only=True)
    del saved["optimizers"]
    saved["model"] = {name: weight.half() for name, weight in saved["model"].items()}
    torch.save(saved, FOLDER / path.name)
    print(f"{FOLDER / path.name}: {(FOLDER / path.name).stat().st_size / 1024:.0f} KiB")
