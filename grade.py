r"""Grade the sampled answers: how many problems does each model solve, with how many samples, in how much time?

    python grade.py                       every model under out/ that has samples
    python grade.py --model teacher pure  only these
    python grade.py --scores              every model must have a reward model's scores (sample.py --score)

Reads   out/<name>/samples.jsonl and samples.json, as sample.py writes them
        out/<name>/scores.jsonl, where there is one: {"problem", "sample", "score"} per completion, from a reward model;
        if sample.py wrote it also "seconds", since scoring began, and "crc" of the text that was scored
Writes  out/results.json, for plot.py; the same is printed as tables

*Coverage* at k is the share of problems of which at least one of k samples is right (pass@k). The share for which the one
answer chosen from k samples is right: *majority* takes the most frequent answer, *best of n* the one with the highest
score, *weighted* the one with the largest sum of scores. The *front* is the best model at each time budget.

Contents: one completion, math-verify, one problem, k of n samples, one model, two models, the front, the report, the script.
"""
import collections
import contextlib
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import zlib

import numpy as np
from tqdm import tqdm

from data import Parser, read_json, run, write_json

SAMPLE = dict(problem=int, sample=int, question=str, gold=str, completion=str, num_tokens=int, finish=str,
              seconds=(int, float))  # a line of samples.jsonl
SCORE = dict(problem=int, sample=int, score=(int, float))  # a line of scores.jsonl; of ours also seconds, crc
LONGEST = 300  # characters; longer answers are compared as strings only
CHECK_SECONDS, CHECK_BYTES = 2, 4 << 30  # limits of one comparison by math-verify
NUM_SUBSETS = 200  # random subsets of a problem's samples, to average a vote over
NUM_RESAMPLES = 1000  # of the bootstrap
ORDER = ("teacher", "pure", "hybrid", "teacher-small", "pure-small", "hybrid-small")  # in tables and figures; then by name
SCORED = ("best_of_n", "weighted")  # rules that need scores
RULES = {"coverage": "coverage", "majority": "majority", "best_of_n": "best of n", "weighted": "weighted"}  # as we print them


# ------------------------------------------------------------------------------------------------ one completion
def extract_answer(text):
    r"""The final answer in a completion: the inside of the last \boxed{...}, else what follows the last `####` on its
    line (GSM8K), else what follows the last "answer is" in its sentence. None if there is no such thing."""
    found = last_boxed(text)
    if found is None and "####" in text:
        found = text.rpartition("####")[2].partition("\n")[0]
    if found is None:
        *before, after = re.split(r"answer is\b:?", text, flags=re.IGNORECASE)
        found = re.split(r"\.\s|\n", after, maxsplit=1)[0] if before else ""
    return found.strip(" \t\n.$") or None


def last_boxed(text):
    r"""The inside of the last complete \boxed{...}, or None. One pass with a stack: linear in the length of the text."""
    opened, last = [], None  # for every open brace: is it a \boxed, and where does its inside start?
    for token in re.finditer(r"(\\boxed\s*\{)|\\.|([{}])", text, flags=re.DOTALL):  # \\. skips \{ and \}
        if token[1] or token[2] == "{":
            opened.append((bool(token[1]), token.end()))
        elif token[2] and opened:
            is_boxed, start = opened.pop()
            if is_boxed and (last is None or start > last[0]):
                last = start, token.start()
    return last and text[slice(*last)]


JUNK = (r"\left", r"\right", r"\!", r"\,", r"\;", r"\ ", r"\$", "$", r"\%", "%", r"^\circ", r"^{\circ}")


def normalise(answer):
    r"""One spelling for what is plainly the same: `\$1,200.0`, `1{,}200 \text{ apples}` and `1200` become `1200`.

    After the normalisation of Minerva (Lewkowycz et al. 2022), much shortened: the rest is math-verify's work.
    """
    s = answer.strip().strip("$").rstrip(".").replace("{,}", ",")
    for junk in JUNK:
        s = s.replace(junk, "")
    s = re.sub(r"^(-?[0-9.,]+)\s*\\(?:text|mbox|mathrm)\{[^{}]*\}$", r"\1", s)  # 12\text{ apples} -> 12
    s = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}", r"\1", s)  # \text{Monday} -> Monday
    s = re.sub(r"\s+", "", s)
    s = re.sub(r"^[a-zA-Z]=", "", s).removeprefix("+")  # x=5 -> 5
    if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?", s):
        s = s.replace(",", "")
    if re.fullmatch(r"-?[0-9]*\.[0-9]+|-?[0-9]+\.", s):
        s = re.sub(r"^(-?)\.", r"\g<1>0.", s).rstrip("0").rstrip(".")  # .50 -> 0.5, 12.0 -> 12
    return s


