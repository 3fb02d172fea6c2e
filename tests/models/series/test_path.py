"""Control paths: what they go through, and what they do not depend on."""

import pytest
import torch

from restpoint.models.series import observation_path, spline_path

NAN = float("nan")


def series(batch=3, length=8, channels=2, share=0.6):
    times = torch.rand(batch, length, dtype=torch.float64).sort(1).values
    values = torch.randn(batch, length, channels, dtype=torch.float64)
    return times, values, torch.rand(batch, length, channels) < share


def at(path, s):
    return path.value(torch.tensor(float(s), dtype=torch.float64))


def in_time(path, times, when):
    """The path's value at one time for all samples."""
    place = torch.searchsorted(times, torch.full((len(times), 1), when, dtype=times.dtype), right=True)[:, 0] - 1
    place = place.clamp(0, times.shape[1] - 2)
    start, stop = (times.gather(1, (place + i).unsqueeze(1))[:, 0] for i in (0, 1))
    return path.value(place + (when - start) / (stop - start))


@pytest.mark.parametrize("kind", ["hermite", "linear"])
def test_it_goes_through_what_was_observed_and_through_nothing_else(kind):
    times, values, observed = series()
    path = spline_path(times, values.masked_fill(~observed, NAN), observed, kind)
    for i in range(times.shape[1]):
        torch.testing.assert_close(at(path, i)[observed[:, i]], values[:, i][observed[:, i]], rtol=1e-12, atol=1e-12)
    assert path.end == times.shape[1] - 1
    assert path.coefficients.isfinite().all()


def test_its_derivative_is_that_of_its_value():
    path = spline_path(*series())
    s = torch.tensor([0.3, 2.0, 6.9], dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda s: path.value(s).sum(0), s).T
    torch.testing.assert_close(path.derivative(s), slope)


