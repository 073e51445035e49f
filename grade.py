"""Grade the sampled answers: how many problems does each model solve, in how many seconds?

    python grade.py                       every model under out/ that has samples
    python grade.py --model teacher pure  only these

Reads   out/<name>/samples.jsonl and samples.json (sample.py); scores.jsonl, if any (score.py)
Writes  out/results.json, for plot.py; prints it as a table

*Coverage* with k samples is the share of problems of which at least one of k samples is right
(pass@k). *Accuracy* is the share of which the one answer chosen from k samples is right: by
majority, or by a vote weighted with a judge's scores. A *round* is one sample of every problem.

Contents: votes, k of n samples, models on the clock, the report; files and options.
"""
import functools
import itertools
import os
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import Parser, crc, folder_name, number, read_json, read_jsonl, run, write_json
from verdict import extract_answer, groups, is_correct

SCORED = ("best_of_n", "weighted")  # rules that need a judge's scores
SERIES = [digit * 10 ** power for power in range(9) for digit in (1, 2, 5)]  # seconds


# ---------------------------------------------------------------------------- votes
# `ids` has a number for each sample: which answer it gave, -1 for none (verdict.groups).
def leaders(ids, weights):
    """The id that leads after each sample, by the sum of weights so far: a list.

    Ties go to the id that came first; it is -1 only as long as nobody has answered.
    """
    totals, first, leader, found = {}, {}, -1, []
    for place, (i, weight) in enumerate(zip(ids, weights, strict=True)):
        if i >= 0:
            first.setdefault(i, place)
            totals[i] = totals.get(i, 0) + weight
            if i == leader and weight < 0:  # it may have fallen behind any other
                leader = max(totals, key=totals.get)  # max takes the first, dicts keep their order
            elif leader < 0 or (totals[i], -first[i]) > (totals[leader], -first[leader]):
                leader = i
        found.append(leader)
    return found


def alone(answers):
    """Ids with which every answer stands for itself, so that the largest sum is the best score."""
    return [-1 if answer is None else place for place, answer in enumerate(answers)]


def elect(answers, ids, weights):
    """The answer that leads in the end, as it was first spelled; None if nobody answered."""
    winner = leaders(ids, weights)[-1] if ids else -1
    return answers[ids.index(winner)] if winner >= 0 else None


def majority_vote(answers):
    """The most frequent answer; equal answers count together. Ties go to the earliest."""
    return elect(answers, groups(answers), [1] * len(answers))


def weighted_vote(answers, scores):
    """The answer with the largest sum of scores; equal answers and ties as in majority_vote."""
    return elect(answers, groups(answers), scores)


def best_of_n(answers, scores):
    """The answer with the highest score. Ties go to the earliest."""
    return elect(answers, alone(answers), scores)


