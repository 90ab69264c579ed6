"""Copy checkpoints to data/weights/TASK-SIZE, without the optimizers and in half precision:

    python .github/weights.py out/latin-puzzle-5-list/scdm-s0.pt

With --out data/weights/TASK-SIZE they can be watched and evaluated (--resume); training on starts with fresh optimizers.
"""
import sys
from pathlib import Path

import torch

for path in map(Path, sys.argv[1:]):
    saved = torch.load(path, map_location="cpu", weights_only=True)
    saved["optimizers"] = []
    saved["model"] = {name: weight.half() for name, weight in saved["model"].items()}
    folder = Path("data/weights", "{task}-{size}".format(**saved["settings"]))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(saved, folder / path.name)
