"""Muon: each step's change of a matrix is made orthogonal.

Read before: nothing. train.py and toy/autoencoder.py train by it beside AdamW.

A gradient of a matrix has few strong directions (the background of a picture) and many weak ones
(a shape's corners). AdamW scales numbers one by one and leaves it so. Muon makes all singular
values of a step about equal, so that rare directions move as fast as common ones: for the denoiser
and the autoencoder of the toy that means a lower loss after the same time.

PyTorch has a Muon, too. This one gives the same numbers without weight decay (a test), takes
convolutions, as matrices [out, in * rows * columns], and steps matrices of one shape together: the
toy has fifty small ones, and one by one each would cost some thirty small products, after each of
which threads wait for one another.

[Muon] is kellerjordan.github.io/posts/muon; the length of a step is Moonshot's (arXiv 2502.16982).
"""
import math

import torch

# Of the polynomial a x + b x^3 + c x^5, applied five times: it takes singular values between about
# 0.01 and 1 to between 0.7 and 1.2. Closer to 1 would cost more steps and gain nothing. [Muon]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """params: matrices [n, k], or kernels of convolutions [n, k, rows, columns].

    lr         a step is as long as one of AdamW's would be with this rate
    momentum   decay of the gradients' average, which is taken as Nesterov's
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                             # {shape: [parameter]}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for params in alike.values():
                self.step_together(params, group["lr"], group["momentum"])

    def step_together(self, params, lr, momentum):
        """Steps parameters of one shape."""
        averages = []
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
            averages.append(self.state[p]["momentum_buffer"])
        grads = [p.grad for p in params]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        ahead = torch.stack(torch._foreach_lerp(grads, averages, momentum))

        matrices = ahead.flatten(2)                                   # [P, n, k]
        changes = orthogonal(matrices).view_as(ahead)
        # An orthogonal matrix has numbers of size 1 / sqrt(max(n, k)); AdamW's steps have about
        # 0.2 lr.
        rate = lr * 0.2 * math.sqrt(max(matrices.shape[1:]))
        torch._foreach_add_(params, list(changes.unbind()), alpha=-rate)


def orthogonal(matrices):
    """The orthogonal matrices nearest to matrices [P, n, k], about: [P, n, k] bf16, all singular
    values near 1. By Newton-Schulz iterations, products alone: an SVD would take far longer."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)          # no singular value above 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT                                               # [P, n, n]
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, update, x, beta=a)
    return x.mT if tall else x
