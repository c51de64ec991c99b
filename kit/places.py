"""Where the parts of a model are: folders, files and hub ids.

Read before: kit/files.py, kit/lora.py's file names. docs/weights.md tells it with examples.
"""
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from kit.files import (
    LensError,
    did_you_mean,
    error_context,
    file_hash,
    first_few,
    open_safetensors,
    quoted,
    read_object,
    require,
    unread_weights,
)
from kit.lora import LORA_KEY, LORA_NAMES

PARTS = ("transformer", "vae", "text_encoder")

# Folders in which a pipeline keeps a part: diffusers' own, and what ComfyUI calls it.
FOLDERS = {
    "transformer": ("transformer", "diffusion_models", "unet"),
    "vae": ("vae",),
    "text_encoder": ("text_encoder", "text_encoders"),
    "tokenizer": ("tokenizer",),
}
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
ADAPTER_NAME = "adapter_model.safetensors"
INDEX_NAME = "model_index.json"
ROOT = Path(__file__).resolve().parent.parent      # of this repository


# --- Names of weights: a folder, a file or a hub id -----------------------------------------------

@dataclass(frozen=True)
class Places:
    """Where each part of a model is, as somebody named it: a folder, a file or a hub id."""
    transformer: str
    vae: str
    text_encoder: str

    def of(self, part):
        return getattr(self, part)

    def __str__(self):
        return ", ".join(dict.fromkeys(str(self.of(part)) for part in PARTS))


def gather(weights, vae=None, text_encoder=None):
    """-> Places. weights: the name of all parts that have none of their own; or Places already."""
    if isinstance(weights, Places):
        return weights
    return Places(weights, vae or weights, text_encoder or weights)


def part_flags(places):
    """The same places as flags of sample.py."""
    flags = f"--weights {quoted(str(places.transformer))}"
    for name, flag in (("vae", "--vae"), ("text_encoder", "--text-encoder")):
        if places.of(name) != places.transformer:
            flags += f" {flag} {quoted(str(places.of(name)))}"
    return flags


def add_part_flags(add):
    """--vae and --text-encoder. add: the add_argument of a parser or of a group in it."""
    add("--vae", metavar="DIR_FILE_OR_REPO", help="the autoencoder, where it lies apart")
    add("--text-encoder", metavar="DIR_FILE_OR_REPO",
        help="the language model, where it lies apart, say openai/gpt-oss-20b")


# owner/name, then perhaps @revision, then perhaps one file of it.
HUB_ID = re.compile(r"(?P<repository>(?P<owner>[\w-][\w.-]*)/[\w.-]+)"
                    r"(?:@(?P<revision>[\w.-]+))?"
                    r"(?:/(?P<file>[\w./-]+\.safetensors))?")

# Where this repository keeps weights: "weights/toy" from another folder is a mistake, and not what
# somebody called "weights" has put on the hub.
OUR_FOLDERS = ("weights", "runs")


def fetch(path_or_repo, parts):
    """A local folder or file as it is, or the files of a hub id, downloaded once and cached.
    -> Path."""
    return local_path(path_or_repo) or from_hub(path_or_repo, files_of(parts))


def fetch_places(places, parts=PARTS):
    """`fetch` for each of some parts: -> Places on this machine. A name that no asked part has is
    left as it is."""
    paths = {}                                     # {name: path}
    for name in dict.fromkeys(str(places.of(part)) for part in parts):
        together = [part for part in parts if str(places.of(part)) == name]
        paths[name] = fetch(name, together)
    return Places(*[paths.get(str(places.of(part)), places.of(part)) for part in PARTS])


def fetch_lora(path_or_repo):
    """The same for an adapter alone."""
    return local_path(path_or_repo) or from_hub(
        path_or_repo, ["adapter_config.json", "*.safetensors"])


def files_of(parts):
    """Patterns of the files of some parts in a repository of the hub, in diffusers layout. One part
    alone may be all of a repository, as a stock language model is."""
    patterns = ["*.json", *(f"{part}/*" for part in (*parts, "tokenizer"))]
    if "transformer" in parts:
        patterns.extend(LORA_NAMES)
    if len(parts) == 1:
        alone = "model" if "text_encoder" in parts else "diffusion_pytorch_model"
        patterns.append(f"{alone}*.safetensors")
    return patterns


