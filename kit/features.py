"""Prompt features on the disk: a prompt that was encoded once needs no text encoder again.

Read before: lens.py's text encoder, kit/checkpoint.py.
"""
import contextlib
import hashlib
import re
import sys
from pathlib import Path

import lens
from kit.checkpoint import load_pipeline, read_denoiser_config
from kit.files import LensError, error_context, file_hash, open_safetensors, write_safetensors
from kit.places import content_hash, find_tokenizer, gather, identity

CACHE_BYTES = 4 * 2**30  # about 1,200 prompts at full size


def cached_features(weights, prompts, device, dtype, date=lens.DATE, cache="", encoder=None):
    """Features of prompts as from encoder.encode_each, from the disk cache, encoding what is not
    there.

    weights   a pipeline's folder, or Places on this machine;  cache: a folder, "" for none
    encoder   one that is loaded already. None: it is loaded where something is missing, and let go
              again before the denoiser comes: a 24 GB card never has to hold both
    Returns [features], None for an empty prompt.
    """
    paths = [None] * len(prompts)
    if cache:
        common = feature_key(weights, dtype, date)
        for i, prompt in enumerate(prompts):
            if prompt.strip():
                name = hashlib.sha256(f"{common}\0{prompt}".encode()).hexdigest()
                paths[i] = Path(cache) / f"{name}.safetensors"

    features = [read_features(path) for path in paths]
    # None so far: not in the cache, or an empty prompt, which has no features.
    missing = [i for i, own in enumerate(features) if own is None and prompts[i].strip()]
    if missing:
        if encoder is None:
            _, _, encoder = load_pipeline(weights, device, dtype, parts=("text_encoder",),
                                          date=date)
        works = bool(cache)
        for k in range(0, len(missing), 64):       # a kill costs no more than these
            few = missing[k:k + 64]
            for i, own in zip(few, encoder.encode_each([prompts[i] for i in few])):
                features[i] = own.cpu()
            works = works and keep_features({paths[i]: features[i] for i in few})
        if works:
            trim_cache(cache)
    return features


def feature_key(weights, dtype, date, layers=None, by_content=False):
    """What features depend on beside the prompt: the encoder's weights, its tokenizer, the layers
    that are read, the chat form around the prompt, its date, and the precision.

    layers      None: those that the denoiser reads
    by_content  the weights' files are read whole: slow, but the key is then the same wherever they
                lie, as features in shards need it, which are carried to other machines
    """
    places = gather(weights)
    layers = layers or read_denoiser_config(places.transformer).selected_layer_index
    tokenizer = find_tokenizer(Path(places.text_encoder))
    encoder = content_hash if by_content else identity
    parts = (encoder(places.text_encoder, "text_encoder"),
             file_hash(tokenizer) if tokenizer else "", layers, lens.CHAT, date, dtype)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_features(path):
    """[K, S, E] of a cache entry; None where there is none, or one that cannot be read: it is made
    again."""
    if path is None:
        return None
    try:
        with error_context(f"cannot read {path}"), open_safetensors(path) as f:
            return f.get_tensor("features")
    except LensError:
        return None


def keep_features(entries):
    """{path: features} -> whether all are kept. A full disk, or a folder that is another user's,
    costs the cache, not the picture."""
    for path, own in entries.items():
        try:
            write_safetensors(path, {"features": own})
        except LensError as e:
            print(f"note: prompt features were not cached: {e}", file=sys.stderr)
            return False
    return True


ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")   # a cache entry's name


def trim_cache(folder, limit=CACHE_BYTES):
    """Removes the oldest entries of a cache until the rest takes at most `limit` bytes. Other files
    in the folder stay."""
    entries = []                                   # (time, size, path)
    with contextlib.suppress(OSError):             # another process may be doing the same
        for path in Path(folder).iterdir():
            if ENTRY.fullmatch(path.name):
                status = path.stat()
                entries.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total > limit:
                path.unlink()
                total -= size


def default_cache():
    """~/.cache/lens; "" for a user without a home, as containers have them."""
    try:
        return str(Path.home() / ".cache" / "lens")
    except RuntimeError:
        return ""
