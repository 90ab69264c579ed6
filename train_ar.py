"""Train autoregressive models, without and with latent tokens, and sweep their number.

    AR       next-token prediction: no latent tokens
    AR+MTP   multi-token prediction: a window of masked tokens, the first of which is decoded and
             the others are latent; with a random window one model serves every window;
             mtp-causal is its variant in which known tokens do not see the window or what comes
             after them, so that decoding can cache them
    control  the same window, but only its first token is trained

`python train_ar.py` does it for the generation of 6x6 Sudoku boards.
"""
from functools import partial

import latent
from data import TASKS


def flags():
    """The flags of both scripts, and the windows."""
    parser = latent.common_flags(__doc__, TASKS, "left", ["ar", "mtp"])
    parser.add_argument("--windows", nargs="+", default=["random"], metavar="W",
                        type=latent.at_least(1, words=["all", "random"]),
                        help="windows to train AR+MTP with, one model for each: random (from 1 to "
                        "all, drawn for each batch) [random], a number, or all")
    return parser


def jobs(task, args):
    """The models to train: every system with every window and every seed."""
    answer = task.seq_len - task.prompt_len
    for seed in args.seeds:
        for system in args.systems:
            for window in args.windows:
                window = answer if window == "all" else window
                if latent.SYSTEMS[system].shifted:
                    window, latents = None, [0]
                elif window == "random":
                    latents = latent.sweep(args, answer - 1)
                elif window <= answer:
                    latents = [window - 1]
                else:
                    raise latent.RunError(f"--windows: 1 to {answer}, all or random, not {window}")
                yield {"system": system, "window": window, "seed": seed, "latents": latents}


def experiment(task, args):
    """Train one model, then decode with every number of latent tokens."""
    system = latent.SYSTEMS[args.system]
    model = latent.Transformer(task.vocab_size, task.seq_len, args.layers, args.heads, args.width,
                               args.seed).to(args.device)
    decode = partial(latent.decode, model, system, prompt_len=task.prompt_len,
                     temperature=args.temperature)
    state = latent.train(task, args, model)
    latent.evaluate(task, args, model, state, decode)


if __name__ == "__main__":
    latent.main(flags(), TASKS, jobs, experiment)
