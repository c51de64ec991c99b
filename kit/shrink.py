"""A whole student as a small adapter of its teacher, to ship (`python distill.py --export`).

Read before: lens.py, kit/lora.py.

A student whose weights were all trained differs from its teacher in every one of them. Most of that
change has a low rank: a LoRA of rank 3 holds nearly all that the toy's student has learnt.
"""
import torch
import torch.nn.functional as F
from torch import nn

from kit.lora import add_lora, lora_layers

SHORTEST = 0.02            # of the times at which layers are fitted; the longest is 1


@torch.no_grad()
def shrink(student, teacher, rank, name):
    """Adds an adapter to the teacher, in place, with which it comes nearest to the student.

    student, teacher  denoisers of one size, in fp32        name  of the adapter, whose weights are
                                                                  rounded to bf16

    Each matrix's change becomes the nearest of that rank. Layers that see the time alone are fitted
    to what the student's give at all times instead. So their biases and the time embedding, where a
    LoRA has no place, go into their adapters: without them a student at rank 4 lost a tenth (0.69,
    not 0.78). The changes of other biases and of the norms are lost.
    """
    times = torch.linspace(SHORTEST, 1, 256, device=teacher.proj_out.weight.device)
    before = F.silu(teacher.time(times)).double()          # [T, W]: what the teacher's layers see
    after = F.silu(student.time(times)).double()           # [T, W]: what the student's see

    linear = [layer_name for layer_name, layer in teacher.named_modules()
              if isinstance(layer, nn.Linear) and "time" not in layer_name]
    add_lora(teacher, rank, rank, linear, name)
    for layer_name, layer in lora_layers(teacher, name).items():
        new = student.get_submodule(layer_name)
        if "_mod." in layer_name or "norm_out" in layer_name:          # these see the time alone
            a, b = fit_timed_layer(layer, new, before, after, rank)
        else:
            a, b = nearest_of_rank((new.weight - layer.weight).double(), rank)
        layer.lora_A[name].data = a.bfloat16()
        layer.lora_B[name].data = b.bfloat16()


def nearest_of_rank(change, rank):
    """(A [rank, in], B [out, rank]), whose product B A is the matrix of that rank which comes
    nearest to `change` [out, in]: its largest singular values."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    return of_rank(rank, root[:, None] * v[:rank], u[:, :rank] * root)


def of_rank(rank, a, b):
    """A and B filled up with zeros: a small layer has fewer directions than the rank that is asked
    for, and a LoRA's scale is alpha over the rank of its matrices."""
    return F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b, (0, rank - b.shape[1]))


def fit_timed_layer(layer, new, before, after, rank):
    """(A [rank, in], B [out, rank]) with which `layer`, on `before` [T, W], gives what `new` gives
    on `after` [T, W], as nearly as that rank allows: a reduced-rank regression over the times."""
    wanted = after @ new.weight.double().T + new.bias                              # [T, out]
    change = wanted - before @ layer.weight.double().T - layer.bias

    # Least squares of any rank: before @ fit ~ change. The times look alike, so the gram matrix is
    # nearly singular; hence the ridge.
    gram = before.T @ before                                                       # [W, W]
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    fit = torch.linalg.solve(gram + ridge, before.T) @ change                      # [W, out]

    # Of its outputs only the `rank` directions in which they vary most.
    u, _, _ = torch.linalg.svd((before @ fit).T, full_matrices=False)              # [out, ...]
    b = u[:, :rank]
    return of_rank(rank, b.T @ fit.T, b)
