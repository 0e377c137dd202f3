"""Checkpoints, batch files, prompts and texts of others: what of them is refused, and how."""

import json
import shutil
import struct

import pytest
import tokenizers
import torch
import transformers
from command_line import refused, sora
from reliability.guarded import in_a_process
from reliability.templates import TEMPLATES
from safetensors.torch import load_file, save_file

from sora_model import Request, SoraPipeline
from sora_model.caption.template import TemplateRefused, render
from sora_model.cli.text import one_line, visible
from sora_model.limits import Limits, limits, raised_limits, set_limits
from sora_model.storage.documents import read_json_file
from sora_model.storage.tokenizer import check_tokenizer, detokenize, tokenize
from sora_model.storage.weights import read_json, read_shapes
from sora_model.text.words import Vocabulary


@pytest.fixture(autouse=True)
def _limits_as_they_are():
    before = limits()
    yield
    set_limits(before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "a twice in one object"),
        ('{"a": NaN}', "NaN, which is no number of JSON"),
        ('{"a": -1e999}', "-1e999, which is too large a number"),
        (f'{{"a": {"9" * 41}}}', "a number of 41 digits"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "its depth: expected at most 64 .*, got 65; 'sora --limit json-depth=65"),
        ('{"a": "' + "x" * 2**24 + '"}', r"a\.json: expected at most 16777216 bytes, got 16777225; 'sora --limit json-bytes="),
        ("\ufeff[1]", "expected an object, got list"),
    ],
)  # fmt: skip
def test_json_is_read_strictly(text, message, tmp_path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"owner: .*{message}"):
        read_json(tmp_path / "a.json", "owner")


def test_many_names_take_no_time(tmp_path) -> None:
    """They were compared each with each."""
    (tmp_path / "a.json").write_text("{" + ", ".join(f'"{i}": 1' for i in range(200_000)) + "}")
    ended = in_a_process(
        lambda: len(read_json_file(tmp_path / "a.json")), writable=tmp_path, untrusted=tmp_path, protected=tmp_path
    )
    assert ended.code == 0
    assert ended.seconds < 5


def test_headers_have_a_limit(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    for length in (2**24 + 1, 2**60, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(
            ValueError, match=rf"a\.safetensors: expected safetensors, got 10 bytes that begin as a header of {length}"
        ):
            read_shapes([path], "owner")
    length = 2**24 + 1
    with path.open("wb") as file:  # as large as it says, of zeros that no disk has to hold
        file.write(struct.pack("<Q", length))
        file.truncate(length + 8)
    with pytest.raises(ValueError, match=rf"header of safetensors: .* got {length}; 'sora --limit header-bytes={length} "):
        read_shapes([path], "owner")
    with raised_limits(header_bytes=2**60), pytest.raises(ValueError, match="expected safetensors, got"):
        read_shapes([path], "owner")


def test_limits_are_checked() -> None:
    assert limits() == Limits()
    for value in (0, -1, 1.5, True, 2**63):
        with pytest.raises(ValueError, match="set_limits: text: expected a whole number from 1 to"), raised_limits(text=value):
            pass
    with (
        pytest.raises(ValueError, match=r"raised_limits: expected names out of picture_pixels, .*, got pixels"),
        raised_limits(pixels=1),
    ):
        pass
    with pytest.raises(TypeError, match="set_limits: new: expected Limits, got int"):
        set_limits(3)  # type: ignore[arg-type]
    line = refused("--limit", "text=1.5e8", "vocabulary")
    assert "error: --limit: text: expected a whole number, such as 20000 or 1e8, got '1.5e8'" in line
    assert "error: --limit: expected NAME=NUMBER, NAME out of picture-pixels, " in refused("--limit", "pixels=3", "vocabulary")
    for text in ("", "text", "text=", "text=-1", "text=1.5", "pixels=3", "text=1e99", "text=0"):
        assert "error: --limit: " in refused("--limit", text, "vocabulary")


def test_texts_have_a_limit(small, tmp_path) -> None:
    long = "a" * 20_001
    line = refused("generate", long, "--checkpoint", small, "--out", tmp_path)
    assert (
        "error: PROMPTS: expected at most 20000 characters, got 20001; 'sora --limit text=20001 COMMAND ...' raises the limit"
        in line
    )
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "a", "negative_prompt": long}]))
    line = refused("batch", tmp_path / "a.json", "--checkpoint", small, "--out", tmp_path)
    assert "error: batch: request 0: negative_prompt: expected at most 20000 characters" in line
    with pytest.raises(ValueError, match="Request: prompt: expected at most 20000 characters, got 20001"):
        Request(long, (1, 8, 8))
    with raised_limits(text=20_001):
        Request(long, (1, 8, 8))
    sora("--limit", "text=3e4", "generate", long, "--checkpoint", small, "--out", tmp_path, "--steps", 1)


