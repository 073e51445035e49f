r"""One answer: extracting it from a completion, whether it is right, and which answers are one.

An answer is turned into its *readings*, texts that are equal where values are. It has several if
people mean several things by it: 15% is 15% and 0.15 and 15; "x = 5" is an equation and 5. What is
no plain number goes through math-verify's grammar (latex2sympy2_extended) into sympy. Its own
verify() rounds at 6 decimals, takes X for x and ab for BA, and compares pairs, where a vote needs
one form per answer.
"""
import functools
import json
import os
import re
import signal
import sys
import threading
import zlib
from contextlib import suppress
from fractions import Fraction
from multiprocessing.connection import wait
from subprocess import DEVNULL, PIPE, Popen

LONGEST = 300  # characters of an answer that is read; longer ones are compared as they are
CPU_SECONDS, MEMORY = 1, 4 << 30  # limits of reading one answer; the latter in bytes


# ---- extraction
# of boxes that aren't empty, and others; \\. skips \{ and \}
BRACES = re.compile(r"(\\f?box(?:ed)?\s*\{(?!\s*\}))|\\.|([{}])", re.DOTALL)
JOINED = re.compile(r"(?=.*(?:and|or|,))(?:\W|\\text|\\q?quad|and|or)*", re.DOTALL)
MARKER = re.compile(r"answer(?:\*\*)?\s*(?:is\b:?|:|(?=\$|\\[(\[]))(?:\*\*)?\s*\}?", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.\s|\n|,?\s(?:so|because|since|which|as)\b")


def boxed(text):
    r"""The inside of the last \boxed{...} or \fbox{...} with something in it, or of several that
    "and" joins; else of one that the end cuts off or that has no braces; else None. One pass.
    """
    first = re.search(r"\\f?box", text)
    if not first:
        return None
    opened, boxes = [], []  # open braces; the spans of both braces of complete boxes
    for token in BRACES.finditer(text, first.start()):
        if token[1] or token[2] == "{":
            opened.append(token)
        elif token[2] and opened:
            begin = opened.pop()
            if begin[1]:
                boxes.append((*begin.span(), *token.span()))
    if not boxes:
        rest = re.split(r"\\(?:boxed|fbox)\b", text)[-1].lstrip(" {}")
        return re.split(r"[\n$]", rest, maxsplit=1)[0].rstrip(" .") or None
    boxes.sort()
    i = len(boxes) - 1
    while i and JOINED.fullmatch(text, boxes[i - 1][3], boxes[i][0]):
        i -= 1
    return ", ".join(text[begin:end] for _, begin, end, _ in boxes[i:])


def extract_answer(text):
    r"""The final answer in a completion, or None: what the last \boxed{...} holds, else what stands
    in <answer>...</answer>, after the last ####, "answer is" or "Answer:", or in bold at the end.
    """
    found = boxed(text)
    for opening, closing in ("<answer>", "</answer>"), ("####", "\n"):
        if found is None and opening in text:
            found = text.rpartition(opening)[2].strip().partition(closing)[0]
    *before, after = MARKER.split(text if found is None else found)
    if before and found is not None:
        found = after.strip() or found  # \boxed{\text{The answer is } 5}
    elif before:
        found = SENTENCE_END.split(re.sub(r"^[\s$]*(?:\\[(\[])?\s*", "", after), maxsplit=1)[0]
    elif found is None and (bold := re.search(r"\*\*([^*\n]+)\*\*[\s.]*$", text[-LONGEST:])):
        found = bold[1]
    return found and found.lstrip(" \t\n$*").rstrip(" \t\n$*.,;:") or None


# ---- spelling
def repeating(found):
    r"""0.1\overline{6} as a fraction: (16 - 1) / 90."""
    whole, start, period = found.groups()
    value = int(whole + start + period) - int(whole + start)
    return rf"\frac{{{value}}}{{{'9' * len(period) + '0' * len(start)}}}"


# What people write for the same thing and the grammar does not know, replaced in this order.
SPELLINGS = [(re.compile(pattern), new) for pattern, new in [
    ("[–—−]", "-"), ("∞", r"\\infty "), ("∈", r"\\in "), ("≈", r"\\approx "), ("²", "^2"),
    ("³", "^3"), ("½", r"\\frac12"), ("¼", r"\\frac14"), ("¾", r"\\frac34"),
    (r"(?:√|(?<![a-z\\])sqrt) *(?:(\w+)|\(([^()]*)\))", r"\\sqrt{\1\2}"),
    (r", *\\! *", ","),  # 10,\! 080
    (r"(?<!\\)\\(?:[!()\[\]]|(?:left|right|displaystyle|bf|it)(?![a-z]))|\\?[$€£¥₹]", ""),
    (r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-z]))|~", " "),
    (r"\\(?:begin|end)\{(?:align|gather)(?:ed)?\*?\}|&(?!.*\\end\{.?(?:matrix|array))", ""),
    (r"\\(?:text[a-z]*|math(?:bf|it|rm)|mbox) ?\{([^{}]*)\}", r" \1 "),
    (r"\s+", " "),
    (r"(?:\^?\{?\\circ *\}?|\^?\\degree|°) *(?:[CF]\b)?|\bdegrees?\b", ""),
    (r"(?<=\d)\^?\{? *(?:st|nd|rd|th) *\}?$", ""),  # 7^{\text{th}}
    (r"(\d+)\.(\d*)\\overline\{(\d+)\}", repeating),
    (r"(?<=\d)[eE]([+-]?\d+)\b", r"\\times 10^{\1}"),
    *[(rf"(?<=\d) *\b{word}\b", rf"\\times {value}") for word, value in dict(
        dozen="12", hundred="10^2", thousand="10^3", million="10^6", billion="10^9").items()],
    (r"^ *([+-]?) *(?:[A-Z]{3}|US|Rs\.?) *(?=[\d.])", r"\1"),
    (r"(?<![a-zA-Z\\])infinity\b", r"\\infty"), (r"(?<![a-zA-Z\\])pi(?![a-z])", r"\\pi"),
    # a unit: words after a space, or a short one after a digit; up to the end or the next comma
    (r"(?:(?:(?<=[\d)}])|(?<=\\pi)) +(?!and|or\b|[ap]m\b|sin|cos|tan|log|mod|choose)"
     r"(?:[a-zA-Z]{2,}|[mgsh]\b)|(?<=\d)(?:[ckm]m|kg|ft|lb|m)\b)"
     r"(?: *\^ *\{?\d\}?|(?! and | or )[a-zA-Z ./-])*(?=,|$)", ""),
    (r"(?<![\d.^_}])(\d+) +(\d+) */ *(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),  # 3 1/2
    (r"(?<=\d),(?=(?:\d{3},)*0\d\d(?!\d))", ""),  # (1,000,2): no number begins with 000
    (r"^[ =]*(?:\\approx)? *|[ ,.;:?\\]+$", ""),
]]


