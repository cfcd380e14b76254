"""The words of a prompt, and where they look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apt_hooks.hooks.attention_guidance import AttentionRecording
from apt_hooks.hooks.attention_maps import token_maps

FILLERS = {"a", "an", "of", "in", "on", "at", "the", "with", "and", "to"}
_WORD_END = "</w>"


def words_of(tokenizer: Any, prompt: str) -> list[tuple[str, list[int]]]:
    """Each word with the places of its tokens among all, those of a prompt that is cut off alone; without fillers.

    Args:
        tokenizer: CLIP's, whose tokens say where a word ends.
    """
    numbers = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    words: list[tuple[str, list[int]]] = []
    text = ""
    places: list[int] = []
    for place, token in enumerate(tokenizer.convert_ids_to_tokens(numbers)):
        if token in tokenizer.all_special_tokens:
            continue
        text, places = text + token.removesuffix(_WORD_END), [*places, place]
        if token.endswith(_WORD_END):
            words.append((text, places))
            text, places = "", []
    return [(word, places) for word, places in words if word not in FILLERS and any(map(str.isalnum, word))]


def word_maps(attention: AttentionRecording, step: int, words: Sequence[tuple[str, list[int]]], ratio: float) -> Tensor:
    """The share of attention that each word gets at a step, of the first picture: [words, height, width] of the finest
    layer.

    Args:
        ratio: height of the picture by its width.
    """
    finest = max(queries.shape[1] for queries in attention.steps[step].queries.values())
    height = round((finest * ratio) ** 0.5)
    maps = token_maps(attention.layers, attention.steps[step], (height, finest // height))[0].float().cpu()
    return torch.stack([maps[places].sum(dim=0) for _, places in words])