def local_path(name):
    """The folder or file of this name; None where nothing is there and it can be a hub id."""
    path = expanded(name)
    if path.exists():
        return path
    elsewhere = ""
    if (ROOT / path).exists():
        elsewhere = f"; there is {ROOT / path}"
    require(may_be_hub_id(name), f"no weights at {name}: it is neither a local folder nor a hub id "
            f"like owner/name{elsewhere or did_you_mean(path)}")
    return None


def expanded(name):
    """The path of a name; the shell leaves a quoted ~ as it is."""
    return Path(os.path.expanduser(name))


def from_hub(hub_id, patterns):
    from huggingface_hub import hf_hub_download, snapshot_download

    match = HUB_ID.fullmatch(str(hub_id))
    repository, revision = match["repository"], match["revision"]
    with error_context(f"no local folder {hub_id}, and the hub could not give it"):
        if match["file"]:
            return Path(hf_hub_download(repository, match["file"], revision=revision))
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def may_be_hub_id(name):
    """Whether a name that is no local path can be one of the hub's."""
    match = HUB_ID.fullmatch(str(name))
    if match is None:
        return False
    # A mistyped name in a folder that is there is no hub id.
    return match["owner"] not in OUR_FOLDERS and not Path(match["owner"]).is_dir()


def base_from(folder, base):
    """How model_index.json in `folder` names a base, a name or Places: a local path by the way from
    `folder`, so that both can be moved together; a hub id as it is. Of parts that lie apart
    {part: name}."""
    places = gather(base)
    if len({str(places.of(part)) for part in PARTS}) > 1:
        return {part: base_from(folder, places.of(part)) for part in PARTS}

    name = places.transformer
    path = expanded(name)
    if not path.exists():
        return str(name)
    # Links are followed first: `..` leads out of where a folder is, not out of a link to it.
    way = os.path.relpath(path.resolve(), Path(folder).resolve())
    if HUB_ID.fullmatch(way):
        way = f"./{way}"
    return way


# --- Where things are -----------------------------------------------------------------------------

def weight_files(path):
    """The safetensors files of one part: a file itself; in a folder the shards that an index names,
    a file with a usual name, or the only file there."""
    path = Path(path)
    if path.is_file():
        return [path]

    for name in WEIGHT_NAMES:                      # before variants such as model.fp16.safetensors
        if (path / f"{name}.index.json").exists():
            return shards_of(path / f"{name}.index.json")
        if (path / name).exists():
            return [path / name]
    indices = sorted(path.glob("*.safetensors.index.json"))
    require(len(indices) < 2, f"no weights in {path}: it has several indices of shards "
            f"({first_few(index.name for index in indices)}) and none with a usual name")
    if indices:
        return shards_of(indices[0])
    files = [file for file in sorted(path.glob("*.safetensors")) if file.name not in LORA_NAMES]
    several = f" ({first_few(file.name for file in files)}): name one of them" if files else ""
    require(len(files) == 1, f"no weights in {path}: expected one .safetensors file or shards "
            f"with an index, found {len(files)} files{several}{unread_weights(path)}")
    return files


def shards_of(index):
    """The files that an index of shards names, beside it."""
    with error_context(f"cannot read {index}"):
        shards = read_object(index)["weight_map"].values()
        require(shards, f"cannot read {index}: it names no shards")
        return sorted({index.parent / Path(shard).name for shard in shards})


def with_bases(path, parts=()):
    """The folder `path`, the base that it names, that one's base, and so on.

    parts   what is looked for: which base is meant where parts lie apart (the first of them; else
            the denoiser's), and what is downloaded of one that is a hub id, beside its JSON files
    """
    folder, visited = Path(path), []
    while folder is not None:
        visited.append(folder.resolve())
        yield folder
        folder = base_of(folder, parts)
        in_circle = folder is not None and folder.resolve() in visited
        require(not in_circle, f"{path}: the bases in {INDEX_NAME} lead in a circle")


def base_of(folder, parts):
    """Where the base is that a folder names, or None if it names none."""
    named = pipeline_index(folder).get("base")
    if isinstance(named, dict):
        named = named.get(parts[0] if parts else "transformer")
    if named is None:
        return base_of_adapter(folder, parts)
    require(isinstance(named, str), f"{folder}/{INDEX_NAME}: its base is no name: {named!r}")

    way = expanded(named)
    by_link = os.path.normpath(folder.absolute() / way)            # as it was stored once
    for base in ((folder.resolve() / way).resolve(), Path(by_link)):
        if base.exists():
            return base
    if HUB_ID.fullmatch(named):
        return from_hub(named, files_of(parts))
    raise LensError(f"{folder}/{INDEX_NAME} names {named} as its base, but {by_link} is not there: "
                    "put it there, or write as \"base\" where it is now")


