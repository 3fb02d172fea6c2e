"""Programs as people write them for torchdiffeq, run with torchdiffeq and with restpoint: only the import differs."""

import math

import pytest
import torch
import torchdiffeq
from torch import nn

from restpoint.solvers.ode import compat

LIBRARIES = (torchdiffeq, compat)


@pytest.fixture(autouse=True)
def double():
    """Two step sequences meet in the solution itself: tight tolerances, and numbers that can resolve them."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def in_both(program, *args, rtol=1e-4, atol=1e-5):
    """Both libraries give the same numbers."""
    results = []
    for library in LIBRARIES:
        torch.manual_seed(0)
        results.append(program(library, *args))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), rtol=rtol, atol=atol)
    return results[1]


def spiral(library, adjoint):
    """Fit a network to a spiral from batches of short pieces."""
    odeint = library.odeint_adjoint if adjoint else library.odeint
    t = torch.linspace(0.0, 25.0, 200)
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])

    class Truth(nn.Module):
        def forward(self, t, y):
            return torch.mm(y**3, matrix)

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
            for module in self.net.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, mean=0, std=0.1)
                    nn.init.constant_(module.bias, val=0)

        def forward(self, t, y):
            return self.net(y**3)

    with torch.no_grad():
        truth = odeint(Truth(), torch.tensor([[2.0, 0.0]]), t, method="dopri5", rtol=1e-6, atol=1e-7)
    field, losses = Field(), []
    optimizer = torch.optim.RMSprop(field.parameters(), lr=1e-3)
    for _ in range(3):
        starts = torch.randint(0, len(t) - 10, (20,))
        target = torch.stack([truth[starts + i] for i in range(10)])
        optimizer.zero_grad()
        prediction = odeint(field, truth[starts], t[:10], rtol=1e-8, atol=1e-10)
        loss = torch.mean(torch.abs(prediction - target))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [truth, *losses, *field.parameters()]


@pytest.mark.parametrize("adjoint", [False, True], ids=["direct", "adjoint"])
def test_spiral(adjoint):
    in_both(spiral, adjoint, rtol=1e-3, atol=1e-4)


class Ball(nn.Module):
    """A ball that bounces and loses speed with every bounce."""

    def __init__(self, library, interface):
        super().__init__()
        self.library, self.interface = library, interface
        self.gravity = nn.Parameter(torch.tensor([9.8]))
        self.log_radius = nn.Parameter(torch.log(torch.tensor([0.2])))
        self.t0 = nn.Parameter(torch.tensor([0.0]))
        self.position = nn.Parameter(torch.tensor([5.0]))
        self.velocity = nn.Parameter(torch.tensor([0.0]))
        self.keeps = nn.Parameter(torch.tensor([0.2]))

    def forward(self, t, state):
        _, velocity, log_radius = state
        return velocity, -self.gravity, torch.zeros_like(log_radius)

    def event_fn(self, t, state):
        position, _, log_radius = state
        return position - torch.exp(log_radius)

    def bounces(self, count):
        state, t0, times = (self.position, self.velocity, self.log_radius), self.t0, []
        for _ in range(count):
            time, solution = self.library.odeint_event(
                self, state, t0, event_fn=self.event_fn, reverse_time=False, atol=1e-7, rtol=1e-7,
                odeint_interface=getattr(self.library, self.interface),
            )  # fmt: skip
            position, velocity, log_radius = (part[-1] for part in solution)
            # Just above the ground, or the next event would be this one.
            state = (position + 1e-4, -velocity * (1 - self.keeps), log_radius)
            t0 = time
            times.append(time)
        return times, state


@pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
def test_bouncing_ball(interface):
    def program(library):
        ball = Ball(library, interface).double()
        times, (_, velocity, _) = ball.bounces(3)
        gradients = torch.autograd.grad(times[-1] + velocity.sum(), list(ball.parameters()), allow_unused=True)
        return [*times, velocity, *(torch.zeros(1) if g is None else g for g in gradients)]

    in_both(program)


def flow(library, adjoint):
    """A continuous normalising flow whose weights a small network makes from the time; density and samples."""
    odeint = library.odeint_adjoint if adjoint else library.odeint

    def trace(speed, z):
        total = 0.0
        for i in range(z.shape[1]):
            total += torch.autograd.grad(speed[:, i].sum(), z, create_graph=True)[0].contiguous()[:, i].contiguous()
        return total.contiguous()

    class HyperNetwork(nn.Module):
        def __init__(self, features, hidden, width):
            super().__init__()
            self.first, self.second = nn.Linear(1, hidden), nn.Linear(hidden, hidden)
            self.third = nn.Linear(hidden, 3 * width * features + width)
            self.features, self.width, self.block = features, width, width * features

        def forward(self, t):
            parameters = torch.tanh(self.first(t.reshape(1, 1)))
            parameters = self.third(torch.tanh(self.second(parameters))).reshape(-1)
            block = self.block
            weight = parameters[:block].reshape(self.width, self.features, 1)
            up = parameters[block : 2 * block].reshape(self.width, 1, self.features)
            gate = parameters[2 * block : 3 * block].reshape(self.width, 1, self.features)
            bias = parameters[3 * block :].reshape(self.width, 1, 1)
            return weight, bias, up * torch.sigmoid(gate)

    class CNF(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.width = HyperNetwork(2, 16, 8), 8

        def forward(self, t, states):
            z, _ = states
            with torch.set_grad_enabled(True):
                z.requires_grad_(True)
                weight, bias, up = self.net(t)
                hidden = torch.tanh(torch.matmul(z.unsqueeze(0).repeat(self.width, 1, 1), weight) + bias)
                speed = torch.matmul(hidden, up).mean(0)
                change = -trace(speed, z).view(z.shape[0], 1)
            return speed, change

    model, x = CNF(), torch.randn(12, 2)
    solution = odeint(
        model, (x, torch.zeros(12, 1)), torch.tensor([1.0, 0.0]), atol=1e-5, rtol=1e-5, method="dopri5"
    )  # fmt: skip
    z, change = solution[0][-1], solution[1][-1]
    loss = -(-z.pow(2).sum(1) / 2 - math.log(2 * math.pi) - change.view(-1)).mean()
    loss.backward()
    with torch.no_grad():
        samples, _ = odeint(
            model, (torch.randn(5, 2), torch.zeros(5, 1)), torch.linspace(0, 1, 4), atol=1e-5, rtol=1e-5
        )
    return [loss.detach(), samples, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("adjoint", [False, True], ids=["direct", "adjoint"])
def test_continuous_flow(adjoint):
    in_both(flow, adjoint, rtol=1e-3, atol=1e-4)


def test_latent_ode():
    """A recurrent encoder run backwards in time, a latent trajectory, a decoder; evaluations are counted."""

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(4, 20), nn.ELU(inplace=True), nn.Linear(20, 20), nn.ELU(), nn.Linear(20, 4)
            )
            self.nfe = 0

        def forward(self, t, x):
            self.nfe += 1
            return self.net(x)

    def program(library):
        field, encoder, decoder = Field(), nn.GRU(2, 16), nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 2))
        head = nn.Linear(16, 8)
        times, data = torch.linspace(0, 3, 30), torch.randn(6, 30, 2)
        _, hidden = encoder(data.permute(1, 0, 2).flip(0))
        mean, log_variance = head(hidden[0]).chunk(2, 1)
        z0 = torch.randn_like(mean) * torch.exp(0.5 * log_variance) + mean
        z = library.odeint(field, z0, times, rtol=1e-8, atol=1e-10).permute(1, 0, 2)
        loss = (decoder(z) - data).pow(2).mean()
        forward = field.nfe
        loss.backward()
        modules = nn.ModuleList([field, encoder, decoder, head])
        return [loss.detach(), float(forward > 0), *(p.grad for p in modules.parameters())]

    in_both(program, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("adjoint", [False, True], ids=["direct", "adjoint"])
def test_ode_block_of_a_classifier(adjoint):
    """A convolutional field that sees the time as a channel, between a stem and a head."""

    class ConcatConv(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.layer = nn.Conv2d(channels + 1, channels, 3, padding=1)

        def forward(self, t, x):
            return self.layer(torch.cat([torch.ones_like(x[:, :1]) * t, x], 1))

    class Field(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.norm1, self.norm2 = nn.GroupNorm(2, channels), nn.GroupNorm(2, channels)
            self.relu = nn.ReLU(inplace=True)
            self.conv1, self.conv2 = ConcatConv(channels), ConcatConv(channels)
            self.nfe = 0

        def forward(self, t, x):
            self.nfe += 1
            return self.conv2(t, self.relu(self.norm2(self.conv1(t, self.relu(self.norm1(x))))))

    class Block(nn.Module):
        def __init__(self, library, field):
            super().__init__()
            self.solve = library.odeint_adjoint if adjoint else library.odeint
            self.field = field
            self.integration_time = torch.tensor([0.0, 1.0])

        def forward(self, x):
            self.integration_time = self.integration_time.type_as(x)
            return self.solve(self.field, x, self.integration_time, rtol=1e-7, atol=1e-8)[1]

    def program(library):
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2), Block(library, Field(6)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)
        )
        loss = nn.functional.cross_entropy(model(torch.randn(4, 1, 12, 12)), torch.arange(4))
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    in_both(program, rtol=2e-2, atol=2e-3)


def test_a_learned_event_and_a_switch_of_the_dynamics():
    """Integrate to an event, change the field, go on to the final time."""

    def program(library):
        threshold = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        rates = nn.Parameter(torch.tensor([0.8, -2.0], dtype=torch.float64))
        y0 = torch.tensor([1.0], dtype=torch.float64)
        t0 = torch.zeros(1, dtype=torch.float64)
        time, solution = library.odeint_event(
            lambda t, y: rates[0] * y, y0, t0, event_fn=lambda t, y: threshold.detach() - y, method="dopri5"
        )
        end = torch.tensor([2.0], dtype=torch.float64)
        later = library.odeint(lambda t, y: rates[1] * y, solution[-1], torch.cat([time.reshape(1), end]))
        return [time.detach(), *torch.autograd.grad(later[-1].sum(), rates)]

    time, gradient = in_both(program, rtol=1e-6, atol=1e-7)
    assert float(time) == pytest.approx(math.log(1.5) / 0.8, rel=1e-6)
    # y(2) = 1.5 exp(b (2 - log(1.5) / a))
    a, b = 0.8, -2.0
    value = 1.5 * math.exp(b * (2 - math.log(1.5) / a))
    exact = torch.tensor([value * b * math.log(1.5) / a**2, value * (2 - math.log(1.5) / a)], dtype=torch.float64)
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("computed", [False, True], ids=["leaves", "computed"])
def test_a_field_with_data_of_its_own_times(computed):
    """A control that is interpolated from tensors that themselves want gradients, reached by an attribute."""

    class Controlled(nn.Module):
        def __init__(self, pieces):
            super().__init__()
            self.pieces = pieces

        def forward(self, t, y):
            return self.pieces[min(int(t), 2)] - y

    def program(library):
        leaves = [torch.full((2,), float(i + 1), dtype=torch.float64).requires_grad_() for i in range(3)]
        pieces = [leaf.exp() for leaf in leaves] if computed else leaves
        y0 = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        t = torch.tensor([0.0, 3.0], dtype=torch.float64)
        jumps = {"jump_t": torch.tensor([1.0, 2.0], dtype=torch.float64)}
        solution = library.odeint(Controlled(pieces), y0, t, method="dopri5", options=jumps)
        return torch.autograd.grad(solution[-1].sum(), [y0, *leaves])

    in_both(program)
