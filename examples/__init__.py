"""Programs that use the two packages as a stranger would: the demo, the adapters' training."""
