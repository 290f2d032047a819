"""Texts taken apart: what comes out does not depend on where their pieces end."""

from hypothesis import given
from hypothesis import strategies as st

from orthrus.serve.parts import Call, Parts, Splitter, joined
from orthrus.serve.transcript import Piece

TOOLS = {
    "paint": {"colour": {"type": "string"}, "count": {"type": "integer"}, "more": {"type": ["object", "null"]}},
    "now": {},
}
TAGGED = (
    '<tool_call>\n<function=paint>\n<parameter=colour>\nré"d\n</par\n\n</parameter>\n<parameter=count>\n3\n'
    '</parameter>\n<parameter=more>\n{"a": [1]}\n</parameter>\n</function>\n</tool_call>'
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": {"b": 1}, "c": "}</x>"}}\n</tool_call>'
TEXTS = {
    "plain <b>text</b> < here": ("plain <b>text</b> < here", "", []),
    "<think>\nhm\n</think>\n\nyes": ("yes", "hm\n", []),
    f"first{CALL}": ("first", "", [("add", '{"a": {"b": 1}, "c": "}</x>"}')]),
    f"{CALL}\n{CALL}": ("", "", [("add", '{"a": {"b": 1}, "c": "}</x>"}')] * 2),
    '<tool_call>{"arguments": {"x": "ü"}, "name": "f"}</tool_call>': ("", "", [("f", '{"x": "ü"}')]),
    "<tool_call>not json</tool_call> after": ("<tool_call>not json</tool_call> after", "", []),
    '<tool_call>{"name": 7}</tool_call>': ('<tool_call>{"name": 7}</tool_call>', "", []),
    "<tool_call>{": ("<tool_call>{", "", []),
    '<tool_call>{"name": "f", "arguments": {"x": 1': ("", "", [("f", '{"x": 1')]),
    f"so {TAGGED}{CALL}": (
        "so ",
        "",
        [
            ("paint", r'{"colour": "ré\"d\n</par\n", "count": 3, "more": {"a": [1]}}'),
            ("add", '{"a": {"b": 1}, "c": "}</x>"}'),
        ],
    ),
    "<tool_call><function=now></function></tool_call>": ("", "", [("now", "{}")]),
    "<tool_call><function=other><parameter=x>7</parameter></function></tool_call>": ("", "", [("other", '{"x": "7"}')]),
    "<tool_call>\n<function=paint>\n<parameter=count>\nmany\n</parameter>\n<parameter=more>\n7\n</parameter>\n"
    "</function></tool_call>": ("", "", [("paint", '{"count": "many", "more": "7"}')]),
    "<tool_call><function=paint><parameter=colour>\nre": ("", "", [("paint", '{"colour": "re')]),
    "<tool_call><fun</tool_call>": ("<tool_call><fun</tool_call>", "", []),
    "<tool_call>\n</tool_call>": ("<tool_call>\n</tool_call>", "", []),
    "<think>never done": ("", "never done", []),
    "a </think> b <thi": ("a </think> b <thi", "", []),
}


def taken_apart(text: str, cuts: list[int]) -> tuple[str, str, list[tuple[str | None, str]]]:
    """Push a text in pieces that end at the cuts, then the end."""
    splitter = Splitter(thinks=True, tools=TOOLS)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    got: list[Parts] = []
    for start, end in zip([0, *ends], ends, strict=False):
        got.append(splitter.push([Piece(text[start:end], end, "draft")]))
    got.append(splitter.push([], last=True))
    content = "".join(piece.text for parts in got for piece in parts.content)
    calls = joined([call for parts in got for call in parts.calls])
    return content, "".join(parts.reasoning for parts in got), [(call.name, call.arguments) for call in calls]


@given(text=st.sampled_from(sorted(TEXTS)), cuts=st.lists(st.integers(0, 260), max_size=12))
def test_a_text_is_taken_apart_alike_however_it_comes(text: str, cuts: list[int]) -> None:
    assert taken_apart(text, cuts) == TEXTS[text]


def test_every_character_may_come_alone() -> None:
    for text, wanted in TEXTS.items():
        assert taken_apart(text, list(range(len(text)))) == wanted


def test_arguments_come_as_they_are_written() -> None:
    splitter = Splitter(tools={})
    splitter.push([Piece('<tool_call>{"name": "f", "argu', 1, "draft")])
    assert splitter.push([Piece('ments": {"city": "Par', 2, "draft")]).calls == [Call(0, "f", '{"city": "Par')]
    assert splitter.push([Piece('is"}', 3, "draft")]).calls == [Call(0, None, 'is"')]
    assert splitter.push([Piece("}</tool_call>", 4, "draft")]).calls == [Call(0, None, "}")]


def test_texts_between_tags_come_as_they_are_written_and_other_values_when_they_are_whole() -> None:
    splitter = Splitter(tools=TOOLS)
    splitter.push([Piece("<tool_call>\n<function=pai", 1, "draft")])
    said = [
        splitter.push([Piece(text, 2, "draft")]).calls
        for text in ("nt>\n<parameter=colour>\nre", "d\n</para", "meter>\n<parameter=count>\n1", "2\n</parameter>")
    ]
    assert said == [
        [Call(0, "paint", '{"colour": "re')],
        [Call(0, None, "d")],
        [Call(0, None, '", "count": ')],
        [Call(0, None, "12")],
    ]


def test_a_value_that_json_has_not_is_a_text() -> None:
    text = "<tool_call><function=paint><parameter=count>NaN</parameter></function></tool_call>"
    assert taken_apart(text, []) == ("", "", [("paint", '{"count": "NaN"}')])


def test_a_thought_that_the_prompt_opened_goes_on() -> None:
    splitter = Splitter(thinks=True, thinking=True)
    assert splitter.push([Piece("\nso</th", 1, "draft")]).reasoning == "so"
    parts = splitter.push([Piece("ink>\n\nyes", 2, "draft")])
    assert [piece.text for piece in parts.content] == ["yes"]


def test_tags_are_text_where_neither_thoughts_nor_tools_are_asked_for() -> None:
    text = f"<think>x</think>{CALL}"
    assert "".join(piece.text for piece in Splitter().push([Piece(text, 1, "draft")], last=True).content) == text


def test_pieces_of_content_keep_their_cycle_and_source() -> None:
    parts = Splitter(thinks=True).push([Piece("a<th", 1, "draft"), Piece("ink>b</think>c", 2, "bonus")], last=True)
    assert parts.content == [Piece("a", 1, "draft"), Piece("c", 2, "bonus")]
