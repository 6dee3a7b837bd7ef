"""The curvature core: layer factors, the structures that keep their outer products, and what to ask of them."""

from bayesdl.curvature.estimate import estimate

__all__ = ["estimate"]
