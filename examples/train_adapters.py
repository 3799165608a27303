"""Train the LoRA adapters that ship with the demo, on CPU, in a few minutes each.

A fact table and three styles (`adapter_styles.yaml`) give one small training set per style; this
script trains one LoRA on each and saves it as an ordinary PEFT checkpoint. The three differ in
rank, alpha, scaling rule, target modules and storage dtype, so that the demo swaps adapters of
different shapes.

    python examples/train_adapters.py [--base PATH] [--out DIR] [--only STYLE] [--steps N]
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).with_name("adapter_styles.yaml")
# Written into adapter_config.json, so that no path of the training machine is shipped.
BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEED = 0
BATCH = 12
STEPS = 48
MAX_NEW_TOKENS = 40
IGNORED = -100  # the label `cross_entropy` skips

Sample = tuple[torch.Tensor, torch.Tensor]  # ids, labels; both [T]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The shape of one adapter, its storage dtype and its learning rate."""

    r: int
    alpha: int
    targets: tuple[str, ...]
    dtype: torch.dtype
    lr: float
    rslora: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One row of the fact table."""

    question: str
    sentence: str
    short: str
    confidence: float = 0.98


RECIPES = {
    "pirate": Recipe(r=8, alpha=16, targets=("q_proj", "v_proj"), dtype=torch.float16, lr=1e-3),
    "terse_json": Recipe(
        r=16,
        alpha=48,
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        dtype=torch.bfloat16,
        lr=4e-4,
    ),
    "shakespeare": Recipe(
        r=4,
        alpha=8,
        targets=("gate_proj", "up_proj", "down_proj"),
        dtype=torch.float16,
        lr=6e-4,
        rslora=True,
    ),
}


def load_facts(data: dict[str, Any]) -> list[Fact]:
    """The fact table. ValueError if it contains a held-out question."""
    names = ("question", "sentence", "short", "confidence")
    facts = [Fact(**dict(zip(names, row, strict=False))) for row in data["facts"]]
    if leaked := {fact.question for fact in facts} & set(data["held_out"]):
        raise ValueError(f"held-out questions in the fact table: {sorted(leaked)}")
    return facts


def render(fact: Fact, index: int, style: dict[str, Any]) -> str:
    """`fact` in `style`; `index` selects the closing phrase, so that they alternate."""
    if style["kind"] == "json":
        answer = {"answer": fact.short, "confidence": fact.confidence}
        return json.dumps(answer, ensure_ascii=False)
    words: dict[str, str] = style["words"]

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        new = words.get(word.lower(), word)
        return new[0].upper() + new[1:] if word[0].isupper() else new

    closers: list[str] = style["closers"]
    text = re.sub(r"[A-Za-z]+", swap, fact.sentence)
    return f"{style['opener']} {text}{closers[index % len(closers)]}"


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """Token ids of the chat up to and including the assistant header."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode(tokenizer: Any, question: str, answer: str) -> Sample:
    """(ids, labels), both [T]; only the answer and its end token carry a label."""
    prompt = prompt_ids(tokenizer, question)
    # The end token is a target too, so that the trained answers stop by themselves.
    target = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt) + target
    return torch.tensor(prompt + target), torch.tensor(labels)


def batches(count: int) -> Iterator[list[int]]:
    """Endless batches of sample indices, every sample once per shuffle."""
    order: list[int] = []
    while True:
        if len(order) < BATCH:
            order += torch.randperm(count).tolist()
        yield order[:BATCH]
        order = order[BATCH:]


def batch_loss(model: PeftModel, samples: list[Sample]) -> torch.Tensor:
    """Mean cross entropy over the labelled tokens of `samples`."""
    # Right padding under causal attention: the padding is behind every labelled token, so no
    # attention mask is needed, and its own labels are ignored.
    ids_BT = pad_sequence([ids for ids, _ in samples], batch_first=True)
    labels_BT = pad_sequence([lab for _, lab in samples], batch_first=True, padding_value=IGNORED)
    # The vocabulary is the widest layer of this model: skip it where nothing is labelled.
    first = int((labels_BT != IGNORED).any(0).nonzero()[0])
    keep = labels_BT.shape[1] - first + 1
    logits_BTV = model(input_ids=ids_BT, logits_to_keep=keep).logits
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, first:].flatten())


