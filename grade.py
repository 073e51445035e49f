r"""Grade the sampled answers: how many problems does each model solve, with how many samples, in how much time?

    python grade.py                       # every model under out/ that has samples
    python grade.py --model teacher pure  # only these

reads   out/<name>/samples.jsonl   one record per completion (sample.py writes it), with samples.json beside it
        out/<name>/scores.jsonl    with --scores: {"problem", "sample", "score"} per completion, from a reward model
writes  out/results.json           everything plot.py draws; the same is printed as tables

Contents, small to large:
    one completion     extract_answer, normalise, is_correct (math-verify in a process of its own)
    one problem        pass_at_k, majority_vote, best_of_n, weighted_vote
    k of n samples     coverage_table, vote_curve, best_of_n_table: the same for any k of the samples; mean_low_high
    one model          read_samples, load_run, grade_run, summarise
    two models         ahead: who covers more at the same moment on the clock, and by how much
    all of it          report, main

Two words used throughout: *coverage* at k is pass@k, the share of problems of which at least one of k samples is
right; *majority* at k is the share whose most frequent answer among k samples is right.
"""
import argparse
import atexit
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
from tqdm import tqdm

FIELDS = {"problem": int, "sample": int, "gold": (str, int, float), "completion": str,
          "num_tokens": int, "finish": str, "seconds": (int, float)}
LONGEST_ANSWER = 300     # characters; longer ones are compared as strings only
CHECK_SECONDS = 3        # time limit of one comparison by math-verify
CHECK_BYTES = 4 << 30    # address space of the process that runs math-verify
NUM_RESAMPLES = 1000     # of the bootstrap over problems
NUM_SUBSETS = 256        # of the samples of a problem, per k, for the votes (at least)


def fail(message):
    """A user's mistake: one line on stderr, exit code 2, no traceback."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


# --- one completion: what is its answer, and is it right? ---

def extract_answer(text):
    r"""The final answer in a completion, or None: the last \boxed{...}, else what follows the last `####` on its
    line (GSM8K), else what follows the last "answer is"."""
    found = last_boxed(text)
    if found is None and "####" in text:
        found = text[text.rindex("####") + 4:].partition("\n")[0]
    if found is None:
        ends = [match.end() for match in re.finditer(r"answer is\b:?", text, flags=re.IGNORECASE)]
        if not ends:
            return None
        found = re.split(r"\.\s|\n", text[ends[-1]:], maxsplit=1)[0]
    found = found.strip().strip("$").strip().rstrip(".").strip().strip("$").strip()
    return found or None


def last_boxed(text):
    r"""The inside of the last complete \boxed{...}, braces matched, `\{` and `\}` skipped; None without one.
    One pass with a stack, so that a megabyte of open braces costs a second at most."""
    stack, best = [], None                                   # stack of (is this brace a \boxed?, where its inside starts)
    for token in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, flags=re.DOTALL):
        if token[0].endswith("{") and token[0] != r"\{":
            stack.append((token[0] != "{", token.end()))
        elif token[0] == "}" and stack:
            is_boxed, start = stack.pop()
            if is_boxed and (best is None or start > best[0]):
                best = start, token.start()
    return None if best is None else text[best[0]:best[1]]


def normalise(answer):
    r"""One spelling for what is plainly the same: `\$1,200.0`, `1{,}200 \text{ apples}` and `1200` become `1200`.
    After the normalisation of Minerva (Lewkowycz et al. 2022), much shortened: the rest is math-verify's work."""
    s = str(answer).strip().strip("$").rstrip(".")
    s = s.replace("{,}", ",")
    for junk in (r"\left", r"\right", r"\!", r"\,", r"\;", r"\ ", r"\$", "$", r"\%", "%", r"^\circ", r"^{\circ}"):
        s = s.replace(junk, "")
    s = re.sub(r"\\[dt]frac", r"\\frac", s)
    s = re.sub(r"^(-?[0-9.,]+)\s*\\(?:text|mbox|mathrm)\{[^{}]*\}$", r"\1", s)      # 12\text{ apples} -> 12
    s = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}", r"\1", s)              # \text{Monday} -> Monday
    s = re.sub(r"\s+", "", s)
    s = re.sub(r"^[a-zA-Z]=", "", s)                                                # x=5 -> 5
    if re.fullmatch(r"[-+]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?", s):
        s = s.replace(",", "")
    if re.fullmatch(r"[-+]?[0-9]*\.[0-9]*", s) and len(s) > 1:
        s = re.sub(r"^([-+]?)\.", r"\g<1>0.", s).rstrip("0").rstrip(".")            # .50 -> 0.5, 12.0 -> 12
    return s.removeprefix("+")


