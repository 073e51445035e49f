"""The formats of others, translated: their files in, dicts of ours out, and back.

    config = Config(**read_config(folder))
    tensors = read_tensors(folder, shapes, cast)  # {our name: tensor}
    write_checkpoint(folder, fields, tensors)     # a Llama loads in transformers
    definition = read_tokenizer(folder)           # for data.Tokenizer

What would compute something else than at its authors' is refused by name.
"""
import base64
import itertools
import json
import re
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common import check_fields, naming, optional_json, read_json, replace_file, require, write_json


# ---- folders
def download(path_or_repo, *patterns):
    """A folder as it is; of a repository, the folder with the files that match. Where org is a
    folder, as in "out/pure", "org/name" is no repository."""
    name = str(path_or_repo)
    if Path(name).parent.is_dir() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return name
    with naming(f"no folder {name}, and the repository (if gated: `hf auth login`)"):
        import huggingface_hub
        return huggingface_hub.snapshot_download(name, allow_patterns=list(patterns))


def tokenizer_folder(path_or_repo):
    return download(path_or_repo, "tokenizer*", "original/tokenizer.model", "chat_template.jinja",
                    "config.json", "generation_config.json")


def checkpoint_folder(path_or_repo):
    """The folder of a checkpoint; .bin only if there is nothing else."""
    folder = download(path_or_repo, "*.json", "model.safetensors")
    shards = [path.name for path in weight_files(folder)]
    return download(path_or_repo, "*.json", *shards or ["pytorch_model.bin"])


SHARDS = "names of files beside it", lambda v: type(v) is dict and v and all(
    re.fullmatch(r"[\w.-]+\.(safetensors|bin)", str(name)) for name in v.values())


def weight_files(folder):
    """Paths of a folder's weights: model.safetensors, or the shards in its index; else .bin."""
    for path in Path(folder, "model.safetensors"), Path(folder, "pytorch_model.bin"):
        index = Path(f"{path}.index.json")
        if path.is_file():
            return [path]
        if index.is_file():
            check_fields(content := read_json(index), dict(weight_map=SHARDS), index)
            return [path.with_name(name) for name in sorted({*content["weight_map"].values()})]
    return []


