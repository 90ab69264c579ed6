"""Measure training and decoding on a device: `python .github/bench.py [cuda | mps | cpu]`.

Training steps a second at the default size, on CUDA also at a GPU's (6 blocks x width 256, batch
512, side 9), with fresh puzzles and with always the same ones, and with torch.compile, beside a
plain GPT of torch's own modules; their share of the device's rate in large matrix products;
milliseconds a board over forward tokens for 1,024 boards at once. A few minutes.
"""
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import latent  # noqa: E402
import train_diffusion  # noqa: E402
from data import TASKS  # noqa: E402

args = train_diffusion.flags().parse_args(["--device", sys.argv[1]] if sys.argv[1:] else [])
DEVICE, CUDA = args.device, args.device == "cuda"


def seconds(work, repeat):
    """Of one call of `work`, once the device has done all of them; the first call is not timed."""
    for n in (1, repeat):
        started = time.time()
        for _ in range(n):
            result = work()
        result.sum().item()                                                 # waits for the device
    return (time.time() - started) / repeat


class Clock:
    """Stands in for the progress bar, and notes when each step begins."""
    stamps = []

    def __init__(self, batches, *_, **__):
        self.batches = batches

    def __iter__(self):
        self.stamps.clear()
        for drawn in self.batches:
            self.stamps.append(time.time())
            yield drawn

    def set_postfix_str(self, text):
        pass


def train_speed(task, name, **flags):
    """Steps a second of latent.train, from the end of step 50 to that of step 100 (after each of
    which it waits for the device), and floating-point operations a step."""
    with tempfile.TemporaryDirectory() as folder:
        window = "random" if name.startswith("mtp") else None
        job = dict(system=name, window=window, seed=0, steps=101, bar=0, size=task.side,
                   path=Path(folder) / "model.pt")
        job = type(args)(**vars(args) | flags | job)
        model = latent.Transformer(task.vocab_size, task.seq_len, job.layers, job.heads,
                                   job.width).to(DEVICE)
        with mock.patch.object(latent, "tqdm", Clock):
            latent.train(task, job, model)
    weights = sum(w.numel() for w in model.blocks.parameters()) + model.output.weight.numel()
    pairs = 2 * job.layers * task.seq_len * job.width           # scores and values, for each token
    speed = 50 / (Clock.stamps[100] - Clock.stamps[50])
    return speed, 6 * job.batch_size * task.seq_len * (weights + pairs)


def plain_speed(task, layers, heads, width, batch_size, **_):
    """Steps a second of a GPT of torch's own modules, trained by AdamW on the same boards."""
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True,
                                       norm_first=True)
    model = nn.Sequential(nn.Embedding(task.vocab_size, width),
                          nn.TransformerEncoder(layer, layers, enable_nested_tensor=False),
                          nn.Linear(width, task.vocab_size)).to(DEVICE)
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(task.vocab_size, (batch_size, task.seq_len), device=DEVICE)

    def step():
        with torch.autocast(DEVICE, HALF, enabled=HALF != torch.float32):
            loss = nn.functional.cross_entropy(model(tokens).transpose(1, 2), tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        return loss
    return 1 / seconds(step, 50)


def same_puzzles(puzzles, n, rng, split):
    return puzzles


if __name__ == "__main__":                        # processes that draw batches import this file
    HALF = torch.bfloat16 if CUDA and torch.cuda.is_bf16_supported(False) else torch.float32
    large = torch.randn(4096 if CUDA else 1024, 4096 if CUDA else 1024, device=DEVICE, dtype=HALF)
    rate = 2 * len(large)**3 / seconds(lambda: large @ large, 20)
    name = torch.cuda.get_device_name() if CUDA else f"{DEVICE}, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}: large products {rate / 1e12:.2f} TFLOP/s, {HALF}")
    shapes = [("6", dict(layers=3, heads=4, width=64, batch_size=64)),
              ("9", dict(layers=6, heads=8, width=256, batch_size=512))]
    for size, shape in shapes if CUDA else shapes[:1]:
        task, same_task = TASKS["sudoku"](size), TASKS["sudoku"](size)
        puzzles = task.batch(shape["batch_size"], np.random.default_rng(0), "train")
        same_task.batch = partial(same_puzzles, puzzles)          # what drawing costs is left out
        print(f"\nside {size}, {shape}\n{'':12}{'steps/s':>9}{'same puzzles':>14}{'compiled':>10}"
              f"{'of large products':>19}")
        for system in latent.SYSTEMS:
            speed, work = train_speed(task, system, **shape)
            same = train_speed(same_task, system, **shape)[0]
            compiled = float("nan")
            if CUDA and system == "scdm":
                compiled = train_speed(task, system, compile=True, **shape)[0]
            print(f"{system:12}{speed:9.1f}{same:14.1f}{compiled:10.1f}{speed * work / rate:19.2%}")
        print(f"{'plain GPT':12}{'':9}{plain_speed(task, **shape):14.1f}")

    task = TASKS["sudoku"]("6")
    model = latent.Transformer(task.vocab_size, task.seq_len, 3, 4, 64).to(DEVICE)
    boards = torch.zeros(1024, task.seq_len, dtype=torch.long, device=DEVICE)
    print("\nside 6, 1,024 boards at once")
    print(f"{'':12}{'latent':>9}{'forward tokens':>16}{'ms a board':>12}")
    for system, k in [("ar", 0), ("mtp", 0), ("mtp", 35), ("mtp-causal", 35), ("sidm", 0),
                      ("scdm", 0), ("scdm", 28), ("scdm-causal", 0), ("scdm-causal", 28),
                      ("mdm", 35)]:
        spent = latent.decode(model, latent.SYSTEMS[system], boards[:2], 0, k)[1]
        took = seconds(lambda: latent.decode(model, latent.SYSTEMS[system], boards, 0, k)[0], 1)
        print(f"{system:12}{k:9}{spent:16}{1000 * took / len(boards):12.2f}")
