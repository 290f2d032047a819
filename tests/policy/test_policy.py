"""The policy in scenarios: simulated drafts and prices, no model and no time."""

from tests.policy.simulated import linear, policy, simulate


def test_a_useless_drafter_costs_at_most_three_percent_more_passes() -> None:
    """Two passes a cycle and nothing ever accepted: after the first trials plain steps remain."""
    chooser = policy("auto:tree+lookup")
    simulate(lambda _: 0, price=linear(1.0), tokens=50, chooser=chooser)
    seconds, _ = simulate(lambda _: 0, price=linear(1.0), tokens=1000, chooser=chooser)
    assert seconds <= 1.03 * 1000