def test_a_line_takes_time_by_its_length() -> None:
    """A million blanks took hours."""
    blanks = " " * 10**6
    assert one_line(f"a{blanks}b \n c\u2028d\te\n") == f"a{blanks}b c d\te"


def test_no_text_steers_the_terminal(small, tmp_path) -> None:
    assert visible("a\x1b]0;x\x07\u202eb\ud800\tc\n") == "a\\x1b]0;x\\x07\\u202eb\\ud800\tc\n"
    path = shutil.copytree(small, tmp_path / "evil") / "model_index.json"
    path.write_text(json.dumps({"_class_name": "\x1b[2J" + "x" * 10**6}))
    line = refused("info", "--checkpoint", tmp_path / "evil")
    assert "\x1b" not in line
    assert "\\x1b[2J" in line
    assert len(line) < 3000


@pytest.mark.parametrize("template", [TEMPLATES[1], "{{ 'a' * 10**10 }}", "{% include '/etc/passwd' %}"])
def test_a_chat_template_ends(template) -> None:
    """Whatever it says, and it runs nothing. The first one would go on for minutes."""
    with pytest.raises(TemplateRefused):
        render(template, [{"role": "user", "content": "a"}], {}, 10_000)


def test_chat_templates_see_what_they_see_in_transformers() -> None:
    template = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}\n  {{ bos_token }}{{ m | tojson }}\n{% endfor %}"
        "{% generation %}{{ add_generation_prompt }}{% endgeneration %}{{ strftime_now('%Y') | length }}"
    )
    messages = [{"role": "user", "content": "é<"}, {"role": "user", "content": "b"}]
    text = render(template, messages, {"bos_token": "<s>", "add_generation_prompt": True}, 100)
    from test_pretrained_text import tokenizer

    reader = tokenizer()
    reader.add_special_tokens({"bos_token": "<s>"})
    theirs = reader.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text == theirs