def base_of_adapter(folder, parts):
    """The base of an adapter without model_index.json, where PEFT's config or our notes name one
    that can be found; else None."""
    config = folder / "adapter_config.json"
    named = None
    if config.exists():
        named = read_object(config).get("base_model_name_or_path")
    if not named and adapter_files(folder):
        named = notes_in(adapter_files(folder)[0]).get("init")
    if named and (expanded(named).is_dir() or may_be_hub_id(named)):
        return fetch(named, parts)
    return None


def part_folder(path, part):
    """Where a part is: its own folder in `path`, in ComfyUI's layout too; else `path` itself, if it
    is a file or a stock language model; else the same in the base that it names. path/part where it
    is nowhere."""
    wanted = "text_encoder" if part == "tokenizer" else part
    for folder in with_bases(path, (wanted,)):
        own = own_folder(folder, part)
        if own is not None:
            return own
        # What a folder had and has no more is not what its base has.
        require(part not in pipeline_index(folder),
                f"no weights in {folder}: {INDEX_NAME} names a {part}, but {folder / part} is gone")
        lost = (folder / "adapter_config.json").exists() and not adapter_files(folder)
        require(part != "transformer" or not lost, f"no weights in {folder}: it has an "
                f"adapter_config.json, but no {ADAPTER_NAME}{unread_weights(folder)}")
    return Path(path) / part


def own_folder(folder, part):
    """The place of a part in this folder itself, or None. A file is the part that it was named
    for."""
    if folder.is_file():
        return folder
    for name in FOLDERS[part]:
        if (folder / name).is_dir():
            return folder / name
    # A language model as others store it: all in one folder, its tokenizer too.
    stock = part in ("text_encoder", "tokenizer") and "model_type" in config_in(folder)
    return folder if stock else None


def config_in(folder):
    """What config.json says; {} where there is none."""
    config = folder / "config.json"
    return read_object(config) if config.exists() else {}


def check_parts(places, parts):
    """LensError unless local places have these parts, with what to do. What was named for one part
    alone may also be the part itself, which its loader finds out."""
    for part in parts:
        path = places.of(part)
        alone = [other for other in parts if places.of(other) == path] == [part]
        if path.is_file():
            refuse_lora(path)
        require(alone or path.is_dir(), f"{path} is one file, of one part: name the others with "
                "--vae and --text-encoder, or a folder that has them all (docs/weights.md)")
        if not alone:
            check_part(path, part)


# What makes the toy's parts.
MAKES = {"transformer": "python train.py", "vae": "python -m toy.autoencoder",
         "text_encoder": "python -m toy.language"}


def check_part(path, part):
    """LensError unless a folder or its base has this part, with what to do."""
    found = part_folder(path, part).exists()
    require(found or not adapter_files(path), f"{path} is an adapter whose base is not known: name "
            f"that with --weights and the adapter with --lora, or write \"base\" into "
            f"{path}/{INDEX_NAME}")
    require(found, f"no weights in {path}: expected {path}/{part}/*.safetensors; the toy's are "
            f"made by `{MAKES[part]} --out {quoted(str(path))}`")


def command_for_next_part(folder, size, data=None):
    """What to type for the first part that a toy's folder lacks; for its denoiser where it has
    both others. data: the shards that all of them are trained on; None: the toy world"""
    missing = missing_parts(folder)
    command = f"{MAKES[missing[0] if missing else 'transformer']} --out {quoted(str(folder))}"
    if data is not None:
        command += f" --data {quoted(data)}"
    return command if size == "toy" else f"{command} --size {size}"


def pipeline_index(folder):
    """What model_index.json says; {} where there is none."""
    index = folder / INDEX_NAME
    return read_object(index) if index.exists() else {}


# What a part's config has, and no other's.
TELLING = {"transformer": "num_layers", "vae": "latent_channels", "text_encoder": "model_type"}


def locate(path, part):
    """-> (files, config) of a part, from a pipeline's folder, the part's own folder, or a file.

    The config is the config.json beside the weights; else what our own files carry in their notes;
    else None.
    """
    path = Path(path)
    if path.is_dir() and part_folder(path, part).exists():
        path = part_folder(path, part)
    elif adapter_files(path):
        check_part(path, part)
    files = weight_files(path)
    beside = config_in(files[0].parent)
    if TELLING[part] in beside:
        return files, beside
    refuse_lora(files[0])
    with error_context(f"{files[0]}: bad config in its metadata"):
        kept = json.loads(notes_in(files[0]).get("config", "null"))
    ours = isinstance(kept, dict) and TELLING[part] in kept        # not of another part
    return files, kept if ours else None


