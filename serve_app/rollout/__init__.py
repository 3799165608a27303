"""Pure decisions of a rollout: plan, machine, assignment. Imports nothing of the product."""