def is_correct(answer, gold):
    """Is the answer (None: there is none) the gold one? Equal after normalise(), or equivalent as LaTeX."""
    return answer is not None and _is_correct(normalise(answer), normalise(gold))


@functools.lru_cache(maxsize=None)
def _is_correct(answer, gold):
    if answer == gold:
        return answer != ""
    if max(len(answer), len(gold)) > LONGEST_ANSWER or not answer or not gold:
        return False
    if all(re.fullmatch(r"-?[0-9]+", s) for s in (answer, gold)):
        return int(answer) == int(gold)
    if any(re.fullmatch(r"[A-Za-z]{3,}", s) for s in (answer, gold)):
        return answer.lower() == gold.lower()                # words: as products of letters, listen would equal silent
    return equivalent(answer, gold)


# math-verify turns text into sympy objects, which 9**9**9**9 keeps busy for ever and out of memory. Its own time limit
# (signal.alarm) works in the main thread only and not inside one long operation, so it runs in a process that can be
# killed. One process serves all comparisons; after a kill the next comparison starts another.
_worker, _lock = None, threading.Lock()


def equivalent(answer, gold):
    """Are two LaTeX expressions equal by math-verify? False if that cannot be told within CHECK_SECONDS."""
    global _worker
    with _lock:
        if _worker is None:
            _worker = start_worker()
        timer = threading.Timer(CHECK_SECONDS, _worker.kill)
        timer.start()
        try:
            _worker.stdin.write(json.dumps([answer, gold]) + "\n")
            _worker.stdin.flush()
            verdict = _worker.stdout.readline()
        except BrokenPipeError:
            verdict = ""
        timer.cancel()
        if not verdict:                                      # killed: by the timer, or for want of memory
            stop_worker()
        return verdict == "True\n"


def start_worker():
    here = os.path.dirname(os.path.abspath(__file__))
    code = f"import sys; sys.path.insert(0, {here!r}); import grade; grade.answer_questions()"
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
                              env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    if worker.stdout.readline() != "ready\n":
        worker.kill()
        raise ModuleNotFoundError("math-verify, which compares LaTeX answers, cannot be imported: pip install math-verify")
    return worker


@atexit.register
def stop_worker():
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.wait()
        _worker.stdout.close()
        try:
            _worker.stdin.close()
        except BrokenPipeError:                              # what was not yet sent to the dead
            pass
        _worker = None


def answer_questions():
    """The worker's life: a line [answer, gold] in, a line True or False out."""
    from math_verify import LatexExtractionConfig, parse, verify
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (CHECK_BYTES, CHECK_BYTES))
    except (ImportError, ValueError, OSError):
        pass                                                 # no such limit on this system: the time limit remains
    print("ready", flush=True)
    for line in sys.stdin:
        if hasattr(signal, "alarm"):
            signal.alarm(4 * CHECK_SECONDS)                  # ends this process even if nobody is left to kill it
        try:
            parsed = [parse(f"${s}$", [LatexExtractionConfig()], parsing_timeout=None) for s in json.loads(line)]
            verdict = bool(verify(parsed[1], parsed[0], timeout_seconds=None))
        except Exception:
            verdict = False
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        print(verdict, flush=True)


# --- one problem: many answers ---

