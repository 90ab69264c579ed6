"""Draw accuracy and nats over training examples, for every system in one or more result folders.

A model that `--resume` trains on with more --steps is evaluated at the end of each budget:

    for steps in 3000 8000 20000; do
        python train_ar.py --task zebra --batch-size 128 --steps $steps --resume
        python train_diffusion.py --task zebra --batch-size 128 --steps $steps --resume
    done
    python .github/curves.py out/zebra-3x3

The figure is curves.png in the last folder. Dashed lines are a dial's end without latent tokens.
"""
import argparse
import json
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import latent  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folders", nargs="+", type=Path)
rows = []
for folder in parser.parse_args().folders:
    records = json.loads(next(folder.glob("*.json")).read_text())["records"]
    rows += latent.summary(argparse.Namespace(**next(iter(records.values())), out=folder))
rows.sort(key=lambda row: row["step"])
loss = "nats" if math.isnan(rows[0]["nats_floor"]) else "excess"                # as latent.draw
figure = Figure(figsize=(12, 4), layout="constrained")
for panel, y in zip(figure.subplots(1, 2), ["accuracy", loss]):
    for name in dict.fromkeys(row["name"] for row in rows):
        latents = [row["n_latent"] for row in rows if row["name"] == name]
        for k in sorted({min(latents), max(latents)}):
            curve = [row for row in rows if (row["name"], row["n_latent"]) == (name, k)]
            panel.errorbar([row["step"] * row["batch_size"] for row in curve],
                           [row[y] for row in curve],
                           [row["error"] for row in curve] if y == "accuracy" else None, capsize=3,
                           fmt="o-" if k == max(latents) else "o--", label=f"{name}, {k} latent",
                           color=latent.SYSTEMS[curve[0]["system"]].color)
    panel.set(xscale="log", xlabel="training examples", ylabel=y.replace("excess", "excess nats"))
figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", frameon=False)
figure.savefig(folder / "curves.png", dpi=100)
print(f"The figure is {folder / 'curves.png'}")
