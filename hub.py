"""The formats of others, translated: their files in, dicts of ours out, and back.

    folder = checkpoint_folder("org/name")        # or a folder
    config = Config(**read_config(folder))
    tensors = read_tensors(folder, shapes, cast)  # {our name: tensor}
    write_checkpoint(folder, fields, tensors)     # a Llama loads in transformers
    definition = read_tokenizer(folder)           # for data.Tokenizer
    rows = dataset_rows("gsm8k", "test")

What would compute something else here than at its authors' is refused by name.
"""
import base64
import contextlib
import itertools
import json
import re
import zlib
from pathlib import Path

from common import check_fields, first_line, read_json, replace_file, write_json


def require(condition, complaint):
    """ValueError(complaint) unless the condition holds."""
    if not condition:
        raise ValueError(complaint)


@contextlib.contextmanager
def naming(what):
    """A context in which any exception becomes a ValueError of one line: `what` cannot be used."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what} cannot be used: {kind}{first_line(error)}") from None


# ---- folders
def download(path_or_repo, *patterns):
    """A folder's name as it is; of a repository "org/name", the folder with the files that match.
    Where org is a folder, as in "out/pure", it is no repository."""
    name = str(path_or_repo)
    here = Path(name).exists() or Path(name.split("/")[0]).is_dir()
    if here or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return name
    with naming(f"no folder {name}, and the repository (if gated: `hf auth login`)"):
        import huggingface_hub
        return huggingface_hub.snapshot_download(name, allow_patterns=list(patterns))


def tokenizer_folder(path_or_repo):
    """The folder of a model's tokenizer and chat template, downloaded if need be."""
    return download(path_or_repo, "tokenizer*", "original/tokenizer.model", "chat_template.jinja",
                    "config.json", "generation_config.json")


def checkpoint_folder(path_or_repo):
    """The folder of a checkpoint, downloaded if need be; .bin only if there is nothing else."""
    folder = download(path_or_repo, "*.json", "model*.safetensors")
    if weight_files(folder):
        return folder
    return download(path_or_repo, "*.json", "pytorch_model*.bin")


def weight_files(folder):
    """Paths of a folder's weights, whole or shards: .safetensors, or .bin where there are none."""
    names = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
    return next(filter(None, (sorted(Path(folder).glob(name)) for name in names)), [])


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
HF_SIZES = dict(  # field of model.Config -> key of a Llama's config.json; from mixers on, ours
    vocab_size="vocab_size", d_model="hidden_size", n_layers="num_hidden_layers",
    n_heads="num_attention_heads", d_ff="intermediate_size")
HF_KEYS = HF_SIZES | dict(
    n_kv_heads="num_key_value_heads", norm_eps="rms_norm_eps", tie_embeddings="tie_word_embeddings",
    max_length="max_position_embeddings", eos_ids="eos_token_id") | {
    key: key for key in "head_dim rope_theta rope_scaling mixers d_state d_conv dt_rank".split()}
HF_DEFAULTS = dict(tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=10000.0)
# Keys of which only one value (or null, or none) is implemented here; the first four are written.
WRITTEN = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
ONLY = WRITTEN | dict(rope_interleaved=False, partial_rotary_factor=1.0, sliding_window=None)


def refuse_other(values, only):
    """ValueError naming a key that has another value than `only` has."""
    for key, value in only.items():
        require(values.get(key) in (None, value),
                f"{key} = {values.get(key)!r}, only {json.dumps(value)} is supported")


def eos_list(values):
    """The eos_token_id of a config as a list; it is an id, several, null or missing."""
    ids = values.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    require(all(type(i) is int for i in ids), f"eos_token_id = {ids}, expected ids")
    return ids


