"""A Ray Serve application that swaps LoRA adapters on a live fleet."""
