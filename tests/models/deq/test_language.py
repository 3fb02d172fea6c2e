"""A causal transformer block at its rest point."""

import math

import pytest
import torch

from restpoint import create_model
from restpoint.models.deq import CausalCell, DEQLanguageModel
from restpoint.models.deq.language import rotated
from restpoint.solvers import GMRES, Anderson, Broyden, ImplicitAdjoint, PhantomAdjoint, Picard
from restpoint.solvers.diagnose import peak_memory
from restpoint.train.tasks import LanguageModelling
from restpoint.zoo import save_pretrained

TEST = {"num_tokens": 11, "channels": 16, "heads": 2}
PLACE = 5


@pytest.fixture
def model():
    return create_model("test_deq_lm", num_tokens=11).double().eval()


@pytest.fixture
def tokens():
    return torch.randint(11, (3, 9))


def with_another(tokens, place=PLACE):
    """The same texts up to `place`, where all differ."""
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % 11
    return changed


def test_the_cell_by_hand():
    cell = CausalCell(8, 2, 2.0, 0.0).double()
    z, x = torch.randn(1, 4, 8, dtype=torch.float64), torch.randn(1, 4, 32, dtype=torch.float64)

    def norm(y):
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    q, k, v = (cell.qkv(z) + x[..., :24])[0].split(8, dim=1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        turned_q, turned_k = (rotated(y[:, part][None, None])[0, 0] for y in (q, k))
        scores = turned_q @ turned_k.T / 2.0
        weights = torch.zeros(4, 4, dtype=torch.float64)
        for t in range(4):
            weights[t, : t + 1] = scores[t, : t + 1].softmax(0)
        heads.append(weights @ v[:, part])
    h = norm(x[0, :, 24:] + cell.out(torch.cat(heads, dim=1)))
    expected = norm(h + cell.down(torch.nn.functional.gelu(cell.up(h))))
    torch.testing.assert_close(cell(z, x)[0], expected)


def test_rotations_keep_lengths_and_know_distances_alone():
    a, b = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    turned_a, turned_b = rotated(a.expand(1, 1, 12, 8)), rotated(b.expand(1, 1, 12, 8))
    torch.testing.assert_close(turned_a.norm(dim=3), a.norm().expand(1, 1, 12), rtol=1e-6, atol=0.0)
    products = (turned_a @ turned_b.transpose(2, 3))[0, 0]
    for distance in range(-6, 7):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-5, atol=1e-5)


def test_the_equation_is_causal_exactly(model, tokens):
    z = torch.randn(3, 9, 16, dtype=torch.float64)
    before, after = model.problem(tokens), model.problem(with_another(tokens))
    image, changed = before.f(z, *before.args), after.f(z, *after.args)
    assert torch.equal(image[:, :PLACE], changed[:, :PLACE])
    assert (image[:, PLACE:] != changed[:, PLACE:]).any(dim=2).all()
    jacobian = torch.autograd.functional.jacobian(lambda z: before.f(z, *(a[:1] for a in before.args))[0], z[:1])
    influence = jacobian.abs().amax(dim=(1, 2, 4))
    assert influence.triu(1).eq(0).all()
    assert influence.diagonal().gt(0).all()


def test_picard_iterates_are_causal_exactly(model, tokens):
    model.deq.solver, model.deq.rtol, model.deq.max_steps = Picard(), 0.0, 12
    with torch.no_grad():
        logits, changed = model(tokens), model(with_another(tokens))
    assert torch.equal(logits[:, :PLACE], changed[:, :PLACE])
    assert (logits[:, PLACE:] != changed[:, PLACE:]).any(dim=2).all()


@pytest.mark.parametrize("solver", [Anderson(), Broyden(memory=50), Picard()])
@pytest.mark.parametrize("rtol", [1e-4, 1e-8])
def test_a_solver_that_moves_all_positions_leaks_no_more_than_it_left_open(model, tokens, solver, rtol):
    """Acceleration and stopping depend on the whole text; what that changes is of the size of the residual."""
    model.deq.solver, model.deq.rtol, model.deq.max_steps = solver, rtol, 200
    with torch.no_grad():
        first, second = model.solve(tokens), model.solve(with_another(tokens))
    assert first.converged.all()
    assert second.converged.all()
    states, changed = (s.value[:, :PLACE].flatten(1) for s in (first, second))
    leaked = (states - changed).norm(dim=1) / first.value.flatten(1).norm(dim=1)
    assert (leaked < 10 * rtol).all()


def test_samples_do_not_touch_each_other(model, tokens):
    with torch.no_grad():
        together = model(tokens)
        alone = torch.cat([model(row) for row in tokens.split(1)])
    torch.testing.assert_close(together, alone)