def llama_fields(values):
    """Fields of Config in a Llama's config.json, of the old layout or the new (rope_parameters)."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    refuse_other(values | rope, ONLY)
    values = HF_DEFAULTS | {key: value for key, value in values.items() if value is not None}
    values["rope_theta"] = rope.pop("rope_theta", values["rope_theta"])
    check_fields(values, dict.fromkeys(HF_SIZES.values(), int) | dict(
        model_type=str, rms_norm_eps=float, rope_theta=float), "config.json")
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    values["rope_scaling"] = None if kind == "default" else rope | dict(rope_type=kind)
    values["eos_token_id"] = eos_list(values)
    if values.get("discrete_mamba2") is False:  # a key that we wrote once
        values["mixers"] = [{"mamba2": "mamba2_step"}.get(x, x) for x in values["mixers"]]
    return {field: values[key] for field, key in HF_KEYS.items() if key in values}


def llamba_as_llama(values):
    """A Llamba's config.json (modeling_llamba.py of cartesia-ai/edge) with a Llama's keys."""
    ssm, mlp, layers = values["ssm_cfg"], values["mlp_cfg"], values["n_layer"]
    heads = ssm["n_v_heads"]
    refuse_other(mlp | ssm, dict(act_fn="silu", activation="identity", n_qk_heads=heads))
    return mlp | ssm | values | dict(
        model_type="llama", hidden_size=values["d_model"], num_hidden_layers=layers,
        num_attention_heads=heads, rms_norm_eps=values["norm_epsilon"],
        tie_word_embeddings=values["tie_embeddings"], mixers=["mamba2"] * layers)


def mamba_fields(llama, mamba):
    """Fields of Config of a MambaInLlama or M1 student: its Llama's, and the mixers by its
    mamba_config.json (mamba/hybrid_mamba_config.py), where only Mamba-2 has `ngroups`."""
    layers, width, heads = (llama[field] for field in ("n_layers", "d_model", "n_heads"))
    fields = dict(n_kv_heads=heads, head_dim=width // heads) | llama
    attention, ssm = mamba["attn_layers"], mamba["ssm_cfg"]
    known = "expand d_state d_conv dt_rank ngroups repeat_kv_before_conv chunk_size"
    require(ssm.keys() <= set(known.split()), f"ssm_cfg has {', '.join(ssm)}, supported: {known}")
    require(set(attention) <= set(range(layers)), f"attn_layers = {attention} of {layers} layers")
    mixer = "mamba2_step" if "ngroups" in ssm else "mamba"
    if mixer == "mamba2_step":
        refuse_other(ssm, dict(ngroups=heads, d_state=fields["head_dim"]))
    mixers = ["attention" if layer in attention else mixer for layer in range(layers)]
    return fields | dict(mixers=mixers)


def read_layout(folder):
    """(fields of Config, translation of a tensor) of the checkpoint in a folder."""
    path, released = Path(folder, "config.json"), Path(folder, "mamba_config.json")
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint in {folder}: expected config.json and model.safetensors")
    with naming(f"the checkpoint in {folder}"):
        values = read_json(path)
        if values.get("model_type") == "llamba":
            return llama_fields(llamba_as_llama(values)), llamba_tensors
        fields = llama_fields(values)
        if "mixers" in fields or not released.is_file():  # ours, maybe saved over a release
            return fields, lambda name, tensor, *_: {name: tensor}
        if any(".mha." in name for name in stored_names(folder)):
            fields["rope_scaling"] = None  # M1 was trained without that of its base
        return mamba_fields(fields, read_json(released)), mamba_in_llama_tensors


def read_config(folder):
    """Fields of model.Config in a folder's config.json; what it does not say is left out.
    FileNotFoundError if there is none, ValueError naming what is not supported."""
    return read_layout(folder)[0]


# ---- weights
EMBEDDING = "model.embed_tokens.weight"


def map_file(path, names=None):
    """{name: tensor} of a weight file (of these names; of a .bin all), mapped: what is used is in
    memory until the tensor is dropped."""
    import torch
    from safetensors import safe_open
    with naming(path):
        if path.suffix == ".bin":  # weights_only: a pickle may hold any code
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return {name: tensor.detach() for name, tensor in tensors.items()}
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}


def stored_names(folder):
    """{name: path of its file} of the tensors in a folder."""
    paths = weight_files(folder) or [Path(folder, "model.safetensors")]
    return {name: path for path in paths for name in map_file(path)
            if not name.endswith("rotary_emb.inv_freq")}  # files of 2023; config.json says it


def llamba_tensors(name, tensor, fields, shapes):
    """{our name: tensor} of a tensor of a Llamba, whose decays have no bias: zeros."""
    name = name.replace("backbone.", "model.").replace(".embedding.", ".embed_tokens.")
    name = name.replace(".final_layernorm.", ".norm.").replace(".mixer.", ".mamba2.")
    bias = {name[:-1] + "A_log_bias": tensor.new_zeros(len(tensor))} if name.endswith(".D") else {}
    return {name: tensor} | bias


FUSED = {  # M1 has one product for several of ours, from top to bottom
    "mha.in_proj": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "mha.out_proj": "self_attn.o_proj",
    "mamba.in_proj": "mamba.in_proj_z mamba.in_proj_x mamba.B_proj mamba.C_proj mamba.dt_proj_down"}


def mamba_in_llama_tensors(name, tensor, fields, shapes):
    """{our name: tensor} of a tensor of a MambaInLlama or M1 student."""
    layer, key = re.fullmatch(r"(model\.layers\.\d+\.|)(.+)", name).groups()
    inner, kv = (fields[heads] * fields["head_dim"] for heads in ("n_heads", "n_kv_heads"))
    if key.startswith("mamba.") and "mamba2_step" in fields["mixers"]:
        ours = name.replace(".mamba.", ".mamba2.").replace("dt_bias", "A_log_bias")
        bias = {layer + "mamba2.z_bias": tensor.new_zeros(inner)} if ".norm." in key else {}
        return {ours: mamba2_rows(key, tensor, inner, kv, fields)} | bias
    if whole := FUSED.get(key.removesuffix(".weight")):
        names = [f"{layer}{ours}.weight" for ours in whole.split()]
        return dict(zip(names, tensor.split([shapes[ours][0] for ours in names])))
    if key == "mamba.dt_proj.bias":  # their dt_proj adds it, and their scan adds it again
        tensor = 2 * tensor
    if key.startswith("mamba.conv1d.") and len(tensor) == kv:  # repeat_kv_before_conv = false
        tensor = repeat_groups(tensor, 16, inner // kv)
    return {name: tensor}


def mamba2_rows(key, tensor, inner, kv, fields):
    """Rows z | x | B | C | dt become x | B | C | z | a, the kv heads of x and B repeated; likewise
    those of a conv1d that runs before that (repeat_kv_before_conv = false)."""
    import torch
    z = a = tensor[:0]
    if key == "mamba.in_proj.weight":
        z, tensor, a = tensor.split([inner, 2 * kv + inner, fields["n_heads"]])
    elif ".conv1d." not in key or len(tensor) == 3 * inner:
        return tensor
    x, B, C = tensor.split([kv, kv, inner])
    x, B = (repeat_groups(part, fields["head_dim"], inner // kv) for part in (x, B))
    return torch.cat([x, B, C, z, a])


def repeat_groups(tensor, size, times):
    """[k1, k2] -> [k1, k1, k2, k2], each of `size` rows: kv heads as the query heads use them."""
    return tensor.unflatten(0, (-1, size)).repeat_interleave(times, dim=0).flatten(0, 1)


def read_tensors(folder, shapes, cast):
    """{our name: cast(our name, tensor)} of a folder's weights, translated from whatever layout.

    shapes: {our name: shape} of what the model needs: a tensor that is missing, extra, misshapen or
    of integers is a ValueError naming it. `cast` copies: one tensor at a time is read.
    """
    import torch
    (fields, translate), tensors = read_layout(folder), {}
    with naming(f"the checkpoint in {folder}"):
        for name, path in stored_names(folder).items():
            tensor = map_file(path, [name])[name]
            tied = name == "lm_head.weight" and name not in shapes  # and may be stored all the same
            with naming(f"tensor {name}, {tensor.dtype} of shape {tuple(tensor.shape)},"):
                require(tensor.is_floating_point(), "expected floating point")
                parts = translate(EMBEDDING if tied else name, tensor, fields, shapes)
                for ours, part in parts.items():
                    require(part.shape == shapes.get(ours),
                            f"expected {shapes.get(ours, 'no such tensor')}")
                    part = cast(ours, part)
                    require(ours not in tensors or torch.equal(part, tensors[ours]),
                            "lm_head.weight and the embedding of a tied model differ")
                    tensors[ours] = part
        missing = ", ".join(sorted(shapes.keys() - tensors.keys()))
        require(not missing, f"missing tensors: {missing[:300]}")
    return tensors


def write_checkpoint(folder, fields, tensors):
    """Writes config.json, from the fields of Config, and model.safetensors, each under a temporary
    name first. All attention, it loads in transformers' LlamaForCausalLM."""
    from safetensors.torch import save_file
    dtype = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    config = dict(architectures=["LlamaForCausalLM"]) | WRITTEN | dict(torch_dtype=dtype)
    config |= {HF_KEYS[field]: value for field, value in fields.items()}
    config["eos_token_id"] = config.get("eos_token_id") or None
    if config.get("rope_scaling"):
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
LLAMA3_RANKS = 128_000  # and 256 special tokens, the last 244 without a use
LLAMA3_SPECIAL = [f"<|{name}|>" for name in (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
    "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag "
    "image").split() + [f"reserved_special_token_{i}" for i in range(2, 246)]]