@functools.lru_cache(maxsize=None)
def is_correct(answer, gold):
    """Is the answer (None: there is none) the gold one: the same after normalise(), or equivalent as LaTeX?"""
    pair = answer, gold = normalise(answer or ""), normalise(gold)
    if "" in pair or answer == gold or max(map(len, pair)) > LONGEST:
        return answer == gold != ""
    if all(re.fullmatch(r"-?[0-9]+", s) for s in pair):
        return int(answer) == int(gold)
    if any(re.fullmatch(r"[A-Za-z]{3,}", s) for s in pair):  # words: as products of letters, listen would equal silent
        return answer.lower() == gold.lower()
    return equivalent(answer, gold)


# ------------------------------------------------------------------------------------------------ math-verify
# It turns text into sympy objects, and 9**9**9**9 keeps sympy busy for ever. So it lives in a process of its own, which
# reads questions line by line and has the system end it when one takes too long; the next question starts another.
_verifier, _lock = None, threading.Lock()


def equivalent(answer, gold):
    """Are two LaTeX expressions equal by math-verify? False if it cannot tell within CHECK_SECONDS."""
    global _verifier
    with _lock:
        verdict, process, _verifier = b"", _verifier or start_verifier(), None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
            verdict = process.stdout.readline()
        if verdict:
            _verifier = process  # alive: it takes the next question too
        else:
            process.communicate()  # closes its pipes
        return verdict == b"True\n"


