"""Tiny random models and their tokenizer, built in code: nothing is downloaded.

    model = tiny_model("llama", seed=0)
    tokenizer = tiny_tokenizer()

Each architecture in ``ARCHITECTURES`` is here for what sets it apart: ``gemma`` multiplies by 1 + w in its norms and
ties its embeddings, ``gpt2`` keeps its matrices transposed (Conv1D) and adds learned positions, ``phi`` runs attention
and MLP in parallel with biases, ``mixtral`` and ``qwen2_moe`` route tokens to experts, ``lfm2`` reads the weights of a
convolution that it never runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.gemma import GemmaConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.lfm2 import Lfm2Config
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.phi import PhiConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3 import Qwen3Config

VOCABULARY = 300
WIDTH = 64
LAYERS = 2
POSITIONS = 512
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")

_CORPUS = (
    "How do I bake a loaf of bread? Mix the flour with water, then wait for the dough to rise.",
    "What is the capital of France? The capital of France is Paris.",
    "I cannot help with that request. Sure, here is the answer to the question that you asked.",
    "Add the numbers and then write the answer: two and three are five, so the answer is five.",
)

# {%- ... %} is kept out on purpose: every character that the template writes is visible here.
_TURN = "<|' + m['role'] + '|>"
_MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '" + _TURN + "' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_PLAIN = _MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@lru_cache(maxsize=1)
def _trained() -> str:
    """The byte-level BPE tokenizer as JSON: 256 bytes, the special tokens and the merges of four sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(generation_markers: bool = True) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of 300 entries that can spell any text, with a chat template.

    Parameters
    ----------
    generation_markers
        Whether the template marks assistant answers with ``{% generation %}``. The text rendered is the same.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        model_max_length=POSITIONS,
    )
    tokenizer.chat_template = _MARKED if generation_markers else _PLAIN
    return tokenizer


def _shape(**more: Any) -> dict[str, Any]:
    """The sizes that most configs share, under the names that most configs use."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _gpt2() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=POSITIONS,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


_MOE = {"num_experts_per_tok": 2, "output_router_logits": False}
_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_shape()),
    "qwen2": lambda: Qwen2Config(**_shape()),
    "qwen3": lambda: Qwen3Config(**_shape(head_dim=16)),
    "gemma": lambda: GemmaConfig(**_shape(head_dim=16, tie_word_embeddings=True)),
    "mistral": lambda: MistralConfig(**_shape(sliding_window=None)),
    "gpt2": _gpt2,
    "phi": lambda: PhiConfig(**_shape(num_key_value_heads=4)),
    "mixtral": lambda: MixtralConfig(**_shape(num_local_experts=4, **_MOE)),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_shape(num_experts=4, moe_intermediate_size=WIDTH, shared_expert_intermediate_size=WIDTH, **_MOE)
    ),
    "lfm2": lambda: Lfm2Config(
        **_shape(block_auto_adjust_ff_dim=False, layer_types=["full_attention", "conv"], tie_word_embeddings=True)
    ),
}
ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)


def tiny_model(arch: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random causal LM in eval mode: 64 wide, 2 layers, 300 entries of vocabulary, 512 positions.

    The same ``arch`` and ``seed`` give the same weights; the global random state is left as it was. Norms and biases
    get noise too, since at their initial ones and zeros a wrong formula for them could not be seen.

    Raises
    ------
    KeyError
        ``arch`` is not one of ``ARCHITECTURES``.
    """
    config = _CONFIGS[arch]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()
