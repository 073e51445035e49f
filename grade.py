"""Grade the sampled answers: how many problems does each model solve, in how many seconds?

    python grade.py                       every model under out/ that has samples
    python grade.py --model teacher pure  only these

Reads   out/<name>/samples.jsonl and samples.json (sample.py), scores.jsonl (score.py)
Writes  out/results.json, for plot.py, and prints it as a table

*Coverage* with k samples (pass@k) is the share of problems of which at least one of k is right.
*Accuracy* is the share of which the one answer chosen from k is right: by majority, or by a vote
weighted with a judge's scores. A *round* is one sample of every problem.
"""
import functools
from pathlib import Path
from typing import NamedTuple

from common import (Parser, crc, folder_name, number, optional_json, own_teacher, read_jsonl,
                    require, run, write_json)

import numpy as np
from tqdm import tqdm

from verdict import extract_answer, groups, is_correct

SCORED = "best_of_n", "weighted"  # rules that take the time of a judge's scoring, too


# ---- votes
def leaders(ids, weights):
    """The id that leads after each sample, by the sum of weights so far: a list. An id is an
    answer, -1 for none (see verdict.groups). Ties go to the earliest."""
    totals, leader, found = {-1: -np.inf}, -1, []
    for i, weight in zip(ids, weights, strict=True):
        totals[i] = totals.get(i, 0) + weight
        if totals[i] >= totals[leader]:  # also if it led and has lost weight
            leader = max(totals, key=totals.get)  # the first of equals: dicts keep their order
        found.append(leader)
    return found


def alone(answers):
    """Ids with which every answer stands for itself."""
    return [-1 if answer is None else place for place, answer in enumerate(answers)]


def weighted_vote(answers, scores, group=groups):
    """The answer with the largest sum of scores, as it was first spelled; None if nobody answered.
    Ties go to the earliest."""
    ids = group(answers)
    winner = leaders(ids, scores)[-1] if ids else -1
    return answers[ids.index(winner)] if winner >= 0 else None


def majority_vote(answers):
    """The most frequent answer; None and ties as in weighted_vote."""
    return weighted_vote(answers, [1] * len(answers))


def best_of_n(answers, scores):
    """The answer with the highest score; None and ties as in weighted_vote."""
    return weighted_vote(answers, scores, alone)


# ---- k of n samples
def pass_at_k(n, c, k):
    """Chance that one of k samples is right, drawn from n of which c are right: a float.

    1 - C(n-c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374), as a product: no overflow.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got {n=}, {c=}, {k=}")
    return 1.0 if n - c < k else 1 - float(np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def vote_at_k(ids, right, weights):
    """Chance that the vote among k samples of a problem is right, for k = 1, ..., n: (n,).

    The mean over runs of k consecutive samples, which begin at every sample for k up to 16, at
    every second up to 32, at every fourth up to 64, and so on.
    """
    n = len(ids)
    hits, runs = np.zeros((2, n))
    is_right = dict(zip(ids, right))
    for start in range(n):
        end = start + 16 * (start & -start) if start else n  # x & -x: the power of two in x
        votes = [is_right[i] for i in leaders(ids[start:end], weights[start:end])]
        hits[:len(votes)] += votes
        runs[:len(votes)] += 1
    return hits / runs


def chances(records):
    """{rule: (n,)}: a problem's chance to be right with k = 1, ..., n of its n samples."""
    n, answers = len(records), [extract_answer(r["completion"]) for r in records]
    ids, right = groups(answers), [is_correct(answer, records[0]["gold"]) for answer in answers]
    found = dict(coverage=[pass_at_k(n, sum(right), k) for k in range(1, n + 1)],
                 majority=vote_at_k(ids, right, [1] * n))
    if "score" in records[0]:
        scores = [r["score"] for r in records]
        found |= dict(best_of_n=vote_at_k(alone(answers), right, scores),
                      weighted=vote_at_k(ids, right, scores))
    return found


