"""kit/muon.py: against PyTorch's own, and against what an SVD gives."""
import torch
import torch.nn.functional as F
from torch import nn

from kit.muon import Muon, orthogonal


def test_in_batches_it_is_pytorchs_muon():
    """Four matrices of two shapes, one of them tall, over five steps: in bf16, products of batches
    are rounded otherwise."""
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(48, 16)) for _ in range(2)]
    theirs += [nn.Parameter(torch.randn(16, 40)) for _ in range(2)]
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizers = (Muon(ours, lr=0.01),
                  torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0,
                                   adjust_lr_fn="match_rms_adamw"))
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-3)     # each number has moved by about 0.01
        averages = [optimizer.state[p]["momentum_buffer"]
                    for optimizer, p in zip(optimizers, (a, b))]
        assert torch.equal(*averages)


def test_a_convolution_is_stepped_as_the_matrix_that_it_is():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1).clone()
    Muon([kernel, matrix], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_a_parameter_without_a_gradient_stays():
    p, other = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    p.grad = torch.randn(4, 4)
    Muon([p, other], lr=0.1).step()
    assert torch.equal(other, torch.ones(4, 4))
    assert not torch.equal(p, torch.ones(4, 4))


def test_orthogonal_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 32, 12), (3, 12, 32)):
        matrices = torch.randn(shape)
        made = orthogonal(matrices).float()
        values = torch.linalg.svdvals(made)
        assert 0.6 < values.min() and values.max() < 1.3
        # Of the decomposition U S V^T they are U V^T: the directions stay.
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        assert F.cosine_similarity(made.flatten(1), (u @ v).flatten(1)).min() > 0.97
