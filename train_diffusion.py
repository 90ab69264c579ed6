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
    parser = latent.common_flags(__doc__, TASKS, "random", ["mdm", "sidm", "scdm"])
    parser.add_argument("--order", default="top-prob", choices=latent.POLICIES,
                        help="which candidate is decoded next [%(default)s]")
    parser.add_argument("--candidates", type=latent.at_least(1),
                        help="random masked positions to choose from [8, or half of the "
                        "answer if that is less; 1 in uniform order]")
    return parser


def jobs(task, args):
    """The models to train: every system with every seed."""
    answer = task.seq_len - task.prompt_len
    default = 1 if args.order == "uniform" else max(1, min(8, answer // 2))
    args.candidates = min(args.candidates or default, answer)
    for seed in args.seeds:
        for system in args.systems:
            only = {"joint": [answer - 1], "independent": [0]}.get(latent.SYSTEMS[system].sees)
            yield {"system": system, "window": None, "seed": seed,
                   "latents": only or latent.sweep(args, answer - args.candidates)}


def experiment(task, args):
    """Train one model, then decode with every number of latent tokens."""
    system = latent.SYSTEMS[args.system]
    model = latent.Transformer(task.vocab_size, task.seq_len, args.layers, args.heads, args.width,
                               args.seed).to(args.device)
    decode = partial(latent.decode, model, system, prompt_len=task.prompt_len, policy=args.order,
                     candidates=args.candidates, temperature=args.temperature)
    state = latent.train(task, args, model)
    latent.evaluate(task, args, model, state, decode, args.order, args.candidates)


if __name__ == "__main__":
    latent.main(flags(), TASKS, jobs, experiment)
