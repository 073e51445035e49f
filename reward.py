"""Reward models: how likely is it that a text is right? They choose among many samples, where a vote only counts.

    reward = RewardModel("RLHFlow/Llama3.1-8B-PRM-Deepseek-Data", device, torch.bfloat16)
    text = process_text(reward.tokenizer, record)     # of a line of samples.jsonl
    [steps] = reward.judge([text])                    # a probability for every step
    score = AGGREGATE["last"](steps)

There are two kinds that are trained for it, and a folder's config.json says which it holds:
- A process reward model (Lightman et al. 2023) judges every step of a solution. That of RLHFlow, which search-and-learn
  uses, is a language model, fine-tuned to answer a dialogue: each turn of the user is one step, and it says "+" if all
  is well so far, "-" if not. p = softmax of these two tokens' logits where it is about to say one.
- A verifier (Cobbe et al. 2021), model.py's Verifier, reads prompt and solution and says one number at the end.

The softmax of two logits is the sigmoid of their difference, (w+ - w-) . x if the head's rows are w+ and w-. So a
process reward model is a verifier with w = w+ - w-, asked at the end of every step; the rest is shared.

A third needs no training: the likelihood of a text under a language model, such as the teacher of a student's. Reading many
texts at once is far cheaper than writing them token by token, so a slow teacher can judge what a fast student wrote.

Contents: what the models read, the models, batches. The script is `sample.py --score`.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import load_tokenizer
from model import LM, Verifier, checkpoint_folder, read_config


# ------------------------------------------------------------------------------------------------ what they read
class Text(NamedTuple):
    """Token ids, and the positions at which the model has seen what it shall judge. `record` is whose text it is."""
    record: dict
    ids: list
    positions: list


def steps_of(completion):
    """What stands between blank lines ("\\n\\n"). Blank steps are left out, but a blank completion is one empty step.

    search-and-learn keeps them, and so takes the judgement of nothing as the last step of a text that ends in "\\n\\n".
    """
    return [step for step in completion.split("\n\n") if step.strip()] or [""]


def process_text(tokenizer, record):
    """The dialogue about a sample: question and first step, "+", second step, "+", ... as RLHFlow's model was trained on.

    The positions are those before each "+": every step is judged as if all before were good. In a causal model one pass
    over the whole dialogue gives what a dialogue cut off after each step would give.
    """
    first, *others = steps_of(record["completion"])
    ids, positions = [], []
    for turn, text in enumerate([f"{record['question']} {first}", *others]):
        ids += tokenizer.chat(text, first=turn == 0)
        positions.append(len(ids) - 1)
        ids += tokenizer.encode("+") + tokenizer.eos_ids[:1]
    return Text(record, ids, positions)


def verifier_text(tokenizer, record, template):
    """A sample as its model read and wrote it, judged at the last token: an end that was reached counts as a token."""
    ids = tokenizer.chat(template.replace("{question}", record["question"])) + tokenizer.encode(record["completion"])
    ids += tokenizer.eos_ids[:1] if record["finish"] == "stop" else []
    return Text(record, ids, [len(ids) - 1])


def likelihood_text(tokenizer, record, template):
    """The same text, with the positions at which its tokens are predicted, all but the prompt's."""
    text, start = verifier_text(tokenizer, record, template), len(tokenizer.chat(template.replace("{question}", record["question"])))
    return text._replace(positions=list(range(start - 1, len(text.ids) - 1)))


# ------------------------------------------------------------------------------------------------ the models
AGGREGATE = dict(last=lambda steps: steps[-1], min=min, prod=math.prod)  # one score of the p of all steps


class RewardModel:
    """A reward model with its tokenizer: p = sigmoid(w . x) where a Text is to be judged; or p of the text itself.

    `folder` may be a repository on the Hub. kind: "process", "verifier" or, if asked for, "likelihood". Raises as
    load_tokenizer and LM.from_pretrained do, and ValueError if a process reward model's "+" or "-" is no single token.
    """

    def __init__(self, folder, device=None, dtype=None, likelihood=False):
        self.tokenizer = load_tokenizer(folder)
        folder = checkpoint_folder(folder)
        is_verifier = Verifier.architecture in (read_config(folder).get("architectures") or ()) and not likelihood
        self.kind = "likelihood" if likelihood else "verifier" if is_verifier else "process"
        self.lm = (Verifier if is_verifier else LM).from_pretrained(folder, device, dtype).eval().requires_grad_(False)
        if likelihood:
            return
        if is_verifier:
            self.w = self.lm.score.weight[0].float()  # (d_model,)
            return
        ids = [self.tokenizer.encode(sign) for sign in "+-"]
        if any(len(sign) != 1 for sign in ids):
            raise ValueError(f'{folder} is no process reward model: its tokenizer must have a token "+" and a token "-", '
                             f"but makes {ids[0]} and {ids[1]} of them")
        head = self.lm.model.embed_tokens if self.lm.config.tie_embeddings else self.lm.lm_head
        good, bad = head.weight[[ids[0][0], ids[1][0]]].float()
        self.w = good - bad

    @torch.inference_mode()
    def judge(self, batch):
        """p at every position of every Text of a batch: a list of numbers each.

        Texts are padded at the right, which nothing before it sees. Of the head's outputs (a Llama 3 has 128,256 per
        token) only what counts is computed, and in float32: in bfloat16, logits of 16 to 32 are multiples of 1/8.
        """
        tokens = pad_sequence([torch.tensor(text.ids) for text in batch], batch_first=True).to(self.lm.device)  # (B, L)
        if self.kind == "likelihood":
            return [[self.likelihood(x, text)] for x, text in zip(self.lm.trunk(tokens), batch)]
        rows = [row for row, text in enumerate(batch) for _ in text.positions]
        columns = [column for text in batch for column in text.positions]
        x = self.lm.model.norm(self.lm.trunk(tokens)[rows, columns])  # (all positions, d_model)
        p = (x.float() @ self.w).sigmoid()
        return [part.tolist() for part in p.split([len(text.positions) for text in batch])]


    def likelihood(self, x, text):
        """The probability of a completion after its prompt, of x (L, d_model). 0 below 1e-323, as floats are.

        The head sees one text at a time: logits of a whole batch would be the largest tensor by far.
        """
        logits = self.lm.head(x[None, text.positions])[0].float()  # (tokens of the completion, V)
        targets = torch.tensor([text.ids[position + 1] for position in text.positions], device=x.device)
        return math.exp(-F.cross_entropy(logits, targets, reduction="sum"))


# ------------------------------------------------------------------------------------------------ batches
POOL = 8  # batches' worth of tokens that are sorted by length together


def pools(texts, tokens):
    """Texts in their order, in lists of `tokens` tokens or a little more; the last may be shorter."""
    pool, total = [], 0
    for text in texts:
        pool.append(text)
        total += len(text.ids)
        if total >= tokens:
            yield pool
            pool, total = [], 0
    if pool:
        yield pool


def batches(texts, budget):
    """Lists of texts of like length: with the padding at most `budget` tokens, unless one text alone has more.

    Sorting everything would pad least but finish no problem's first sample before the end; so the texts, which come in
    the order in which they were sampled, are sorted a few batches at a time. Longest first: what is too much for the
    memory shows at once.
    """
    for pool in pools(texts, POOL * budget):
        batch = []
        for text in sorted(pool, key=lambda text: len(text.ids), reverse=True):
            if batch and (len(batch) + 1) * len(batch[0].ids) > budget:
                yield batch
                batch = []
            batch.append(text)
        yield batch