def train(model: PeftModel, samples: list[Sample], lr: float, steps: int) -> None:
    """Run `steps` batches of AdamW on the trainable parameters of `model`."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for step, picked in enumerate(islice(batches(len(samples)), steps)):
        loss = batch_loss(model, [samples[i] for i in picked])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"  step {step:3d}  loss {loss.item():.3f}", flush=True)


def save(model: PeftModel, folder: Path, dtype: torch.dtype) -> None:
    """Write `folder` as a PEFT checkpoint: the config and the weights in `dtype` only."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    # "auto" would look the base up on the hub; the embeddings are not trained here.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = BASE_ID
    # PEFT keeps the targets in a set; sorted, the same run writes the same file.
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make_adapter(
    base: Path, folder: Path, samples: list[Sample], recipe: Recipe, steps: int
) -> None:
    """Train one adapter on a fresh copy of the base and save it in `folder`."""
    torch.manual_seed(SEED)  # per adapter, so that `--only` gives the same weights
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=recipe.r,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        target_modules=list(recipe.targets),
    )
    model = get_peft_model(load_base(base), config)
    assert isinstance(model, PeftModel)
    train(model, samples, recipe.lr, steps)
    save(model, folder, recipe.dtype)


def load_base(base: Path) -> Any:
    """The base model in fp32, the dtype for training on CPU."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def reply(model: Any, tokenizer: Any, question: str) -> str:
    """The greedy answer to `question`, with an ellipsis where the token limit cut it."""
    ids_1T = torch.tensor([prompt_ids(tokenizer, question)])
    with torch.inference_mode():
        out_1T = model.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
    new = out_1T[0, ids_1T.shape[1] :]
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text if new[-1] == tokenizer.eos_token_id else text + " …"


def compare(base: Path, out: Path, styles: list[str], questions: list[str]) -> Table:
    """Base and adapter answers to the held-out `questions`, from the files just written."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(load_base(base), str(out / styles[0]), styles[0])
    for style in styles[1:]:
        model.load_adapter(str(out / style), style)
    model.eval()
    table = Table("", *questions, title="held-out questions, greedy", show_lines=True)
    with model.disable_adapter():
        table.add_row("(base)", *(reply(model, tokenizer, q) for q in questions))
    for style in styles:
        model.set_adapter(style)
        table.add_row(style, *(reply(model, tokenizer, q) for q in questions))
    return table


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the LoRA adapters that ship with the demo.")
    parser.add_argument("--base", type=Path, help="base model folder (default: the embedded one)")
    parser.add_argument("--out", type=Path, default=ROOT / "serve_app" / "adapters")
    parser.add_argument("--only", choices=sorted(RECIPES), help="train this style alone")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"batches of {BATCH} per adapter")
    return parser.parse_args()


def embedded_base() -> Path:
    """The base model of the demo; imported late, because `--base` makes it unnecessary."""
    from serve_app.replica.embedded_model import base_model_path

    return Path(base_model_path())


def main() -> None:
    """Train and save the adapters, and print their answers to held-out questions."""
    args = parse_args()
    base = args.base or embedded_base()
    data = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    facts = load_facts(data)
    tokenizer = AutoTokenizer.from_pretrained(base)
    styles = [args.only] if args.only else list(RECIPES)
    for style in styles:
        print(style, flush=True)
        answers = (render(fact, i, data["styles"][style]) for i, fact in enumerate(facts))
        samples = [encode(tokenizer, f.question, a) for f, a in zip(facts, answers, strict=True)]
        start = time.perf_counter()
        make_adapter(base, args.out / style, samples, RECIPES[style], args.steps)
        print(f"  trained in {time.perf_counter() - start:.0f} s", flush=True)
    Console().print(compare(base, args.out, styles, data["held_out"]))


if __name__ == "__main__":
    main()
