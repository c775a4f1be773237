"""What is added before the layers of an encoder arrives there, and nowhere else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import threading

import pytest
import torch
from torch import nn
from torch import Tensor

from optuna_llm_catalyst.prompt_tuning.models.layers import added
from optuna_llm_catalyst.prompt_tuning.models.layers import find_layers
from optuna_llm_catalyst.prompt_tuning.models.layers import spread
from optuna_llm_catalyst.prompt_tuning.models.layers import watched
from optuna_llm_catalyst.prompt_tuning.models.tokens import embed_tokens
from optuna_llm_catalyst.prompt_tuning.prompts import DeepPrompt

from .test_families import ALL
from .test_families import family
from .test_families import hidden
from .tiny import make_examples
from .tiny import make_sequence


#: ALBERT runs one layer many times, XLNet has sequences along the second axis.
WITHOUT_LAYERS = {"albert", "xlnet"}
WITH_LAYERS = [name for name in ALL if name not in WITHOUT_LAYERS]


def ground(name: str) -> tuple[nn.Module, Tensor, list[nn.Module]]:
    """An encoder, embeddings of two sequences of six tokens, and its layers."""
    encoder, _ = family(name)
    ids = torch.tensor([[2, 5, 9, 7, 8, 3], [2, 6, 4, 11, 10, 3]])
    embedded = embed_tokens(encoder, ids).detach()
    layers, width = find_layers(encoder, embedded[:1])
    assert width == (32 if layers else 0)
    return encoder, embedded, layers


def change_of(embedded: Tensor, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(embedded), 2, width, generator=generator)


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_a_change_arrives_before_its_layer_at_its_tokens(name: str) -> None:
    encoder, embedded, layers = ground(name)
    assert len(layers) == 2
    with watched(layers) as before:
        plain = hidden(encoder, inputs_embeds=embedded)
    width = before[1].shape[-1]
    change = change_of(embedded, width)
    with added(layers, {1: change}, offset=1), watched(layers) as after:
        moved = hidden(encoder, inputs_embeds=embedded)
    torch.testing.assert_close(after[0], before[0])
    expected = before[1].clone()
    expected[:, 1:3] += change
    torch.testing.assert_close(after[1], expected)
    assert not torch.allclose(moved, plain, atol=1e-3)


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_no_change_and_a_change_that_is_gone_change_nothing(name: str) -> None:
    encoder, embedded, layers = ground(name)
    plain = hidden(encoder, inputs_embeds=embedded)
    with watched(layers) as states:
        hidden(encoder, inputs_embeds=embedded)
    nothing = torch.zeros(2, 2, states[1].shape[-1])
    with added(layers, {1: nothing}, offset=1):
        torch.testing.assert_close(hidden(encoder, inputs_embeds=embedded), plain)
    assert torch.equal(hidden(encoder, inputs_embeds=embedded), plain)
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_bert_is_the_loop_over_its_layers() -> None:
    encoder, embedded, layers = ground("bert")
    change = change_of(embedded, 32)
    with torch.no_grad(), added(layers, {1: change}, offset=1):
        found = hidden(encoder, inputs_embeds=embedded)
    with torch.no_grad():
        states = encoder.embeddings(inputs_embeds=embedded)  # type: ignore[operator]
        for i, layer in enumerate(encoder.encoder.layer):  # type: ignore[union-attr, arg-type]
            if i == 1:
                states = states.clone()
                states[:, 1:3] += change
            states = layer(states)
            states = states[0] if isinstance(states, tuple) else states
    torch.testing.assert_close(found, states)


@pytest.mark.parametrize("name", sorted(WITHOUT_LAYERS))
def test_an_encoder_without_such_layers_has_none(name: str) -> None:
    encoder, embedded, layers = ground(name)
    assert layers == []


def test_a_gradient_reaches_the_change() -> None:
    encoder, embedded, layers = ground("bert")
    change = change_of(embedded, 32).requires_grad_()
    with added(layers, {1: change}, offset=1):
        encoder(inputs_embeds=embedded).last_hidden_state[..., 0].sum().backward()
    assert change.grad is not None and change.grad.abs().max() > 0


def test_hooks_are_removed_whatever_happens() -> None:
    encoder, embedded, layers = ground("bert")
    with (
        pytest.raises(ValueError, match=r"layer 1 reads hidden states of shape \(2, 6, 32\)"),
        added(layers, {1: change_of(embedded[:1], 32)}, offset=1),
    ):
        encoder(inputs_embeds=embedded)
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_another_thread_sees_no_change() -> None:
    encoder, embedded, layers = ground("bert")
    plain = hidden(encoder, inputs_embeds=embedded)
    is_open, is_done = threading.Event(), threading.Event()

    def change() -> Tensor:
        with added(layers, {1: change_of(embedded, 32)}, offset=1):
            is_open.set()
            is_done.wait(timeout=60)
            return hidden(encoder, inputs_embeds=embedded)

    with ThreadPoolExecutor(1) as pool:
        moved = pool.submit(change)
        assert is_open.wait(timeout=60)
        other = hidden(encoder, inputs_embeds=embedded)
        is_done.set()
        assert torch.equal(other, plain)
        assert not torch.allclose(moved.result(), plain, atol=1e-3)


def test_a_spread_leaves_outliers_out() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator)
    assert spread(values) == pytest.approx(1.0, abs=0.02)
    values[:100] = 1000.0
    assert values.std() > 30
    assert spread(values) == pytest.approx(1.0, abs=0.15)


def test_padding_has_no_part_in_a_spread() -> None:
    model = make_sequence()
    split = model.encode(make_examples(9, seed=1))
    assert len(set(split.lengths)) > 2  # Else nothing is padded.
    prompt = model.start([[7, 9]], split, DeepPrompt())
    states = []
    for i in range(len(split)):
        with watched(model._layers) as seen:
            model.log_probs(prompt, split.select([i]))
        states.append(seen[1].flatten())
    assert model.spreads(prompt, split)["texts.1"] == pytest.approx(
        spread(torch.cat(states)), rel=1e-3
    )
