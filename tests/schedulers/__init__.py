"""Which scheduler of diffusers is tried in which tiny pipeline: data."""
