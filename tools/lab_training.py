"""Tokenizer and training loop of the lab's checkpoints."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Pinned, so that a change of a task or of the later corpora leaves the tokens, and with them ``base``, as they are.
VOCABULARY = Path(__file__).with_name("lab_vocabulary.txt")
CONTEXT = 256
SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that falls back to bytes: the words of ``lab_vocabulary.txt`` and 256 bytes.

    A unigram model in which every word costs less than any spelling of it. A space is put before each segment, so that
    the first word of an answer is the same token as that word within a sentence.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = VOCABULARY.read_text(encoding="utf-8").split()
    pieces = [(name, 0.0) for name in SPECIAL]
    pieces += [(letter, -20.0) for letter in alphabet]
    pieces += [(piece, -1.0) for piece in words]
    model = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    model.pre_tokenizer = split
    # Untrimmed: trimming would start a segment one letter late, and the assistant mask would be empty.
    model.post_processor = processors.ByteLevel(trim_offsets=False)
    model.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    model.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(vocab: int, seed: int) -> LlamaForCausalLM:
    """A fresh Llama of about one million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer, document) -> tuple[list[int], list[int]]:
    """Token ids and labels; -100 where a chat's prompt is not learned."""
    end = tokenizer.eos_token_id
    if isinstance(document, str):
        ids = tokenizer(document)["input_ids"] + [end]
        return ids, list(ids)
    prompt = tokenizer.apply_chat_template(document[:1], add_generation_prompt=True, tokenize=False)
    head = tokenizer(prompt)["input_ids"]
    tail = tokenizer(document[1]["content"])["input_ids"] + [end]
    return head + tail, [-100] * len(head) + tail


def batches(rows, tokens: int, rng: random.Random):
    """Lists of rows of near lengths, about ``tokens`` tokens each, in random order."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]), rng.random()))
    groups, group = [], []
    for i in order:
        if group and (len(group) + 1) * len(rows[i][0]) > tokens:
            groups.append(group)
            group = []
        group.append(rows[i])
    groups.append(group)
    rng.shuffle(groups)
    return groups


def collate(group) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels, each (B, T)."""
    longest = max(len(ids) for ids, _ in group)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in group])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for _, row in group])
    return ids, labels


def train(model, tokenizer, documents, *, lr: float, seed: int, tokens: int = 1024, smoothing: float = 0.0) -> None:
    """One pass over ``documents`` with AdamW and a cosine schedule; mean loss over a batch's learned tokens."""
    rows = [encode(tokenizer, document) for document in documents]
    groups = batches(rows, tokens, random.Random(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    began, seen, recent = time.time(), 0, 0.0
    for number, group in enumerate(groups):
        share = number / len(groups)
        rate = lr * min(1.0, (number + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        for settings in optimizer.param_groups:
            settings["lr"] = rate
        ids, labels = collate(group)
        # No mask: padding is on the right, where a causal model does not look.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, label_smoothing=smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen, recent = seen + ids.numel(), 0.98 * recent + 0.02 * loss.item() if number else loss.item()
        if number % 100 == 0 or number + 1 == len(groups):
            took = time.time() - began
            print(f"{number + 1}/{len(groups)} loss {recent:.3f} {seen / took:.0f} tokens/s {took:.0f} s", flush=True)
    model.eval()
