"""Train autoregressive models, without and with latent tokens, and sweep their number.

    AR       next-token prediction: no latent tokens
    AR+MTP   multi-token prediction: a window of masked tokens, the first of which is decoded and
             the others are latent; with a random window one model serves every window;
             mtp-causal is its variant in which known tokens do not see the window or what comes
             after them, so that decoding can cache them
    control  the same window, but only its first token is trained

`python train_ar.py` does it for Latin squares of which some cells are given: 3 to 7 minutes on
one of two CPU cores; expect about 20 % right answers of AR, 4 to 36 % of AR+MTP.
"""
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


def models(task, args, settings):
    """Every system with every window and every seed: the recipe of a model, and how to decode."""
    answer = task.seq_len - task.prompt_len
    named = {"random": "random", "all": answer}
    windows = [named.get(w) or min(w, answer) for w in args.windows]
    for seed in args.seeds:
        for system in args.systems:
            shifted = latent.SYSTEMS[system].shifted
            for window in [None] if shifted else dict.fromkeys(windows):
                if shifted:
                    latents = [0]
                elif window == "random":
                    latents = latent.sweep(args.latents, answer - 1)
                else:
                    latents = [window - 1]
                recipe = latent.Recipe(system, window, seed, **settings)
                yield recipe, [{"n_latent": k} for k in latents]


if __name__ == "__main__":
    latent.main(flags(), TASKS, models)