def read_tiktoken(path):
    """{pattern, ranks, special} of Llama 3's tokenizer.model; special tokens as Meta names them."""
    lines = [line.split() for line in path.read_text("ascii").splitlines()]
    require([line[1:] for line in lines] == [[str(rank)] for rank in range(LLAMA3_RANKS)],
            f"{path.name} is not Llama 3's {LLAMA3_RANKS:,} lines of token and rank")
    return dict(pattern=LLAMA3_PATTERN, ranks=[token for token, _ in lines],
                special={name: LLAMA3_RANKS + i for i, name in enumerate(LLAMA3_SPECIAL)})


def gpt2_alphabet():
    """{character: byte}: a tokenizer.json has a printable character for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(map(chr, [*printable, *range(256, 256 + len(others))]), printable + others))


def read_byte_bpe(path):
    """{pattern, ranks, special} of a tokenizer.json, if it is byte-level BPE as tiktoken does it.

    tiktoken has no list of merges: it joins the neighbours that make the token of the lowest id. So
    merges must come in the order of the ids they make, and make every token (with ignore_merges a
    piece that is a token is taken whole, as by tiktoken).
    """
    file, byte_of = read_json(path), gpt2_alphabet()
    model, added, splits = file["model"], file["added_tokens"], file["pre_tokenizer"]
    refuse_other(file | model, dict(normalizer=None, type="BPE", dropout=0, byte_fallback=False,
                                    end_of_word_suffix=""))
    steps = splits.get("pretokenizers", [splits])
    patterns = [pattern for known, pattern in PRE_TOKENIZERS if known == steps]
    require(patterns, f"its pre-tokenizer, {steps}, is neither GPT-2's nor SmolLM2's nor Llama 3's")
    require(all(token["special"] for token in added), "it has added tokens that are not special")
    special = {token["content"]: token["id"] for token in added}
    vocab = {token: rank for token, rank in model["vocab"].items() if token not in special}
    ids = {*vocab.values(), *special.values()}
    require(len(ids) == len(vocab | special) and 0 <= min(ids) <= max(ids) < 2 * len(ids),
            f"its {len(ids):,} ids, {min(ids)} to {max(ids)}, are not one for each token")
    made = [vocab.get("".join(merge).replace(" ", "")) for merge in model["merges"]]
    longer = {rank for token, rank in vocab.items() if len(token) > 1}
    complete = model.get("ignore_merges") or longer == set(made)
    require(longer and complete and None not in made and made == sorted(made),
            "its merges do not make its tokens in the order of the ids")
    ranks = {rank: base64.b64encode(bytes(byte_of[c] for c in token)).decode()
             for token, rank in vocab.items()}
    return dict(pattern=patterns[0], special=special,
                ranks=[ranks.get(rank) for rank in range(max(ranks) + 1)])


START, HEADER = "<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n"
USER, ANSWER = HEADER.format("user"), "<|eot_id|>" + HEADER.format("assistant")
LLAMA3_SYSTEM = HEADER.format("system") + (
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>")
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATS = (  # words of a chat template, and what it puts before and after a question
    ("Cutting Knowledge Date", START + LLAMA3_SYSTEM + USER, ANSWER),
    ("<|start_header_id|>", START + USER, ANSWER),
    (SMOLLM2_SYSTEM, f"<|im_start|>system\n{SMOLLM2_SYSTEM}<|im_end|>\n<|im_start|>user\n",
     "<|im_end|>\n<|im_start|>assistant\n"),
    ("no template", START, "\n"), ("no template", "", "\n"))  # a base model's


def optional_json(folder, name):
    """The dict in a JSON file, {} if there is none."""
    path = Path(folder, name)
    return read_json(path) if path.is_file() else {}


def chat_of(folder, special, default):
    """What comes before and after a question, each as a list of special tokens and texts. The
    folder's chat template, `default` if it has none, is recognised, not run."""
    path = Path(folder, "chat_template.jinja")
    template = path.read_text("utf-8") if path.is_file() else optional_json(
        folder, "tokenizer_config.json").get("chat_template")
    for words, *chat in CHATS:
        chat = [[part for part in re.split(r"(<\|\w+\|>)", text) if part] for text in chat]
        known = all(part in special for parts in chat for part in parts if part[:2] == "<|")
        if known and words in str(template or default):  # a list if there are several
            return chat
    raise ValueError("its chat template is neither Llama 3's nor SmolLM2's")


