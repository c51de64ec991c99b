"""The denoisers that play in a distillation: whole models, each process with all of their weights
or with a share (FSDP), or adapters on one base.

Read before: lens.py, kit/lora.py.
"""
from dataclasses import dataclass

from torch import nn

from kit.lora import named_lora, set_lora


@dataclass
class Players:
    """Teacher, student, fake, `ema` (the student's average), and the discriminator's heads.

    With LoRA the four models are one object: a base on which each plays with an adapter of its own
    name, and the teacher with none. So one is called right after `as_` has named it, and never kept
    while another plays.
    """
    models: dict           # {who: LensTransformer} of "teacher", "student", "fake", "ema"
    heads: nn.ModuleList   # the discriminator
    trained: dict          # {who: {name: parameter}} of "student", "fake", "ema", "heads"
    lora: int = 0          # rank of the adapters; 0: whole models

    def as_(self, who):
        """The model that plays `who`; with LoRA until the next call."""
        model = self.models[who]
        if self.lora:
            set_lora(model, None if who == "teacher" else who)
        return model

    def weights(self, who):
        """{name: parameter} of what is trained in student, fake and heads, and averaged in ema: in
        the same order for student, fake and ema."""
        return self.trained[who]


def trained_weights(model, who, lora):
    """{name: parameter} of `who`: its adapter, or all that can get a gradient."""
    if lora:
        return named_lora(model, who)
    dead = set(model.unread())
    return {name: p for name, p in model.named_parameters() if name not in dead}
