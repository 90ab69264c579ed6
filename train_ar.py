"""Train autoregressive models, without and with latent tokens, and sweep their number.

    AR       next-token prediction: no latent tokens
    MTP      multi-token prediction: a window of masked tokens, the first of which is decoded and
             the others are latent; with a random window one model serves every window;
             mtp-causal is its variant in which known tokens do not see the window or what comes
             after them, so that decoding can cache them; mtp-cuts is the same model, trained at
             several cuts in one pass, which share the known tokens
    control  the same window, but only its first token is trained

`python train_ar.py` does it for the generation of 6x6 Sudoku boards.
"""
from functools import partial

import latent
from data import TASKS


def flags():
    """The flags of both scripts, and the windows."""
    parser = latent.common_flags(__doc__, TASKS, ["ar", "mtp", "mtp-causal", "mtp-cuts", "control"],
                                 ["ar", "mtp"])
    parser.add_argument("--windows", nargs="+", default=["random"], metavar="W",
                        type=latent.at_least(1, words=["all", "random"]),
                        help="windows to train MTP and the control with, one model for each: "
                        "random (from 1 to all, drawn for each batch) [random], a number, or all")
    return parser


def jobs(task, args):
    """The models to train: every system with every window and every seed."""
    most = task.seq_len - task.prompt_len
    windows = [most if w == "all" else w for w in args.windows]
    for w in windows:
        if w != "random" and w > most:
            raise latent.RunError(f"--windows: 1 to {most}, all or random, not {w}")
    return [{"system": system, "window": w, "seed": seed} for seed in args.seeds
            for system in args.systems for w in ([None] if system == "ar" else windows)]


def experiment(task, args):
    """Train one system with one seed, then evaluate it with every number of latent tokens."""
    model = latent.new_model(task, args)
    causal = args.system in latent.CACHEABLE
    is_random, most = args.window == "random", task.seq_len - task.prompt_len
    sweep = args.latents if is_random else [(args.window or 1) - 1]

    def objective(tokens, rng):
        if args.system == "ar":
            return latent.next_token(tokens, task.prompt_len, model.mask)
        window = rng.integers(1, most, endpoint=True) if is_random else args.window
        if args.system == "mtp-cuts":
            return latent.multi_token_cuts(tokens, task.prompt_len, model.mask, rng, window)
        return latent.multi_token(tokens, task.prompt_len, model.mask, rng, window,
                                  args.system != "control", causal)

    def decode(tokens, n_latent, generator, on_step=None):
        window = 0 if args.system == "ar" else n_latent + 1
        return latent.decode_left_to_right(model, tokens, task.prompt_len, window, args.greedy,
                                           generator, causal, on_step)

    def nats(tokens, rng, n_latent):
        if args.system == "ar":
            return latent.next_token_nats(model, tokens, task.prompt_len)
        return latent.multi_token_nats(model, tokens, task.prompt_len, n_latent + 1, causal)

    training = latent.train(task, args, model, objective, partial(decode, n_latent=sweep[-1]))
    records = []
    for k in sweep:
        measured = latent.held_out_mean(task, args, partial(nats, n_latent=k))
        records.append(latent.evaluate(task, args, model, k, partial(decode, n_latent=k), measured,
                                       training))
    return records


if __name__ == "__main__":
    latent.main(flags(), TASKS, jobs, experiment)