def start_verifier():
    process = subprocess.Popen([sys.executable, "-c", "import grade; grade.verify_lines()"], bufsize=0,
                               cwd=os.path.dirname(os.path.abspath(__file__)), env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if process.stdout.readline() != b"ready\n":
        raise ValueError("math-verify, which compares LaTeX answers, does not start: pip install -r requirements.txt")
    return process


def verify_lines():
    """The life of the process: a line [answer, gold] in, a line True or False out. Ends with its input."""
    import resource
    from math_verify import LatexExtractionConfig, parse, verify
    with contextlib.suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (CHECK_BYTES, CHECK_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(CHECK_SECONDS)  # unhandled, SIGALRM ends the process, even inside one long operation
        try:
            answer, gold = [parse(f"${s}$", [LatexExtractionConfig()], parsing_timeout=None) for s in json.loads(line)]
            verdict = verify(gold, answer, timeout_seconds=None)
        except Exception:  # whatever sympy makes of nonsense; out of memory; too deep a recursion
            verdict = False
        signal.alarm(0)
        print(bool(verdict), flush=True)


# ------------------------------------------------------------------------------------------------ one problem
def pass_at_k(n, c, k):
    """Chance that at least one of k samples, drawn from n of which c are right, is right: 1 - C(n-c, k) / C(n, k),
    the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def weighted_vote(answers, scores):
    """The answer with the largest sum of scores. A tie goes to the earliest; None wins only if nobody answered."""
    totals = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0) + score
    return max(totals, key=totals.get, default=None)  # dicts keep their order, max takes the first


def majority_vote(answers):
    """The most frequent answer; ties and None as in weighted_vote."""
    return weighted_vote(answers, [1] * len(answers))


def best_of_n(answers, scores):
    """The answer with the highest score; ties and None as in weighted_vote."""
    answered = [(score, answer) for answer, score in zip(answers, scores, strict=True) if answer is not None]
    return max(answered, key=lambda pair: pair[0], default=(0, None))[1]


# ------------------------------------------------------------------------------------------------ k of n samples
# From n samples of a problem we tell how k would do by averaging over subsets of k: exactly for coverage (pass_at_k),
# over random subsets for the votes.
def powers_of_two(n):
    """1, 2, 4, ... up to n, and n itself."""
    return np.array(sorted({2 ** i for i in range(n.bit_length())} | {n}))


def subsets_of(n, k, seed):
    """Subsets of k of n samples, (S, k) indices: all of them for k = 1 and k = n, else NUM_SUBSETS random ones."""
    if k in (1, n):
        return np.arange(n).reshape(-1, k)
    everything = np.tile(np.arange(n), (NUM_SUBSETS, 1))
    return np.random.default_rng(seed).permuted(everything, axis=1)[:, :k]


def vote_accuracy(codes, right, weights, subsets):
    """Share of the subsets (S, k) of one problem's n samples whose weighted vote is right; as weighted_vote, for arrays.

    codes (n,): which answer a sample gave, numbered from 0, or -1 for none; right (n,) bool; weights (n,).
    """
    count, width = len(subsets), codes.max() + 2  # subsets; answers, the last one being "no answer"
    rows, given = np.arange(count)[:, None], codes[subsets] % width  # (S, 1), (S, k)
    totals = np.bincount((rows * width + given).ravel(), weights[subsets].ravel(), count * width).reshape(count, width)
    totals[:, -1] = -np.inf
    winner = totals[rows, given].argmax(1, keepdims=True)  # the first sample that gave an answer with the most votes
    return right[subsets[rows, winner]].mean()


def mean_low_high(values, seed):
    """Mean over problems of each column of (P, K), and its 95% interval by bootstrap over problems: (3, K).

    One seed gives the same resamples of P problems every time, so a difference of two models is compared pairwise.
    """
    count = len(values)
    resamples = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), NUM_RESAMPLES) / count
    return np.array([values.mean(0), *np.quantile(resamples @ values, (0.025, 0.975), axis=0)])


# ------------------------------------------------------------------------------------------------ one model
def read_records(path, fields):
    """The records of a .jsonl file, each with these fields. A last line that a kill cut off is left out."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for number, line in enumerate(f, 1):
            try:
                record = json.loads(line)
                wrong = [field for field, kind in fields.items() if not isinstance(record[field], kind)]
            except (ValueError, KeyError, TypeError) as error:
                wrong = [error]
            if not wrong:
                records.append(record)
            elif line.endswith("\n"):
                raise ValueError(f"{path}, line {number} is not an object with {', '.join(fields)} ({wrong[0]}): "
                                 f"{line[:80].strip()}; repair or delete it")
    return records


def is_finite(number):
    return isinstance(number, (int, float)) and abs(number) <= sys.float_info.max


def add_scores(path, problems):
    """Give samples, {problem: {sample: record}}, their `score`, and `scored`, its moment since scoring began, if it is told."""
    if not os.path.exists(path):
        raise ValueError(f"no {path}: run python sample.py --score MODEL")
    for r in read_records(path, SCORE):
        which = f"problem {r['problem']}, sample {r['sample']}"
        sample = problems.get(r["problem"], {}).get(r["sample"])
        if sample is None or r.get("crc", crc(sample)) != crc(sample):
            wrong = "is not in samples.jsonl" if sample is None else "has another text in samples.jsonl"
            raise ValueError(f"{path} has scores of other samples ({which} {wrong}): delete it and run "
                             "python sample.py --score MODEL")
        for key in ("score", "seconds"):
            if not is_finite(r.get(key, 0)):
                raise ValueError(f"{path}: the {key} of {which} is {r[key]}, which is no finite number")
        if sample.setdefault("score", r["score"]) != r["score"]:
            raise ValueError(f"{path}: {which} has two scores, {sample['score']} and {r['score']}: delete the wrong one")
        sample.setdefault("scored", r.get("seconds"))


def crc(sample):
    """Eight hex digits that tell to which text a score belongs."""
    return f"{zlib.crc32(sample['completion'].encode('utf-8', 'surrogatepass')):08x}"


class Run:
    """One model's samples, graded: P problems with n samples each.

    With `scores`, the name of a file in the folder, scores must be complete; without, scores.jsonl counts if it is.
    """

    def __init__(self, folder, scores=None):
        path = functools.partial(os.path.join, folder)
        self.name, problems = os.path.basename(folder), {}
        for r in read_records(path("samples.jsonl"), SAMPLE):
            problems.setdefault(r["problem"], {})[r["sample"]] = r
        if not problems:
            raise ValueError(f"{path('samples.jsonl')} is empty: run python sample.py first")
        n, most = min(map(len, problems.values())), max(map(len, problems.values()))
        if n < most:
            print(f"{self.name}: some problems have only {n} of {most} samples, so {n} of each count; run python sample.py")
        self.sidecar = read_json(path("samples.json")) if os.path.exists(path("samples.json")) else {}
        self.problems = [[samples[s] for s in sorted(samples)[:n]] for _, samples in sorted(problems.items())]  # P x n
        # (n,): seconds[k - 1] is the measured moment at which every problem had k completions
        self.seconds = np.max([sorted(r["seconds"] for r in samples.values())[:n] for samples in problems.values()], axis=0)
        self.scores = self.scoring_seconds = None
        if scores or os.path.exists(path("scores.jsonl")):
            try:
                self.read_scores(path(scores or "scores.jsonl"), problems)
            except ValueError as error:
                if scores:
                    raise
                print(f"{error}; until then it does not count")
        self.grade(n)

    def read_scores(self, path, problems):
        add_scores(path, problems)
        counted, sidecar = list(itertools.chain(*self.problems)), os.path.splitext(path)[0] + ".json"
        lacking = [f"problem {r['problem']}, sample {r['sample']}" for r in counted if "score" not in r]
        if lacking:
            raise ValueError(f"{path} lacks some of the samples: {len(lacking)} of {len(counted)} have no score, the first is "
                             f"{lacking[0]}; run python sample.py --score MODEL")
        settings = read_json(sidecar).get("settings", {}) if os.path.exists(sidecar) else {}
        self.scorer = ", ".join([os.path.basename(path)] + [f"{key} {settings[key]}" for key in ("model", "kind", "aggregate")
                                                            if settings.get(key)])
        self.scores = np.array([[r["score"] for r in problem] for problem in self.problems], float)  # (P, n)
        if all(r["scored"] is not None for r in counted):  # (n,): when, since scoring began, every problem had k scores
            self.scoring_seconds = np.max([sorted(r["scored"] for r in problem) for problem in self.problems], axis=0)

    def grade(self, n):
        self.answers = []  # P lists of n normalised answers or None
        self.codes = np.full((len(self.problems), n), -1)  # (P, n): the answers of a problem, numbered; -1 for None
        self.right = np.zeros((len(self.problems), n), bool)
        bar = tqdm(self.problems, desc=f"grading {self.name}", unit="problem", leave=False, disable=None)
        for p, problem in enumerate(bar):
            answers = [normalise(extract_answer(r["completion"]) or "") or None for r in problem]
            numbers = {answer: code for code, answer in enumerate(dict.fromkeys(answers)) if answer is not None}
            self.answers.append(answers)
            self.codes[p] = [numbers.get(answer, -1) for answer in answers]
            self.right[p] = [is_correct(answer, r["gold"]) for answer, r in zip(answers, problem)]
        # (P, n): column k - 1 is the chance that k of a problem's samples cover it
        self.coverage = np.array([[pass_at_k(n, c, k) for k in range(1, n + 1)] for c in self.right.sum(1).tolist()])

    def votes(self, rule, ks, seed):
        """Chance that the vote among k of a problem's samples is right, for each k: (P, len(ks))."""
        codes, weights = self.codes, np.ones(self.codes.shape)
        if rule in SCORED:
            weights = self.scores
        if rule == "best_of_n":  # a weighted vote in which every answer stands for itself
            codes = np.where(codes < 0, -1, np.arange(codes.shape[1]))
        subsets = [subsets_of(codes.shape[1], k, seed) for k in ks]
        return np.array([[vote_accuracy(*problem, s) for s in subsets] for problem in zip(codes, self.right, weights)])


def luck(run):
    """Coverage at n against the answer of another problem, the one before: what guesses of this kind would cover."""
    golds = [normalise(problem[0]["gold"]) for problem in run.problems]
    hits = [golds[p - 1] in run.answers[p] for p in range(len(golds)) if golds[p - 1] != golds[p]]
    return float(np.mean(hits)) if hits else None


def summarise(run, seed):
    """A model's entry of results.json."""
    records, sidecar = list(itertools.chain(*run.problems)), run.sidecar
    ks, tokens = powers_of_two(len(run.seconds)), sum(r["num_tokens"] for r in records)
    entry = {key: sidecar.get(key) for key in ("params", "device", "dtype", "date")} | dict(
        task=sidecar.get("settings", {}).get("task"),
        tokens_per_second=sidecar.get("tokens_per_second") or float(tokens / run.seconds[-1]),
        num_problems=len(run.problems), num_samples=len(run.seconds), mean_tokens=tokens / len(records),
        answered=float((run.codes >= 0).mean()), finished=float(np.mean([r["finish"] == "stop" for r in records])),
        luck=luck(run), k=ks.tolist(), seconds=run.seconds[ks - 1].tolist())
    curves = {"coverage": run.coverage[:, ks - 1]}
    for rule in ("majority", *SCORED) if run.scores is not None else ("majority",):
        curves[rule] = run.votes(rule, ks, seed)
    if run.scores is not None:
        timed = run.scoring_seconds is not None
        entry |= dict(scorer=run.scorer, scoring_seconds=run.scoring_seconds[ks - 1].tolist() if timed else None,
                      seconds_scored=(run.seconds + run.scoring_seconds)[ks - 1].tolist() if timed else None)
        curves["gain"] = 100 * (curves["weighted"] - curves["majority"])  # points, paired over problems
    for name, values in curves.items():
        for suffix, numbers in zip(("", "_low", "_high"), mean_low_high(values, seed)):
            entry[name + suffix] = numbers.tolist()
    return entry


# ------------------------------------------------------------------------------------------------ two models
def teacher_of(name, names):
    """A student's teacher is that of its size, teacher-small for pure-small; if there is none, teacher."""
    sizes = [other for other in names if other.startswith("teacher-") and name.endswith(other.removeprefix("teacher"))]
    return max(sizes, key=len, default="teacher")


def asked(run):
    return [(problem[0]["question"], problem[0]["gold"]) for problem in run.problems]


def are_comparable(teacher, student):
    """Same problems? Says so if not. Other settings that differ are named: they may explain a difference in time."""
    if asked(teacher) != asked(student):
        print(f"{student.name} and {teacher.name} were sampled on different problems: not compared")
        return False
    theirs, ours = (r.sidecar.get("settings", {}) for r in (teacher, student))
    for key in sorted(theirs.keys() & ours.keys() - {"weights"}):
        if theirs[key] != ours[key]:
            print(f"note: {student.name} was sampled with {key} {ours[key]}, {teacher.name} with {theirs[key]}")
    return True


def rows(**columns):
    """Columns of numbers as a list of rows for JSON, which has null for NaN."""
    columns = {name: [None if x != x else x for x in column.tolist()] for name, column in columns.items()}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def when_covered(run, goals):
    """The moment of the first round with each coverage (above 0) of goals; NaN for never."""
    reached = np.searchsorted(run.coverage.mean(0) + 1e-9, np.where(goals > 0, goals, np.inf))
    return np.append(run.seconds, np.nan)[reached]


def ahead(teacher, student, seed):
    """A student's `ahead` entry: where on the clock does it cover more problems than its teacher, and how many more?

    We look at the moments at which the teacher has just completed its k-th round (k samples of every problem), and at
    what the student has completed by then; after its last round it stays where it is. This is the careful choice: each
    model's coverage on the clock is a staircase, and just before the teacher's next step the student would look best.
    If the teacher completes more rounds within 1% of that time, they count for it: the first rounds of a large batch end
    almost together. Moments before the student's first round do not count (NaN). Leads are in points, hundredths of the problems. The
    interval of the best lead does not account for our having picked the best moment.
    """
    seconds, ks = teacher.seconds, powers_of_two(len(teacher.seconds))
    rounds = np.searchsorted(student.seconds, seconds, side="right")  # (n,) the student's k at the teacher's moments
    theirs = np.searchsorted(teacher.seconds, 1.01 * seconds, side="right")  # (n,) the teacher's own
    counts = np.where(rounds > 0, 1, np.nan)
    difference = student.coverage[:, rounds - 1] - teacher.coverage[:, theirs - 1]  # (problems, n)
    lead, low, high = counts * mean_low_high(100 * difference, seed)
    best = [np.nan_to_num(lead, nan=-np.inf).argmax()]
    entry, = rows(best_lead=lead[best], best_lead_low=low[best], best_lead_high=high[best],
                  best_lead_seconds=counts[best] * seconds[best])

    stretches = [seconds[list(moments)].tolist() for is_ahead, moments
                 in itertools.groupby(range(len(lead)), lambda i: lead[i] > 1e-9) if is_ahead]
    entry["budgets"] = [[stretch[0], stretch[-1]] for stretch in stretches]
    entry["span"] = max((end / start for start, end in entry["budgets"]), default=None)

    at, ours = ks - 1, rounds[ks - 1]
    entry["table"] = rows(
        seconds=seconds[at], teacher_k=ks, teacher_coverage=teacher.coverage.mean(0)[at],
        teacher_majority=teacher.votes("majority", ks, seed).mean(0), student_k=ours,
        student_coverage=counts[at] * student.coverage.mean(0)[ours - 1],
        student_majority=counts[at] * student.votes("majority", np.maximum(ours, 1), seed).mean(0),
        lead=lead[at], lead_low=low[at], lead_high=high[at])

    goals = teacher.coverage.mean(0)[at]
    theirs, ours = when_covered(teacher, goals), when_covered(student, goals)
    entry["equal_coverage"] = rows(k=ks, coverage=goals, teacher_seconds=theirs, student_seconds=ours, ratio=theirs / ours)
    return entry


# ------------------------------------------------------------------------------------------------ the front
# At a time budget a model counts with the rounds it has completed by then, and stays where it is after its last one. Whoever
# has the highest value then is on the front. Votes can get worse with more samples; a model has the k that it has.
Curve = collections.namedtuple("Curve", "name ks seconds values mean")  # (K,), (K,), (P, K), (K,)


def curve(run, rule, with_scoring, seed):
    """Values after each round: coverage at every k; votes too, but of more than 64 samples at 32 even steps and the powers
    of two only, since they take their time (0.9 s per model for 72 problems x 64 samples)."""
    n = len(run.seconds)
    few = n <= 64 or rule == "coverage"
    ks = np.arange(1, n + 1) if few else np.union1d(powers_of_two(n), np.linspace(1, n, 32).astype(int))
    values = run.coverage if rule == "coverage" else run.votes(rule, ks, seed)
    seconds = run.seconds + run.scoring_seconds if with_scoring and rule in SCORED else run.seconds
    return Curve(run.name, ks, seconds[ks - 1], values, values.mean(0).round(9))  # rounded, so that equal is equal


def standings(curves, moment):
    """The models with a complete round at this moment, the best first: [(curve, column)]. Ties go to who was there first."""
    places = []
    for c in curves:
        at = np.searchsorted(c.seconds, moment, side="right") - 1
        if at >= 0:
            since = c.seconds[(c.mean[:at + 1] >= c.mean[at]).argmax()]
            places.append((-c.mean[at], since, len(places), c, at))
    return [place[3:] for place in sorted(places)]


def front_at(curves, budgets, seed):
    """Rows of `front`: at each budget the model on the front, its value, and its lead over the next best in points, paired
    over problems. The interval does not account for our having picked the two."""
    found = []
    for budget in budgets:
        if budget < min(c.seconds[0] for c in curves):
            continue
        (best, at), *others = standings(curves, budget)
        row = dict(seconds=budget, model=best.name, k=int(best.ks[at]), value=float(best.mean[at]))
        row |= dict.fromkeys(("next", "lead", "lead_low", "lead_high"))
        if others:
            second, column = others[0]
            lead = mean_low_high(100 * (best.values[:, [at]] - second.values[:, [column]]), seed)[:, 0].tolist()
            row |= zip(("next", "lead", "lead_low", "lead_high"), (second.name, *lead))
        found.append(row)
    return found


def front_steps(curves):
    """The front as a staircase: [seconds, model, k, value] of every moment at which it changes."""
    steps = []
    for moment in np.unique(np.concatenate([c.seconds for c in curves])).tolist():
        best, at = standings(curves, moment)[0]
        step = [best.name, int(best.ks[at]), float(best.mean[at])]
        if not steps or steps[-1][1:] != step:
            steps.append([moment, *step])
    return steps


def budgets_between(first, last):
    """first, then those of 1, 2, 5, 10, 20, ... that lie between, then last."""
    series = [float(f"{digit}e{exponent}") for exponent in range(-3, 9) for digit in (1, 2, 5)]
    return sorted({first, last} | {budget for budget in series if first < budget < last})


def fronts(runs, seed):
    """`front` and `front_steps` of results.json, {rule: [...]}; with scores in all models also of the rules that need them,
    with the time that scoring took if all know it."""
    peers = [run for run in runs if asked(run) == asked(runs[0])]
    if len(peers) < len(runs):
        others = ", ".join(run.name for run in runs if run not in peers)
        print(f"left out of the front, since sampled on other problems than {runs[0].name}: {others}")
    if len(peers) < 2:
        return dict(front={}, front_steps={}, front_models=[], front_with_scoring=False)
    without = [run.name for run in peers if run.scores is None]
    if 0 < len(without) < len(peers):
        print(f"no scores of {', '.join(without)}: the front is that of coverage and majority")
    with_scoring = not without and all(run.scoring_seconds is not None for run in peers)
    bar = tqdm(RULES if not without else ("coverage", "majority"), desc="front", unit="rule", leave=False, disable=None)
    curves = {rule: [curve(run, rule, with_scoring, seed) for run in peers] for rule in bar}
    moments = np.concatenate([c.seconds for found in curves.values() for c in found])
    budgets = budgets_between(float(moments.min()), float(moments.max()))
    return dict(front={rule: front_at(found, budgets, seed) for rule, found in curves.items()},
                front_steps={rule: front_steps(found) for rule, found in curves.items()},
                front_models=[run.name for run in peers], front_with_scoring=with_scoring)


# ------------------------------------------------------------------------------------------------ the report
# Markdown, padded so that it reads well in a terminal too. plot.py writes the same to results.md.
def table(header, rows):
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * (width - 1) + ":" for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in lines)


def text(value, form=".1f"):
    return "-" if value is None else f"{value:{form}}"


def with_interval(entry, key, form="+.1f"):
    """-1.2 [-3.4, +1.0] of a number with _low and _high beside it; the last one of lists."""
    numbers = [entry[key + suffix] for suffix in ("", "_low", "_high")]
    number, low, high = [text(x[-1] if isinstance(x, list) else x, form) for x in numbers]
    return f"{number} [{low}, {high}]"


def model_table(models):
    n = "/".join(map(str, sorted({m["num_samples"] for m in models.values()})))
    return table(
        ["model", "parameters", "tokens/s", "samples", "seconds", "luck", "pass@1", f"coverage@{n}", f"majority@{n}"],
        [[name, text(m["params"], ","), text(m["tokens_per_second"], ",.0f"), f"{m['num_problems']} x {m['num_samples']}",
          text(m["seconds"][-1]), text(m["luck"], ".1%"), text(m["coverage"][0], ".1%"),
          with_interval(m, "coverage", ".1%"), with_interval(m, "majority", ".1%")] for name, m in models.items()])


def budget_table(teacher, name, entry):
    columns = dict(seconds=".2f", teacher_k="", teacher_coverage=".1%", teacher_majority=".1%", student_k="",
                   student_coverage=".1%", student_majority=".1%")
    header = [key.replace("_", " ").replace("teacher", teacher).replace("student", name) for key in columns]
    return table(header + ["lead, points", "times as fast"], [
        [text(row[key], form) for key, form in columns.items()] + [with_interval(row, "lead"), text(equal["ratio"], ".2f")]
        for row, equal in zip(entry["table"], entry["equal_coverage"])])


def verdict(teacher, name, entry):
    """A student's result in one line."""
    if entry["best_lead"] is None:
        return f"{name} completes no round of samples before {teacher} has completed all."
    ratios = [row["ratio"] for row in entry["equal_coverage"] if row["ratio"]]
    speed = "never equals its coverage"
    if ratios:
        speed = f"reaches equal coverage {min(ratios):.2f} to {max(ratios):.2f} times as fast"
    where = "at no time budget"
    if entry["budgets"]:
        start, end = max(entry["budgets"], key=lambda budget: budget[1] / budget[0])
        where = f"at budgets from {start:.1f} to {end:.1f} s (a factor of {entry['span']:.1f})"
    return (f"{name} is ahead of {teacher} {where}, at best by {with_interval(entry, 'best_lead')} points at "
            f"{entry['best_lead_seconds']:.1f} s; it {speed}.")


def selection_table(models):
    """What each rule has at n samples and at some fewer, and what they took."""
    lines = []
    for name, m in models.items():
        seconds = [m["seconds"], m["scoring_seconds"] or [None] * len(m["k"]), m["seconds_scored"] or m["seconds"]]
        for i in reversed(range(len(m["k"]))[::-2][:3]):
            at = {key: m[key][i] for rule in RULES for key in (rule, rule + "_low", rule + "_high")}
            lines.append([name, text(m["coverage"][0], ".1%"), str(m["k"][i])]
                         + [with_interval(at, rule, ".1%") for rule in ("majority", *SCORED)]
                         + [text(column[i]) for column in seconds])
    return table(["model", "pass@1", "k", "majority", "best of k", "weighted", "sampling, s", "scoring, s", "sum, s"], lines)


def gain_line(name, m):
    """At which k is the weighted vote ahead of the majority? The interval does not account for our having picked the best."""
    ahead, clear = (", ".join(str(k) for k, points in zip(m["k"], m[key]) if points > 1e-9) for key in ("gain", "gain_low"))
    best = max(range(len(m["k"])), key=lambda i: (m["k"][i] > 1, m["gain"][i]))  # a vote of one is no choice
    at_best = {key: m[key][best] for key in ("gain", "gain_low", "gain_high")}
    return (f"{name}: the weighted vote is ahead of the majority at {f'k = {ahead}' if ahead else 'no k'} (interval above 0: "
            f"{clear or 'none'}), at best by {with_interval(at_best, 'gain')} points at k = {m['k'][best]}.")


def selection_report(models):
    if not models:
        return []
    untimed = ", ".join(name for name, m in models.items() if m["scoring_seconds"] is None)
    unknown = f" How long scoring took is unknown for {untimed} and not counted." if untimed else ""
    scorers = "; ".join(dict.fromkeys(m["scorer"] for m in models.values()))
    return [f"Choosing one of k answers by scores ({scorers}).{unknown}", selection_table(models),
            "\n".join(f"- {gain_line(name, m)}" for name, m in models.items())]


def stretches(steps):
    """The models on the front one after the other, [model, start, end]; the last one has no end."""
    starts = [(name, next(group)[0]) for name, group in itertools.groupby(steps, key=lambda step: step[1])]
    return [[name, start, end] for (name, start), (_, end) in zip(starts, starts[1:] + [(None, None)])]


def front_line(rule, steps):
    """Who is on the front from when on; stretches shorter than a quarter of their start are put together."""
    parts = []
    for is_short, group in itertools.groupby(stretches(steps), key=lambda s: s[2] is not None and s[2] < 1.25 * s[1]):
        found = [(name, start) for name, start, _ in group]
        if is_short:
            found = [(" or ".join(dict.fromkeys(name for name, _ in found)), found[0][1])]
        parts += [f"{name} from {start:.2f} s" for name, start in found]
    return f"Front of {RULES[rule]}: {', '.join(parts)} on."


def front_table(front):
    """Per time budget and rule model@k and value; for coverage the lead over the next best too."""
    found = {rule: {row["seconds"]: row for row in found} for rule, found in front.items()}
    lines = []
    for budget, row in found["coverage"].items():
        cells = [found[rule].get(budget) for rule in found]
        cells = ["{model}@{k} {value:.1%}".format(**cell) if cell else "-" for cell in cells]
        lead = f"{with_interval(row, 'lead')} over {row['next']}" if row["next"] else "-"
        lines.append([f"{budget:.2f}", cells[0], lead, *cells[1:]])
    names = [RULES[rule] for rule in found]
    return table(["seconds", names[0], "its lead, points", *names[1:]], lines)


def front_report(front, steps, with_scoring):
    if not front:
        return []
    note = f" Best of n and weighted {'with' if with_scoring else 'without'} the time of scoring."
    return ["The front: who has most at each time budget, as model@k." + (note if "weighted" in front else ""),
            "\n".join(f"- {front_line(rule, found)}" for rule, found in steps.items()), front_table(front)]


def report(results):
    """The results as Markdown: a table of the models; a line and a table per student; choosing by scores; the front."""
    models = results["models"]
    made = dict.fromkeys(f"{m['task'] or 'samples'} on {m['device']}, {m['dtype']}, {m['date']}" for m in models.values())
    parts = [model_table(models), f"Sampled: {'; '.join(made)}. In brackets: 95% intervals, by bootstrap over problems. "
             "Luck: the share of problems whose samples hold another problem's answer."]
    students = [name for name in models if "ahead" in models[name]]
    parts += [f"**{verdict(models[name]['teacher'], name, models[name]['ahead'])}**" for name in students]
    if students:
        parts.append("Below, what each has when its teacher completes 1, 2, 4, ... samples of every problem, and how many "
                     "times as fast the student is to the coverage that its teacher has then (-: never).")
    parts += [budget_table(models[name]["teacher"], name, models[name]["ahead"]) for name in students]
    parts += selection_report({name: m for name, m in models.items() if "weighted" in m})
    return "\n\n".join(parts + front_report(results["front"], results["front_steps"], results["front_with_scoring"]))


# ------------------------------------------------------------------------------------------------ the script
def find_samples(out):
    """Names of the models under `out` that have samples."""
    names = os.listdir(out) if os.path.isdir(out) else []
    names = [name for name in names if os.path.isfile(os.path.join(out, name, "samples.jsonl"))]
    if not names:
        raise ValueError(f"no samples under {out}/: run python sample.py first, or name the folder with --out")
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out", default="out", help="folder with one folder per model")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="grade only these; default: all that have samples")
    parser.add_argument("--teacher", metavar="NAME", help="compare all others with this one; default: each student with "
                        "the teacher of its size, pure-small with teacher-small, pure with teacher")
    parser.add_argument("--scores", nargs="?", const="scores.jsonl", metavar="FILE", help="every model must have complete "
                        "scores in its folder, in scores.jsonl or this file; default: scores.jsonl counts where it is complete")
    parser.add_argument("--seed", type=int, default=0, help="of the random subsets (votes) and the bootstrap")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    names = find_samples(args.out)
    wanted = (args.model or names) + ([args.teacher] if args.teacher else [])
    for name in wanted:
        if name not in names:
            raise ValueError(f"no samples of {name} under {args.out}/: choose from {', '.join(names)}")
    runs = {name: Run(os.path.join(args.out, name), args.scores) for name in names if name in wanted}
    base = runs.get(args.teacher or "teacher")
    results = dict(teacher=base and base.name, seed=args.seed,
                   models={name: summarise(run, args.seed) for name, run in runs.items()})
    for name, student in runs.items():
        if name == args.teacher or not args.teacher and name.split("-")[0] == "teacher":
            continue
        teacher = runs.get(args.teacher or teacher_of(name, runs))
        if not teacher:
            print(f"no teacher among these models to compare {name} with: name one with --teacher")
        elif are_comparable(teacher, student):
            results["models"][name] |= dict(teacher=teacher.name, ahead=ahead(teacher, student, args.seed))
    results |= fronts(list(runs.values()), args.seed)
    path = os.path.join(args.out, "results.json")
    write_json(path, results)
    print(f"{report(results)}\n\nwrote {path}")


if __name__ == "__main__":
    run(main)
