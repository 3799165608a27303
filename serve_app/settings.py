"""Settings of the application: what `serve run` takes as `name=value` and a config file as `args`.

Checked before anything starts; an unknown name or a wrong value is one sentence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from click import ClickException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

EMBEDDED = "embedded"


class InvalidSettings(ClickException):
    """One or more settings are wrong; nothing was started.

    A click exception, because `serve run` is a click program: it prints one line, no traceback.
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
    """Everything an operator can choose. Lengths are in tokens, times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    # what is served
    model: Annotated[
        str, Field(min_length=1, description="Hub id, local folder, or 'embedded'")
    ] = EMBEDDED
    model_revision: Annotated[str | None, Field(description="Hub branch, tag or commit")] = None
    served_model_name: Annotated[
        str | None, Field(description="what clients call it; default: from `model`")
    ] = None
    adapter: Annotated[
        str | None, Field(description="first adapter; default: none, the base model")
    ] = None
    adapter_name: Annotated[str | None, Field(description="its revision name")] = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False

    # what a replica accepts
    max_rank: Annotated[int, Field(ge=1, le=1024)] = 16
    target_modules: Annotated[
        str, Field(min_length=1, description="'all-linear', or names separated by commas")
    ] = "all-linear"
    modules_to_save: Annotated[
        str | None,
        Field(min_length=1, description="modules that adapters may replace, separated by commas"),
    ] = None
    use_dora: Annotated[bool, Field(description="whether adapters may use DoRA")] = False
    lora_bias: Annotated[bool, Field(description="whether they may have a bias on lora_B")] = False
    bias: Annotated[
        Literal["none", "lora_only", "all"], Field(description="whose biases they may replace")
    ] = "none"

    # the fleet
    replicas: Annotated[int, Field(ge=1)] = 2
    num_gpus: Annotated[
        float | None, Field(ge=0, description="per replica; default: 1 when the cluster has GPUs")
    ] = None
    num_cpus: Annotated[float, Field(ge=0, description="per replica")] = 1.0
    torch_threads: Annotated[
        int | None, Field(ge=1, description="default: the replica's share of the node's cores")
    ] = None

    # pressure
    max_ongoing_requests: Annotated[int, Field(ge=1, description="per replica")] = 64
    max_queued_requests: Annotated[
        int, Field(ge=0, description="waiting for a replica; above it a request gets 429")
    ] = 256
    max_body_bytes: Annotated[int, Field(ge=1024, description="of one HTTP request")] = 4 * 2**20
    request_timeout_s: Annotated[
        float, Field(gt=0, description="from a replica to the last token; then 504")
    ] = 600.0

    # the engine
    task: Annotated[
        Literal["auto", "generate", "embed", "classify"],
        Field(description="what requests ask for; auto: what the model's config says it is"),
    ] = "auto"
    compile: bool = True
    compile_cache_uri: Annotated[
        str | None, Field(description="where replicas share what they compiled (fsspec URI)")
    ] = None
    cuda_graphs: Annotated[bool, Field(description="on a GPU, replay steps as CUDA graphs")] = True
    max_model_len: Annotated[int, Field(ge=16)] = 2048
    max_tokens_default: Annotated[int, Field(ge=1)] = 256
    max_logprobs: Annotated[int, Field(ge=0, le=20, description="most `top_logprobs`")] = 20

    # generation with a causal model
    lanes: Annotated[
        int, Field(ge=1, le=64, description="revisions that one replica generates with at once")
    ] = 2
    lane_overflow: Annotated[
        Literal["wait", "refuse"],
        Field(description="a request whose revision finds every lane taken waits, or gets 429"),
    ] = "wait"
    kv_cache_tokens: Annotated[
        int | None,
        Field(ge=64, description="KV cache of each lane; default: four requests of max_model_len"),
    ] = None
    max_batch_tokens: Annotated[int, Field(ge=16, description="tokens in one step")] = 256

    # every other task: requests are put together into batches
    max_batch_size: Annotated[int, Field(ge=1, description="requests in one batch")] = 32
    batch_wait_s: Annotated[
        float, Field(ge=0, description="how long the first request waits for others")
    ] = 0.005
    pooling: Annotated[
        Literal["auto", "mean", "cls", "last"], Field(description="tokens to one embedding")
    ] = "auto"
    normalize: Annotated[bool, Field(description="embeddings have length 1")] = True

    # control
    state_uri: Annotated[
        str | None, Field(description="where the journal lives (fsspec URI); default: node-local")
    ] = None
    admin_token: Annotated[
        str | None, Field(min_length=1, description="bearer token for admin")
    ] = None
    poll_s: Annotated[
        float, Field(gt=0, le=60, description="longest time a replica's report stays open")
    ] = 2.0
    drain_timeout_s: Annotated[
        float, Field(gt=0, description="longest wait for running requests before a swap")
    ] = 120.0
    start_timeout_s: Annotated[
        float, Field(gt=0, description="longest wait of a new replica for its revision")
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
        """What the KV cache of one lane holds."""
        return self.kv_cache_tokens or 4 * self.max_model_len

    @property
    def silence_s(self) -> float:
        """After this many seconds without a report a replica counts as gone."""
        return max(3 * self.poll_s, 5.0)  # a busy node stalls a replica for a second or two

    @property
    def model_name(self) -> str:
        if self.served_model_name:
            return self.served_model_name
        if self.model == EMBEDDED:
            return "SmolLM2-135M-Instruct"
        return self.model.rstrip("/").rsplit("/", 1)[-1]


def parse(values: dict[str, Any] | Settings) -> Settings:
    """Settings from a config file or `name=value` words. Raises `InvalidSettings`."""
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
