"""Every table of README.md and .github/RESULTS.md is made from .github/records.jsonl.

    python .github/tables.py                    write the tables between their marker comments
    python .github/tables.py --check            say what differs, status 1 (for .ci/run)
    python .github/tables.py --collect FOLDER VARIANT COMMIT    add a folder's measurements first

A marker, <!-- table dial task=sudoku -->, names a function below and what its records must have
(variant "": the scripts as they are; a,b: one of both). Of measurements made in the same way the
last counts. ± is the standard error over seeds, which all solve the same test puzzles, of one seed
the binomial one.
"""
import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from latent import Recipe  # noqa: E402

TITLES = {"ar": "AR", "mtp": "AR+MTP", "mtp-causal": "AR+MTP causal", "control": "control",
          "control-causal": "control causal", "mdm": "MDM", "sidm": "SIDM", "scdm": "SCDM",
          "scdm-causal": "SCDM causal"}
HOW = ["variant", "experiment", *Recipe._fields, "policy", "candidates", "n_latent", "samples",
       "step", "kind", "k", "chain"]
TASKS = {"5×5 puzzles": {"task": "latin-puzzle", "size": "5-list"},
         "6×6 boards": {"task": "sudoku", "size": "6"}}
CLAIMS = [("C1: without joint prediction", "mdm", "sidm"), ("C2: no latent tokens to all", "scdm",
          "scdm"), ("C3: latent tokens for AR", "ar", "mtp"), ("C4: none to all", "mtp", "mtp")]
ARMS = ["none", "next", "near", "apart", "elsewhere", "latent"]         # of elsewhere.py