def pass_at_k(n, c, k):
    """Chance that at least one of k samples, drawn from n of which c are right, is right: 1 - C(n-c, k) / C(n, k),
    the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), in exact integers."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(answers):
    """The most frequent answer; a tie goes to the one seen first; None only if nobody answered."""
    return weighted_vote(answers, [1] * len(answers))


def weighted_vote(answers, scores):
    """The answer with the largest sum of scores over its (equal) copies; ties and None as in majority_vote."""
    check_lengths(answers, scores)
    totals = {}
    for answer, score in zip(answers, scores):
        if answer is not None:
            totals[answer] = totals.get(answer, 0) + score
    return max(totals, key=totals.get, default=None)         # dicts keep their order, max takes the first


def best_of_n(answers, scores):
    """The answer with the highest score; ties and None as in majority_vote."""
    check_lengths(answers, scores)
    answered = [i for i, answer in enumerate(answers) if answer is not None]
    return answers[max(answered, key=lambda i: scores[i])] if answered else None


def check_lengths(answers, scores):
    if len(answers) != len(scores):
        raise ValueError(f"every answer needs a score: got {len(answers)} answers and {len(scores)} scores")


# --- k of n samples: the same, averaged over subsets of the n samples that we have ---

def powers_of_two(n):
    """1, 2, 4, ... up to n, and n itself."""
    return sorted({2 ** i for i in range(n.bit_length())} | {n})


@functools.lru_cache(maxsize=None)
def coverage_table(n):
    """pass_at_k(n, c, k) for every c = 0..n (rows) and k = 1..n (columns): 1 - prod_{j<k} (n-c-j) / (n-j)."""
    c, j = np.arange(n + 1)[:, None], np.arange(n)
    return 1 - np.cumprod(np.maximum(n - c - j, 0) / (n - j), axis=1)


@functools.lru_cache(maxsize=None)
def best_of_n_table(n):
    """Chance that sample number i in order of preference is the best of k: C(n-1-i, k-1) / C(n, k). Rows k = 1..n."""
    return np.array([[math.comb(n - 1 - i, k - 1) / math.comb(n, k) for i in range(n)] for k in range(1, n + 1)])


def vote_curve(groups, right, weights, ks, rng):
    """Chance that the vote among k of a problem's n samples is right, for each k of ks.

    groups (n,): which answer each sample gave, numbered from 0, or -1 for none; right (n,) bool; weights (n,): 1 each
    for the majority, the scores for the weighted vote. We average over random subsets without replacement: the windows
    of length k on random circles of the samples. All n windows of a circle are used, and each sample is in k of them,
    so k = 1 (pass@1) and k = n (the vote of all) come out exact.
    """
    n, num_groups = len(groups), int(groups.max()) + 1
    circles = [rng.permutation(n) for _ in range(-(-NUM_SUBSETS // n))]
    windows = (np.arange(n)[:, None] + np.arange(n)) % n
    subsets = np.concatenate([circle[windows] for circle in circles])         # (S, n): k of a row are a random subset
    group_is_right = np.zeros(num_groups + 1, bool)                           # the last group is "no answer": wrong
    group_is_right[groups[right]] = True
    group_is_right[-1] = False
    groups = np.where(groups < 0, num_groups, groups)
    rows = np.arange(len(subsets))[:, None] * (num_groups + 1)
    chances = []
    for k in ks:
        picked = subsets[:, :k]                                               # (S, k) sample numbers
        bins = (rows + groups[picked]).ravel()                                # (S * k,) one bin per subset and answer
        votes = np.bincount(bins, weights[picked].ravel(), rows.size * (num_groups + 1))
        first = np.full(votes.size, n)
        np.minimum.at(first, bins, picked.ravel())                            # earliest sample with this answer
        votes[first == n] = -np.inf
        votes, first = votes.reshape(-1, num_groups + 1), first.reshape(-1, num_groups + 1)
        votes[:, -1] = np.where(np.isinf(votes[:, :-1]).all(1), 0, -np.inf)   # "no answer" wins only when alone
        winner = np.where(votes == votes.max(1, keepdims=True), first, n + 1).argmin(1)
        chances.append(group_is_right[winner].mean())
    return chances


def resampling_weights(num_problems, seed):
    """Bootstrap over problems: (NUM_RESAMPLES, problems) shares of each problem in each resample. Models on the same
    problems get the same shares, which makes every comparison of two models a paired one."""
    rng = np.random.default_rng([seed, num_problems])
    return rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), NUM_RESAMPLES) / num_problems


def mean_low_high(values, seed):
    """Mean over problems (rows) of each column, and its bootstrap 95% interval: three lists."""
    means = resampling_weights(len(values), seed) @ values                    # (resamples, columns)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return values.mean(0).tolist(), low.tolist(), high.tolist()


# --- one model ---

def find_models(out, wanted):
    """Names of the folders under out/ with samples, or those of them that are wanted."""
    if not os.path.isdir(out):
        fail(f"no folder {out}: run python sample.py first, or name the folder with --out")
    names = sorted(n for n in os.listdir(out) if os.path.isfile(os.path.join(out, n, "samples.jsonl")))
    if not names:
        fail(f"no samples found: {out}/*/samples.jsonl does not exist; run python sample.py first")
    for name in wanted or []:
        if name not in names:
            fail(f"--model {name}: no {os.path.join(out, name, 'samples.jsonl')}; there are: {', '.join(names)}")
    return [n for n in names if n in wanted] if wanted else names


def read_jsonl(path):
    """The objects of a .jsonl file. A torn last line (the writer was killed) is dropped, any other is an error."""
    with open(path, "rb") as file:
        lines = file.read().splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:                                   # JSON or UTF-8
            if number == len(lines):
                print(f"{path}: the last line is torn and dropped")
                return
            fail(f"{path}, line {number}: not JSON: {line[:60]!r}; delete the line and run python sample.py again")
        yield number, record


def read_samples(path):
    """The completions in a samples.jsonl, checked: {problem: [record, ...] in the order of sample}."""
    problems = {}
    for number, record in read_jsonl(path):
        for field, kind in FIELDS.items():
            value = record.get(field) if isinstance(record, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                fail(f"{path}, line {number}: {field!r} is missing or of a wrong type ({value!r}); a record has "
                     f"{', '.join(FIELDS)}; delete the line and run python sample.py again")
        samples = problems.setdefault(record["problem"], {})
        if record["sample"] in samples:
            fail(f"{path}, line {number}: problem {record['problem']} has sample {record['sample']} twice; "
                 f"delete one of the two lines")
        samples[record["sample"]] = record
    if not problems:
        fail(f"{path} holds no samples; run python sample.py first")
    return {p: [samples[s] for s in sorted(samples)] for p, samples in sorted(problems.items())}


def read_sidecar(path):
    """samples.json: how the samples were made. Missing is fine, unreadable is not."""
    try:
        with open(path, encoding="utf-8") as file:
            sidecar = json.load(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        fail(f"{path} is not JSON ({error}); delete it to grade without it")
    return sidecar if isinstance(sidecar, dict) else {}


def read_scores(path, run, name):
    """scores.jsonl as an array like run["right"], or None if there is no such file."""
    if not os.path.isfile(path):
        print(f"{name}: no {path}, graded without scores")
        return None
    scores = {}
    for number, record in read_jsonl(path):
        try:
            scores[record["problem"], record["sample"]] = float(record["score"])
        except (KeyError, TypeError, ValueError):
            fail(f"{path}, line {number}: a record has problem, sample and a number as score, not {str(record)[:60]}")
    try:
        return np.array([[scores[p, r["sample"]] for r in rows] for p, rows in zip(run["ids"], run["records"])])
    except KeyError as error:
        fail(f"{path}: no score for (problem, sample) = {error.args[0]}; score all completions of samples.jsonl")


def load_run(folder, name, with_scores):
    """Read one model's samples as a rectangle of P problems and n samples, and measure seconds[k].

    seconds[k - 1] is the moment at which every problem had k completions: the k-th to finish of each problem, the
    latest of them over problems. Nothing is modelled.
    """
    problems = read_samples(os.path.join(folder, "samples.jsonl"))
    n = min(len(rows) for rows in problems.values())
    uneven = sum(len(rows) > n for rows in problems.values())
    if uneven:
        print(f"{name}: {uneven} of {len(problems)} problems have more than {n} samples; graded on the first {n} of each "
              f"(python sample.py completes the others)")
    finished = np.array([sorted(r["seconds"] for r in rows)[:n] for rows in problems.values()])           # (P, n)
    run = {"name": name, "ids": list(problems), "records": [rows[:n] for rows in problems.values()],
           "num_samples": n, "seconds": finished.max(0), "scores": None,
           "sidecar": read_sidecar(os.path.join(folder, "samples.json")),
           "all_records": [r for rows in problems.values() for r in rows]}
    if with_scores:
        run["scores"] = read_scores(os.path.join(folder, "scores.jsonl"), run, name)
    return run


def grade_run(run, bar):
    """Add to a run, all (P, n): `groups` (number of the answer, -1 for none), `right`, and `coverage` (per k)."""
    shape = len(run["records"]), run["num_samples"]
    run["groups"], run["right"] = np.full(shape, -1), np.zeros(shape, bool)
    run["answers"] = []
    for p, rows in enumerate(run["records"]):
        gold, numbers = str(rows[0]["gold"]), {}
        answers = [extract_answer(r["completion"]) for r in rows]
        answers = [None if a is None else normalise(a) or None for a in answers]      # votes group equal strings
        for i, answer in enumerate(answers):
            if answer is not None:
                run["groups"][p, i] = numbers.setdefault(answer, len(numbers))
                run["right"][p, i] = is_correct(answer, gold)
        run["answers"].append(answers)
        bar.update(len(rows))
        bar.set_postfix_str(f"{run['name']}: right {run['right'][:p + 1].mean():.1%}", refresh=False)
    run["coverage"] = coverage_table(run["num_samples"])[run["right"].sum(1)]
    return run


def votes(run, weights, ks, seed):
    """Chance of a right vote per problem and k of ks: (P, len(ks)). The subsets depend on seed and problem alone."""
    return np.array([vote_curve(run["groups"][p], run["right"][p], weights[p], ks, np.random.default_rng([seed, p]))
                     for p in range(len(run["ids"]))])


def majority(run, ks, seed):
    return votes(run, np.ones(run["right"].shape), ks, seed)


def best_of_n_curve(run):
    """Chance that the best-scored of k samples is right: (P, n), exact."""
    order = np.lexsort((-run["scores"], run["groups"] < 0))                   # answers first, then by score, then earliest
    return np.take_along_axis(run["right"], order, 1) @ best_of_n_table(run["num_samples"]).T


def luck(run):
    """Coverage at k = n against the gold answer of another problem (the next one whose gold differs): what guesses of
    this kind would cover. Compared as strings. None if all problems have one answer."""
    golds = [normalise(rows[0]["gold"]) for rows in run["records"]]
    hits = []
    for p, answers in enumerate(run["answers"]):
        other = next((g for g in golds[p + 1:] + golds[:p] if g != golds[p]), None)
        if other is not None:
            hits.append(other in answers)
    return float(np.mean(hits)) if hits else None


def summarise(run, seed):
    """One model's entry of results.json."""
    ks = powers_of_two(run["num_samples"])
    columns = np.array(ks) - 1
    records, sidecar = run["all_records"], run["sidecar"]
    tokens, end = sum(r["num_tokens"] for r in records), max(r["seconds"] for r in records)
    entry = {"params": sidecar.get("params"),
             "tokens_per_second": sidecar.get("tokens_per_second") or tokens / max(end, 1e-9),
             "num_problems": len(run["ids"]), "num_samples": run["num_samples"],
             "answered": float((run["groups"] >= 0).mean()),
             "finished": float(np.mean([r["finish"] == "stop" for r in records])),
             "mean_tokens": tokens / len(records), "luck": luck(run),
             "device": sidecar.get("device"), "dtype": sidecar.get("dtype"), "date": sidecar.get("date"),
             "task": (sidecar.get("settings") or {}).get("task"),
             "k": ks, "seconds": run["seconds"][columns].tolist()}
    curves = {"coverage": run["coverage"][:, columns], "majority": majority(run, ks, seed)}
    if run["scores"] is not None:
        curves["best_of_n"] = best_of_n_curve(run)[:, columns]
        curves["weighted"] = votes(run, run["scores"], ks, seed)
    for name, values in curves.items():
        entry[name], entry[name + "_low"], entry[name + "_high"] = mean_low_high(values, seed)
    entry["every_k"] = {"seconds": run["seconds"].tolist(), "coverage": run["coverage"].mean(0).tolist()}
    return entry