# ---- expressions, in a process of their own, which imports sympy and the grammar
def listing(forms):
    """The form of a list whose order does not count."""
    forms = sorted(set(forms))
    return forms[0] if len(forms) == 1 else f"FiniteSet({','.join(forms)})"


def value_at(tree, k):
    """A formula's value at point k: a variable's value depends on its name only."""
    return tree.xreplace({symbol: sympy.Rational(
        zlib.crc32(f"{k} {symbol.name}".encode()), (-1) ** k << 31)  # 0 to 2; 0 to -2
        for symbol in tree.free_symbols}).doit()


def scalar(tree):
    """The form of a formula: exact if it is rational or a name, else 12 digits, at two points if it
    has variables: formulas that agree there are equal in all likelihood."""
    exact = {number: sympy.Rational(str(number)) for number in tree.atoms(sympy.Float)}
    exact |= {symbol: sympy.I for symbol in tree.free_symbols if symbol.name == "i"}
    tree = tree.xreplace(exact).doit()
    if tree.is_Symbol or tree.is_Rational:
        return str(tree)
    return " ".join(str(sympy.N(value_at(tree, k), 12)) for k in range(1 + bool(tree.free_symbols)))


def relation(left, right, kind="Equality"):
    """The form of x = 5, also of 2x - 10 = 0: left minus right at two points, up to a factor."""
    if isinstance(left, sympy.Expr) and not left.is_Function and isinstance(right, sympy.Expr):
        return f"{kind} {sympy.N(value_at(left - right, 0) / value_at(left - right, 1), 12)}"
    return f"{left} {kind} {form(right)}"


