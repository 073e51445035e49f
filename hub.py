"""The formats of others, translated: their files in, dicts of ours out, and back.

    folder = checkpoint_folder("org/name")        # or a folder
    config = Config(**read_config(folder))
    tensors = read_tensors(folder, shapes, cast)  # {our name: tensor}
    write_checkpoint(folder, fields, tensors)     # a Llama loads in transformers
    definition = read_tokenizer(folder)           # for data.Tokenizer
    rows = dataset_rows("gsm8k", "test")

Read are Llamas as Hugging Face stores them, the students that MambaInLlama, M1 and Llamba released,
the tokenizers and chats of Llama 3 and SmolLM2, and three data sets. What would make a model
compute something else than its authors' code does is refused by name.
"""
import base64
import contextlib
import itertools
import json
import os
import re
import zlib

from common import first_line, read_json, replace_file, write_json


def refuse_unless(condition, complaint):
    """Raises ValueError(complaint) where the condition does not hold."""
    if not condition:
        raise ValueError(complaint)


@contextlib.contextmanager
def naming(what):
    """A context in which anything that a broken file leads to is a ValueError of one line."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{what} cannot be used: {reason}") from None


# ---------------------------------------------------------------------------- folders
def download(path_or_repo, patterns):
    """The path itself, or the folder with those files of the repository "org/name" that match.

    A name is a repository's unless org is a folder here ("out/pure" is a missing folder). Raises
    FileNotFoundError if the Hugging Face Hub cannot give the files.
    """
    name = str(path_or_repo)
    here = os.path.exists(name) or os.path.isdir(name.split("/")[0])
    if here or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return name
    try:
        import huggingface_hub
        return huggingface_hub.snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # its own kinds, httpx's, OSError, no such package
        raise FileNotFoundError(
            f"no folder {name}; no download: {type(error).__name__}: {first_line(error)} (gated or "
            "private: `hf auth login`; no package: `pip install huggingface_hub`)") from None


def weight_files(folder):
    """Paths of a folder's weights: safetensors, or .bin where there are none; whole or shards."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return [path]
        if os.path.isfile(index := path + ".index.json"):
            with naming(index):
                files = sorted(set(read_json(index)["weight_map"].values()))
                outside = [file for file in files if file != os.path.basename(file)]
                refuse_unless(not outside, f"it names files outside its folder, {outside[:1]}")
            return [os.path.join(folder, file) for file in files]
    return []


def checkpoint_folder(path_or_repo):
    """The folder of a checkpoint's config and weights; a repository "org/name" is downloaded.

    Its .bin files only where it has no safetensors: many repositories hold the weights twice.
    """
    folder = download(path_or_repo, ["*.json", "model*.safetensors"])
    if weight_files(folder):
        return folder
    return download(path_or_repo, ["*.json", "pytorch_model*.bin"])


def tokenizer_folder(path_or_repo):
    """The folder of a model's tokenizer and chat format; a repository "org/name" is downloaded."""
    return download(path_or_repo, ["tokenizer*", "original/tokenizer.model", "chat_template.jinja",
                                   "config.json", "generation_config.json"])


def fingerprint(path_or_repo):
    """CRC-32 of a checkpoint's weight files in hexadecimal: did two runs use the same model?"""
    folder, crc = checkpoint_folder(path_or_repo), 0
    for name in sorted(os.listdir(folder)):
        if name.endswith((".safetensors", ".bin")):
            with open(os.path.join(folder, name), "rb") as file:
                while block := file.read(1 << 24):
                    crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


# ---------------------------------------------------------------------------- config.json
REQUIRED = dict(  # field of model.Config -> key of a Hugging Face Llama config
    vocab_size="vocab_size", d_model="hidden_size", n_layers="num_hidden_layers",
    n_heads="num_attention_heads", d_ff="intermediate_size")
HF_KEYS = REQUIRED | dict(
    n_kv_heads="num_key_value_heads", head_dim="head_dim", rope_theta="rope_theta",
    rope_scaling="rope_scaling", norm_eps="rms_norm_eps", tie_embeddings="tie_word_embeddings",
    max_length="max_position_embeddings", eos_ids="eos_token_id",
    mixers="mixers", d_state="d_state", d_conv="d_conv", dt_rank="dt_rank")  # this line is ours