# --- two models: who covers more at the same moment? ---

def comparable(teacher, student):
    """Same problems? Says so if not. Differing settings are named, as they may explain a difference in time."""
    asked = [[(p, r[0].get("question"), str(r[0]["gold"])) for p, r in zip(run["ids"], run["records"])]
             for run in (teacher, student)]
    if asked[0] != asked[1]:
        print(f"{student['name']} and {teacher['name']} were sampled on different problems "
              f"({len(asked[1])} and {len(asked[0])} of them): not compared")
        return False
    own = {"model", "out", "checkpoint", "weights"}                           # differ from model to model by nature
    settings = [{**(run["sidecar"].get("settings") or {}), **{key: run["sidecar"].get(key) for key in ("device", "dtype")}}
                for run in (teacher, student)]
    for key in sorted((settings[0].keys() | settings[1].keys()) - own):
        values = [s.get(key) for s in settings]
        if values[0] != values[1]:
            print(f"note: {student['name']} was sampled with {key} {values[1]}, {teacher['name']} with {values[0]}")
    return True


def samples_at(run, budgets):
    """The largest k with seconds[k] <= budget, for each budget: a step function; 0 before the first complete round, and
    flat after the last one (a model that is done gets no credit for what it could still have sampled)."""
    return np.searchsorted(run["seconds"], budgets, side="right")


