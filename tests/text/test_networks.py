"""Extra networks: what they say, and that nothing else of the prompt is touched."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.text.networks import extracted, show_network
from reverie.text.pieces import Network


@pytest.mark.parametrize(
    ("tag", "network"),
    [
        ("<lora:x>", Network("lora", "x", 1.0, 1.0)),
        ("<lora:x:0.5>", Network("lora", "x", 0.5, 0.5)),
        ("<lora:x:0.5:0.8>", Network("lora", "x", 0.5, 0.8)),
        ("<lora:x:0.5:0.8:32>", Network("lora", "x", 0.5, 0.8, 32)),
        ("<lora:x:te=0.3>", Network("lora", "x", 0.3, 0.3)),
        ("<lora:x:unet=0.7>", Network("lora", "x", 1.0, 0.7)),
        ("<lora:x:0.2:unet=0.7:dyn=8>", Network("lora", "x", 0.2, 0.7, 8)),
        ("<lora:x:-1>", Network("lora", "x", -1.0, -1.0)),
        ("<lyco:x:.5>", Network("lora", "x", 0.5, 0.5)),
        ("<hypernet:x:0.4>", Network("hypernet", "x", 0.4, 0.4)),
        ("<lora: a b (c) : 1. >", Network("lora", "a b (c)", 1.0, 1.0)),
    ],
)
def test_a_network_is_taken_out_and_read(tag: str, network: Network) -> None:
    assert extracted(f"a {tag}b") == ("a b", (network,), [])
    assert extracted(show_network(network)) == ("", (network,), [])


@pytest.mark.parametrize(
    ("tag", "why"),
    [
        ("<lora:x:strong>", "'strong' is no number"),
        ("<lora:x:1e400>", "'1e400' is no number"),
        ("<lora:x:nan>", "'nan' is no number"),
        ("<lora:x:1:1:2.5>", "'2.5' is no whole number"),
        ("<lora::1>", "it has no name"),
        ("<lora:x:unit=1>", "'unit' is no weight; known: te, unet, dyn"),
        ("<lara:x:1>", "'lara' is no kind of network; known: lora, lyco, hypernet"),
    ],
)
def test_a_network_that_cannot_be_meant_is_left_out_and_told(tag: str, why: str) -> None:
    assert extracted(f"a {tag} b") == ("a  b", (), [f"{tag!r} is left out: {why}"])


@pytest.mark.parametrize("text", ["a < b > c", "<lora:x", "<lora:>", "<:x>", "1 <2: 3", "<lora>", "<-lora:x>"])
def test_other_text_stays(text: str) -> None:
    assert extracted(text) == (text, (), [])


@settings(deadline=None)
@given(st.lists(st.sampled_from(["<", ">", "lora", ":", "x", "1", "=", " "]), max_size=30).map("".join))
def test_what_is_taken_out_is_what_upstream_takes_out(text: str) -> None:
    rest, networks, warnings = extracted(text)
    tags = re.findall(r"<\w+:[^>]+>", text)
    assert rest == re.sub(r"<\w+:[^>]+>", "", text)
    assert len(tags) == len(networks) + len(warnings)
