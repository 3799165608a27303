"""The rollout machine: pure decisions, without I/O, clock, thread or random numbers.

The controller runs it. In: events (`events`) with their time. Out: the next `Fleet` (`state`), and
one document for each replica (`documents`). A rollout walks through the transitions of `table`.

For others: `plan`, `analysis` and `precondition` (what users send), `state`, `documents`, `events`,
`machine`, `recovery`, `traffic_split`, `canary.traffic`, `walk.progress` and `errors`. The rest
belongs to the machine.
"""