def fingerprint(path_or_repo):
    """CRC-32 of a checkpoint's weight files in hexadecimal: did two runs use the same model?"""
    crc = 0
    for path in sorted(Path(checkpoint_folder(path_or_repo)).iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


# ---- config.json
HF_KEYS = dict(  # field of model.Config -> key of a Llama's config.json, which has the first five
    vocab_size="vocab_size", d_model="hidden_size", n_layers="num_hidden_layers",
    n_heads="num_attention_heads", d_ff="intermediate_size", n_kv_heads="num_key_value_heads",
    norm_eps="rms_norm_eps", tie_embeddings="tie_word_embeddings", eos_ids="eos_token_id",
    max_length="max_position_embeddings") | {key: key for key in (  # the last four are ours
        "head_dim rope_theta rope_scaling mixers d_state d_conv dt_rank".split())}
WRITTEN = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
SIZE = "a whole number, 1 to 10^7", lambda v: type(v) is int and 1 <= v <= 10 ** 7
RATE = "a number above 0, to 10^12", lambda v: type(v) in (int, float) and 0 < v <= 1e12
IDS = "ids", lambda v: all(type(i) is int and 0 <= i <= 10 ** 7 for i in v)
KINDS = dict.fromkeys(HF_KEYS.values(), SIZE) | WRITTEN | dict(
    rms_norm_eps=RATE, rope_theta=RATE, rope_scaling=dict, tie_word_embeddings=bool, mixers=list,
    eos_token_id=IDS, rope_interleaved=False, partial_rotary_factor=1.0)


def eos_list(values):
    """The eos_token_id of a config, whatever it is, as a list."""
    ids = values.get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def llama_fields(values):
    """Fields of Config in a Llama's config.json, of the old layout or the new (rope_parameters)."""
    values = {key: value for key, value in values.items() if value is not None}
    rope = values.get("rope_parameters", values.get("rope_scaling", {}))
    check_fields(dict(rope_scaling=rope), dict(rope_scaling=dict), "config.json")
    values = dict(tie_word_embeddings=False, rms_norm_eps=1e-6) | values | rope  # not our defaults
    values["eos_token_id"] = eos_list(values)
    needed = {*values, *list(HF_KEYS.values())[:5]}
    check_fields(values, {key: KINDS[key] for key in KINDS if key in needed}, "config.json")
    kind = values.get("rope_type", values.get("type", "default"))
    values["rope_scaling"] = None if kind == "default" else dict(rope_type=kind) | {
        key: value for key, value in rope.items() if key != "rope_theta" and RATE[1](value)}
    if values.get("discrete_mamba2") is False:  # a key that we wrote once
        values["mixers"] = [{"mamba2": "mamba2_step"}.get(x, x) for x in values["mixers"]]
    return {field: values[key] for field, key in HF_KEYS.items() if key in values}


def llamba_as_llama(values):
    """A Llamba's config.json (modeling_llamba.py of cartesia-ai/edge) with a Llama's keys."""
    parts = values["mlp_cfg"] | values["ssm_cfg"]
    heads = parts["n_v_heads"]
    check_fields(parts, dict(act_fn="silu", activation="identity", n_qk_heads=heads), "config.json")
    return parts | values | dict(
        model_type="llama", hidden_size=values["d_model"], num_hidden_layers=values["n_layer"],
        num_attention_heads=heads, rms_norm_eps=values["norm_epsilon"],
        tie_word_embeddings=values["tie_embeddings"])


def mamba_fields(llama, mamba):
    """Fields of Config of a MambaInLlama or M1 student: its Llama's, and the mixers by its
    mamba_config.json (mamba/hybrid_mamba_config.py), where only Mamba-2 has `ngroups`."""
    heads, layers = llama["n_heads"], range(llama["n_layers"])
    fields = dict(n_kv_heads=heads, head_dim=llama["d_model"] // heads) | llama
    attention, ssm = mamba["attn_layers"], mamba["ssm_cfg"]
    known = "expand d_state d_conv dt_rank ngroups repeat_kv_before_conv chunk_size"
    require(ssm.keys() <= {*known.split()}, f"ssm_cfg has {', '.join(ssm)}, supported: {known}")
    require({*attention} <= {*layers}, f"attn_layers = {attention} of {len(layers)} layers")
    mixer = "mamba"
    if "ngroups" in ssm:
        mixer = "mamba2_step"
        check_fields(ssm, dict(ngroups=heads, d_state=fields["head_dim"]), "ssm_cfg")
    return fields | dict(mixers=["attention" if i in attention else mixer for i in layers])


def read_layout(folder):
    """(fields of Config, {stored name: its file}, translation of a tensor) of a checkpoint."""
    path = Path(folder, "config.json")
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint in {folder}: expected config.json and model.safetensors")
    with naming(f"the checkpoint in {folder}"):
        values, released = read_json(path), optional_json(folder, "mamba_config.json")
        is_llamba = values.get("model_type") == "llamba"
        fields = llama_fields(llamba_as_llama(values) if is_llamba else values)
        files = weight_files(folder) or [Path(folder, "model.safetensors")]
        stored = {name: file for file in files for name in map_file(file)}
        layers = fields["n_layers"]
        require(layers <= len(stored),
                f"config.json: num_hidden_layers is {layers}, but there are {len(stored)} tensors")
        if is_llamba:
            return fields | dict(mixers=["mamba2"] * layers), stored, llamba_tensors
        if "mixers" in fields or not released:  # ours, maybe saved over a release
            return fields, stored, lambda name, tensor, *_: {name: tensor}
        if ".mha." in " ".join(stored):
            fields["rope_scaling"] = None  # M1 was trained without that of its base
        return mamba_fields(fields, released), stored, mamba_in_llama_tensors


def read_config(path_or_repo):
    """Fields of model.Config in a config.json, without those that it leaves open."""
    return read_layout(checkpoint_folder(path_or_repo))[0]


# ---- weights
def map_file(path, names=None):
    """{name: tensor} of a weight file (of these names; of a .bin all), mapped: what is used is in
    memory until the tensor is dropped."""
    with naming(path):
        if path.suffix == ".bin":  # weights_only: a pickle may hold any code
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return {name: tensor.detach() for name, tensor in tensors.items()}
        if names is None:
            with path.open("rb") as file:  # the length of its header, and the header
                header = file.read(int.from_bytes(file.read(8), "little"))
            names = [name for name, _ in json.loads(header, object_pairs_hook=list)]
            require(len(names) == len({*names}), "a name comes twice in its header")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names if name != "__metadata__"}


def llamba_tensors(name, tensor, fields, shapes):
    """{our name: tensor} of a tensor of a Llamba, whose decays have no bias: zeros."""
    name = name.replace("backbone.", "model.").replace(".embedding.", ".embed_tokens.")
    name = name.replace(".final_layernorm.", ".norm.").replace(".mixer.", ".mamba2.")
    bias = {name[:-1] + "A_log_bias": torch.zeros_like(tensor)} if name.endswith(".D") else {}
    return {name: tensor} | bias


FUSED = {  # M1 has one product for several of ours, from top to bottom
    "mha.in_proj": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "mha.out_proj": "self_attn.o_proj",
    "mamba.in_proj": "mamba.in_proj_z mamba.in_proj_x mamba.B_proj mamba.C_proj mamba.dt_proj_down"}


def mamba_in_llama_tensors(name, tensor, fields, shapes):
    """{our name: tensor} of a tensor of a MambaInLlama or M1 student."""
    inner, kv = (fields[heads] * fields["head_dim"] for heads in ("n_heads", "n_kv_heads"))

    def repeated(groups, size=fields["head_dim"]):
        """[k1, k2] -> [k1, k1, k2, k2], each of `size` rows."""
        return groups.unflatten(0, (-1, size)).repeat_interleave(inner // kv, dim=0).flatten(0, 1)

    if ".mamba." in name and "mamba2_step" in fields["mixers"]:
        name = name.replace(".mamba.", ".mamba2.").replace("dt_bias", "A_log_bias")
        if ".in_proj." in name:  # z | x | B | C | dt become x | B | C | z | a
            z, xB, C, a = tensor.split([inner, 2 * kv, inner, fields["n_heads"]])
            tensor = torch.cat([repeated(xB), C, z, a])
        if ".conv1d." in name and len(tensor) < 3 * inner:  # it runs before kv heads are repeated
            xB, C = tensor.split([2 * kv, inner])
            tensor = torch.cat([repeated(xB), C])
        bias = {name.replace("norm.weight", "z_bias"): torch.zeros_like(tensor)}
        return {name: tensor} | (bias if ".norm." in name else {})
    for whole, parts in FUSED.items():
        if name.endswith(f".{whole}.weight"):
            names = [name.replace(whole, part) for part in parts.split()]
            return dict(zip(names, tensor.split([shapes[ours][0] for ours in names])))
    if name.endswith(".mamba.dt_proj.bias"):  # their dt_proj adds it, and their scan adds it again
        tensor = 2 * tensor
    if ".mamba.conv1d." in name and len(tensor) == kv:
        tensor = repeated(tensor, 16)
    return {name: tensor}


def read_tensors(folder, shapes, cast):
    """{our name: cast(our name, tensor)} of a folder's weights.

    shapes: {our name: shape} of what the model needs; ValueError names a tensor that does not fit.
    `cast` copies: one is read at a time.
    """
    (fields, stored, translate), tensors = read_layout(folder), {}
    if "lm_head.weight" not in shapes:  # tied: the embedding, but may be stored all the same
        stored.pop("lm_head.weight", None)
    with naming(f"the checkpoint in {folder}"):
        for name, path in stored.items():
            tensor = map_file(path, [name])[name]
            with naming(f"tensor {name}, {tensor.dtype} of shape {tuple(tensor.shape)},"):
                require(tensor.is_floating_point(), "expected floating point")
                for ours, part in translate(name, tensor, fields, shapes).items():
                    require(part.shape == shapes.get(ours),
                            f"expected {shapes.get(ours, 'no such tensor')}")
                    tensors[ours] = cast(ours, part)
                    extremes = tensors[ours].aminmax()
                    require(all(map(torch.isfinite, extremes)), "holds nan or infinity")
        missing = ", ".join(sorted(shapes.keys() - tensors.keys()))
        require(not missing, f"missing tensors: {missing[:300]}")
    return tensors


def write_checkpoint(folder, fields, tensors):
    """Writes model.safetensors and, from the fields of Config, config.json."""
    dtype = str(tensors["model.embed_tokens.weight"].dtype)[6:]
    config = WRITTEN | dict(architectures=["LlamaForCausalLM"], torch_dtype=dtype) | {
        HF_KEYS[field]: value for field, value in fields.items()}
    config["eos_token_id"] = config["eos_token_id"] or None
    if config["rope_scaling"]:
        config["rope_scaling"] = dict(rope_type="llama3") | config["rope_scaling"]
    replace_file(Path(folder, "model.safetensors"),
                 lambda path: save_file(tensors, path, metadata=dict(format="pt")))
    write_json(Path(folder, "config.json"), config)


# ---- tokenizers
# What cuts a text into pieces before merging. SmolLM2's is GPT-2's, but every digit is a piece, and
# so are all spaces before one.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM2_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
PRE_TOKENIZERS = (  # steps in a tokenizer.json, and the one regex that splits as they do
    ([BYTES], GPT2_PATTERN),
    ([dict(type="Digits", individual_digits=True), BYTES], SMOLLM2_PATTERN),
    ([dict(type="Split", pattern=dict(Regex=LLAMA3_PATTERN), behavior="Isolated", invert=False),
      BYTES | dict(use_regex=False)], LLAMA3_PATTERN))
LLAMA3_RANKS = 128_000  # and 256 special tokens, those that we use with Meta's names
LLAMA3_SPECIAL = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id",
                  8: "eom_id", 9: "eot_id"}


def read_tiktoken(path):
    """{pattern, ranks, special} of Llama 3's tokenizer.model."""
    lines = [line.split() for line in path.read_text("latin-1").splitlines()]
    require([line[1:] for line in lines] == [[str(rank)] for rank in range(LLAMA3_RANKS)],
            f"{path.name} is not Llama 3's {LLAMA3_RANKS:,} lines of token and rank")
    special = {f"<|{LLAMA3_SPECIAL.get(i, i)}|>": LLAMA3_RANKS + i for i in range(256)}
    return dict(pattern=LLAMA3_PATTERN, ranks=[token for token, _ in lines], special=special)


OTHERS = itertools.count(256)
BYTE_OF = {  # by its character in a tokenizer.json: itself, if it leaves ink
    chr(byte if byte > 32 and chr(byte).isprintable() else next(OTHERS)): byte
    for byte in range(256)}


def read_byte_bpe(path):
    """{pattern, ranks, special} of a tokenizer.json, if it is byte-level BPE as tiktoken does it.

    tiktoken joins the neighbours that make the token of the lowest id: merges must make all tokens,
    in the order of their ids.
    """
    file = read_json(path)
    model, added, splits = file["model"], file["added_tokens"], file["pre_tokenizer"]
    check_fields(file | model, dict(
        added_tokens=list, pre_tokenizer=dict, vocab=dict, merges=list, normalizer=None, type="BPE",
        dropout=0, byte_fallback=False, end_of_word_suffix=""), path.name)
    steps = splits.get("pretokenizers", [splits])
    patterns = [pattern for known, pattern in PRE_TOKENIZERS if known == steps]
    require(patterns, f"its pre-tokenizer, {steps}, is neither GPT-2's nor SmolLM2's nor Llama 3's")
    require(all(token["special"] for token in added), "it has added tokens that are not special")
    special = {token["content"]: token["id"] for token in added}
    vocab = {token: rank for token, rank in model["vocab"].items() if token not in special}
    ids = {*vocab.values(), *special.values()}
    require(len(ids) == len(vocab | special) and 0 <= min(ids) <= max(ids) < 2 * len(ids),
            f"its {len(ids):,} ids, {min(ids)} to {max(ids)}, are not one for each token")
    made = [vocab.get("".join(merge).replace(" ", ""), -1) for merge in model["merges"]]
    longer = {rank for token, rank in vocab.items() if len(token) > 1}
    require(longer and -1 not in made and made == sorted(made)
            and (longer == {*made} or model.get("ignore_merges")),
            "its merges do not make its tokens in the order of the ids")
    ranks = {rank: base64.b64encode(bytes(BYTE_OF[c] for c in token)).decode()
             for token, rank in vocab.items()}
    return dict(pattern=patterns[0], special=special,
                ranks=[ranks.get(rank) for rank in range(max(ranks) + 1)])


START, HEADER = "<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n".format
USER, ANSWER = HEADER("user"), "<|eot_id|>" + HEADER("assistant")
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATS = (  # words of a chat template, and what it puts before and after a question
    ("Cutting Knowledge Date", START + HEADER("system") + "Cutting Knowledge Date: December 2023\n"
     "Today Date: 26 Jul 2024\n\n<|eot_id|>" + USER, ANSWER),
    ("<|start_header_id|>", START + USER, ANSWER),
    (SMOLLM2_SYSTEM, f"<|im_start|>system\n{SMOLLM2_SYSTEM}<|im_end|>\n<|im_start|>user\n",
     "<|im_end|>\n<|im_start|>assistant\n"),
    ("no template", "", "\n"))  # a base model's


def chat_of(folder, special):
    """The special tokens and texts before and after a question, in a list each, by the folder's
    chat template, which is recognised, not run."""
    path = Path(folder, "chat_template.jinja")
    template = path.read_text("utf-8") if path.is_file() else optional_json(
        folder, "tokenizer_config.json").get("chat_template")
    for words, *chat in CHATS:
        chat = [[*filter(None, re.split(r"(<\|\w+\|>)", text))] for text in chat]
        known = all(part in special for part in sum(chat, []) if part[:2] == "<|")
        # several are a list; without one, Llama 3's vocabulary is Instruct's
        if known and words in str(template or "Cutting Knowledge Date, or no template"):
            return chat
    raise ValueError("its chat template is neither Llama 3's nor SmolLM2's")


def read_tokenizer(folder):
    """The definition of data.Tokenizer of a folder: of Llama 3's tokenizer.model (Meta has it in
    original/), else of tokenizer.json."""
    files = "tokenizer.model", "original/tokenizer.model", "tokenizer.json"
    path = next(filter(Path.is_file, (Path(folder, name) for name in files)), None)
    if path is None:
        raise FileNotFoundError(f"no tokenizer in {folder}: expected {' or '.join(files)}")
    with naming(f"the tokenizer in {folder}"):
        found = read_byte_bpe(path) if path.suffix == ".json" else read_tiktoken(path)
        special = found["special"]
        before, after = chat_of(folder, special)
        ids = eos_list(optional_json(folder, "config.json")
                       | optional_json(folder, "generation_config.json"))
        names = {token: name for name, token in special.items()}
        require({*ids} <= {*names}, f"its eos_token_id, {ids}, is not of special tokens")
        ends = [after[0], "<|end_of_text|>", "<|endoftext|>", "<|eom_id|>", *map(names.get, ids)]
        eos = list(dict.fromkeys(end for end in ends if end in special))
        return found | dict(chat=[before, after], trim=after[0] == "<|eot_id|>", eos=eos)


# ---- data sets
HUB = {  # task: (repository, configuration, splits)
    "gsm8k": ("openai/gsm8k", "main", ("train", "test")),
    "math500": ("HuggingFaceH4/MATH-500", None, ("test",)),
    "openmath2": ("nvidia/OpenMathInstruct-2", None, ("train",))}


def dataset_rows(task, split, first=0, end=None):
    """The rows of a task of HUB as dicts; with an end only those from first to end, streamed."""
    repository, configuration, splits = HUB[task]
    require(split in splits, f"{task} has no {split} split: it has {' and '.join(splits)}")
    with naming(f"{repository} (without a network pass a .jsonl file instead of {task})"):
        import datasets
        rows = datasets.load_dataset(repository, configuration, split=split, streaming=bool(end))
        rows = [dict(row) for row in itertools.islice(rows, first, end)]
    require(rows, f"{task} has no rows {first} to {end}")
    return rows