def test_slopes_at_knots_are_those_of_the_interval_before():
    times, values, observed = series(batch=1, length=6, channels=1, share=2.0)
    path = spline_path(times, values, observed)
    gaps, rises = times.diff(dim=1)[0], values.diff(dim=1)[0, :, 0]
    for i in range(5):
        beginning = path.derivative(torch.tensor(float(i), dtype=torch.float64)) / gaps[i]
        end = path.derivative(torch.tensor(i + 1 - 1e-12, dtype=torch.float64)) / gaps[i]
        torch.testing.assert_close(beginning[0, 0], rises[max(i - 1, 0)] / gaps[max(i - 1, 0)], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(end[0, 0], rises[i] / gaps[i], rtol=1e-6, atol=1e-6)


def test_between_equally_spaced_points_it_is_the_published_cubic():
    """Written out: with v the rise before, the cubic from x with the slope v to x + w with the slope w."""
    x = torch.tensor([[0.0, 1.0, 3.0, 2.0]], dtype=torch.float64).unsqueeze(-1)
    path = spline_path(torch.arange(4.0, dtype=torch.float64).unsqueeze(0), x, torch.ones_like(x, dtype=torch.bool))
    # From 1 to 3: 1 + u + 2 u^2 - u^3. From 3 to 2: 3 + 2 u - 6 u^2 + 3 u^3.
    torch.testing.assert_close(at(path, 1.5)[0, 0].item(), 1 + 0.5 + 2 * 0.25 - 0.125)
    torch.testing.assert_close(at(path, 2.5)[0, 0].item(), 3 + 1 - 1.5 + 0.375)


def test_a_straight_line_stays_one():
    times, _, observed = series(share=0.5)
    line = 2 * times.unsqueeze(-1).expand(-1, -1, 2) + 1
    observed[:, 0] = observed[:, -1] = True
    path = spline_path(times, line, observed)
    for i in range(times.shape[1]):
        torch.testing.assert_close(at(path, i), line[:, i])


@pytest.mark.parametrize("kind", ["hermite", "linear"])
def test_points_without_observation_do_not_bend_it(kind):
    times, values, observed = series()
    before = observation_path(times, values, observed, intensity=0.5, kind=kind)
    middle = (times[:, 3:4] + times[:, 4:5]) / 2
    longer = torch.cat([times[:, :4], middle, times[:, 4:]], 1)
    nothing = torch.full_like(values[:, :1], NAN)
    after = observation_path(
        longer,
        torch.cat([values[:, :4], nothing, values[:, 4:]], 1),
        torch.cat([observed[:, :4], torch.zeros_like(observed[:, :1]), observed[:, 4:]], 1),
        intensity=0.5,
        kind=kind,
    )
    for when in torch.linspace(float(times[:, 0].max()), float(times[:, -1].min()), 23).tolist():
        torch.testing.assert_close(in_time(before, times, when), in_time(after, longer, when), rtol=1e-9, atol=1e-9)


def test_channels_are_time_values_and_counts():
    times, values, observed = series()
    observed[0, :, 1] = False
    path = observation_path(times, values, observed, span=2.0, intensity=0.25)
    end = at(path, path.end)
    torch.testing.assert_close(end[:, 0], (times[:, -1] - times[:, 0]) / 2)
    torch.testing.assert_close(end[:, 3:], 0.25 * observed.sum(1).double())
    torch.testing.assert_close(at(path, 0)[:, 3:], 0.25 * observed[:, 0].double())
    assert at(path, 3.7)[0, 2] == end[0, 2] == 0, "never observed"
    assert observation_path(times, values, observed).coefficients.shape[-1] == 3
    # A variable that was measured once stays what it was, before and after.
    once = torch.zeros_like(observed)
    once[:, 4] = True
    path = observation_path(times, values, once)
    for s in (0.0, 2.2, 7.0):
        torch.testing.assert_close(at(path, s)[:, 1:], values[:, 4])


def test_it_does_not_look_ahead_further_than_the_next_observation():
    times, values, observed = series(share=2.0)
    changed = values.clone()
    changed[:, 5:] += 1
    paths = [spline_path(times, x, observed) for x in (values, changed)]
    assert paths[0].coefficients[:, :4].equal(paths[1].coefficients[:, :4])
    assert not paths[0].coefficients[:, 4].equal(paths[1].coefficients[:, 4])


def test_an_ended_series_stands_still():
    times, values, observed = series()
    observed[:, -1] = True
    path = spline_path(times, values, observed)
    ended = spline_path(
        torch.cat([times, times[:, -1:].expand(-1, 3)], 1),
        torch.cat([values, torch.full((3, 3, 2), NAN, dtype=torch.float64)], 1),
        torch.cat([observed, torch.zeros(3, 3, 2, dtype=torch.bool)], 1),
    )
    torch.testing.assert_close(ended.coefficients[:, :7], path.coefficients)
    assert (ended.coefficients[:, 7:, 1:] == 0).all()


def test_one_point_and_two_of_one_time_are_paths_too():
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    path = spline_path(torch.zeros(1, 1), torch.full((1, 1, 1), 3.0), one)
    assert (path.end, float(path.value(torch.tensor(0.5)))) == (1.0, 3.0)
    # A jump is gone through while time stands still.
    x = torch.tensor([[[0.0], [1.0], [5.0], [6.0]]])
    path = spline_path(torch.tensor([[0.0, 1.0, 1.0, 2.0]]), x, torch.ones_like(x, dtype=torch.bool))
    assert [float(path.value(torch.tensor(float(i)))) for i in range(4)] == pytest.approx([0, 1, 5, 6])


def test_gradients_by_values_and_times_are_exact():
    times, values, observed = series(batch=2, length=5)

    def coefficients(times, values):
        return spline_path(times, values, observed).coefficients

    assert torch.autograd.gradcheck(coefficients, (times.requires_grad_(), values.requires_grad_()))


def test_series_that_do_not_fit_are_refused():
    times, values, observed = series()
    with pytest.raises(ValueError, match="Did you mean 'hermite'"):
        spline_path(times, values, observed, "hermit")
    with pytest.raises(ValueError, match="those of series 1 do not"):
        spline_path(torch.tensor([[0.0, 1], [1, 0]]), torch.zeros(2, 2, 1), torch.ones(2, 2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one point"):
        spline_path(times[:, :0], values[:, :0], observed[:, :0])