def load():
    """All records, flat, and of those made in the same way the last."""
    found = {}
    for line in (HERE / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        record |= record.pop("model") | record.pop("decoding", {})
        found[tuple(record.get(name) for name in HOW)] = record
    return list(found.values())


def select(records, **wanted):
    """The records that have what is wanted; "a,b" is one of both."""
    wanted = {"variant": "", "experiment": None} | wanted
    return [r for r in records if all(str(r.get(name)) in str(value).split(",")
                                      for name, value in wanted.items())]


def grouped(records, *names):
    groups = defaultdict(list)
    for record in records:
        groups[tuple(record.get(name) for name in names)].append(record)
    return groups


def table(head, rows):
    """Lines of a table in Markdown: the first column to the left, the others to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def with_error(values, samples=None):
    error = np.std(values, ddof=1) / len(values) ** 0.5 if values[1:] else (
        values[0] * (100 - values[0]) / samples) ** 0.5
    digits = 1 if samples else 2
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


def level(nats):
    """Of one seed without an error, which would be that of the puzzles."""
    return with_error(nats) if nats[1:] else "".join(f"{x:.2f}" for x in nats)


def title(record):
    window = f", window {record['window']}" if type(record["window"]) is int else ""
    variant = f", {record['variant']}" if record["variant"] else ""
    return TITLES[record["system"]] + window + variant


def dial(records):
    """All systems and numbers of latent tokens, in random order (or from the left) and top-prob."""
    rows = []
    for _, of_model in grouped(records, "variant", "system", "window").items():
        most = {policy: max(r["n_latent"] for r in group)
                for (policy,), group in grouped(of_model, "policy").items()}
        named = defaultdict(list)
        for r in of_model:
            k = r["n_latent"]
            named["all" if k == most[r.get("policy")] > 0 else k].append(r)
        for k, group in named.items():
            row = [title(group[0]), k]
            for order in "random", "top-prob":
                seeds = [r for r in group if r.get("policy", "random") == order]
                assert len({r["seed"] for r in seeds}) == len(seeds), "runs are mixed"
                row += [""] * 3 if not seeds else [
                    with_error([100 * r["accuracy"] for r in seeds], seeds[0]["samples"]),
                    f"{np.mean([r['nats'] - (r['floor_nats'] or 0) for r in seeds]):.2f}",
                    seeds[0]["forward_tokens"]]
            place, seeds = list(TITLES).index(group[0]["system"]), {r["seed"] for r in group}
            rows.append([place, *row, len(seeds)])
    rows.sort(key=lambda row: (row[0], row[1], 10**6 if row[2] == "all" else row[2]))
    head = ["system", "latent tokens", "right, %", "nats", "forward tokens",
            "top-prob: right, %", "nats", "forward tokens", "seeds"]
    return table(head, [row[1:] for row in rows])


def claims(records):
    """The four claims, two columns for each task: in random order and in top-prob order."""
    rows = []
    for text, one, two in CLAIMS:
        row = [text, " → ".join(dict.fromkeys(TITLES[name] for name in (one, two)))]
        for wanted in TASKS.values():
            for order in "random", "top-prob":
                ends = []
                for system, end in (one, min if one == two else max), (two, max):
                    found = [r for r in select(records, system=system, **wanted)
                             if r.get("policy", order) == order and type(r["window"]) is not int]
                    k = end(r["n_latent"] for r in found)
                    ends.append(np.mean([100 * r["accuracy"] for r in found if r["n_latent"] == k]))
                same = two == "mtp" and order == "top-prob"      # from the left: one order
                row.append("" if same else "{:.0f} → {:.0f}".format(*ends))
        rows.append(row)
    head = [f"{name}{order}" for name in TASKS for order in ("", ", top-prob")]
    return table(["", "", *head], rows)


def orders(records):
    """Right answers in %, by the policy and the number of its candidates."""
    hows = sorted({(r["policy"], r["candidates"]) for r in records},
                  key=lambda how: (how[0] == "margin", how[1]))
    rows = []
    for (system,), of_system in grouped(records, "system").items():
        for latents in 0, "all":
            row = [TITLES[system], latents]
            for how in hows:
                group = [r for r in of_system if (r["policy"], r["candidates"]) == how]
                k = max((r["n_latent"] for r in group), default=0) if latents else 0
                found = [100 * r["accuracy"] for r in group if r["n_latent"] == k]
                right = found and bool(k) == bool(latents)
                row.append(with_error(found, group[0]["samples"]) if right else "")
            if any(row[2:]):
                rows.append(row)
    names = ["random" if policy == "random" else f"{policy} of {n}" for policy, n in hows]
    return table(["system", "latent tokens", *names], rows)


def kinds(records):
    """latents.py: nats without latent tokens, the change with k of one kind, nats with all."""
    numbers = [1, 2, 4, 8, 16, "all"]
    rows = []
    for (task, kind), group in sorted(grouped(records, "task", "kind").items()):
        at = {k: found for (k,), found in grouped(group, "k").items()}
        at["all"] = at[max(at)] if max(at) else []
        row = [task, kind, level([r["nats"] for r in at[0]])]
        for k in numbers:
            found = at.get(k, [])
            row.append(with_error([-r["less"] for r in found]) if found[1:] else "".join(
                f"{-r['less']:.2f} ± {r['less_error']:.2f}" for r in found))
        rows.append([*row, level([r["nats"] for r in at["all"]]), len(at[0])])
    return table(["task and model", "latent tokens", "nats with none", *numbers,
                  "nats with all", "seeds"], rows)


def arms(records):
    """elsewhere.py: nats of an answer, and of the cells of latent tokens."""
    groups, rows = grouped(records, "kind"), []
    for arm in ARMS:
        found = groups[arm,]
        row = [arm, with_error([100 * r["accuracy"] for r in found], found[0]["samples"])]
        for name in "nats", "first_nats", "further_nats":
            row.append(level([r[name] for r in found if name in r]))
        rows.append([*row, len(found)])
    return table(["model", "right, %", "nats of an answer", "of the first latent token's cell",
                  "of the others'", "seeds"], rows)


def chains(records):
    """deadends.py: how many boards the 26th token loses, by what decides it."""
    names = ["column 4", "column 5", "column 6", "longer chain", "nothing"]
    rows = []
    for (*_, k), group in grouped(records, "system", "window", "k").items():
        row = [title(group[0]), k]
        for name in names:
            lost, of = (sum(r[x] for r in group if r["chain"] == name) for x in ("lost", "of"))
            row.append(f"{lost} of {of} ({100 * lost / max(1, of):.0f} %)")
        rows.append(row)
    return table(["system", "latent tokens", *names], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--collect", nargs=3, metavar=("FOLDER", "VARIANT", "COMMIT"))
    args = parser.parse_args()
    if args.collect:
        folder, variant, commit = args.collect
        with (HERE / "records.jsonl").open("a") as file:
            for path in sorted(Path(folder).glob("*.jsonl")):
                for line in path.read_text().splitlines():
                    record = {"variant": variant, "commit": commit, **json.loads(line)}
                    file.write(json.dumps(record) + "\n")
    records = load()

    def fill(match):
        name, *wanted = match[1].split()
        chosen = records if name == "claims" else select(
            records, **dict(pair.split("=") for pair in wanted))
        return f"<!-- table {match[1]} -->\n\n{globals()[name](chosen)}\n\n<!-- end -->"

    for path in HERE.parent / "README.md", HERE / "RESULTS.md":
        text = path.read_text()
        new = re.sub(r"<!-- table (.*?) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)
        if new != text:
            if args.check:
                sys.exit(f"{path}: a table is not that of the records; python .github/tables.py")
            path.write_text(new)