HF_DEFAULTS = dict(tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=10000.0)
# Keys of which only one value (or null, or none at all) is implemented here.
ONLY = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False,
            rope_interleaved=False, partial_rotary_factor=1.0, sliding_window=None,
            quantization_config=None)


def refuse_missing(values, keys):
    """Raises ValueError naming the keys that a config.json has not, or has as null."""
    missing = ", ".join(key for key in keys if values.get(key) is None)
    base = values.get("_name_or_path", "its base")  # a released student's may hold little else
    refuse_unless(not missing, f"config.json lacks {missing} (copy what is missing from {base})")


def refuse_other(values, only):
    """Raises ValueError for a key of `only` that has another value in `values`."""
    for key, value in only.items():
        refuse_unless(values.get(key) in (None, value),
                      f"{key} = {values.get(key)!r}, only {json.dumps(value)} is supported")


def as_list(ids):
    """Token ids as a list: eos_token_id is one, several, null or missing."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def llama_fields(values):
    """Fields of Config in a Llama's config.json, of the old layout or the new (rope_parameters)."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    refuse_other(values | rope, ONLY)
    refuse_missing(values, ["model_type", *REQUIRED.values()])
    values = HF_DEFAULTS | {key: value for key, value in values.items() if value is not None}
    values["eos_token_id"] = as_list(values.get("eos_token_id"))
    values["rope_theta"] = rope.get("rope_theta", values["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {key: value for key, value in rope.items()
               if key not in ("rope_theta", "type", "partial_rotary_factor")}
    values["rope_scaling"] = None if kind == "default" else scaling | dict(rope_type=kind)
    if values.get("discrete_mamba2") is False:  # a key that we wrote once
        step = {"mamba2": "mamba2_step"}
        values["mixers"] = [step.get(mixer, mixer) for mixer in values["mixers"]]
    return {field: values[key] for field, key in HF_KEYS.items() if key in values}


def llamba_fields(values):
    """Fields of Config for a Llamba (modeling_llamba.py of cartesia-ai/edge): all is Mamba-2."""
    mlp, ssm = values.get("mlp_cfg") or {}, values.get("ssm_cfg") or {}
    found = dict(expand=1, tie_embeddings=False) | mlp | ssm | values
    keys = dict(vocab_size="vocab_size", d_model="d_model", n_layers="n_layer", d_state="d_state",
                n_heads="n_v_heads", d_ff="intermediate_size")
    refuse_missing(found, keys.values())
    heads, width = found["n_v_heads"], found["d_model"]
    refuse_other(values | mlp, dict(lm_head_bias=False, act_fn="silu", bias=False))
    refuse_other(ssm, dict(activation="identity", bias=False, conv_bias=True, n_qk_heads=heads))
    keys |= dict(norm_eps="norm_epsilon", tie_embeddings="tie_embeddings", d_conv="d_conv")
    return {field: found[key] for field, key in keys.items() if key in found} | dict(
        head_dim=found["expand"] * width // heads, mixers=["mamba2"] * found["n_layer"],
        eos_ids=as_list(values.get("eos_token_id")))


def mamba_in_llama_fields(llama, mamba):
    """Fields of Config for a MambaInLlama or M1 student.

    llama: those of its config.json; mamba: its mamba_config.json, which says what has replaced
    attention (mamba/hybrid_mamba_config.py of MambaInLlama). Only its Mamba-2 has `ngroups`. Sizes
    that it repeats (d_inner, d_xb, ...) are not read: those of the weights are checked.
    """
    layers, width, heads = (llama[field] for field in ("n_layers", "d_model", "n_heads"))
    fields = dict(n_kv_heads=heads, head_dim=width // heads) | llama
    ssm, attention = mamba.get("ssm_cfg") or {}, mamba.get("attn_layers")
    known = "expand d_state d_conv dt_rank ngroups repeat_kv_before_conv chunk_size".split()
    refuse_unless(ssm.keys() <= set(known), f"ssm_cfg = {ssm}, supported are {', '.join(known)}")
    refuse_unless(attention is not None and set(attention) <= set(range(layers)),
                  f"attn_layers = {attention}, but layers are 0 .. {layers - 1}")
    mixer = "mamba2_step" if "ngroups" in ssm else "mamba"
    if mixer == "mamba2_step":
        refuse_other(ssm, dict(ngroups=heads, d_state=fields["head_dim"]))
    rank = ssm.get("dt_rank", "auto")
    return fields | dict(
        mixers=["attention" if layer in attention else mixer for layer in range(layers)],
        d_state=ssm.get("d_state", 16), d_conv=ssm.get("d_conv", 4),
        dt_rank=-(-width // 16) if rank == "auto" else rank)


def layout_of(folder, values):
    """Whose layout a checkpoint with this config.json has: llama (ours, too), llamba or mamba."""
    if "mixers" in values:  # we saved it, maybe over a release
        return "llama"
    released = os.path.isfile(os.path.join(folder, "mamba_config.json"))
    return "mamba" if released else values.get("model_type")


def read_config(folder):
    """Fields of model.Config in a folder's config.json; what it does not say is left out.

    Raises FileNotFoundError if there is none, ValueError naming what is not supported here.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"no checkpoint in {folder}: expected config.json and model.safetensors there")
    values = read_json(path)
    layout = layout_of(folder, values)
    with naming(f"the checkpoint in {folder}"):
        if layout == "llamba":
            return llamba_fields(values)
        fields = llama_fields(values)
        if layout == "mamba":
            if any(".mha." in name for name in stored_tensors(folder)):
                fields["rope_scaling"] = None  # M1 was trained without that of its base
            mamba = read_json(os.path.join(folder, "mamba_config.json"))
            return mamba_in_llama_fields(fields, mamba)
        refuse_other(values, dict(architectures=["LlamaForCausalLM"]))
        return fields


# ---------------------------------------------------------------------------- weight files
def map_file(path, names=None):
    """{name: tensor} of a weight file (of these names; of a .bin all), mapped into memory.

    Nothing is read before it is used; what was read counts as memory until the tensor is dropped.
    """
    import torch
    from safetensors import safe_open
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.endswith(".bin"):  # weights_only: a pickle may hold any code
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return {name: tensor.detach() for name, tensor in tensors.items()}
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}
    except Exception as error:  # safetensors' and pickle's own, RuntimeError, EOFError
        raise ValueError(f"{path} is not a readable weight file: {first_line(error)}") from None


def stored_tensors(folder):
    """{name: (path, tensor on "meta")} of a folder's weights: where they are, shape and dtype."""
    import torch
    paths = weight_files(folder)
    if not paths:
        raise FileNotFoundError(f"no such file: {os.path.join(folder, 'model.safetensors')}")
    return {name: (path, torch.empty_like(tensor, device="meta"))
            for path in paths for name, tensor in map_file(path).items()
            if not name.endswith("rotary_emb.inv_freq")}  # files of 2023; config.json says it


def take_apart(name, tensor, sizes):
    """{part: its rows of a tensor}, from top to bottom; sizes: {part: number of rows}."""
    expected = (sum(sizes.values()), *tensor.shape[1:])
    refuse_unless(tensor.shape == expected,
                  f"tensor {name} has shape {tuple(tensor.shape)}, expected {expected}")
    return dict(zip(sizes, tensor.split(list(sizes.values()))))


def repeat_groups(tensor, size, times):
    """[k1, k2] -> [k1, k1, k2, k2], each of `size` rows: kv heads as the query heads use them."""
    return tensor.unflatten(0, (-1, size)).repeat_interleave(times, dim=0).flatten(0, 1)


FUSED = {  # one product in M1 and in MambaInLlama's inference code -> ours, from top to bottom
    "mamba.in_proj.weight": ("mamba.in_proj_z", "mamba.in_proj_x", "mamba.B_proj", "mamba.C_proj",
                             "mamba.dt_proj_down"),
    "mha.in_proj.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mha.out_proj.weight": ("self_attn.o_proj",)}


def mamba2_rows(name, tensor, inner, kv, config):
    """A tensor of MambaInLlama's Mamba-2 (mamba2/hybrid_mamba_layer.py) with its rows as ours.

    In in_proj z | x | B | C | dt become x | B | C | z | a, the kv heads of x and B repeated; as in
    a conv1d that runs before they are repeated (repeat_kv_before_conv = false).
    """
    import torch
    sizes = dict(x=kv, B=kv, C=inner)
    if name.endswith(".in_proj.weight"):
        sizes = dict(z=inner) | sizes | dict(a=config["n_heads"])
    elif ".conv1d." not in name or len(tensor) == 3 * inner:
        return tensor
    rows = take_apart(name, tensor, sizes)
    rows |= {part: repeat_groups(rows[part], config["head_dim"], inner // kv) for part in "xB"}
    return torch.cat([rows[part] for part in "xBCza" if part in rows])


def mamba_in_llama_tensors(name, tensor, config, shapes):
    """{our name: tensor} of a stored tensor of a MambaInLlama or M1 student."""
    layer, key = re.fullmatch(r"(model\.layers\.\d+\.|)(.+)", name).groups()
    fused = [f"{layer}{ours}.weight" for ours in FUSED.get(key, ())]
    if fused and shapes.keys() >= set(fused):
        return take_apart(name, tensor, {ours: shapes[ours][0] for ours in fused})
    inner, kv = (config[heads] * config["head_dim"] for heads in ("n_heads", "n_kv_heads"))
    if key.startswith("mamba.") and "mamba2_step" in config["mixers"]:
        tensor = mamba2_rows(name, tensor, inner, kv, config)
        return {layer + key.replace("mamba.", "mamba2.").replace("dt_bias", "A_log_bias"): tensor}
    # Mamba-1, mamba/hybrid_mamba_layer.py
    if key == "mamba.dt_proj.bias":  # their dt_proj adds it, and their scan adds it again
        tensor = 2 * tensor
    if key.startswith("mamba.conv1d.") and len(tensor) == kv:  # repeat_kv_before_conv = false
        tensor = repeat_groups(tensor, config["d_state"], inner // kv)
    return {name: tensor}


def llamba_tensors(name, tensor):
    """{our name: tensor} of a stored tensor of a Llamba."""
    for theirs, ours in (("backbone.embedding.", "model.embed_tokens."), (".mixer.", ".mamba2."),
                         ("backbone.final_layernorm.", "model.norm."), ("backbone.", "model.")):
        name = name.replace(theirs, ours)
    return {name: tensor}


# ---------------------------------------------------------------------------- checkpoints
def check_tensors(stored, shapes, translate, zeros):
    """Raises ValueError naming a tensor that is no floating point, extra, misshapen or missing."""
    found = set()
    for name, (_, like) in sorted(stored.items()):
        shape = tuple(like.shape)
        refuse_unless(like.is_floating_point(), f"tensor {name} is of {like.dtype}, no float")
        for ours, part in translate(name, like).items():
            refuse_unless(ours in shapes, f"unexpected tensor {name} of shape {shape}")
            refuse_unless(part.shape == shapes[ours], f"tensor {name} has shape {shape}, expected "
                          f"{tuple(shapes[ours])}" + (f" for {ours}" if ours != name else ""))
            found.add(ours)
    for ours, shape in shapes.items():
        refuse_unless(ours in found or ours.endswith(zeros),
                      f"tensor {ours} is missing, expected shape {tuple(shape)}")


def read_tensors(folder, shapes, cast):
    """{our name: cast(our name, tensor)} of a folder's weights, translated from whatever layout.

    shapes: {our name: shape} of what the model needs. All is checked before anything is read: a
    tensor that is missing, extra, misshapen or of integers is a ValueError naming it. Biases that
    we have and a release has not are zeros. Tensors are read one by one, each from a mapping of
    its own that ends with it: memory peaks at the weights and one tensor.
    """
    import torch
    config, stored = read_config(folder), stored_tensors(folder)
    layout = layout_of(folder, read_json(os.path.join(folder, "config.json")))
    embedding = "model.embed_tokens.weight"

    def translate(name, tensor):
        if name == "lm_head.weight" and name not in shapes:  # a tied model may store its head, too
            return {embedding: tensor}
        if layout == "mamba":
            return mamba_in_llama_tensors(name, tensor, config, shapes)
        return llamba_tensors(name, tensor) if layout == "llamba" else {name: tensor}

    with naming(f"the checkpoint in {folder}"):
        zeros = {"llamba": ".A_log_bias", "mamba": ".mamba2.z_bias", "llama": ()}[layout]
        check_tensors(stored, shapes, translate, zeros)
    tensors = {}
    for name, (path, _) in stored.items():
        tensor = map_file(path, [name])[name]
        for ours, part in translate(name, tensor).items():
            part = cast(ours, part)
            if part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                part = part.clone()
            same = ours not in tensors or torch.equal(part.to(tensors[ours].dtype), tensors[ours])
            refuse_unless(same, f"{folder}: a tied model, but its lm_head.weight is not {ours}")
            tensors[ours] = part
    for ours in shapes.keys() - tensors.keys():
        tensors[ours] = cast(ours, torch.zeros(shapes[ours], dtype=tensors[embedding].dtype))
    return tensors


def write_checkpoint(folder, fields, tensors):
    """Writes config.json and model.safetensors, each under a temporary name first.

    fields: those of Config. An all-attention checkpoint loads in transformers' LlamaForCausalLM.
    """
    from safetensors.torch import save_file
    os.makedirs(folder, exist_ok=True)
    dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
                  attention_bias=False, mlp_bias=False, torch_dtype=dtype)
    config |= {HF_KEYS[field]: value for field, value in fields.items()}
    config["eos_token_id"] = config.get("eos_token_id") or None
    if config.get("rope_scaling"):
        config["rope_scaling"] = dict(rope_type="llama3") | config["rope_scaling"]
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    replace_file(os.path.join(folder, "model.safetensors"),
                 lambda path: save_file(tensors, path, metadata=dict(format="pt")))
    write_json(os.path.join(folder, "config.json"), config)


# ---------------------------------------------------------------------------- tokenizers
# What cuts a text into pieces before merging. SmolLM2's is GPT-2's with every digit a text of its
# own: no space joins a digit, and spaces before one end their text, so all of them are one piece.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM2_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False)
PRE_TOKENIZERS = (  # steps in a tokenizer.json, and the one regex that splits as they do
    ([BYTE_LEVEL], GPT2_PATTERN),
    ([dict(type="Digits", individual_digits=True), BYTE_LEVEL], SMOLLM2_PATTERN),
    ([dict(type="Split", pattern=dict(Regex=LLAMA3_PATTERN), behavior="Isolated", invert=False),
      BYTE_LEVEL | dict(use_regex=False)], LLAMA3_PATTERN))
LLAMA3_RANKS = 128_000  # and 256 special tokens, the last 244 without a use
LLAMA3_SPECIAL = (
    "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> "
    "<|finetune_right_pad_id|> <|step_id|> <|start_header_id|> <|end_header_id|> <|eom_id|> "
    "<|eot_id|> <|python_tag|> <|image|>").split()
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(2, 246)]


def is_tiktoken(path):
    """Does a file hold tiktoken's lines of `base64 rank`? Llama 2's is sentencepiece's."""
    with open(path, "rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", file.readline(1000)) is not None


def read_tiktoken(path):
    """{pattern, ranks, special} of Llama 3's tokenizer.model; special tokens as Meta names them."""
    with open(path, encoding="ascii") as file:
        lines = [line.split() for line in file]
    refuse_unless([line[1:] for line in lines] == [[str(rank)] for rank in range(LLAMA3_RANKS)],
                  f"tokenizer.model is not Llama 3's {LLAMA3_RANKS:,} lines of token and rank")
    return dict(pattern=LLAMA3_PATTERN, ranks=[token for token, _ in lines],
                special={name: LLAMA3_RANKS + i for i, name in enumerate(LLAMA3_SPECIAL)})


def gpt2_alphabet():
    """{character: byte}: a tokenizer.json has a printable character for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def split_pattern(pre_tokenizer):
    """The regex that splits as a pre-tokenizer of a tokenizer.json does."""
    ignored = [("trim_offsets", True), ("trim_offsets", False), ("use_regex", True)]
    steps = [dict(item for item in step.items() if item not in ignored)
             for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]
    pattern = next((pattern for known, pattern in PRE_TOKENIZERS if steps == known), None)
    refuse_unless(pattern, f"its pre-tokenizer is {json.dumps(pre_tokenizer)[:300]}, supported are "
                           f"GPT-2's, SmolLM2's and Llama 3's")
    return pattern


def read_byte_bpe(path):
    """{pattern, ranks, special} of a tokenizer.json, if it is byte-level BPE as tiktoken does it.

    tiktoken has no list of merges: it joins the neighbours that make the token of the lowest id. So
    merges have to come in the order of the ids they make, and to make every token (with
    ignore_merges a piece that is a token is taken whole, as tiktoken does).
    """
    file = read_json(path)
    model, added, byte_of = file["model"], file.get("added_tokens") or [], gpt2_alphabet()
    refuse_other(file, dict(normalizer=None))
    refuse_other(model, dict(type="BPE", dropout=0, byte_fallback=False, fuse_unk=False,
                             continuing_subword_prefix="", end_of_word_suffix=""))
    special = {token["content"]: token["id"] for token in added}
    plain = [token["content"] for token in added if not token["special"]]
    refuse_unless(not plain, f"its added tokens {plain[:3]} are not special")
    vocab = {token: rank for token, rank in model["vocab"].items() if token not in special}
    strange = "".join(set("".join(vocab)) - byte_of.keys())
    refuse_unless(not strange, f"its tokens are not of bytes, they have {strange[:9]!r}")
    ids = sorted([*vocab.values(), *special.values()])
    refuse_unless(len(set(ids)) == len(ids) and 0 <= ids[0] and ids[-1] < 2 * len(ids),
                  f"its {len(ids):,} tokens have the ids {ids[0]} to {ids[-1]}, not one each")
    refuse_unless(len(model["merges"]) <= 1_000_000, f"it has {len(model['merges']):,} merges")
    made = [vocab.get(merge.replace(" ", "") if isinstance(merge, str) else "".join(merge))
            for merge in model["merges"]]
    longer = {rank for token, rank in vocab.items() if len(token) > 1}
    refuse_unless(None not in made and made == sorted(made) and longer and (
        longer == set(made) or model.get("ignore_merges")),
        "its merges do not make its tokens in the order of the ids")
    ranks = {rank: base64.b64encode(bytes(byte_of[c] for c in token)).decode()
             for token, rank in vocab.items()}
    return dict(pattern=split_pattern(file.get("pre_tokenizer") or {}), special=special,
                ranks=[ranks.get(rank) for rank in range(max(ranks) + 1)])


LLAMA3_NAMES = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# What comes before and after a question; the system message of Llama 3.1 and 3.2 has a fixed date.
LLAMA3_SYSTEM = ("<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
                 "December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>")
LLAMA3_CHAT = ("<|start_header_id|>user<|end_header_id|>\n\n",
               "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2_CHAT = (f"<|im_start|>system\n{SMOLLM2_SYSTEM}<|im_end|>\n<|im_start|>user\n",
                "<|im_end|>\n<|im_start|>assistant\n")


def optional_json(folder, name):
    """The dict in a JSON file, {} if there is none."""
    path = os.path.join(folder, name)
    return read_json(path) if os.path.isfile(path) else {}


def chat_template(folder):
    """The chat template in a model's folder, None if it has none."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            return file.read()
    template = optional_json(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, with names
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def chat_format(template, special, instruct):
    """{chat, trim, eos} for a chat template, which is recognised, not run.

    instruct: is a Llama 3 without a template Instruct's? Any other is a base model, whose prompt is
    the text and a newline.
    """
    llama3, start = set(LLAMA3_NAMES) <= special.keys(), LLAMA3_NAMES[0]
    if llama3 and template is None and instruct:
        template = LLAMA3_SYSTEM
    if template is None:
        chat = (start if start in special else "", "\n")
        ends = ("<|end_of_text|>", "<|endoftext|>")
    elif llama3 and "<|start_header_id|>" in template:
        system = LLAMA3_SYSTEM if "Cutting Knowledge Date" in template else ""
        chat = (start + system + LLAMA3_CHAT[0], LLAMA3_CHAT[1])
        ends = ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
    elif SMOLLM2_SYSTEM in template and {"<|im_start|>", "<|im_end|>"} <= special.keys():
        chat, ends = SMOLLM2_CHAT, ("<|im_end|>", "<|endoftext|>")
    else:
        raise ValueError("its chat template is neither Llama 3's nor SmolLM2's")
    items = [[item for item in re.split(r"(<\|\w+\|>)", text) if item] for text in chat]
    return dict(chat=items, trim="<|eot_id|>" in ends, eos=[end for end in ends if end in special])


def read_tokenizer(folder):
    """The definition of data.Tokenizer, {pattern, ranks, special, chat, trim, eos}, of a folder.

    pattern: regex that cuts a text into pieces; ranks: base64 of each id's bytes, null where it is
    special; chat: what comes before and after a question, which trim strips; eos: names. Llama 3's
    tokenizer.model counts first (Meta has it in original/), then tokenizer.json. Raises
    FileNotFoundError if there is neither, ValueError saying why a file cannot be used.
    """
    names = ("tokenizer.model", "original/tokenizer.model", "tokenizer.json")
    paths = [path for name in names if os.path.isfile(path := os.path.join(folder, name))]
    if not paths:
        raise FileNotFoundError(f"no tokenizer in {folder}: expected tokenizer.model or .json")
    with naming(f"the tokenizer in {folder}"):
        path = next((path for path in paths if path.endswith(".json") or is_tiktoken(path)), None)
        refuse_unless(path, "tokenizer.model is not Llama 3's but probably a sentencepiece file")
        found = read_byte_bpe(path) if path.endswith(".json") else read_tiktoken(path)
        # A tokenizer.model beside a tokenizer_config.json without a template is a base model's.
        silent = not os.path.isfile(os.path.join(folder, "tokenizer_config.json"))
        found |= chat_format(chat_template(folder), found["special"],
                             instruct=silent or path.endswith(".json"))
        names = {token: name for name, token in found["special"].items()}
        config = optional_json(folder, "config.json")
        config |= optional_json(folder, "generation_config.json")
        for end in as_list(config.get("eos_token_id")):
            refuse_unless(end in names, f"its eos_token_id, {end}, is not a special token")
            found["eos"] = list(dict.fromkeys([*found["eos"], names[end]]))
        return found


# ---------------------------------------------------------------------------- data sets
HUB = {  # task: (repository, configuration, splits)
    "gsm8k": ("openai/gsm8k", "main", ("train", "test")),
    "math500": ("HuggingFaceH4/MATH-500", None, ("test",)),
    "openmath2": ("nvidia/OpenMathInstruct-2", None, ("train",))}


def dataset_rows(task, split, rows=None):
    """The rows of a task of HUB as dicts; with rows = (first, end) those only, streamed.

    Raises ValueError if there is no such split, no package `datasets`, no network, or no row.
    """
    repository, configuration, splits = HUB[task]
    refuse_unless(split in splits, f"{task} has no {split} split: it has {' and '.join(splits)}")
    try:
        import datasets
        found = datasets.load_dataset(repository, configuration, split=split, streaming=bool(rows))
        found = [dict(row) for row in itertools.islice(found, *rows or (None,))]
    except Exception as error:  # its own kinds, httpx's, OSError, no such package: no rows
        raise ValueError(
            f"could not load {repository} from the Hugging Face Hub ({type(error).__name__}: "
            f"{first_line(error)[:200]}): check the network and `pip install datasets`, or pass a "
            f".jsonl file instead of {task}") from None
    refuse_unless(found, f"{task} has no rows {' to '.join(map(str, rows or []))}")
    return found
