"""One way to save and resume, for every kind of run: autoencoder, text encoder, denoiser, reward
RL, distillation.

Read before: kit/run.py.

DIR/state-00000250/ holds what a resume needs: weights, their average and the optimisers' moments by
name (safetensors, written by all ranks through torch.distributed.checkpoint, so that any number of
ranks can read it back), and notes.json: the run's settings, and how far it is. A folder gets this
name when all of it is there, and only then does the one before it go: a kill at any moment leaves a
whole state behind.
"""
import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from kit.files import LensError, error_context, read_json, require


def newest_state(out):
    """The newest finished state in a run's folder, or None."""
    finished = [p for p in Path(out).glob("state-*") if p.name.removeprefix("state-").isdigit()]
    return max(finished, key=lambda p: int(p.name.removeprefix("state-")), default=None)


def kept_progress(out):
    """The progress of the newest state in a run's folder; None where there is none."""
    newest = newest_state(out)
    return None if newest is None else read_json(newest / "notes.json")["progress"]


# What a run has not always kept: where it is missing, nobody knows, and the run goes on.
NEWER = ("--parts",)


def check_same_run(out, settings):
    """LensError where `out` holds a run with other settings. settings: {what the user calls it, say
    "--seed": value}."""
    newest = newest_state(out)
    if newest is None:
        return
    kept = read_json(newest / "notes.json").get("settings", {})
    given = json.loads(json.dumps(settings))       # as JSON gives it back: tuples are lists there
    differ = [f"{name} {kept.get(name)}, not {given.get(name)}"
              for name in sorted(kept.keys() | given.keys())
              if kept.get(name) != given.get(name) and (name in kept or name not in NEWER)]
    require(not differ, f"{out} holds another run, with {'; '.join(differ)}: "
            "give another --out, or the same settings")


def check_no_other_weights(out, adapter):
    """LensError where `out` holds weights of the other kind: an adapter beside a whole checkpoint
    would be merged into it by whoever loads the folder, and a whole one beside an adapter would get
    it unasked."""
    whole = (Path(out) / "transformer").is_dir()
    lora = (Path(out) / "adapter_model.safetensors").exists()
    require(not (adapter and whole),
            f"{out} holds a whole checkpoint: give another --out for the adapter")
    require(not (lora and not adapter),
            f"{out} holds an adapter: give another --out for a whole checkpoint")


def save_state(run, step, groups, optimizers, settings, progress):
    """Writes state-<step>; all ranks must call it.

    groups      {group: {name: tensor}}, say {"model": ..., "ema": ...}; of sharded tensors each
                rank writes its part
    optimizers  their moments are stored under the names of the parameters in `groups`
    settings    what `check_same_run` compares
    progress    {name: what JSON can hold}, which `load_state` gives back
    """
    path = Path(run.out) / f"state-{step:08d}"
    if path.exists():                              # the same step of the same run: nothing is new
        return
    beside = Path(f"{path}.new")
    if run.rank == 0:
        for torn in Path(run.out).glob("state-*.new"):     # of a run killed while it saved
            shutil.rmtree(torn)
    with checkpoint_errors(f"cannot write {path}"):
        dcp.save(named_tensors(groups, optimizers),
                 storage_writer=dcp.HuggingFaceStorageWriter(str(beside), save_distributed=True))
        if run.rank == 0:
            notes = {"settings": settings, "progress": progress}
            (beside / "notes.json").write_text(json.dumps(notes))
            os.replace(beside, path)
            for other in Path(run.out).glob("state-*"):
                if other.name.removeprefix("state-").isdigit() and other != path:
                    shutil.rmtree(other)


def load_state(run, groups, optimizers, settings):
    """Fills groups and optimisers in place from the newest state of the run's folder, whatever
    number of ranks saved it. -> its progress, or None where there is no state yet. LensError where
    it is another run's."""
    newest = newest_state(run.out)
    if newest is None:
        return None
    check_same_run(run.out, settings)
    with checkpoint_errors(f"cannot read {newest}"):
        make_moments(stepped(newest, groups, optimizers))
        dcp.load(named_tensors(groups, optimizers),
                 storage_reader=dcp.HuggingFaceStorageReader(str(newest)))
    return kept_progress(run.out)


def named_tensors(groups, optimizers):
    """{"group.name": tensor} of the groups, and {"optimizer.name:moment": tensor} of all that
    optimisers carry along."""
    names = names_in(groups)
    tensors = {f"{group}.{name}": t.detach()
               for group, named in groups.items() for name, t in named.items()}
    for optimizer in optimizers:
        for p, moments in optimizer.state.items():
            for moment, t in moments.items():
                if torch.is_tensor(t):
                    tensors[f"optimizer.{names[p]}:{moment}"] = t
    return tensors


def names_in(groups):
    """{tensor: "group.name"} of {group: {name: tensor}}."""
    return {t: f"{group}.{name}" for group, named in groups.items() for name, t in named.items()}


def stepped(state, groups, optimizers):
    """Those of the optimisers that have moments in a state: one that had taken no sound step before
    it was saved has none."""
    stored = dcp.HuggingFaceStorageReader(str(state)).read_metadata().state_dict_metadata
    have_moments = {name.partition(":")[0] for name in stored}
    names = names_in(groups)
    return [optimizer for optimizer in optimizers
            if any(f"optimizer.{names[p]}" in have_moments
                   for group in optimizer.param_groups for p in group["params"])]


def make_moments(optimizers):
    """Lets optimisers make their moments, by a step of length zero: a resume then fills them."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate


@contextlib.contextmanager
def checkpoint_errors(doing):
    """error_context around torch.distributed.checkpoint: its error is no Exception, and it warns
    that one process is one."""
    with error_context(doing), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except dcp.CheckpointException as e:
            first = next(iter(e.failures.values()), ("unknown",))
            reason = str(first[0]).strip() or type(first[0]).__name__
            raise LensError(f"{doing}: {reason.splitlines()[0]}") from None