def test_tokenizers_may_not_blow_up_a_text(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    for name, rules in (("normalizer", [rule] * 3), ("decoder", [{**rule, "pattern": {"Regex": "a*"}, "content": "x" * 999}])):
        path.write_text(json.dumps({name: {"type": "Sequence", "normalizers": rules}}))
        with pytest.raises(
            ValueError, match=rf"owner: .*tokenizer\.json: {name}: expected rules that make a text at most 160 times"
        ):
            check_tokenizer(path, "owner")
    path.write_text(json.dumps({"post_processor": {"single": [{}] * 257}}))
    with pytest.raises(ValueError, match="single: expected at most 256 parts, got 257"):
        check_tokenizer(path, "owner")
    path.write_text(json.dumps({"normalizer": {"type": "Sequence", "normalizers": [rule] * 2}}))
    check_tokenizer(path, "owner")


def test_ids_without_a_vector_are_refused() -> None:
    from test_pretrained_text import tokenizer

    with pytest.raises(ValueError, match=r"owner: tokenizer: expected ids from 0 to 1, got \d"):
        tokenize(tokenizer(), ["a red circle"], 2, "owner", padding=True, return_tensors="pt")

    class PanicException(BaseException):
        """As of the tokenizers library, whose regular expressions give up in this way."""

    def panics(*_: object) -> None:
        raise PanicException("retry-limit-in-match over")

    with pytest.raises(ValueError, match="owner: tokenizer: expected one that can read the texts, got retry-limit"):
        tokenize(panics, ["a"], 2, "owner")


def test_a_decoder_that_panics_is_named() -> None:
    reader = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    reader.decoder = tokenizers.decoders.Strip("a", 1, 1)
    with pytest.raises(ValueError, match="owner: tokenizer: expected one that can write the ids, got "):
        detokenize(transformers.PreTrainedTokenizerFast(tokenizer_object=reader), [0], "owner")


def test_a_vocabulary_that_is_no_text_is_named(tmp_path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"vocab\.txt: expected text in UTF-8"):
        Vocabulary.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "got step -1 after 1 s"),
        ({"step": 2**60}, "got step 1152921504606846976 after 1 s"),
        ({"step": True}, "got step True"),
        ({"step": 10**6}, "got step 1000000 after 1 s"),
        ({"seconds": "x"}, "got seconds 'x'"),
        ({"seconds": float("nan")}, "got seconds nan"),
        ({"settings": [1]}, "got a config or settings that are no objects"),
    ],
)
def test_a_state_that_cannot_be_is_refused(change, message, tmp_path) -> None:
    from sora_model.training.resume import read_state

    state = {"step": 1, "seconds": 1.0, "config": {}, "settings": {}} | change
    save_file({"a": torch.zeros(1)}, tmp_path / "training.safetensors", {"state": json.dumps(state)})
    with pytest.raises(ValueError, match=f"expected the state of a run of this package, {message}"):
        read_state(tmp_path / "training.safetensors")


def test_states_that_no_run_has_are_refused(small, tmp_path) -> None:
    run, options = tmp_path / "run", ["--start", str(small), "--size", "1x16x16", "--tokens", "32", "--steps"]
    sora("train", run, *options, 1)
    path = run / "training.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = {"state": file.metadata()["state"]}  # without a checksum, which would say so first
    moment = next(name for name in weights if name.startswith("optimizer.") and weights[name].ndim > 1)
    trained = next(name for name in weights if name.startswith("model."))
    for name, value, message in (
        (moment, weights[moment].flatten()[:3], "expected float32 ["),
        (moment, weights[moment].new_zeros(()), "expected float32 ["),
        (moment, weights[moment] * float("nan"), "expected finite numbers"),
        ("average.n_averaged", torch.tensor(-5), "expected the step 1, got -5"),
        (trained, weights[trained].to(torch.int8), ""),
    ):
        save_file({**weights, name: value.contiguous()}, path, metadata)
        line = refused("train", run, *options, "2", "--resume")
        assert f"{path}: {name.removeprefix('model.')}: {message}" in line


def test_a_checkpoint_that_cannot_be_resumed_names_resume(small, tmp_path) -> None:
    """Not the option --start, which nobody gave."""
    run, options = tmp_path / "run", ["--start", str(small), "--size", "1x16x16", "--tokens", "32", "--steps"]
    sora("train", run, *options, 1)
    path = run / "checkpoint" / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": [1, 16, "2"]}))
    line = refused("train", run, *options, "2", "--resume")
    assert "error: --resume: " in line
    assert "model_index.json: size: expected [T, H, W], each at least 1" in line


def test_schedulers_and_vaes_have_numbers_that_can_be(small, tmp_path) -> None:
    path = shutil.copytree(small, tmp_path / "a") / "scheduler" / "scheduler_config.json"
    for value in (2**40, 0, "x", 1.5):
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_timesteps": value}))
        with pytest.raises(
            ValueError, match=r"scheduler_config\.json: num_train_timesteps: expected a whole number from 1 to 100000"
        ):
            SoraPipeline.from_pretrained(tmp_path / "a")
