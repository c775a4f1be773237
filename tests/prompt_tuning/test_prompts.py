from __future__ import annotations

import pytest
import torch

from optuna_llm_catalyst.prompt_tuning import SoftPrompt
from optuna_llm_catalyst.prompt_tuning.prompts import embed


TABLE = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_prompt_of_tokens_is_exactly_the_rows_of_the_models_table(dtype: torch.dtype) -> None:
    table = TABLE.to(dtype)
    prompt = SoftPrompt.from_token_ids([3, 0, 10, 3], table)()
    assert prompt.dtype == torch.float32
    assert torch.equal(prompt, torch.stack([table[i].float() for i in (3, 0, 10, 3)]))


def test_a_prompt_is_kept_in_full_precision_whatever_it_is_made_from() -> None:
    half = TABLE.half()
    assert SoftPrompt(half)().dtype == torch.float32
    assert embed([[1, 2]], half).dtype == torch.float32


def test_many_prompts_are_embedded_as_each_alone() -> None:
    prompts = [(1, 2, 3), (4, 4, 4), (10, 0, 9)]
    together = embed(prompts, TABLE)
    assert together.shape == (3, 3, 4)
    for ids, embeddings in zip(prompts, together, strict=True):
        assert torch.equal(embeddings, embed([ids], TABLE)[0])


def test_training_a_prompt_does_not_touch_the_table_it_came_from() -> None:
    table = TABLE.clone().requires_grad_()
    prompt = SoftPrompt.from_token_ids([1, 2], table)
    prompt().sum().backward()
    torch.optim.SGD(prompt.parameters(), lr=1.0).step()
    assert torch.equal(table, TABLE)
    assert table.grad is None


def test_training_a_prompt_does_not_touch_the_tensor_it_started_from() -> None:
    start = TABLE[:3].clone()
    prompt = SoftPrompt(start)
    with torch.no_grad():
        prompt().add_(1.0)
    assert torch.equal(start, TABLE[:3])


def test_a_prompt_trains_its_embeddings_and_nothing_else() -> None:
    [parameter] = SoftPrompt(TABLE).parameters()
    assert parameter.shape == TABLE.shape
    assert parameter.requires_grad


@pytest.mark.parametrize("shape", [(4,), (1, 3, 4)])
def test_embeddings_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(L, d\)"):
        SoftPrompt(torch.zeros(shape))


def test_a_token_that_the_model_does_not_embed_is_refused_by_its_number() -> None:
    with pytest.raises(ValueError, match="holds 11, but the model embeds 11 tokens only"):
        SoftPrompt.from_token_ids([0, 11], TABLE)