def form(tree):
    """A text for a sympy object, equal for equal ones."""
    if isinstance(tree, sympy.MatrixBase):
        return f"{tree.shape}{[*map(form, tree.flat())]}"
    if isinstance(tree, sympy.Expr):
        return scalar(tree)
    if isinstance(tree, sympy.Rel):
        return relation(tree.lhs, tree.rhs, type(tree).__name__)
    if isinstance(tree, sympy.FiniteSet):
        return listing(map(form, tree.args))
    if isinstance(tree, sympy.Interval) and tree.is_open and tree.end.is_finite:  # a pair
        tree = sympy.Tuple(tree.start, tree.end)
    if not tree.args:
        return str(tree)
    order = sorted if isinstance(tree, sympy.Union) else list
    return f"{type(tree).__name__}({','.join(order(map(form, tree.args)))})"


def named(tree):
    """(x, value) of `x = value`, `x = ... = value` and inequalities in one x; else (None, tree)."""
    parts = tree._unsorted_args if isinstance(tree, sympy.And) else [tree]
    if all(isinstance(part, sympy.Eq) for part in parts):
        name = parts[0].lhs
        if grammar.is_expr_of_only_symbols(name) and not name.is_Add:
            return name, parts[-1].rhs
    elif isinstance(tree, sympy.logic.boolalg.Boolean) and len(tree.free_symbols) == 1:
        return min(tree.free_symbols), tree.as_set()
    return None, tree


def expression_readings(text):
    """The readings of LaTeX: of `x = 5` also 5, of a list the tuple, of a number its roundings."""
    name, value = named(grammar.latex2sympy(
        text, is_real=True,
        normalization_config=grammar.NormalizationConfig(malformed_operators=True, boxed="none"),
        conversion_config=grammar.ConversionConfig(lowercase_symbols=False)))
    found = [form(value)]
    if isinstance(value, grammar.FiniteSet):
        values = [form(named(part)[1]) for part in value._unsorted_args]  # in the order written
        found += [listing(values), f"Tuple({','.join(values)})"]
    elif isinstance(value, sympy.Expr) and value.is_number and value.is_real and abs(value) > 0.01:
        near = Fraction(str(sympy.N(value, 30)))
        found += [str(round(near, decimals)) for decimals in range(6, 17)]
    return list(dict.fromkeys(found if name is None else [relation(name, value), *found]))


# ---- their process: sympy would compute 9^{9^{9^9}} for ever
_child, _lock = None, threading.Lock()


