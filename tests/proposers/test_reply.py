from __future__ import annotations

import json
import time

from hypothesis import given
from hypothesis import strategies as st
import pytest

from optuna_llm_catalyst import InvalidReplyError
from optuna_llm_catalyst import records
from optuna_llm_catalyst.proposers import reply
from optuna_llm_catalyst.providers.base import estimated_tokens


FRAGMENTS = st.sampled_from(
    ['{"prompts": ["calm"]}', '{"prompts":', "[", "]", "{", "}", '"', ",", "\\", "<think>"]
    + [
        "</think>",
        "```json\n",
        "```",
        "null",
        "NaN",
        "1e999",
        "\x00",
        '{"prompts": [1]}',
        "\ud800",
    ]
)


@given(st.text() | st.lists(FRAGMENTS, max_size=12).map("".join))
def test_any_text_gives_clean_prompts_or_says_what_is_wrong(text: str) -> None:
    try:
        prompts = reply.parse(text)
    except InvalidReplyError as error:
        assert str(error)
        return
    assert prompts
    assert len(set(prompts)) == len(prompts)
    for prompt in prompts:
        assert prompt == " ".join(prompt.split())
        assert prompt and prompt.isprintable()
        assert len(prompt) <= reply.MAX_PROMPT


BYTES = st.binary(max_size=80) | st.lists(
    FRAGMENTS.map(lambda text: text.encode(errors="replace")) | st.binary(max_size=3), max_size=12
).map(b"".join)


@pytest.mark.parametrize("errors", ["replace", "surrogateescape"])
@given(data=BYTES)
def test_any_bytes_give_prompts_or_an_invalid_reply(errors: str, data: bytes) -> None:
    try:
        prompts = reply.parse(data.decode(errors=errors))
    except InvalidReplyError as error:
        # What is said of it goes into JSON records and back to the LLM.
        str(error).encode()
        return
    for prompt in prompts:
        prompt.encode()


@given(st.lists(st.text("abc ", max_size=6), max_size=6))
def test_prompts_come_back_in_order_without_repetitions(prompts: list[str]) -> None:
    text = json.dumps({"prompts": prompts})
    expected = list(dict.fromkeys(" ".join(p.split()) for p in prompts if p.strip()))
    if expected:
        assert reply.parse(text) == expected
    else:
        with pytest.raises(InvalidReplyError, match="list of prompts is empty"):
            reply.parse(text)


GOOD = '{"prompts": ["calm answer", "quick topic"]}'
TAGS = st.sampled_from(["<think>", "</think>", "<thinking>", "</thinking>", "<THINK>"])
THOUGHT = st.lists(st.text() | FRAGMENTS | TAGS, max_size=8).map("".join)


@given(thought=THOUGHT, tag=st.sampled_from(["</think>", "</thinking>", "</Think>"]))
def test_all_before_the_last_closing_tag_is_thought(thought: str, tag: str) -> None:
    assert reply.parse(f"{thought}{tag}{GOOD}") == reply.parse(GOOD)


@given(thought=THOUGHT, tag=st.sampled_from(["<think>", "<thinking>", "<Think>"]))
def test_all_after_an_opening_tag_is_thought(thought: str, tag: str) -> None:
    unclosed = thought.replace("/", "")
    assert reply.parse(f"{GOOD}{tag}{unclosed}") == reply.parse(GOOD)
    with pytest.raises(InvalidReplyError, match="is all thinking, without an answer"):
        reply.parse(f"{tag}{unclosed}{GOOD}")


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n\n  {GOOD}\n",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n```\nGood luck!",
        f'<think>Maybe {{"prompts": ["draft"]}}? No.</think>{GOOD}',
        f"<THINKING>\nhm\n</THINKING>\n{GOOD}",
        f"<think>one</think> <think>two</think> {GOOD}",
        f'{{"prompts": ["draft"]}} <think>No.</think> {GOOD}',
        f'{{"prompts": ["draft"]}}</think>{GOOD}',
        f'{GOOD}<think>Or {{"prompts": ["draft"]}}?',
        f"Sure! Here {{as asked}} they are: {GOOD} I hope {{this}} helps.",
        f'{GOOD}\n{{"prompts": ["a second thought"]}}',
        f'{{"note": "first"}} {GOOD}',
        f'{{"answer": {GOOD}}}',
        '{"prompts": ["calm answer", "calm answer", " calm   answer", "quick topic", ""]}',
        '{"prompts": ["calm\\u0000 answer", "quick\\n\\ttopic"], "why": {"a": [1, 2]}}',
        '{"prompts": ["\\ud800calm answer", "quick\\u2028topic\\u202e"]}',
    ],
)
def test_the_prompts_are_found_in(text: str) -> None:
    assert reply.parse(text) == ["calm answer", "quick topic"]


