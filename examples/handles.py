"""Send a request, move the fleet to another adapter, send it again: all through Ray Serve handles.

    python -m examples.handles

Runs on a machine of the cluster, while the application is deployed. HOTSWAP_APP is the name of the
Serve application, HOTSWAP_ADAPTER the adapter to move to.
"""

import os
import time

from ray import serve

app = os.environ.get("HOTSWAP_APP", "default")
adapter = os.environ.get("HOTSWAP_ADAPTER", "serve_app/adapters/terse_json")

model = serve.get_deployment_handle("Model", app)
controller = serve.get_deployment_handle("RolloutController", app)


def ask(question: str) -> None:
    request = {"messages": [{"role": "user", "content": question}], "max_tokens": 32}
    answer = model.chat.remote(request | {"temperature": 0}).result()
    print(answer["system_fingerprint"], "answers", answer["choices"][0]["message"]["content"])


ask("What is the capital of France?")

plan = {"adapter": os.path.abspath(adapter), "strategy": "rolling"}
rollout = controller.start_rollout.remote(plan).result()
while not rollout.ended:
    time.sleep(0.1)
    rollout = controller.rollout.remote(rollout.id).result()
print(rollout.state, "in", rollout.converge_ms, "ms")

ask("What is the capital of France?")
