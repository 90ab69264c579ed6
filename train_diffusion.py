"""Train masked diffusion models and sweep the number of latent tokens.

    MDM   joint prediction: all masked tokens see each other, all that are not decoded are latent
    SIDM  independent prediction: no latent tokens
    SCDM  semi-causal: one model, any number of latent tokens; scdm-causal is its variant in which
          known tokens, too, see only those known before them, so that decoding can cache them

`python train_diffusion.py` does it for Latin squares of which some cells are given: 5 to 10
minutes on one of two CPU cores; expect, in random order, about 45 % right answers of MDM, 12 of
SIDM, 7 to 23 of SCDM, and more than 90 % of all in top-prob order.
"""
import latent
from data import TASKS


def flags():
    """The flags of both scripts, and the order of decoding."""
    parser = latent.common_flags(__doc__, TASKS, "random", ["mdm", "sidm", "scdm"])
    parser.add_argument("--orders", nargs="+", default=["random", "top-prob"],
                        choices=latent.POLICIES, help="which candidate is decoded next: a random "
                        "one, or as some policy says [random top-prob]")
    parser.add_argument("--candidates", type=latent.at_least(1), help="random masked positions "
                        "that a policy chooses from [8, or half of the answer if that is less]")
    return parser


def models(task, args, settings):
    """Every system with every seed: the recipe of a model, and how to decode."""
    answer = task.seq_len - task.prompt_len
    most = min(args.candidates or max(1, min(8, answer // 2)), answer)
    for seed in args.seeds:
        for system in args.systems:
            sees = latent.SYSTEMS[system].sees
            decodings = []
            for policy in args.orders:
                candidates = 1 if policy == "random" else most
                if sees == "joint":
                    latents = [answer - 1]
                elif sees == "independent":
                    latents = [0]
                else:
                    latents = latent.sweep(args.latents, answer - candidates)
                decodings += [{"policy": policy, "candidates": candidates, "n_latent": k}
                              for k in latents]
            yield latent.Recipe(system, None, seed, **settings), decodings


if __name__ == "__main__":
    latent.main(flags(), TASKS, models)