# ---------------------------------------------------------------------------- k of n samples
def pass_at_k(n, c, k):
    """Chance that at least one of k samples is right, drawn from n of which c are right: a float.

    1 - C(n-c, k) / C(n, k) = 1 - prod of (1 - k/i) over i = n-c+1, ..., n: the unbiased estimator
    of Chen et al. 2021 (arXiv 2107.03374, section 2.1), in the form that does not overflow.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 if n - c < k else 1 - float(np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def vote_at_k(ids, right, weights):
    """Chance that the vote among k samples of a problem is right, for k = 1, ..., n: (n,).

    Averaged over runs of k consecutive samples: all are drawn alike, so any run is as good as k
    new ones. Runs of up to 16 samples begin at every sample, of up to 32 at every second, of up to
    64 at every fourth and so on (close ones hardly differ). k = n is one vote, that of all samples.
    """
    n, hits, runs = len(ids), np.zeros(len(ids)), np.zeros(len(ids))
    is_right = dict(zip(ids, right)) | {-1: False}  # {id: bool}
    for start in range(n):
        end = start + 16 * (start & -start) if start else n  # x & -x: the power of two in x
        votes = [is_right[winner] for winner in leaders(ids[start:end], weights[start:end])]
        hits[:len(votes)] += votes
        runs[:len(votes)] += 1
    return hits / runs


def grade(name, problems, has_scores):
    """Chances to be right, {rule: (P, n)}, from the records of P problems with n samples each.

    Column k - 1 is a problem's chance with k of its n samples; we report the mean over problems.
    Rules are "coverage", "majority" and, with scores, "best_of_n" and "weighted".
    """
    chances = []
    for records in tqdm(problems, f"grading {name}", leave=False, disable=None):
        answers, n = [extract_answer(r["completion"]) for r in records], len(records)
        verdicts = {answer: is_correct(answer, records[0]["gold"]) for answer in set(answers)}
        right, ids = [verdicts[answer] for answer in answers], groups(answers)
        c = sum(right)
        chances.append(dict(coverage=[pass_at_k(n, c, k) for k in range(1, n + 1)],
                            majority=vote_at_k(ids, right, [1] * n)))
        if has_scores:
            scores = [r["score"] for r in records]
            chances[-1] |= dict(best_of_n=vote_at_k(alone(answers), right, scores),
                                weighted=vote_at_k(ids, right, scores))
    return {rule: np.array([problem[rule] for problem in chances]) for rule in chances[0]}


@functools.cache
def resamples(count, seed):
    """1,000 random samples of `count` problems, as the share that each problem has: (1000, P).

    The same for all models, so that the interval of a difference is paired, problem by problem.
    """
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), 1000) / count


def with_interval(key, values, seed):
    """{key, key_low, key_high}: the mean over problems of (P, ...), its 95% interval by bootstrap.

    All three are None where `values` is.
    """
    found = [None] * 3
    if values is not None:
        means = resamples(len(values), seed) @ values
        found = [values.mean(0).tolist(), *np.quantile(means, (0.025, 0.975), axis=0).tolist()]
    return dict(zip((key, key + "_low", key + "_high"), found))


# ---------------------------------------------------------------------------- models on the clock
class Curve(NamedTuple):
    """A staircase in time: from seconds[i] on, the P problems have the chances values[:, i]."""
    seconds: np.ndarray  # (M,) ascending, measured since sampling began
    values: np.ndarray  # (P, M)

    def step(self, moments):
        """The steps on which a model stands at some moments; -1 before its first round."""
        return np.searchsorted(self.seconds, moments, side="right") - 1

    def when(self, value):
        """The first moment at which the mean is at least `value`, None for never."""
        there = self.values.mean(0) > value - 1e-9  # so that equal is equal
        return float(self.seconds[there.argmax()]) if there.any() else None


def best_rule(curves):
    """The Curve of whichever of some rules, as Curves, has the highest mean at each moment."""
    moments = np.unique(np.concatenate([curve.seconds for curve in curves]))  # (M,)
    best = [max((curve.values[:, curve.step(moment)] for curve in curves
                 if curve.step(moment) >= 0), key=np.mean) for moment in moments]
    return Curve(moments, np.stack(best, axis=1))


def ahead(teacher, student, seed):
    """Where a student's Curve is ahead of its teacher's: an entry of results.json, leads in points.

    We look at the moments at which the teacher has just completed a round, the careful choice: just
    before its next one the student would look best. Rounds that it completes within 1% of that
    time count too (the first rows of a large batch end almost together); moments before the
    student's first round do not. That we picked the best moment is not in its interval.
    """
    moments, ours = teacher.seconds, student.step(teacher.seconds)  # (M,)
    difference = student.values[:, ours] - teacher.values[:, teacher.step(1.01 * moments)]
    columns = with_interval("best_lead", 100 * difference, seed) | dict(seconds=moments.tolist())
    lead = np.where(ours >= 0, columns["best_lead"], -np.inf)  # (M,)
    best, known = lead.argmax(), ours[-1] >= 0
    edges = np.flatnonzero(np.diff([0, *(lead > 1e-9), 0])).reshape(-1, 2)  # first, last + 1
    return {key: column[best] if known else None for key, column in columns.items()} | dict(
        budgets=moments[edges - [0, 1]].tolist(), times_as_fast=times_as_fast(teacher, student))


# ---- first reading ends here: the front, the table, files, options ----
def times_as_fast(teacher, student):
    """[least, most] of the teacher's seconds over the student's to the same value; None for never.

    The values are all that the teacher has after a round and that the student reaches too.
    """
    values = [value for value in np.unique(teacher.values.mean(0)) if value > 0]
    ratios = [teacher.when(value) / student.when(value) for value in values if student.when(value)]
    return [min(ratios), max(ratios)] if ratios else None


def front(curves, teachers, budgets, seed):
    """For each time budget the best of {name: Curve} and its lead over the next best, in points.

    Also the value of each model that has completed a round by then, and the lead of the best
    student over its teacher. Ties go to the model that is listed first.
    """
    rows = []
    for budget in budgets:
        at = {name: curve.values[:, curve.step(budget)] for name, curve in curves.items()
              if curve.step(budget) >= 0}  # {name: (P,)}
        ranks = sorted(at, key=lambda name: -at[name].mean().round(9))
        best, second = [*ranks, None][:2]
        student = next((name for name in ranks if teachers.get(name) in at), None)
        rows.append(dict(
            seconds=budget, model=best, value=float(at[best].mean()), next=second, student=student,
            models={name: with_interval("value", values, seed) for name, values in at.items()}))
        pairs = dict(lead=(best, second), student_lead=(student, teachers.get(student)))
        for key, (name, other) in pairs.items():
            rows[-1] |= with_interval(key, 100 * (at[name] - at[other]) if other else None, seed)
    return rows


def interval(entry, key, form="{:+.1f} [{:+.1f}, {:+.1f}]", scale=1):
    """A number of results.json with its interval as text; "-" if there is none."""
    numbers = [entry[key + end] for end in ("", "_low", "_high")]
    return "-" if None in numbers else form.format(*(scale * value for value in numbers))


def in_words(entry):
    """Where a student is ahead of its teacher and by how much: the end of a sentence."""
    if entry["best_lead"] is None:
        return "nowhere, since it completes no round in that time"
    where, speed = "nowhere", "never"
    if entry["budgets"]:  # the longest stretch of them
        where = "from {:.1f} to {:.1f} s".format(*max(entry["budgets"], key=lambda b: b[1] - b[0]))
    if entry["times_as_fast"]:
        speed = "{:.1f} to {:.1f} times as fast".format(*entry["times_as_fast"])
    return (f"{where}, at best {interval(entry, 'best_lead')} points at {entry['seconds']:.1f} s "
            f"(equally good {speed})")


def table(header, rows):
    """A Markdown table of texts, padded so that it reads well in a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * (width - 1) + ":" for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in lines)


