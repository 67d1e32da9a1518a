# yolo-sos, AGPL-3.0
"""What an exact shift does to the Hessian: nothing in the final layer's own block, something before it."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.nn.functional import cross_entropy

from yolo_sos.core import Moments, budgeted_shift, minimum_norm_shift, principal_shift
from yolo_sos.core.layers import weight_matrix, write_weight

BATCH, WIDTH, CLASSES = 5, 8, 3


def setting():
    """Return a float64 MLP whose final layer has fewer rows than columns, a batch, and the final layer's inputs."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=g)
    x, y = torch.randn(BATCH, 3, generator=g, dtype=torch.float64), torch.arange(BATCH) % CLASSES
    return model, x, y, model[:-1](x).detach()


def block(model, x, y, names):
    """Return the exact Hessian of the loss in the named parameters, by automatic differentiation."""
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    flat = torch.cat([parameters[n].flatten() for n in names])

    def loss(vector):
        pieces = vector.split([parameters[n].numel() for n in names])
        own = {n: piece.view_as(parameters[n]) for n, piece in zip(names, pieces, strict=True)}
        return cross_entropy(torch.func.functional_call(model, {**parameters, **own}, (x,)), y)

    return hessian(loss, flat)


FINAL, EARLIER = ("4.weight", "4.bias"), ("0.weight", "0.bias", "2.weight", "2.bias")
EXACT = {
    "svd": lambda a, v: minimum_norm_shift(a, v, solver="svd"),
    "gauss": lambda a, v: minimum_norm_shift(a, v, solver="gauss"),
    "spectral": lambda a, v: principal_shift(Moments(WIDTH).update(a), v),
}


@pytest.mark.parametrize("solve", EXACT.values(), ids=EXACT)
def test_an_exact_shift_leaves_the_final_block_and_moves_the_earlier_trace(solve):
    model, x, y, a = setting()
    final, earlier, logits = block(model, x, y, FINAL), block(model, x, y, EARLIER), model(x)
    result = solve(a, weight_matrix(model[-1]))
    assert result.norm_after < 0.95 * result.norm_before
    write_weight(model[-1], result.weight)
    assert torch.allclose(model(x), logits, rtol=1e-9, atol=1e-12)
    new_final, new_earlier = block(model, x, y, FINAL), block(model, x, y, EARLIER)
    assert float((new_final - final).norm() / final.norm()) < 1e-9
    assert abs(float(new_earlier.trace() / earlier.trace()) - 1) > 1e-2


def test_the_final_block_is_the_closed_form():
    """For cross-entropy the weight's block is ``Σ_i (diag(p_i) − p_i p_iᵀ) ⊗ a_iᵀa_i / n``."""
    model, x, y, a = setting()
    p = model(x).softmax(1).detach()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    closed = sum(torch.kron(c, torch.outer(ai, ai)) for c, ai in zip(curvature, a, strict=True)) / BATCH
    assert torch.allclose(block(model, x, y, FINAL[:1]), closed, rtol=1e-10, atol=1e-14)


def test_a_shift_that_changes_outputs_changes_the_final_block():
    model, x, y, a = setting()
    final = block(model, x, y, FINAL)
    write_weight(model[-1], budgeted_shift(Moments(WIDTH).update(a), weight_matrix(model[-1]), budget=0.3).weight)
    assert float((block(model, x, y, FINAL) - final).norm() / final.norm()) > 1e-2