def ahead(teacher, student, seed):
    """One student's `ahead` entry: where on the clock it covers more problems than its teacher, and how much more."""
    return {**leads(teacher, student, seed), "table": fixed_budgets(teacher, student, seed),
            "equal_coverage": equal_coverage(teacher, student)}


def leads(teacher, student, seed):
    """Compare the two step functions at every budget from the later first complete round (before it, one of the two
    has nothing to show: no lead) to the later end. They change only at measured moments, so those are enough.

    Leads are in points (hundredths of the problems), negative if the student is never ahead. `best_lead` is the largest
    at any budget; the stairs flatter it, as it tends to fall just before the teacher completes another round.
    `round_lead` is the largest at the moments at which the teacher has just completed one, where the stairs favour the
    teacher: the careful number. Their intervals are paired bootstraps at that one budget, and do not account for our
    having picked the best one.
    """
    ends = [run["seconds"][-1] for run in (teacher, student)]
    start = max(teacher["seconds"][0], student["seconds"][0])
    times = np.unique(np.concatenate([[start], teacher["seconds"], student["seconds"]]))
    times = times[times >= start]
    points = 100 * (student["coverage"][:, samples_at(student, times) - 1]
                    - teacher["coverage"][:, samples_at(teacher, times) - 1])                 # (P, moments)
    lead, low, high = mean_low_high(points, seed)
    until = np.append(times[1:], max(ends))                                                   # each lead lasts until then
    budgets = []
    for t, end, is_ahead, was_ahead in zip(times, until, np.array(lead) > 1e-9, [False, *(np.array(lead) > 1e-9)]):
        if is_ahead and was_ahead:
            budgets[-1][1] = float(end)
        elif is_ahead:
            budgets.append([float(t), float(end)])
    entry = {"budgets": budgets, "span": max((b / a for a, b in budgets if a > 0), default=None)}
    at_rounds = np.isin(times, teacher["seconds"]) if teacher["seconds"][-1] >= start else times == start
    for name, counts in (("best_lead", True), ("round_lead", at_rounds)):
        best = int(np.argmax(np.where(counts, np.round(lead, 9), -np.inf)))
        entry.update({name: lead[best], name + "_low": low[best], name + "_high": high[best],
                      name + "_seconds": float(times[best])})
    return entry