def report(results):
    """The results as Markdown: a sentence for each student, then one table over time budgets."""
    sentences = ["**{}** is ahead of {} in coverage {coverage}; in accuracy {accuracy}.".format(
        name, m["teacher"], **{kind: in_words(entry) for kind, entry in m["ahead"].items()})
        for name, m in results["models"].items() if "ahead" in m]
    names, rows = list(results["front"]["coverage"][-1]["models"]), []
    for cover, choice in zip(results["front"]["coverage"], results["front"]["accuracy"]):
        rows.append([f"{cover['seconds']:.4g}"] + [
            interval(cover["models"][name], "value", "{:.1f} [{:.1f}, {:.1f}]", 100)
            + f" / {100 * choice['models'][name]['value']:.1f}" if name in cover["models"] else "-"
            for name in names] + [f"{cover['model']} / {choice['model']}",
                                  f"{cover['student'] or ''} {interval(cover, 'student_lead')}"])
    note = "By seconds of sampling: coverage [95% interval] / accuracy in percent, who has most, " \
           "and the lead in coverage, in points, of the student that covers most over its teacher."
    return "\n\n".join([*sentences, note, table(["seconds", *names, "best", "lead"], rows)])


def read_records(path, **fields):
    """{(problem, sample): record} of a .jsonl file; each has `fields` and its seconds."""
    found, common_fields = {}, dict(problem=int, sample=int, seconds=float)
    for record in read_jsonl(path, common_fields | fields, torn=True):
        pair = record["problem"], record["sample"]
        if pair in found or record["seconds"] < 0:
            raise ValueError("{}: problem {}, sample {} comes twice or has negative seconds: "
                             "delete that line".format(path, *pair))
        found[pair] = record
    return found


def read_rounds(folder):
    """A model's complete rounds, P lists of the n records of a problem; its tokens per second."""
    path = os.path.join(folder, "samples.jsonl")
    found = read_records(path, question=str, gold=str, completion=str, num_tokens=int)
    problems = range(max((p + 1 for p, _ in found), default=1))
    n = next(s for s in itertools.count() if any((p, s) not in found for p in problems))
    if not n:
        raise ValueError(f"{path} has no complete round, one sample of each problem: "
                         f"run python sample.py, with more --seconds")
    last = max(r["seconds"] for r in found.values())
    return ([[found[p, s] for s in range(n)] for p in problems],
            sum(r["num_tokens"] for r in found.values()) / last if last else None)


def add_scores(path, problems):
    """Give records a judge's `score`, and `scored`: its seconds since scoring began."""
    found = read_records(path, score=float)
    for r in itertools.chain(*problems):
        text = crc(r["completion"])
        score = found.get((r["problem"], r["sample"]), dict(crc=None))
        if score.get("crc", text) != text:
            raise ValueError(f"{path} has no score of problem {r['problem']}, sample {r['sample']}"
                             f", or one of another text: run python score.py")
        r |= dict(score=score["score"], scored=score["seconds"])


def when_complete(problems, key):
    """(n,) the moments at which every problem had its first k records, of P lists of n."""
    return np.maximum.accumulate([max(r[key] for r in records) for records in zip(*problems)])