def find_tokenizer(path):
    """tokenizer.json of a text encoder: in the pipeline's tokenizer/, else beside the model, else
    in a tokenizer/ next to its folder. None where it is in none of these."""
    files, _ = locate(path, "text_encoder")
    beside = files[0].parent
    for folder in (part_folder(Path(path), "tokenizer"), beside, beside.parent / "tokenizer"):
        if (folder / "tokenizer.json").exists():
            return folder / "tokenizer.json"
    return None


def refuse_lora(file):
    """LensError where a file holds no weights of a part, but a LoRA."""
    with open_safetensors(file) as handle:
        is_lora = any(LORA_KEY.fullmatch(name) for name in handle.keys())
    require(not is_lora, f"{file} is a LoRA: name the weights that it changes with --weights, and "
            "it with --lora")


def has_parts(folder):
    """Whether a folder has an autoencoder and a text encoder of its own."""
    return not missing_parts(folder)


def missing_parts(folder):
    """Those of ["vae", "text_encoder"] that a folder does not have itself."""
    return [part for part in ("vae", "text_encoder")
            if not (Path(folder) / part / "config.json").exists()]


# --- What a checkpoint says of itself -------------------------------------------------------------

def notes_in(file):
    """The metadata of a safetensors file, {name: text}."""
    with open_safetensors(file) as handle:
        return handle.metadata() or {}


def adapter_files(folder):
    """The adapter in a pipeline's folder, as a list of one or none. Under diffusers' name it may
    also be an offer beside a whole model, and is then left alone."""
    folder = Path(folder)
    names = [ADAPTER_NAME]
    if not (folder / "transformer").is_dir():
        names = LORA_NAMES
    return [folder / name for name in names if (folder / name).exists()][:1]


def adapters_of(path):
    """The adapters in a pipeline's folder and in its bases down to the denoiser, whose comes first:
    the order in which they are merged."""
    files = []
    for folder in with_bases(path, ("transformer",)):
        files = adapter_files(folder) + files
        if own_folder(folder, "transformer"):
            break
    return files


def read_metadata(path):
    """The notes stored with a denoiser (command, seed, score, ...), and over them its adapter's."""
    files, _ = locate(path, "transformer")
    notes = notes_in(files[0])
    for file in adapters_of(path):
        own = notes_in(file)
        if "init" in own and not own.get("base", "").isdigit():
            own.pop("base", None)      # rl.py once noted scores under the name of the home size
        notes.update(own)
    return notes


def trained_over(lora):
    """The files of the denoiser that an adapter, a file or a folder, was trained over; None where
    it does not say, or where they are not on this machine."""
    folder = lora if lora.is_dir() else lora.parent
    named = pipeline_index(folder).get("base")
    if isinstance(named, dict):
        named = named.get("transformer")
    if named is None or not (folder.resolve() / expanded(named)).exists():
        return None
    return locate(folder, "transformer")[0]


def settings_of_adapter(file):
    """{"steps", "guidance"} that an adapter was made for, as far as its notes say so. Those of
    other tools are not read: in them "steps" may be the length of a training."""
    notes = notes_in(file)
    ours = "trained_steps" in notes
    return {name: notes[name] for name in ("steps", "guidance") if ours and name in notes}


def identity(folder, part="transformer"):
    """A short name for a part's weights: the folder's name, and a hash of each file's first 64 KiB
    (the beginning of its header), its name and its size."""
    files, _ = locate(folder, part)
    if part == "transformer":
        files = [*files, *adapters_of(folder)]

    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            digest.update(f.read(1 << 16))
        status = file.stat()
        # Features are kept on disk under the encoder's identity; there the date counts too.
        date = status.st_mtime_ns if part == "text_encoder" else 0
        digest.update(str((file.name, status.st_size, date)).encode())
    return f"{Path(folder).name}-{digest.hexdigest()[:10]}"


def vae_identity(path_or_repo):
    """A hash of an autoencoder's file: what latents are kept under."""
    files, _ = locate(fetch(path_or_repo, ("vae",)), "vae")
    return file_hash(files[0])


def content_hash(path, part):
    """A hash of all that the files of a part hold, the same wherever they lie."""
    files, _ = locate(path, part)
    hashes = [file_hash(file) for file in files]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]