def test_the_gradient_is_that_of_the_rest_point(tokens):
    torch.manual_seed(0)
    model = create_model("test_deq_lm", num_tokens=11, rtol=1e-12, max_steps=200).double()
    parameters = list(model.parameters())

    def loss():
        return model(tokens).logsumexp(2).square().sum()

    gradients = torch.autograd.grad(loss(), parameters)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    ends = []
    for shift in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=shift)
            ends.append(loss())
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_memory_does_not_grow_with_the_steps():
    peaks = []
    for steps in (5, 40):
        model = DEQLanguageModel(
            **TEST, rtol=0.0, max_steps=steps, solver=Anderson(memory=3), adjoint=ImplicitAdjoint(GMRES())
        )
        text = torch.randint(11, (4, 64))
        peaks.append(peak_memory(lambda model=model, text=text: model(text).square().sum()))
    assert peaks[1] <= 1.1 * peaks[0]


def test_dropout_is_one_mask_of_channels_a_solve(tokens):
    model = create_model("test_deq_lm", num_tokens=11, dropout=0.4, rtol=1e-6)
    model.train()
    problem = model.problem(tokens)
    z = torch.randn(3, 9, 16)
    assert torch.equal(problem.f(z, *problem.args), problem.f(z, *problem.args))
    masks = [a for a in problem.args if a.shape[1:] == (16, 1)]
    assert len(masks) == 2
    assert all(((m == 0) | (m - 1 / 0.6).abs().lt(1e-6)).all() for m in masks)
    assert model.solve_problem(problem).converged.all()


def test_generation(model, tokens):
    prompt = tokens[:, :3]
    drawn = [model.generate(prompt, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert drawn[0].shape == (3, 11)
    assert torch.equal(drawn[0][:, :3], prompt)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    # The most probable token each time, window by window, without the warm start.
    greedy = model.generate(prompt, 8, temperature=0.0)
    for end in range(3, 11):
        with torch.no_grad():
            logits = model(greedy[:, max(0, end - model.context) : end])[:, -1]
        assert torch.equal(logits.argmax(dim=1), greedy[:, end])
    assert torch.equal(model.generate(prompt, 8, top_k=1), greedy)
    assert torch.equal(model.generate(prompt, 0), prompt)
    assert not model.training


def test_a_warm_start_saves_steps(model, tokens):
    with torch.no_grad():
        solution = model.solve(tokens[:, :-1])
        z0 = torch.nn.functional.pad(solution.value, (0, 0, 0, 1))
        warm, cold = model.solve(tokens, z0), model.solve(tokens)
    torch.testing.assert_close(warm.value, cold.value, rtol=1e-3, atol=1e-3)
    assert warm.stats.steps.sum() < cold.stats.steps.sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: DEQLanguageModel(channels=18, heads=6), "multiple of 2 \\* heads"),
        (lambda m: DEQLanguageModel(num_tokens=0), "num_tokens and context"),
        (lambda m: m(torch.full((1, 4), 11)), "0 ... 10; got 11 to 11"),
        (lambda m: m.generate(torch.zeros(1, 0, dtype=torch.int64), 3), "one token at least"),
        (lambda m: m.generate(torch.zeros(1, 2, dtype=torch.int64), 3, temperature=-1.0), "temperature"),
        (lambda m: m.generate(torch.zeros(1, 2, dtype=torch.int64), 3, top_k=0), "top_k"),
    ],
)
def test_what_cannot_be_is_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_it_learns_a_text_and_the_task_reports_every_place(tmp_path):
    torch.manual_seed(0)
    model = create_model("test_deq_lm", num_tokens=4, adjoint=PhantomAdjoint(steps=3))
    text = torch.tensor([0, 1, 2, 3, 2, 1]).repeat(8)
    where = torch.arange(8)[:, None] + torch.arange(12)
    batch = text[where], text[where + 1]
    task = LanguageModelling(growth_weight=1.0, growth_limit=0.5, growth_every=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        outcome = task.losses(model, batch, step)
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        assert ("growth" in outcome.metrics) == (step % 2 == 0)
    found = task.evaluate(model, [batch])
    # 1 is followed by 2 or by 0, whichever did not come before it: of the first character alone nobody knows.
    assert -2.5 * math.log(2) / 12 < found["log_likelihood"]
    assert found["converged"] == 1.0
    assert found["place_residual_max"] < 1e-4 * math.sqrt(12)
    save_pretrained(model, tmp_path)
    again = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(batch[0]), model.eval()(batch[0]))