def serve(cpu_seconds):
    """Read texts and write their readings, in lines of JSON, until the parent ends."""
    global sympy, grammar
    import resource
    import sympy
    from latex2sympy2_extended import latex2sympy2 as grammar
    with suppress(ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers, sys.stdout = sys.stdout, sys.stderr  # where others may print
    print('"ready"', file=answers, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # unhandled, SIGPROF ends the process
        try:
            found = expression_readings(json.loads(line))
        except Exception:  # whatever sympy makes of nonsense; no memory
            found = []
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(found), file=answers, flush=True)


def start_child():
    """A process that runs serve() and is ready. ValueError if math-verify isn't installed."""
    child = Popen([sys.executable, "-c", f"import verdict; verdict.serve({CPU_SECONDS})"],
                  cwd=os.path.dirname(__file__), text=True, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
    if receive(child, 100) != "ready":
        end_child(child)
        raise ValueError("math-verify, which reads LaTeX answers, does not start: "
                         "pip install -r requirements.txt")
    return child


def receive(child, seconds):
    """The next message of a process; None if it ends or the time is over."""
    with suppress(ValueError):
        return json.loads(child.stdout.readline()) if wait([child.stdout], seconds) else None


def end_child(child):
    child.kill()
    child.communicate()  # closes the pipes


def ask(text):
    """The readings of LaTeX by the process; [] if it can't tell within its limits, in two tries."""
    global _child
    with _lock:
        for _ in range(2):
            child, _child = _child or start_child(), None  # None if we are interrupted
            with suppress(OSError):
                print(json.dumps(text), file=child.stdin, flush=True)
            found = receive(child, 10 * CPU_SECONDS)
            if found is not None:
                _child = child
                return found
            end_child(child)
        return []


# ---- verdicts
@functools.lru_cache(maxsize=1 << 20)
def readings(answer):
    """What an answer may mean, the most literal first: a list of texts, [] if it says nothing."""
    text = answer
    for pattern, new in SPELLINGS if len(answer) <= LONGEST else ():
        text = pattern.sub(new, text)
    text = text.strip()
    if not text or len(text) > LONGEST:
        return [text] if text else []
    grouped = re.fullmatch(r"[+-]?[1-9]\d{0,2}([ ,]\d{3})+(\.\d*)?", text)  # 1,234.5
    plain = re.sub("[ ,]", "", text) if grouped else text
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", plain):
        value = str(Fraction(plain))
        pair = "," in text and not re.search("[ .]", text)  # 120,150 may be two numbers
        return [listing(text.split(",")), value] if pair else [value]
    if text.endswith("%"):
        value, *others = readings(text[:-1]) or [""]
        part = [str(Fraction(value) / 100)] if re.fullmatch(r"-?\d+(/\d+)?", value) else []
        return [value + "%", *part, value, *others]
    if found := re.fullmatch(r"(?i)(\d\d?:\d\d)(?: ?([ap])\.? ?m)?", text):  # time, or a ratio
        return [found[1] + found[2].lower(), found[1]] if found[2] else [found[1], *ask(text)]
    if found := re.fullmatch(r"\(?(-?[\dA-F.]+)\)?_\{?(\d+)\}?", text):  # 52_8
        return [f"{found[1]}_{found[2]}", found[1]]
    found = re.fullmatch(r"\(?([A-Za-z]|[A-Za-z]{2,}([' -][A-Za-z]+)*)\)?", text)
    marked = "\\text" in answer
    if found and len(found[1]) == 1:
        return [found[1], found[1].lower()] if marked else [found[1]]
    if found and (marked or re.search("[eiouA-Z']", found[1])):  # else a product, like abc
        return [found[1].lower()]
    if re.search(r"(?<![_^\d])\d+ \d", text):  # the grammar would add 1 2 up
        return [text]
    return ask(text) or ["".join(text.split())]


def is_correct(answer, gold):
    """Whether one of both, taken literally, says what the other may mean; None is never right."""
    found, expected = readings(answer or ""), readings(gold)
    return bool(found and expected) and (found[0] in expected or expected[0] in found)


def groups(answers):
    """A number per answer, from 0 in order of first appearance, the same for those that is_correct
    holds equal to the first of a group; -1 for None and for an answer that says nothing."""
    literal, possible, numbers = {}, {}, []  # {reading: group whose first answer has it}
    for answer in answers:
        found = readings(answer or "")
        known = {*map(possible.get, found[:1]), *map(literal.get, found)} - {None}
        if found and not known:
            known = {len(literal)}
            for reading in found:
                possible.setdefault(reading, len(literal))  # the earlier group wins
            literal[found[0]] = len(literal)
        numbers.append(min(known, default=-1))
    return numbers
