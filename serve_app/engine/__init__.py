"""The engine: runs requests on the revisions of one prepared model.

It runs in a replica's process: admission on the event loop, the model in threads of its own. In
come token ids, sampling parameters and staged adapter images; out go tokens, log-probabilities,
embeddings or classes, and request statistics. It knows no HTTP, no OpenAI and no controller.

For other rooms: `engine` (Engine, Ticket), its kinds in `causal`, `encoder` and `seq2seq`, and the
values `sampling_params`, `steps`, `pooling` and `admission.DrainTimeout`. The rest is internal.
"""