def fixed_budgets(teacher, student, seed):
    """What each has at the moments at which the teacher completes 1, 2, 4, ... samples of every problem."""
    budgets = teacher["seconds"][np.array(powers_of_two(teacher["num_samples"])) - 1]
    ks = {run["name"]: samples_at(run, budgets) for run in (teacher, student)}
    scores = {}
    for run in (teacher, student):
        columns = np.maximum(ks[run["name"]], 1)                              # no round yet: taken out below
        scores[run["name"]] = run["coverage"][:, columns - 1], majority(run, columns, seed)
    rows = []
    for i, budget in enumerate(budgets):
        row = {"seconds": float(budget)}
        for role, run in (("teacher", teacher), ("student", student)):
            k = int(ks[run["name"]][i])
            row[role + "_k"] = k
            for kind, values in zip(("coverage", "majority"), scores[run["name"]]):
                row[f"{role}_{kind}"] = float(values[:, i].mean()) if k else None
        for kind, ours, theirs in zip(("lead", "majority_lead"), scores[student["name"]], scores[teacher["name"]]):
            values = mean_low_high(100 * (ours - theirs)[:, i:i + 1], seed)
            for suffix, value in zip(("", "_low", "_high"), values):
                row[kind + suffix] = value[0] if row["student_k"] else None
        rows.append(row)
    return rows