def read_tokenizer(folder):
    """The definition of data.Tokenizer, {pattern, ranks, special, chat, trim, eos}, of a folder.

    Llama 3's tokenizer.model counts first (Meta has it in original/), then tokenizer.json.
    FileNotFoundError if there is neither, ValueError if it cannot be used.
    """
    paths = [Path(folder, name) for name in
             ("tokenizer.model", "original/tokenizer.model", "tokenizer.json")]
    paths = [path for path in paths if path.is_file() and path.read_bytes()[:1] != b"\n"]
    if not paths:  # sentencepiece's begins with a newline
        raise FileNotFoundError(f"no tokenizer in {folder}: expected tokenizer.json, or Llama 3's "
                                f"tokenizer.model (not one of sentencepiece)")
    with naming(f"the tokenizer in {folder}"):
        is_json, default = paths[0].suffix == ".json", "no template"
        found = (read_byte_bpe if is_json else read_tiktoken)(paths[0])
        if is_json or not Path(folder, "tokenizer_config.json").is_file():
            default = "Cutting Knowledge Date, or no template"  # a Llama 3 is Instruct's
        before, after = chat_of(folder, found["special"], default)
        config = optional_json(folder, "config.json")
        ids = eos_list(config | optional_json(folder, "generation_config.json"))
        names = {token: name for name, token in found["special"].items()}
        require(set(ids) <= names.keys(), f"its eos_token_id, {ids}, is not of special tokens")
        ends = [after[0], "<|end_of_text|>", "<|endoftext|>", "<|eom_id|>", *map(names.get, ids)]
        eos = list(dict.fromkeys(end for end in ends if end in found["special"]))
        return found | dict(chat=[before, after], trim=after[0] == "<|eot_id|>", eos=eos)


# ---- data sets
HUB = {  # task: (repository, configuration, splits)
    "gsm8k": ("openai/gsm8k", "main", ("train", "test")),
    "math500": ("HuggingFaceH4/MATH-500", None, ("test",)),
    "openmath2": ("nvidia/OpenMathInstruct-2", None, ("train",))}


def dataset_rows(task, split, rows=None):
    """The rows of a task of HUB as dicts; with rows = (first, end) those only, streamed.
    ValueError if there is no such split, no network, or no row."""
    repository, configuration, splits = HUB[task]
    require(split in splits, f"{task} has no {split} split: it has {' and '.join(splits)}")
    with naming(f"{repository} (without a network pass a .jsonl file instead of {task})"):
        import datasets
        found = datasets.load_dataset(repository, configuration, split=split, streaming=bool(rows))
        found = [dict(row) for row in itertools.islice(found, *rows or (None,))]
    require(found, f"{task} has no rows {' to '.join(map(str, rows or []))}")
    return found
