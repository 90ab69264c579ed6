"""Train masked diffusion models and sweep the number of latent tokens.

    MDM   joint prediction: all masked tokens see each other, all that are not decoded are latent
    SIDM  independent prediction: no latent tokens
    SCDM  semi-causal: one model, any number of latent tokens; scdm-causal is its variant in which
          known tokens, too, see only those known before them, so that decoding can cache them

`python train_diffusion.py` does it for the generation of 6x6 Sudoku boards.
"""
from functools import partial

import latent
from data import TASKS


def flags():
    """The flags of both scripts, and the order of decoding."""
    systems = ["mdm", "sidm", "scdm"]
    parser = latent.common_flags(__doc__, TASKS, [*systems, "scdm-causal"], systems)
    parser.add_argument("--order", default="top-prob", choices=["top-prob", "uniform"],
                        help="decode the most certain of some candidates [top-prob], or a random "
                        "position")
    parser.add_argument("--candidates", type=latent.at_least(1),
                        help="random positions to choose from in top-prob order; if not given 8 "
                        "or a quarter of the answer, whichever is less, so that many can be latent")
    return parser


def jobs(task, args):
    """The models to train: every system with every seed."""
    return [{"system": system, "window": None, "seed": seed}
            for seed in args.seeds for system in args.systems]


def experiment(task, args):
    """Train one system with one seed, then evaluate it with every number of latent tokens."""
    kind, most = latent.KIND[args.system], task.seq_len - task.prompt_len - 1
    causal = args.system in latent.CACHEABLE
    sweep = {"mdm": [most], "sidm": [0]}.get(args.system, args.latents)
    candidates = args.candidates or max(1, min(8, (most + 1) // 4))
    if args.order == "uniform":
        candidates = 1
    model = latent.new_model(task, args)

    def objective(tokens, rng):
        return latent.diffusion(tokens, task.prompt_len, model.mask, rng, causal)

    def decode(tokens, n_latent, generator, on_step=None):
        return latent.decode_any_order(model, tokens, task.prompt_len, kind, n_latent, candidates,
                                       args.greedy, generator, causal, on_step)

    def table_of(tokens, rng):
        return latent.diffusion_table(model, tokens, task.prompt_len, kind, rng, causal)

    training = latent.train(task, args, model, objective, partial(decode, n_latent=sweep[-1]))
    table = latent.held_out_mean(task, args, table_of)
    return [latent.evaluate(task, args, model, k, partial(decode, n_latent=k),
                            latent.diffusion_nats(table, kind, k), training, args.order, candidates)
            for k in sweep]


if __name__ == "__main__":
    latent.main(flags(), TASKS, jobs, experiment)
