"""Settings of the application: `name=value` for `serve run`, `args` in a Serve config file.

They are checked before anything starts. An unknown name or a wrong value gives one sentence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from click import ClickException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

EMBEDDED = "embedded"


class InvalidSettings(ClickException):
    """One or more settings are wrong. Nothing was started.

    It is a click exception, so that `serve run`, a click program, prints one line, no traceback.
    """

    code = "invalid_settings"

    def __init__(self, problems: str) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return f"settings refused: {self.problems}"

    def format_message(self) -> str:
        return str(self)


class Settings(BaseModel):
    """All settings. Lengths are in tokens, times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    # model
    model: Annotated[
        str, Field(min_length=1, description="a Hub id, a local folder, or 'embedded'")
    ] = EMBEDDED
    model_revision: Annotated[
        str | None, Field(description="branch, tag or commit of the model on the Hub")
    ] = None
    served_model_name: Annotated[
        str | None,
        Field(description="the model's name in requests; default: the last part of `model`"),
    ] = None
    adapter: Annotated[
        str | None,
        Field(description="the first adapter to serve; default: none, the base model"),
    ] = None
    adapter_name: Annotated[
        str | None, Field(description="revision name of that adapter; default: from its source")
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="data type of the weights; auto: as the checkpoint has them"),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, Field(description="run Python code from the model's repository")
    ] = False

    # envelope: the adapters that a replica can load without a restart
    max_rank: Annotated[int, Field(ge=1, le=1024, description="highest rank of an adapter")] = 16
    target_modules: Annotated[
        str,
        Field(
            min_length=1,
            description="modules that adapters may target: 'all-linear', or a comma-separated list",
        ),
    ] = "all-linear"
    modules_to_save: Annotated[
        str | None,
        Field(
            min_length=1,
            description="modules that adapters may replace completely, as a comma-separated list",
        ),
    ] = None
    use_dora: Annotated[bool, Field(description="adapters may use DoRA")] = False
    lora_bias: Annotated[bool, Field(description="adapters may have a bias on lora_B")] = False
    bias: Annotated[
        Literal["none", "lora_only", "all"],
        Field(description="biases of the model that adapters may replace"),
    ] = "none"

    # fleet
    replicas: Annotated[int, Field(ge=1, description="number of replicas")] = 2
    num_gpus: Annotated[
        float | None,
        Field(ge=0, description="GPUs for each replica; default: 1 if the cluster has GPUs"),
    ] = None
    num_cpus: Annotated[float, Field(ge=0, description="CPUs that Ray reserves per replica")] = 1.0
    torch_threads: Annotated[
        int | None,
        Field(ge=1, description="CPU threads of torch; default: as many as Ray gives the replica"),
    ] = None

    # load limits
    max_ongoing_requests: Annotated[
        int, Field(ge=1, description="requests that run on one replica at a time")
    ] = 64
    max_queued_requests: Annotated[
        int, Field(ge=0, description="requests that wait for a replica; beyond it, 429")
    ] = 256
    max_body_bytes: Annotated[
        int, Field(ge=1024, description="longest body of an HTTP request; beyond it, 413")
    ] = 4 * 2**20
    request_timeout_s: Annotated[
        float, Field(gt=0, description="longest time of a request on a replica; beyond it, 504")
    ] = 600.0

    # engine
    task: Annotated[
        Literal["auto", "generate", "embed", "classify"],
        Field(description="the task that the model is served for; auto: from its config"),
    ] = "auto"
    compile: Annotated[bool, Field(description="compile the model with torch.compile")] = True
    compile_cache_uri: Annotated[
        str | None,
        Field(description="where replicas share compiled code (fsspec URI); default: nowhere"),
    ] = None
    cuda_graphs: Annotated[
        bool, Field(description="on a GPU, capture and replay steps as CUDA graphs")
    ] = True
    max_model_len: Annotated[
        int, Field(ge=16, description="most tokens of a request, prompt and answer together")
    ] = 2048
    max_tokens_default: Annotated[
        int, Field(ge=1, description="most tokens of an answer when a request names no number")
    ] = 256
    max_logprobs: Annotated[
        int,
        Field(ge=0, le=20, description="most alternatives per token (`top_logprobs`) of a request"),
    ] = 20

    # generation with a causal model
    lanes: Annotated[
        int, Field(ge=1, le=64, description="revisions that a replica generates with at a time")
    ] = 2
    lane_overflow: Annotated[
        Literal["wait", "refuse"],
        Field(description="a request for one revision more waits for a lane, or gets 429"),
    ] = "wait"
    kv_cache_tokens: Annotated[
        int | None,
        Field(ge=64, description="KV cache of each lane, in tokens; default: 4 * max_model_len"),
    ] = None
    max_batch_tokens: Annotated[
        int, Field(ge=16, description="most tokens that one step of a lane processes")
    ] = 256

    # the other tasks, which run requests in batches
    max_batch_size: Annotated[int, Field(ge=1, description="most requests in a batch")] = 32
    batch_wait_s: Annotated[
        float, Field(ge=0, description="longest time that a batch waits for more requests")
    ] = 0.005
    pooling: Annotated[
        Literal["auto", "mean", "cls", "last"],
        Field(description="how token vectors become one embedding; auto: from the model's files"),
    ] = "auto"
    normalize: Annotated[bool, Field(description="scale embeddings to length 1")] = True

    # control
    state_uri: Annotated[
        str | None,
        Field(description="where the journal is (fsspec URI); default: the disk of one node"),
    ] = None
    admin_token: Annotated[
        str | None,
        Field(min_length=1, description="bearer token of the admin routes; default: none needed"),
    ] = None
    poll_s: Annotated[
        float, Field(gt=0, le=60, description="longest time between two reports of a replica")
    ] = 2.0
    drain_timeout_s: Annotated[
        float, Field(gt=0, description="longest wait for running requests before a swap")
    ] = 120.0
    start_timeout_s: Annotated[
        float, Field(gt=0, description="longest wait of a warm replica for its first revision")
    ] = 600.0

    @field_validator("kv_cache_tokens")
    @classmethod
    def _one_request_fits(cls, value: int | None, info: ValidationInfo) -> int | None:
        longest = info.data.get("max_model_len")
        if value is not None and longest is not None and value < longest:
            raise PydanticCustomError(
                "kv_cache_too_small",
                "should hold at least one request of max_model_len={longest}",
                {"longest": longest},
            )
        return value

    @property
    def lane_tokens(self) -> int:
        """The size of the KV cache of one lane, in tokens."""
        return self.kv_cache_tokens or 4 * self.max_model_len

    @property
    def silence_s(self) -> float:
        """A replica counts as gone after this many seconds without a report."""
        return max(3 * self.poll_s, 5.0)  # a busy node stalls a replica for a second or two

    @property
    def model_name(self) -> str:
        if self.served_model_name:
            return self.served_model_name
        if self.model == EMBEDDED:
            return "SmolLM2-135M-Instruct"
        return self.model.rstrip("/").rsplit("/", 1)[-1]


def parse(values: dict[str, Any] | Settings) -> Settings:
    """Returns settings from a config file or from `name=value`. Raises `InvalidSettings`."""
    if isinstance(values, Settings):
        return values
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise InvalidSettings("; ".join(map(_problem, error.errors()))) from None


def _problem(detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = ", ".join(sorted(Settings.model_fields))
        return f"there is no setting {name!r} (there are {known})"
    return f"{name}={detail['input']!r}: {detail['msg'].lower()}"
