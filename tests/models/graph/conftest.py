"""A small random graph."""

import pytest

from tests.models.graph.graphs import random_graph


@pytest.fixture
def graph():
    return random_graph()
