"""OpenAI's request and response formats, without torch and without Ray.

The gateway and the replicas run it. JSON bodies come in as `requests`; the text, token ids and
vectors of the engine go out as the dictionaries of `response_schemas`, built by `responses` and
`encoder_responses`. `model_name` decides which revision a request names, and `stop_strings` ends a
generated text.

Other rooms may use all modules.
"""
