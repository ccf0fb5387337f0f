"""Passes over graphs that torch.compile makes: given to one compile call by its options, never set for the process."""