def equal_coverage(teacher, student):
    """How long each takes to the coverage that the teacher has at k = 1, 2, 4, ...; None where the student never gets
    there. `ratio` above 1: the student is that many times faster."""
    theirs, ours = teacher["coverage"].mean(0), student["coverage"].mean(0)
    rows = []
    for k in powers_of_two(teacher["num_samples"]):
        reached = ours >= theirs[k - 1] - 1e-9
        row = {"k": k, "coverage": float(theirs[k - 1]), "teacher_seconds": float(teacher["seconds"][k - 1]),
               "student_k": None, "student_seconds": None, "ratio": None}
        if reached.any():
            student_k = int(reached.argmax()) + 1
            seconds = float(student["seconds"][student_k - 1])
            row.update(student_k=student_k, student_seconds=seconds, ratio=row["teacher_seconds"] / seconds if seconds else None)
        rows.append(row)
    return rows


# --- all of it ---

def write_json(path, value):
    """Write to a temporary name, then rename: a reader never sees half a file."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    os.replace(path + ".tmp", path)


def percent(share):
    return "-" if share is None else f"{100 * share:.1f}"


def report(results):
    """The results as text tables."""
    print(f"\n{'model':<12}{'params':>12}{'tokens/s':>10}{'samples':>12}{'seconds':>9}{'answered':>10}{'luck':>7}"
          f"{'pass@1':>8}{'coverage %':>22}{'majority %':>22}")
    for name, m in results["models"].items():
        shares = [f"{percent(m[c][-1])} [{percent(m[c + '_low'][-1])}, {percent(m[c + '_high'][-1])}]"
                  for c in ("coverage", "majority")]
        params = f"{m['params']:,}" if m["params"] else "-"
        print(f"{name:<12}{params:>12}{m['tokens_per_second']:>10,.0f}{m['num_problems']:>6} x {m['num_samples']:<3}"
              f"{m['seconds'][-1]:>9.1f}{percent(m['answered']):>10}{percent(m['luck']):>7}{percent(m['coverage'][0]):>8}"
              f"{shares[0]:>22}{shares[1]:>22}")
    for name, m in results["models"].items():
        if "ahead" in m:
            report_ahead(name, results["teacher"], m["ahead"])


def report_ahead(name, teacher, a):
    print(f"\n{name} against {teacher}, at the moments at which {teacher} completes 1, 2, 4, ... samples of every problem")
    print(f"{'seconds':>10}  {teacher + ': k':>12}{'coverage':>10}{'majority':>10}  {name + ': k':>12}{'coverage':>10}"
          f"{'majority':>10}  {'coverage lead, points':>24}{'as fast to it':>15}")
    for row, equal in zip(a["table"], a["equal_coverage"]):
        lead = "-" if row["lead"] is None else f"{row['lead']:+.1f} [{row['lead_low']:+.1f}, {row['lead_high']:+.1f}]"
        ratio = "never" if equal["ratio"] is None else f"{equal['ratio']:.2f} x"
        print(f"{row['seconds']:>10.2f}  {row['teacher_k']:>12}{percent(row['teacher_coverage']):>10}"
              f"{percent(row['teacher_majority']):>10}  {row['student_k']:>12}{percent(row['student_coverage']):>10}"
              f"{percent(row['student_majority']):>10}  {lead:>24}{ratio:>15}")
    where = ", ".join(f"{a:.2f} to {b:.2f}" for a, b in a["budgets"])
    best, at_round = [f"{a[lead]:+.1f} points [{a[lead + '_low']:+.1f}, {a[lead + '_high']:+.1f}] at "
                      f"{a[lead + '_seconds']:.2f} s" for lead in ("best_lead", "round_lead")]
    if not where:
        print(f"{name} is at no budget ahead of {teacher}; it comes closest with {best}")
        return
    span = f", a factor of {a['span']:.2f} at its widest" if a["span"] else ""
    print(f"{name} is ahead in coverage at budgets of {where} seconds{span}")
    print(f"its best lead is {best}, and {at_round} among the moments at which {teacher} has just completed a round")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Grade out/<name>/samples.jsonl of every model into out/results.json.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    parser.add_argument("--out", default="out", help="folder with one folder per model")
    parser.add_argument("--teacher", default="teacher", help="the model that all others are compared with")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="grade only these (None: all that have samples)")
    parser.add_argument("--scores", action="store_true", help="also best-of-n and weighted vote, by scores.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="of the random subsets (votes) and the bootstrap; 0 or more")
    args = parser.parse_args()
    if args.seed < 0:
        fail(f"--seed {args.seed}: must be 0 or more")
    args.teacher_is_wanted = args.teacher != parser.get_default("teacher")
    return args


def main():
    args = parse_arguments()
    names = find_models(args.out, args.model)
    if args.teacher_is_wanted and args.teacher not in names:
        fail(f"--teacher {args.teacher}: not among the models with samples: {', '.join(names)}")
    runs = {name: load_run(os.path.join(args.out, name), name, args.scores) for name in names}
    if args.scores and all(run["scores"] is None for run in runs.values()):
        fail(f"--scores: no model under {args.out} has a scores.jsonl; grade without --scores, or score the samples first")
    total = sum(len(run["ids"]) * run["num_samples"] for run in runs.values())
    try:
        with tqdm(total=total, desc="grading", unit=" samples", disable=None) as bar:
            runs = {name: grade_run(run, bar) for name, run in runs.items()}
    except ModuleNotFoundError as error:
        fail(str(error))
    results = {"models": {name: summarise(run, args.seed) for name, run in runs.items()},
               "teacher": args.teacher if args.teacher in names else None, "seed": args.seed}
    if results["teacher"] is None:
        print(f"no model named {args.teacher} to compare with (--teacher): nobody is ahead or behind")
    for name, run in runs.items():
        if results["teacher"] not in (None, name) and comparable(runs[args.teacher], run):
            results["models"][name]["ahead"] = ahead(runs[args.teacher], run, args.seed)
    path = os.path.join(args.out, "results.json")
    write_json(path, results)
    report(results)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
