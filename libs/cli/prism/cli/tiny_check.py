"""The prompts on which the tiny models' greedy output is known to be beyond doubt.

A greedy token is the same on every correct engine only if its logit leads the next one's by more than
rounding errors amount to. The tiny models are made so that it does, on these prompts.
"""

from typing import Any

from tokenizers import Tokenizer

from prism.cli.tiny_tokenizer import BOS, CORPUS, END

PROMPT_TOKENS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 400, 700)
CHECKED_STEPS = 32
MINIMUM_MARGIN = 0.01

_QUESTIONS = (
    "Hello! How are you today?",
    "Tell me a story about a dragon.",
    "What is a queue?",
    "Warum, 你好 🙂?",
)


def check_prompts(tokenizer: Tokenizer) -> list[str]:
    """Prompts of about PROMPT_TOKENS tokens (never more), then a few chats as the chat template renders them.

    They depend on the tokenizer alone. Encode them without adding special tokens.
    """
    words = CORPUS.read_text(encoding="utf-8").split()
    prompts = [
        _prompt(tokenizer, words[17 + 61 * index :], tokens) for index, tokens in enumerate(PROMPT_TOKENS)
    ]
    return prompts + [
        f"{BOS}<|user|>\n{conversation[0]['content']}{END}\n<|assistant|>\n"
        for conversation in check_conversations()
    ]


def check_conversations() -> list[list[dict[str, str]]]:
    """The chats among the prompts, as messages for a chat endpoint."""
    return [[{"role": "user", "content": question}] for question in _QUESTIONS]


def _prompt(tokenizer: Tokenizer, words: list[str], tokens: int) -> str:
    text = ""
    for word in words:
        longer = f"{text} {word}" if text else word
        if len(tokenizer.encode(longer, add_special_tokens=False).ids) > tokens:
            # A first word of several tokens would leave nothing: skip on to one that fits.
            if text:
                break
            continue
        text = longer
    return text


def greedy_margins(model: Any, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], float]:
    """Greedy continuations of `steps` tokens each, and the smallest lead of a chosen logit in any of them.

    `model` is a causal language model of transformers in float32; end-of-sequence tokens don't end it.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    continuations: list[list[int]] = [[] for _ in prompts]
    smallest = float("inf")
    with torch.inference_mode():
        for batch in _similar_lengths(order, prompts):
            longest = max(len(prompts[index]) for index in batch)
            padding = [longest - len(prompts[index]) for index in batch]
            ids = torch.tensor([[0] * pad + prompts[i] for pad, i in zip(padding, batch, strict=True)])
            mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            cache = None
            for _ in range(steps):
                out = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                best = out.logits[:, -1].topk(2, dim=-1)
                smallest = min(smallest, float((best.values[:, 0] - best.values[:, 1]).min()))
                ids, cache = best.indices[:, :1], out.past_key_values
                positions = positions[:, -1:] + 1
                mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
                for index, token in zip(batch, ids[:, 0].tolist(), strict=True):
                    continuations[index].append(token)
    return continuations, smallest


def _similar_lengths(order: list[int], prompts: list[list[int]]) -> list[list[int]]:
    """Split `order` so that padding a batch at most doubles its work."""
    batches: list[list[int]] = []
    for index in order:
        if batches and len(prompts[index]) <= max(32, 2 * len(prompts[batches[-1][0]])):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