def test_tags_within_the_texts_of_a_whole_reply_are_text() -> None:
    prompts = ["calm </think> answer", "<think> quick"]
    assert reply.parse(json.dumps({"prompts": prompts})) == prompts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the reply is empty"),
        (" \n ", "the reply is empty"),
        ("<think>forever</think>", "the reply is empty after its thinking"),
        (f"<think>{GOOD}</think>\n", "the reply is empty after its thinking"),
        (f"{GOOD}<think>Was that right?</think>", "the reply is empty after its thinking"),
        (f"<think>Say {GOOD} or", "the reply is all thinking, without an answer"),
        (f"<think>one</think> <think>{GOOD}", "the reply is all thinking, without an answer"),
        (f"<think>Say {GOOD}</think>I would rather not.", "has no object"),
        ("calm answer", "has no object"),
        ('["calm answer"]', "has no object"),
        ('"calm answer"', "has no object"),
        ("null", "has no object"),
        ('{"prompt": ["calm answer"]}', "has no object"),
        ('{"prompts": "calm answer"}', "has no object"),
        ('{"prompts": {"0": "calm answer"}}', "has no object"),
        ('{"prompts": [["calm answer"]]}', "has no object"),
        ('{"prompts": ["calm answer", 1]}', "has no object"),
        ('{"prompts": ["calm answer", null]}', "has no object"),
        ('{"prompts": ["calm answer", ', "has no object"),
        ('{"prompts": ["calm answer"', "has no object"),
        ("{'prompts': ['calm answer']}", "has no object"),
        ('{"prompts": [' + "9" * 10_000 + "]}", "has no object"),
        ('{"prompts": []}', "list of prompts is empty"),
        ('{"prompts": ["", " ", "\\u0000"]}', "list of prompts is empty"),
    ],
)
def test_a_reply_that_is_no_list_of_prompts_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidReplyError, match=reason):
        reply.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "{" * 32_000,
        "[" * 32_000,
        '{"prompts": ' + "[" * 31_000,
        '{"prompts": ' + "[" * 15_000 + "]" * 15_000 + "}",
        '{"a":' * 6_000,
        '{"a":' * 5_000 + "1" + "}" * 5_000,
        '{"' * 16_000,
        '{"prompts": ["' + "\\" * 31_000,
        "<think>" * 4_500,
        "</think>" * 4_000,
        "<think>" * 2_200 + "</think" * 2_200,
        "<think></think>" * 2_100,
        "```json" * 4_500,
        '{"prompts": [' + "9" * 31_000 + "]}",
    ],
)
def test_a_reply_that_would_choke_the_parser_is_refused(text: str) -> None:
    assert len(text) <= reply.MAX_REPLY
    started = time.thread_time()  # Whatever other threads of the process do meanwhile.
    with pytest.raises(InvalidReplyError):
        reply.parse(text)
    assert time.thread_time() - started < 2


def test_a_huge_reply_is_refused_unread() -> None:
    huge = GOOD + " " * reply.MAX_REPLY
    with pytest.raises(InvalidReplyError, match=f"has {len(huge)} characters, over 32000"):
        reply.parse(huge)
    assert reply.parse(GOOD.ljust(reply.MAX_REPLY)) == reply.parse(GOOD)


def test_a_reply_is_as_long_as_its_record() -> None:
    """A recorded reply that was too long is too long when it is replayed, and no other is."""
    longest = GOOD.ljust(reply.MAX_REPLY)
    assert records.clip(longest) == longest
    assert len(records.clip(longest + " ")) > reply.MAX_REPLY


def test_a_huge_prompt_is_cut() -> None:
    (prompt,) = reply.parse(json.dumps({"prompts": ["calm " * 6_000]}))
    assert prompt == ("calm " * 200).strip()


@pytest.mark.parametrize("n", [1, 4])
def test_the_schema_asks_for_so_many_strings(n: int) -> None:
    schema = reply.schema(n)
    assert schema["required"] == ["prompts"]
    prompts = schema["properties"]["prompts"]
    assert prompts["items"] == {"type": "string"}
    pattern = "^[a-z]+$"
    items = reply.schema(n, pattern)["properties"]["prompts"]["items"]
    assert items == {"type": "string", "pattern": pattern}
    assert prompts["minItems"] == prompts["maxItems"] == n
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize("form", [["...", "..."], list(reply.EXAMPLES), []])
def test_the_example_of_the_form_is_passed_over(form: list[str]) -> None:
    echo = json.dumps({"prompts": form})
    assert reply.parse(f'As {echo} says: {{"prompts": ["calm answer"]}}') == ["calm answer"]


@pytest.mark.parametrize(("n", "length"), [(1, 1), (1, 8), (2, 3), (9, 20)])
def test_an_example_is_of_the_form_that_is_wanted(n: int, length: int) -> None:
    shown = reply.examples(n, length)
    assert len(shown) == min(n, 2)
    assert all(1 <= len(text.split()) <= length and reply.is_example(text) for text in shown)


@given(n=st.integers(1, 20), length=st.integers(1, 60))
def test_a_reply_has_room_for_its_prompts(n: int, length: int) -> None:
    prompts = [" ".join(["unbelievable"] * length)] * n
    text = json.dumps({"prompts": prompts}, indent=1)
    assert estimated_tokens(text) <= reply.max_tokens(n, length)
