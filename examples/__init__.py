"""Programs that use the two packages as a user would: scripts for rollouts, the demo, training.

Each says in its first lines how to run it, from the root of the repository.
"""
