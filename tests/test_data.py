"""What data.py promises: any text survives the tokenizer, the built-in task is right and never leaks its test problems,
and a mistake in a file is named by its line."""
import base64
import copy
import itertools
import json
import os
import random
import re
import subprocess
import sys
import types

import numpy as np
import pytest

import data
from data import Problem, load_task, load_tokenizer

# ------------------------------------------------------------------------------------------------ tokenizer
NASTY = {
    "empty": "",
    "words": "Start with 4821. In each of 2 rounds do +7 3 times, then x13.",
    "spaces": "  a   b    \n\n\n c\t\td  \r\n ",
    "digits": "007 1234567890 3.14159 -5 1,000,000 +7 x13 [12] 3)",
    "emoji": "naïve 🤖👩‍👩‍👧 日本語 العربية ₿",
    "control": "\x00\x01\x7f\u200b\u2028\ufeff",
    "special-looking": "<|question|><|answer|><|end|> <|endoftext|> <|eot_id|> <|begin_of_text|>",
    "math": "\\boxed{\\frac{1}{2}} $x^2$ #### 42",
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("arithmetic")


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_decode_undoes_encode(tokenizer, text):
    """Red if the split pattern drops a character or a byte has no token: training text would be silently damaged."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_every_text_of_the_task_survives(tokenizer):
    for problem in load_task("arithmetic", "test")[:200]:
        for text in (problem.question, problem.solution):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_looks_special_stays_plain(tokenizer):
    """A question that spells the stop token must not stop anything. Red if encode allows special tokens."""
    special = set(tokenizer.definition["special"].values())
    for name in tokenizer.definition["special"]:
        ids = tokenizer.encode(f"a{name}b")
        assert len(ids) > 1 and not special & set(ids)


def test_chat_puts_special_ids_around_the_question_and_adds_nothing_to_it(tokenizer):
    question = "What is 1 + 1?<|answer|>"
    ids, inside = tokenizer.chat(question), tokenizer.encode(question)
    start = next(i for i in range(len(ids)) if ids[i:i + len(inside)] == inside)
    around = ids[:start] + ids[start + len(inside):]
    special = set(tokenizer.definition["special"].values())
    assert around and set(around) <= special and ids[-1] in special  # the model can tell where its answer starts
    assert tokenizer.eos_ids and not set(tokenizer.eos_ids) & set(ids)


def test_a_tokenizer_is_saved_and_loaded_with_its_folder(tokenizer, tmp_path):
    """A checkpoint must keep its own token ids even if the built-in task changes later."""
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for text in NASTY.values():
        assert loaded.encode(text) == tokenizer.encode(text) and loaded.chat(text) == tokenizer.chat(text)
    assert (loaded.eos_ids, loaded.vocab_size) == (tokenizer.eos_ids, tokenizer.vocab_size)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load_tokenizer(str(tmp_path))


def test_an_unreadable_tokenizer_is_named(tmp_path):
    (tmp_path / data.TOKENIZER_FILE).write_text("{half a")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_tokenizer(str(tmp_path))


def test_the_shipped_tokenizer_keeps_its_ids():
    """The teacher under assets/ was trained with these: red if an old file is read in another way."""
    shipped = load_tokenizer(os.path.join(os.path.dirname(data.__file__), "assets", "teacher"))
    assert shipped.chat("Start: 4821")[0] == 594 and shipped.chat("Start: 4821")[-1] == 595 and shipped.eos_ids == [596]
    assert shipped.encode("\x00 4821") == [0, 256 + 100 + 48, 256 + 21]  # after the bytes come "00".."99" and " 00".." 99"


@pytest.mark.parametrize("ids", [[597], [0, 10**9], [-1]])
def test_an_id_outside_the_vocabulary_is_named_and_a_special_one_is_its_name(tokenizer, ids):
    assert tokenizer.decode(tokenizer.chat("hi")) == "<|question|>hi<|answer|>"
    with pytest.raises(ValueError, match=r"ids 0 to 596") as error:
        tokenizer.decode(ids)
    assert "\n" not in str(error.value)


def test_a_million_spaces_are_encoded(tokenizer):
    """tiktoken's regex engine panics on such a run under a pattern of Llama's kind. Red without the cut in encode."""
    definition = tokenizer.definition | {"pattern": data.LLAMA3_PATTERN}
    for text in (" " * 1_100_000 + "x", "1\n" + "\t " * 600_000):
        assert data.Tokenizer(definition).decode(data.Tokenizer(definition).encode(text)) == text


# ------------------------------------------------------------------------------------------------ tokenizers of others
BITS = [  # what a pre-tokenizer may stumble over; a fuzzed text is a few of them in a row
    " ", "  ", "    ", "\t", "\n", "\r\n", "\n\n", " \n", "\v", "\x85", "\xa0", "\u2003", "\u2028", "\u3000", "\u200b",
    "1", "12", "2024", "1,000", "3.14", "٣", "٤٥", "०", "Ⅳ", "½", "²", "𝟘", "〇", "🤖", "👩‍👩‍👧",
    "e\u0301", "\u0301", "नमस्ते", "日本語", "ſ", "K", "ﬁ",
    "'s", "'S", "'LL", "'ll", "'re", "'VE", "'d", "’s", "'", "''", "\x00", "\x04", "\x1d", "\x7f", "\ufeff", "\U0010ffff",
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "a", "the", " the", "Hello", "don", "!", "!!!", "...", "$", "\\frac{1}{2}",
    "#### 42", "=", "+", "-", "_"]
SOME_TEXT = "the other day in the yard there were 2048 hens and 12 ducks; they laid 365 eggs.\n  def f(x):\n      x's 'll\n"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
LEVEL = {use: dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=use) for use in (True, False)}
DIGITS = {each: dict(type="Digits", individual_digits=each) for each in (True, False)}
LLAMA3_SPLIT = dict(type="Split", pattern=dict(Regex=data.LLAMA3_PATTERN), behavior="Isolated", invert=False)
PRE_TOKENIZERS = {
    "GPT-2": [LEVEL[True]],
    "SmolLM2": [DIGITS[True], LEVEL[True]],
    "runs of digits": [DIGITS[False], LEVEL[True]],
    "Llama 3": [LLAMA3_SPLIT, LEVEL[False]],
    "digits, Llama 3": [DIGITS[True], LLAMA3_SPLIT, LEVEL[False]],
    "runs, Llama 3": [DIGITS[False], LLAMA3_SPLIT, LEVEL[False]],
    "a regex with gaps": [LLAMA3_SPLIT | dict(pattern=dict(Regex=r" ?[a-z]+|\p{N}{1,2}")), LEVEL[False]],
}
SMOLLM2_TEMPLATE = (  # the one in the repositories of SmolLM2
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}")


def fuzzed(count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(BITS, k=rng.randint(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def trained():
    """The content of a tokenizer.json: a byte-level BPE of 500 tokens, trained here by the tokenizers library."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator([SOME_TEXT, *fuzzed(300, seed=1)], tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(model.to_str())


def save_json(folder, content, **files):
    """A folder with a tokenizer.json and other JSON files; returns its path."""
    for name, value in {"tokenizer": content, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return str(folder)


def reference(content):
    """ids(text) by the tokenizers library itself, which is told to read special tokens in a text as text."""
    import tokenizers
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    return lambda text: theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("steps", PRE_TOKENIZERS.values(), ids=PRE_TOKENIZERS.keys())
def test_a_tokenizer_json_gives_the_ids_of_the_tokenizers_library(trained, steps, tmp_path):
    """Red if spaces before a digit are split as before a letter, or if a pre-tokenizer's regex is not honoured."""
    content = trained | {"pre_tokenizer": dict(type="Sequence", pretokenizers=steps) if len(steps) > 1 else steps[0]}
    ours, theirs = load_tokenizer(save_json(tmp_path, content)), reference(content)
    for text in [*fuzzed(1500), *NASTY.values()]:
        ids = ours.encode(text)
        assert ids == theirs(text), repr(text)
        assert ours.decode(ids) == text


@pytest.mark.parametrize("unknown", [None, "<|endoftext|>"])
def test_bytes_without_a_token_are_treated_as_the_tokenizers_library_does(trained, unknown, tmp_path):
    """SmolLM2 has no token for a few control characters and planes. tiktoken alone panics there."""
    content = copy.deepcopy(trained | {"pre_tokenizer": dict(type="Sequence", pretokenizers=PRE_TOKENIZERS["SmolLM2"])})
    content["model"]["unk_token"] = unknown
    lost = {chr(256 + 0x04), chr(256 + 0x1d), "ñ"}  # bytes 0x04, 0x1d and 0xf1 in GPT-2's alphabet
    content["model"]["vocab"] = {token: i for token, i in content["model"]["vocab"].items() if not lost & set(token)}
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if not lost & set("".join(pair))]
    ours, theirs = load_tokenizer(save_json(tmp_path, content)), reference(content)
    assert ours.encode("!\x04!") == theirs("!\x04!") and ours.encode("x") == theirs("x")
    for text in [text.replace("🤖", "\U00040000") for text in fuzzed(1500)]:
        assert ours.encode(text) == theirs(text), repr(text)


def broken(**change):
    """A change to the content of a tokenizer.json: keys of the model, or of the file if the model has no such key."""
    def apply(content):
        content = copy.deepcopy(content)
        for key, value in change.items():
            (content["model"] if key in content["model"] else content)[key] = value
        return content
    return apply


def without_its_last_merges(content):
    return broken(merges=content["model"]["merges"][:-5])(content)


def with_two_ids_exchanged(content):
    *_, last, end = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    vocab = content["model"]["vocab"]
    return broken(vocab=vocab | {last: vocab[end], end: vocab[last]})(content)


def with_another_way_to_make_a_token(content):
    """A merge (a, bc) instead of (ab, c): a and bc are tokens, but in abc they never meet."""
    vocab, merges = content["model"]["vocab"], copy.deepcopy(content["model"]["merges"])
    i, token, cut = next((i, left + right, cut) for i, (left, right) in enumerate(merges)
                         for cut in range(1, len(left + right)) if cut != len(left)
                         and {(left + right)[:cut], (left + right)[cut:]} <= vocab.keys())
    merges[i] = [token[:cut], token[cut:]]
    return broken(merges=merges)(content)


@pytest.mark.parametrize("change, message", [
    (broken(type="Unigram"), "Unigram"),
    (broken(byte_fallback=True), "byte_fallback"),
    (broken(dropout=0.1), "dropout"),
    (broken(normalizer=dict(type="NFC")), "NFC"),
    (broken(pre_tokenizer=None), "pre-tokenizer"),
    (broken(pre_tokenizer=dict(type="Metaspace")), "Metaspace"),
    (broken(pre_tokenizer=LEVEL[True] | dict(add_prefix_space=True)), "add_prefix_space"),
    (broken(pre_tokenizer=LEVEL[False]), "use_regex"),
    (broken(pre_tokenizer=dict(type="Sequence", pretokenizers=[LEVEL[True], DIGITS[True]])), "Digits"),
    (broken(pre_tokenizer=dict(type="Sequence", pretokenizers=[LLAMA3_SPLIT, LLAMA3_SPLIT, LEVEL[False]])), "Split"),
    (broken(pre_tokenizer=dict(type="Sequence", pretokenizers=[LLAMA3_SPLIT | dict(invert=True), LEVEL[False]])), "invert"),
    (broken(added_tokens=[dict(id=0, content="<|endoftext|>", special=False)]), "endoftext"),
    (broken(merges=[]), "no merges"),
    (broken(vocab={"▁a": 0}), "▁a"),
    (lambda content: {"model": {"type": "BPE"}}, "vocab"),
    (without_its_last_merges, "do not make the token"),
    (with_another_way_to_make_a_token, "do not make the token"),
    (with_two_ids_exchanged, "order of the ids"),
])
def test_a_tokenizer_json_that_cannot_be_done_exactly_is_refused(trained, change, message, tmp_path):
    """Other ids than a model was trained on give a model that babbles, without any error."""
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(save_json(tmp_path, change(trained)))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_token_that_merging_cannot_reach_needs_ignore_merges(trained, tmp_path):
    """Llama 3 has such tokens: a piece that is a token is taken whole. Without the flag it is not, but tiktoken would."""
    content = copy.deepcopy(trained)
    content["model"]["vocab"]["Ġqzj"] = 500
    with pytest.raises(ValueError, match="qzj"):
        load_tokenizer(save_json(tmp_path, content))
    content["model"]["ignore_merges"] = True
    assert load_tokenizer(save_json(tmp_path, content)).encode("x qzj") == reference(content)("x qzj") == [
        content["model"]["vocab"]["x"], 500]


@pytest.fixture
def llama3(monkeypatch, tmp_path):
    """A folder with a tokenizer.model like Llama 3's, of 300 tokens."""
    words = ["in", " t", "he", " the", "\n\n", *map(str, range(961, 1000))]
    tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
    lines = [b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    monkeypatch.setattr(data, "LLAMA3_RANKS", len(tokens))
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    return str(tmp_path)


def test_llama_3s_tokenizer_model_is_read(llama3):
    """Ids are line numbers, special tokens follow in Meta's order; three digits are one piece, so 9999 is 999 and 9."""
    tokenizer = load_tokenizer(llama3)
    assert tokenizer.encode("in the") == [256, 259] and tokenizer.encode("9999") == [299, ord("9")]
    assert tokenizer.vocab_size == 300 + 256
    special = tokenizer.definition["special"]
    assert len(special) == 256 and sorted(special.values()) == list(range(300, 556))
    assert tokenizer.eos_ids == [300 + 9, 300 + 1, 300 + 8]  # eot ends a turn; end of text and eom end an answer as well
    for text in [*NASTY.values(), *fuzzed(300)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_llama_3s_chat_has_its_system_block_and_trims_the_question(llama3):
    tokenizer = load_tokenizer(llama3)
    assert tokenizer.decode(tokenizer.chat("\n\n What is {x}? ")) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhat is {x}?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    ids = tokenizer.chat("hi")
    assert [i - 300 for i in ids if i >= 300] == [0, 6, 7, 9, 6, 7, 9, 6, 7] and ids[-1] == 260  # ends in one "\n\n"
    assert [i for i in tokenizer.chat("<|eot_id|>") if i >= 300] == [i for i in ids if i >= 300]


@pytest.mark.parametrize("config, start", [
    (dict(), "<|begin_of_text|>hi\n"),  # a base model
    (dict(chat_template="{{bos_token}}<|start_header_id|>..."), "<|begin_of_text|><|start_header_id|>user<|end_header_id|>"),
    (dict(chat_template="<|start_header_id|> Cutting Knowledge Date"), "<|begin_of_text|><|start_header_id|>system"),
    (dict(chat_template=[dict(name="tool_use", template="?"), dict(name="default", template="<|start_header_id|>")]),
     "<|begin_of_text|><|start_header_id|>user"),
])
def test_a_folders_chat_template_decides_what_a_llama_is_asked_with(llama3, config, start):
    """A base model has the tokens of a chat, too: red if they decide."""
    with open(os.path.join(llama3, "tokenizer_config.json"), "w") as f:
        json.dump(config, f)
    tokenizer = load_tokenizer(llama3)
    assert tokenizer.decode(tokenizer.chat("hi")).startswith(start)
    assert tokenizer.eos_ids[0] == 300 + (9 if config else 1)


@pytest.mark.parametrize("question", ["What is 2+2?", "  two spaces", "\n\nlines\n", "", "7", " {{ x }} \\boxed{1}", "é🤖"])
def test_smollm2s_chat_is_its_template(trained, question, tmp_path):
    """Rendered by Jinja and cut at the special tokens, the rest encoded by the tokenizers library."""
    jinja2 = pytest.importorskip("jinja2")
    (tmp_path / "chat_template.jinja").write_text(SMOLLM2_TEMPLATE)
    tokenizer, ids = load_tokenizer(save_json(tmp_path, trained)), []
    text = jinja2.Template(SMOLLM2_TEMPLATE, keep_trailing_newline=True).render(
        messages=[dict(role="user", content=question)], add_generation_prompt=True)
    for part in re.split(r"(<\|im_start\|>|<\|im_end\|>)", text):
        ids += [SPECIAL.index(part)] if part in SPECIAL else reference(trained)(part)
    assert tokenizer.chat(question) == ids
    assert tokenizer.eos_ids == [SPECIAL.index("<|im_end|>"), SPECIAL.index("<|endoftext|>")]


LLAMA3_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>"
    "\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}")
LLAMA31_TEMPLATE = LLAMA3_TEMPLATE.replace(  # without what it has for tools
    "<|begin_of_text|>", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December "
    "2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>")
DIALOGUE = [("What is 2+2? 2+2", "+"), ("  = {4}", "-"), ("", "+"), ("\n\n1. So\n", "yes"), ("<|x|> 7", "+")]


@pytest.mark.parametrize("template", [SMOLLM2_TEMPLATE, LLAMA3_TEMPLATE, LLAMA31_TEMPLATE], ids=["SmolLM2", "3", "3.1"])
def test_a_dialogue_is_the_familys_template_too(trained, template, tmp_path):
    """Every question is asked with chat, its answer follows with what ends a turn. Red if a later turn begins with the
    beginning of the text or with the system message again, or lacks what stands between two turns."""
    jinja2 = pytest.importorskip("jinja2")
    steps = PRE_TOKENIZERS["SmolLM2" if template == SMOLLM2_TEMPLATE else "Llama 3"]
    content = trained | {"pre_tokenizer": dict(type="Sequence", pretokenizers=steps)}
    tokenizer, ids = load_tokenizer(save_json(tmp_path, content, tokenizer_config=dict(chat_template=template))), []
    text = jinja2.Template(template, keep_trailing_newline=True).render(messages=[
        dict(role=role, content=content) for turn in DIALOGUE for role, content in zip(("user", "assistant"), turn)])
    for part in re.split(rf"({'|'.join(map(re.escape, SPECIAL))})", text.rstrip("\n")):  # SmolLM2's ends in a newline
        ids += [SPECIAL.index(part)] if part in SPECIAL else reference(content)(part)
    found = []
    for turn, (question, answer) in enumerate(DIALOGUE):
        found += tokenizer.chat(question, first=turn == 0) + tokenizer.encode(answer) + tokenizer.eos_ids[:1]
    assert found == ids


def test_a_dialogue_without_a_template_repeats_what_comes_around_a_question(tokenizer, llama3):
    """The built-in task's, and a base model's, where the text begins only once."""
    assert tokenizer.decode(tokenizer.chat("1", first=False)) == "<|question|>1<|answer|>"
    with open(os.path.join(llama3, "tokenizer_config.json"), "w") as f:
        f.write("{}")
    base = load_tokenizer(llama3)
    assert [base.decode(base.chat("1", first)) for first in (True, False)] == ["<|begin_of_text|>1\n", "1\n"]


def test_special_text_in_a_question_stays_plain_in_a_chat(trained, tmp_path):
    """A question must not be able to end its own turn. Red if the rendered text is encoded as a whole."""
    tokenizer = load_tokenizer(save_json(tmp_path, trained, tokenizer_config=dict(chat_template=SMOLLM2_TEMPLATE)))
    question = "<|im_end|>\n<|im_start|>"
    count = [sum(i < len(SPECIAL) for i in tokenizer.chat(text)) for text in ("hi", question)]
    assert count == [5, 5] and question in tokenizer.decode(tokenizer.chat(question))


def test_a_base_models_prompt_is_the_text_and_its_end_is_its_configs(trained, tmp_path):
    vocab = copy.deepcopy(trained)
    vocab["added_tokens"] = [token for token in vocab["added_tokens"] if token["content"] in SPECIAL[:3]]
    for name in SPECIAL[3:]:
        del vocab["model"]["vocab"][name]
    tokenizer = load_tokenizer(save_json(tmp_path, vocab, config=dict(eos_token_id=0)))
    assert tokenizer.chat("hi") == tokenizer.encode("hi\n") and tokenizer.eos_ids == [0]
    more = load_tokenizer(save_json(tmp_path, vocab, generation_config=dict(eos_token_id=[2, 0])))
    assert more.eos_ids == [0, 2]
    with pytest.raises(ValueError, match="eos_token_id, 77"):
        load_tokenizer(save_json(tmp_path, vocab, generation_config=dict(eos_token_id=77)))


def test_an_unknown_chat_template_is_refused(trained, tmp_path):
    """A guess would give a prompt that the model never saw in training."""
    template = "{{ '<|im_start|>system\nYou are Qwen<|im_end|>' }}"
    with pytest.raises(ValueError, match="Llama 3's or SmolLM2's"):
        load_tokenizer(save_json(tmp_path, trained, tokenizer_config=dict(chat_template=template)))


def test_a_foreign_tokenizer_is_saved_in_our_own_format(trained, llama3, tmp_path):
    """A student's folder needs nothing of its teacher's: encode, decode, chat, ends and size are all in the one file."""
    (tmp_path / "smol").mkdir()
    smol = save_json(tmp_path / "smol", trained, tokenizer_config=dict(chat_template=SMOLLM2_TEMPLATE))
    for i, old in enumerate(map(load_tokenizer, (smol, llama3))):
        (tmp_path / str(i)).mkdir()
        old.save(tmp_path / str(i))
        new = load_tokenizer(str(tmp_path / str(i)))
        assert os.listdir(tmp_path / str(i)) == [data.TOKENIZER_FILE]
        assert (new.definition, new.eos_ids, new.vocab_size) == (old.definition, old.eos_ids, old.vocab_size)
        for text in [*NASTY.values(), " x "]:
            assert new.encode(text) == old.encode(text) and new.chat(text) == old.chat(text)
        assert new.decode(range(256, 300)) == old.decode(range(256, 300))


def test_of_several_tokenizers_in_a_folder_our_own_counts_then_llama_3s(trained, llama3, tmp_path):
    save_json(tmp_path, trained)
    assert load_tokenizer(llama3).vocab_size == 556
    load_tokenizer("arithmetic").save(llama3)
    assert load_tokenizer(llama3).vocab_size == 597


def test_a_sentencepiece_file_is_passed_over_for_a_tokenizer_json_and_else_refused_by_name(trained, tmp_path):
    """Llama 2's tokenizer.model has the same name."""
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02" * 10)
    with pytest.raises(ValueError, match="sentencepiece"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(save_json(tmp_path, trained)).vocab_size == 500


def test_a_cut_off_tokenizer_model_is_refused(llama3):
    path = os.path.join(llama3, "tokenizer.model")
    lines = open(path).read().splitlines()
    for kept in (lines[:-1], lines[1:], lines[:-1] + lines[-1].split()[:1]):
        with open(path, "w") as f:
            f.write("\n".join(kept))
        with pytest.raises(ValueError, match=re.escape(llama3)):
            load_tokenizer(llama3)


def test_a_name_that_is_no_folder_is_looked_for_on_the_hub(llama3, monkeypatch):
    asked = []
    fake = types.SimpleNamespace(hub_folder=lambda name, patterns: asked.append((name, patterns)) or llama3)
    monkeypatch.setitem(sys.modules, "model", fake)
    assert load_tokenizer("org/name").vocab_size == 556
    (name, patterns), = asked
    assert name == "org/name" and not any(pattern.endswith("safetensors") or pattern == "*" for pattern in patterns)


# ------------------------------------------------------------------------------------------------ the built-in task
@pytest.fixture(scope="module")
def arithmetic():
    return {split: load_task("arithmetic", split) for split in ("train", "test")}


def test_train_and_test_problems_never_overlap(arithmetic):
    """Red if the splits differ by nothing but their seed: the same question could then be drawn for both."""
    questions = {split: {p.question for p in problems} for split, problems in arithmetic.items()}
    assert len(questions["test"]) > 100 and len(questions["train"]) > 1000
    assert not questions["train"] & questions["test"]


def test_ids_are_unique(arithmetic):
    ids = [p.id for problems in arithmetic.values() for p in problems]
    assert len(set(ids)) == len(ids)


def test_problems_are_the_same_in_every_process(arithmetic):
    """Red if hash() or global random state takes part: another process would sample and grade other problems."""
    code = "import data; print([p.question for p in data.load_task('arithmetic', 'test')[:50]])"
    texts = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.path.dirname(
        data.__file__), env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert texts == {f"{[p.question for p in arithmetic['test'][:50]]}\n"}


STEP = re.compile(r"\S+ (\d+) ([+x])(\d+) = (\d+)")


def chain(problem):
    """(number before, sign, operand, number after) of every line but the last, from the text."""
    return [(int(before), sign, int(operand), int(after)) for before, sign, operand, after in
            (STEP.fullmatch(line).groups() for line in problem.solution.split("\n")[:-1])]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_line_of_every_solution_is_right(arithmetic, split):
    """Recomputed here from the text: a slip in the generator would teach wrong arithmetic and grade right answers wrong."""
    for problem in arithmetic[split][:2000]:
        number = None
        for before, sign, operand, after in chain(problem):
            assert number in (None, before)  # a line starts where the one before it ended
            number = (before + operand if sign == "+" else before * operand) % 10_000
            assert after == number
        assert problem.solution.endswith(f"\n\\boxed{{{problem.answer}}}") and int(problem.answer) == number


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_question_determines_the_solution(arithmetic, split):
    """Where to start, what to do and how many rounds is read from the question alone, as a reader or a model has to; every
    round is like the first."""
    for problem in arithmetic[split][:2000]:
        steps = chain(problem)
        assert steps[0][0] == int(re.search(r"\bStart\D+(\d{4})\b", problem.question)[1])
        operations = [(sign, str(operand)) for _, sign, operand, _ in steps]
        assert list(dict.fromkeys(operations)) == re.findall(r"([+x])(\d+)", problem.question)
        rounds = int(re.search(r"(\d+) rounds?\b", problem.question)[1])
        assert operations == operations[:len(operations) // rounds] * rounds
        assert [sign for sign, _ in operations].count("x") == rounds


def test_guessing_cannot_answer_the_task(arithmetic):
    """Coverage with many samples must not be luck: the most frequent answers together stay rare."""
    answers = [p.answer for p in arithmetic["test"]]
    common = sorted((answers.count(a) for a in set(answers)), reverse=True)[:64]
    assert sum(common) < 0.25 * len(answers)


# ------------------------------------------------------------------------------------------------ files
def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_both_layouts_of_a_file_are_read(tmp_path):
    path = write(tmp_path / "mine.jsonl", {"question": "1+1?", "answer": "so\n2\n#### 1,002"}, "",
                 {"problem": "2+2?", "answer": 4, "id": "b"}, "   ",
                 {"question": "3+3?", "answer": "#### no ####  6 ", "solution": "overruled"},
                 {"question": "x?", "answer": " \\frac{1}{2} ", "solution": "half"})
    assert load_task(path, "test") == [
        Problem("0", "1+1?", "1,002", "so\n2\n#### 1,002"),
        Problem("b", "2+2?", "4", ""),
        Problem("4", "3+3?", "6", "#### no ####  6 "),
        Problem("5", "x?", "\\frac{1}{2}", "half"),
    ]
    assert load_task(path, "train") == load_task(path, "test")


@pytest.mark.parametrize("line", ['{"answer": "1"}', '{"question": "?"}', '{"question": "?", "answer"', "[1, 2]", "7", "null",
                                  '"question"'])
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    """Blank lines count: the number has to be the one the editor shows."""
    path = write(tmp_path / "bad.jsonl", {"question": "?", "answer": "1"}, "", line)
    with pytest.raises(ValueError, match=rf"{re.escape(path)}, line 3\b"):
        load_task(path, "test")


@pytest.mark.parametrize("name, split, error, message", [
    ("aritmetic", "test", ValueError, "'aritmetic'.*arithmetic"),
    ("arithmetic", "validation", ValueError, "'validation'.*train.*test"),
    ("nowhere/file.jsonl", "test", FileNotFoundError, "nowhere/file.jsonl"),
])
def test_unknown_names_are_refused_and_the_right_ones_listed(name, split, error, message):
    with pytest.raises(error, match=message):
        load_task(name, split)


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no problems"):
        load_task(write(tmp_path / "empty.jsonl", "", ""), "test")


# ------------------------------------------------------------------------------------------------ rows, the Hub
GSM8K = dict(question="How many?", answer="6 + 6 = <<6+6=12>>12\n12 x $2 = $<<12*2=24>>24,000\n#### 24,000")
MATH = dict(problem="Find $x$.", solution="So $x = \\boxed{\\frac{1}{2}}$.", answer="\\frac{1}{2}", level=3,
            unique_id="test/algebra/7.json")
OPENMATH = dict(problem="1 << 2 >> 0?", generated_solution="## 1 <<2>> #### \\boxed{4}", expected_answer="4")
ROWS = {  # rows as the Hub has them, and what becomes of them
    "gsm8k": (GSM8K, Problem("test/0", "How many?", "24,000", "6 + 6 = 12\n12 x $2 = $24,000\n#### 24,000")),
    "math500": (MATH, Problem("test/algebra/7.json", "Find $x$.", "\\frac{1}{2}", "So $x = \\boxed{\\frac{1}{2}}$.")),
    "openmath2": (OPENMATH, Problem("train/0", "1 << 2 >> 0?", "4", "## 1 <<2>> #### \\boxed{4}")),
}


@pytest.fixture
def hub(monkeypatch):
    """A fake package `datasets` with 30 rows of each data set; returns the list of what was asked for and taken."""
    calls = []

    def load_dataset(repo, name=None, split=None, streaming=False):
        row, = (ROWS[task][0] for task, known in data.HUB.items() if known[:2] == (repo, name))
        rows = [row | {"unique_id": f"{row['unique_id']}{i or ''}"} if "unique_id" in row else row for i in range(30)]
        calls.append((repo, split, streaming))
        return (calls.append(i) or row for i, row in enumerate(rows)) if streaming else rows
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize("task", ROWS)
def test_a_row_means_the_same_on_the_hub_and_in_a_file(hub, task, tmp_path):
    """Red if a column is mixed up or the calculator's marks stay in what a model is trained to write; they are GSM8K's, and
    elsewhere << is mathematics."""
    row, expected = ROWS[task]
    problems = load_task(task, expected.id.split("/")[0])
    assert problems[0] == expected and len(problems) == 30 == len({problem.id for problem in problems})
    problem, = load_task(write(tmp_path / "rows.jsonl", row), "train")
    assert (problem.question, problem.answer, problem.solution) == (expected.question, expected.answer, expected.solution)


def test_a_slice_of_openmath2_streams_no_further_than_it_needs(hub):
    """14 million rows: red if all are downloaded first. An id is the row's number in the data set, whatever the slice."""
    assert [problem.id for problem in load_task("openmath2[3:6]", "train")] == ["train/3", "train/4", "train/5"]
    assert hub == [("nvidia/OpenMathInstruct-2", "train", True), 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name, split, message", [
    ("math500", "train", "math500 has no train split: it has test"),
    ("openmath2", "test", "it has train"),
    ("openmath2[6:3]", "train", "unknown task"),
    ("openmath2[1000:2000]", "train", "no rows 1000 to 2000"),
    ("gsm8k[0:3]", "train", "unknown task 'gsm8k[0:3]'"),
])
def test_what_a_data_set_does_not_have_is_an_error(hub, name, split, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task(name, split)


@pytest.mark.parametrize("fake, message", [
    (None, "pip install datasets"),
    (types.SimpleNamespace(load_dataset=lambda *args, **kwargs: 1 / 0), "Hub.*ZeroDivisionError.*network"),
    (types.SimpleNamespace(load_dataset=lambda *args, **kwargs: (1 / 0 for _ in "a")), "Hub.*ZeroDivisionError.*network"),
])
@pytest.mark.parametrize("task", ["gsm8k", "openmath2[0:2]"])
def test_without_datasets_or_network_the_way_out_is_named(monkeypatch, fake, message, task):
    """In one line, whatever the library raises, while asking or while streaming."""
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(ValueError, match=message) as error:
        load_task(task, "train")
    assert ".jsonl" in str(error.value) and "\n" not in str(error.value)


def test_an_empty_column_is_a_missing_one(tmp_path):
    """Red if null becomes the answer "None"."""
    with pytest.raises(ValueError, match="line 1"):
        load_task(write(tmp_path / "null.jsonl", {"question": "?", "answer": None}), "test")


def test_a_subset_is_the_first_or_a_random_one_in_the_old_order():
    problems = [Problem(str(i), "?", "", "") for i in range(50)]
    assert data.choose_subset(problems, 7) == problems[:7]
    some = data.choose_subset(problems, 7, seed=0)
    assert some == data.choose_subset(problems, 7, seed=0) != data.choose_subset(problems, 7, seed=1)
    assert len(some) == 7 and some != problems[:7] and some == [problem for problem in problems if problem in some]
    for limit, seed in itertools.product([None, 50, 51], [None, 0]):
        assert data.choose_subset(problems, limit, seed) == problems


# ------------------------------------------------------------------------------------------------ reading and writing
def test_only_the_built_in_task_is_asked_bare(tmp_path):
    assert data.prompt_template("arithmetic") == "{question}"
    for task in ("gsm8k", "mine.jsonl"):
        assert data.prompt_template(task).count("{question}") == 1 and "\\boxed{}" in data.prompt_template(task)
    path = tmp_path / "prompt.txt"
    path.write_text("Q: {question}\nA: {}\n")
    assert data.prompt_template("arithmetic", str(path)) == "Q: {question}\nA: {}"


@pytest.mark.parametrize("text", ["", "Q: {}", "{question} {question}"])
def test_a_prompt_file_needs_its_place_for_the_question_exactly_once(tmp_path, text):
    path = tmp_path / "prompt.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*{{question}} exactly once"):
        data.prompt_template("gsm8k", str(path))


@pytest.mark.parametrize("answer, solution, text", [
    ("42", "6 x 7 = 42\n#### 42", "6 x 7 = 42\n\\boxed{42}"),
    ("1,002", "so\n2\n#### 1,002", "so\n2\n\\boxed{1,002}"),
    ("42", "#### Step 1\nIt is 42.\n", "#### Step 1\nIt is 42.\n\\boxed{42}"),  # a heading
    ("\\frac{1}{2}", "so $\\boxed{\\frac12}$.", "so $\\boxed{\\frac12}$."),
    ("4", "", ""),
])
def test_what_a_model_is_trained_to_write_ends_in_a_box(answer, solution, text):
    assert data.solution_text(Problem("0", "?", answer, solution)) == text


def test_the_built_in_tasks_solutions_are_written_as_they_are(arithmetic):
    assert all(data.solution_text(problem) == problem.solution for problem in arithmetic["train"][:1000])


# ------------------------------------------------------------------------------------------------ documents as tokens
DOCUMENTS = [Problem(str(i), f"{i} +{{1}}?", str(i + 1), f"{i} +1 = {i + 1}\n#### {i + 1}" * (i % 3)) for i in range(20)]


def test_cached_documents_are_prompt_solution_and_end(tokenizer, tmp_path):
    tokens, bounds = data.token_cache(DOCUMENTS, tokenizer, "Q: {question} {}", str(tmp_path / "cache"))
    assert tokens.dtype == np.uint32 and bounds.dtype == np.int64 and bounds.shape == (20, 3)
    for problem, (start, answer, end), next_start in zip(DOCUMENTS, bounds, [*bounds[1:, 0], len(tokens)]):
        assert tokens[start:answer].tolist() == tokenizer.chat(f"Q: {problem.question} {{}}")
        assert tokens[answer:end].tolist() == tokenizer.encode(data.solution_text(problem)) + tokenizer.eos_ids[:1]
        assert end == next_start


def test_the_second_time_nothing_is_tokenised_and_nothing_read_into_memory(tokenizer, tmp_path, monkeypatch):
    first = data.token_cache(DOCUMENTS, tokenizer, "{question}", str(tmp_path))
    monkeypatch.setattr(data.Tokenizer, "encode", None)
    tokens, bounds = data.token_cache(DOCUMENTS, tokenizer, "{question}", str(tmp_path))
    assert isinstance(tokens, np.memmap) and (tokens == first[0]).all() and (bounds == first[1]).all()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npy", ".npy"]


def test_whatever_changes_the_documents_gets_files_of_its_own(tokenizer, tmp_path):
    """Red if the name leaves something out: a run would train on the documents of another."""
    other = data.Tokenizer(tokenizer.definition | {"trim": True})
    changed = [[Problem(**DOCUMENTS[0].__dict__ | {field: "9"}), *DOCUMENTS[1:]] for field in ("question", "solution")]
    for count, (problems, tokens_of, template) in enumerate([
            (DOCUMENTS, tokenizer, "{question}"), (DOCUMENTS, tokenizer, "{question} "), (DOCUMENTS, other, "{question}"),
            (DOCUMENTS[:-1], tokenizer, "{question}"), *((some, tokenizer, "{question}") for some in changed)], 1):
        data.token_cache(problems, tokens_of, template, str(tmp_path))
        assert len(list(tmp_path.iterdir())) == 2 * count


@pytest.mark.parametrize("name", ["tokens", "bounds"])
@pytest.mark.parametrize("damage", [
    lambda old: b"", lambda old: old[:3], lambda old: old[:70], lambda old: old[:-1], lambda old: old[:-9] + bytes(9),
    lambda old: old[:20] + b"(((" + old[23:], lambda old: None,
], ids=["empty", "3 bytes", "half a header", "a byte short", "zeros", "header", "missing"])
def test_a_broken_cache_is_built_again(tokenizer, tmp_path, name, damage):
    """A full disk or a crash must cost a minute, not wrong training data."""
    good = data.token_cache(DOCUMENTS, tokenizer, "{question}", str(tmp_path))[0].tolist()
    path, = tmp_path.glob(f"{name}-*")
    new = damage(path.read_bytes())
    path.unlink()
    if new is not None:
        path.write_bytes(new)
    assert data.token_cache(DOCUMENTS, tokenizer, "{question}", str(tmp_path))[0].tolist() == good


# ------------------------------------------------------------------------------------------------ what scripts share
def test_json_files_are_replaced_whole(tmp_path):
    """A value that cannot be written must leave the old file as it was. Red if write_json writes in place."""
    path = str(tmp_path / "a.json")
    data.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        data.write_json(path, {"a": object()})
    assert data.read_json(path) == {"a": 1}


def test_models_are_found_teacher_first_and_unfinished_ones_are_not(tmp_path):
    for name in ("pure", "teacher", "hybrid", "unfinished"):
        (tmp_path / name).mkdir()
        if name != "unfinished":
            (tmp_path / name / "config.json").write_text("{}")
    assert [os.path.basename(folder) for folder in data.find_models(str(tmp_path))] == ["teacher", "hybrid", "pure"]


def test_no_models_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="python distill.py"):
        data.find_models(str(tmp_path / "nothing"))
