"""Optima that can be differentiated: programmes, minimisers, simplex maps, projections and soft sorting."""

__all__: list[str] = []