def read_model(folder, scores, seed):
    """A graded model: its entry of results.json, {rule: Curve}, its questions and golds."""
    (problems, rate), path = read_rounds(folder), functools.partial(os.path.join, folder)
    has_scores = bool(scores) or os.path.exists(path("scores.jsonl"))
    try:
        if has_scores:
            add_scores(path(scores or "scores.jsonl"), problems)
    except ValueError as error:
        if scores:
            raise
        print(f"{error}; until then its scores do not count")
        has_scores = False
    known = read_json(path("samples.json")) if os.path.exists(path("samples.json")) else {}
    seconds, n = when_complete(problems, "seconds"), len(problems[0])
    ks = np.array(sorted({2 ** i for i in range(n.bit_length())} | {n}))
    entry = dict(params=known.get("params"), tokens_per_second=rate, num_problems=len(problems),
                 k=ks.tolist(), seconds=seconds[ks - 1].tolist())
    clock = dict.fromkeys(("coverage", "majority"), seconds)
    if has_scores:
        clock |= dict.fromkeys(SCORED, seconds + when_complete(problems, "scored"))
        entry["seconds_scored"] = clock["weighted"][ks - 1].tolist()
    chances = grade(os.path.basename(folder), problems, has_scores)
    for rule, values in chances.items():
        entry |= with_interval(rule, values[:, ks - 1], seed)
    return (entry, {rule: Curve(clock[rule], values) for rule, values in chances.items()},
            [(records[0]["question"], records[0]["gold"]) for records in problems])


def find_samples(out, wanted, teacher):
    """Names of the models to grade: those under `out` that have samples, or these of them."""
    names = [name for name in (sorted(os.listdir(out)) if os.path.isdir(out) else [])
             if os.path.isfile(os.path.join(out, name, "samples.jsonl"))]
    if not names:
        raise ValueError(f"no samples under {out}/: run python sample.py, or name another --out")
    for name in [*wanted, teacher or names[0]]:
        if name not in names:
            raise ValueError(f"no samples of {name} under {out}/: choose from {', '.join(names)}")
    return in_order(name for name in names if not wanted or name in (*wanted, teacher))


def in_order(names):
    """Names in the order of tables and figures: teacher, pure, hybrid, others; then small ones."""
    kinds = ("teacher", "pure", "hybrid")
    return sorted(names, key=lambda name: (
        name.endswith("-small"), *(not name.startswith(kind) for kind in kinds), name))


def choose_rules(curves):
    """Of {name: {rule: Curve}} the rules that may give the accuracy: alike for all models."""
    scored = [name for name, found in curves.items() if "weighted" in found]
    if 0 < len(scored) < len(curves):
        print(f"only {', '.join(scored)} has scores: accuracy is that of the majority for all")
    return ["majority", "weighted"] if len(scored) == len(curves) else ["majority"]


def teacher_of(name, names):
    """The teacher of a student's size, teacher-small for pure-small; if there is none, teacher."""
    own = f"teacher-{name.rpartition('-')[2]}"
    return own if own in names else "teacher"


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", default="out", help="folder with one folder per model")
    add("--model", nargs="+", metavar="NAME", default=[], help="only these; default: all")
    add("--teacher", metavar="NAME", help="compare all others with this one; default: that of a "
        "student's size, teacher-small for pure-small, else teacher")
    add("--scores", type=folder_name, metavar="FILE", help="every model must have complete scores "
        "in this file of its folder; default: scores.jsonl counts where it is complete")
    add("--seed", type=number(0), default=0, help="of the bootstrap")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    path = functools.partial(os.path.join, args.out)
    models, curves, asked, fronts = {}, {}, {}, {}
    for name in find_samples(args.out, args.model, args.teacher):
        models[name], curves[name], asked[name] = read_model(path(name), args.scores, args.seed)
    first = args.teacher or next(iter(models))
    for name in [name for name in models if asked[name] != asked[first]]:
        print(f"{name} was sampled on other problems than {first}: not compared")
        del curves[name]
    students = [name for name in curves
                if name != args.teacher and (args.teacher or not name.startswith("teacher"))]
    teachers = {name: args.teacher or teacher_of(name, curves) for name in students}
    teachers = {name: teacher for name, teacher in teachers.items() if teacher in curves}
    for name, teacher in teachers.items():
        models[name] |= dict(teacher=teacher, ahead={})
    moments = np.concatenate([rules["coverage"].seconds for rules in curves.values()]).tolist()
    budgets = [b for b in SERIES if min(moments) <= b < max(moments)] + [max(moments)]
    for kind, rules in dict(coverage=["coverage"], accuracy=choose_rules(curves)).items():
        clock = {name: best_rule([found[rule] for rule in rules]) for name, found in curves.items()}
        fronts[kind] = front(clock, teachers, budgets, args.seed)
        for name, teacher in teachers.items():
            models[name]["ahead"][kind] = ahead(clock[teacher], clock[name], args.seed)
    results = dict(models=models, front=fronts)
    write_json(path("results.json"), results)
    print(f"{report(results)}\n\nwrote {path('results.json')}")


if __name__ == "__main__":
    run(main, resumes=False)