@functools.cache
def resamples(count, seed):
    """1,000 random samples of `count` problems, as the share that each has: (1000, count). The same
    for all models, so that intervals of differences are paired."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), 1000) / count


def with_interval(key, values, seed):
    """{key, key_low, key_high}: means over problems of (P, ...), their 95% bootstrap intervals."""
    ends = np.quantile(resamples(len(values), seed) @ values, (0.025, 0.975), axis=0)
    return {key + end: np.where(np.isnan(found), None, found).tolist()  # JSON has no nan
            for end, found in zip(("", "_low", "_high"), (values.mean(0), *ends))}


# ---- models on the clock
class Curve(NamedTuple):
    """A staircase in time: from seconds[i] on, the P problems have the chances values[:, i]."""
    seconds: np.ndarray  # (M,) ascending, measured since sampling began
    values: np.ndarray  # (P, M)

    def at(self, moments):
        """The chances at some moments (...), nan before the first round: (P, ...)."""
        steps = np.searchsorted(self.seconds, moments, side="right")
        return np.insert(self.values, 0, np.nan, axis=1)[:, steps]

    def when(self, value):
        """The first moment at which the mean is at least `value`, inf for never."""
        return min(self.seconds[self.values.mean(0) > value - 1e-9], default=np.inf)


def grade(problems):
    """{rule: Curve} of a model from P lists of the n records of a problem, a step per round."""
    def complete(key):  # (n,) the moments at which every problem had its first k records
        return np.maximum.accumulate([max(r[key] for r in records) for records in zip(*problems)])
    found = [chances(records) for records in tqdm(problems, leave=False, disable=None)]
    return {rule: Curve(complete("seconds") + (complete("scored") if rule in SCORED else 0),
                        np.array([c[rule] for c in found])) for rule in found[0]}


def best_rule(curves):
    """The Curve of whichever of some rules, as Curves, has the highest mean at each moment."""
    moments = np.unique(np.concatenate([curve.seconds for curve in curves]))  # (M,)
    values = np.stack([curve.at(moments) for curve in curves])  # (rules, P, M)
    best = np.nan_to_num(values.mean(1), nan=-1).argmax(0)  # (M,)
    return Curve(moments, values[best, :, np.arange(len(moments))].T)


def ahead(teacher, student, seed):
    """Where a student's Curve is ahead of its teacher's: an entry of results.json, leads in points.

    They are compared when the teacher has just completed a round: just before, the student would
    look too good. Rounds that end in the next 1% of the time count as done: the first rows of a
    batch end almost together. The interval does not account for picking the best moment.
    """
    moments = teacher.seconds  # (M,)
    leads = 100 * (student.at(moments) - teacher.at(1.01 * moments))  # (P, M)
    means = np.nan_to_num(leads.mean(0), nan=-np.inf)  # nan before the student's first round
    edges = np.flatnonzero(np.diff([0, *(means > 1e-9), 0])).reshape(-1, 2)  # of stretches ahead
    best = means.argmax()
    speeds = [speed for value in teacher.values.mean(0) if value > 0  # no ratio to 0 seconds
              if (speed := teacher.when(value) / (student.when(value) or np.inf)) > 0]
    return dict(budgets=moments[edges - [0, 1]].tolist(), seconds=float(moments[best]),
                times_as_fast=[min(speeds), max(speeds)] if speeds else None,
                **with_interval("best_lead", leads[:, best], seed))


# ---- first reading ends here: the table, files, options ----
def front(curves, teachers, budgets, seed):
    """A row per time budget: the best of {name: Curve}, the values of all that have completed a
    round, and the lead of the best student over its teacher, in points."""
    rows = []
    for budget in budgets:
        at = {name: c.at(budget) for name, c in curves.items() if c.seconds[0] <= budget}  # (P,)
        ranks = sorted(at, key=lambda name: -at[name].mean().round(9))  # ties: the first listed
        student = next((name for name in ranks if teachers.get(name) in at), None)
        lead = at[student] - at[teachers[student]] if student else np.nan * at[ranks[0]]
        rows.append(dict(
            seconds=budget, model=ranks[0], student=student,
            models={name: with_interval("value", at[name], seed) for name in at},
            **with_interval("student_lead", 100 * lead, seed)))
    return rows


def in_words(entry):
    """Where a student is ahead of its teacher and by how much: the end of a sentence."""
    if entry["best_lead"] is None:
        return "nowhere: it completes no round in that time"
    where, speed = "nowhere", "never"
    if entry["budgets"]:  # the longest stretch of them
        where = "from {:.1f} to {:.1f} s".format(*max(entry["budgets"], key=np.ptp))
    if entry["times_as_fast"]:
        speed = "{:.1f} to {:.1f} times as fast".format(*entry["times_as_fast"])
    best = "at best {best_lead:+.1f} [{best_lead_low:+.1f}, {best_lead_high:+.1f}] points"
    return f"{where}, {best.format(**entry)} at {entry['seconds']:.1f} s (equally good {speed})"


def report(results):
    """The results as Markdown: a sentence for each student, then one table over time budgets."""
    words = ["**{}** is ahead of {} in coverage {}; in accuracy {}.\n\n".format(
        name, m["teacher"], *map(in_words, m["ahead"].values()))
        for name, m in results["models"].items() if "ahead" in m]
    names = list(results["front"]["coverage"][-1]["models"])
    rows = [["seconds", *names, "best", "lead"]]
    for cover, choice in zip(*results["front"].values()):
        cells = dict.fromkeys(names, "-")
        for name, found in cover["models"].items():
            values = *found.values(), choice["models"][name]["value"]
            cells[name] = "{:.1f} [{:.1f}, {:.1f}] / {:.1f}".format(*(100 * x for x in values))
        lead = "{student} {student_lead:+.1f} [{student_lead_low:+.1f}, {student_lead_high:+.1f}]"
        rows.append([f"{cover['seconds']:.4g}", *cells.values(),
                     f"{cover['model']} / {choice['model']}",
                     lead.format(**cover) if cover["student"] else "-"])
    widths = [max(map(len, column)) for column in zip(*rows)]  # reads well in a terminal too
    rows.insert(1, ["-" * (width - 1) + ":" for width in widths])
    table = [f"| {' | '.join(map(str.rjust, row, widths))} |" for row in rows]
    return "".join(words) + (
        "Coverage [95% interval] / accuracy in percent by seconds of sampling, and by how many "
        "points the best student covers more than its teacher.\n\n") + "\n".join(table)


def read_records(path, **fields):
    """{(problem, sample): record} and {problem: (question, gold)} of a .jsonl file."""
    found, asked = {}, {}
    for r in read_jsonl(path, dict(problem=int, sample=int, seconds=float, **fields), torn=True):
        p, s, question = r["problem"], r["sample"], (r.get("question"), r.get("gold"))
        if (p, s) in found or r["seconds"] < 0 or asked.setdefault(p, question) != question:
            raise ValueError(f"{path}: problem {p}, sample {s} comes twice, has negative seconds, "
                             f"or another question or gold than before: delete that line")
        found[p, s] = r
    return found, asked


def add_scores(found, path):
    """Give records a judge's `score`, and `scored`: its seconds since scoring began."""
    scores, _ = read_records(path, score=float, crc=str)
    for (p, s), r in found.items():
        score = scores.get((p, s), {})
        if score.get("crc") != crc(r["completion"]):
            raise ValueError(f"{path} has no score of problem {p}, sample {s}, or one of another "
                             f"text: run python score.py, or delete that file")
        r |= dict(score=score["score"], scored=score["seconds"])


