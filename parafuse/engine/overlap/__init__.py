"""A request that decodes while the next one denoises."""