def in_order(names):
    """Names in the order of tables and figures: teacher, pure, hybrid, others; then small ones."""
    return sorted(names, key=lambda name: (name.endswith("-small"), *(
        not name.startswith(kind) for kind in ("teacher", "pure", "hybrid")), name))


def read_model(folder, scores, seed):
    """A model's entry of results.json, its Curves of coverage and accuracy, its questions."""
    path = folder / "samples.jsonl"
    found, asked = read_records(path, question=str, gold=str, completion=str, num_tokens=int)
    problems = range(max(asked, default=0) + 1)
    n = 0
    while all((p, n) in found for p in problems):
        n += 1
    require(n, f"{path} has no complete round, one sample of each problem: run python sample.py, "
               "with more --seconds")
    if scores:
        add_scores(found, folder / scores)
    curves = grade([[found[p, s] for s in range(n)] for p in problems])
    k = np.unique([*2 ** np.arange(n.bit_length()), n])  # 1, 2, 4, ... and n
    tokens, seconds = zip(*((r["num_tokens"], r["seconds"]) for r in found.values()))
    entry = dict(params=optional_json(folder, "samples.json").get("params"),
                 tokens_per_second=sum(tokens) / max(seconds) if max(seconds) else None,
                 k=k.tolist())
    for rule, curve in curves.items():
        entry["seconds_scored" if rule in SCORED else "seconds"] = curve.seconds[k - 1].tolist()
        entry |= with_interval(rule, curve.values[:, k - 1], seed)
    choices = [curves[rule] for rule in ("majority", "weighted") if rule in curves]
    return entry, best_rule([curves["coverage"]]), best_rule(choices), asked


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder with one folder per model")
    add("--model", nargs="+", metavar="NAME", default=[], help="only these; default: all")
    add("--teacher", metavar="NAME", help="compare all with this one; default: teacher, or of "
        "NAME-SIZE teacher-SIZE")
    add("--scores", type=folder_name, metavar="FILE", help="of a judge, in each model's folder; "
        "default: scores.jsonl if all have it")
    add("--seed", type=number(0), default=0, help="of the bootstrap")
    args = parser.parse_args(argv)
    out, seed, models, coverage, accuracy, asked = args.out, args.seed, {}, {}, {}, {}
    everyone = {path.parent.name for path in out.glob("*/samples.jsonl")}
    names = in_order({*(args.model or everyone), args.teacher} - {None})
    require(names, f"no samples under {out}/: run python sample.py, or name another --out")
    judged = all((out / name / "scores.jsonl").exists() for name in names)
    for name in names:
        models[name], coverage[name], accuracy[name], asked[name] = read_model(
            out / name, args.scores or judged and "scores.jsonl", seed)
        if asked[name] != asked[names[0]]:
            print(f"{name} was sampled on other problems than {names[0]}: not compared")
            del coverage[name], accuracy[name]
    teachers, kinds = {}, dict(coverage=coverage, accuracy=accuracy)
    for name in coverage:
        own = own_teacher(name)
        teacher = args.teacher or (own if own in coverage else "teacher")
        if teacher in coverage and teacher != name:
            teachers[name] = teacher
            models[name] |= dict(teacher=teacher, ahead={
                kind: ahead(curves[teacher], curves[name], seed) for kind, curves in kinds.items()})
    moments = np.concatenate([curve.seconds for curve in coverage.values()]).tolist()
    budgets = [digit * 10 ** power for power in range(9) for digit in (1, 2, 5)]
    budgets = [b for b in budgets if min(moments) <= b < max(moments)] + [max(moments)]
    results = dict(models=models, front={
        kind: front(curves, teachers, budgets, seed) for kind, curves in kinds.items()})
    write_json(out / "results.json", results)
    print(f"{report(results)}\n\nwrote {out / 'results.json'}")


if __name__ == "__main__":
    run(main, resumes=False)
