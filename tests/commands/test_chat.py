# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext chat`, its standard input a pipe; and generate and eval on every kind of model."""

from __future__ import annotations

import io
import json

import pytest

from peft_ext.cli import main
from peft_ext.commands.chat import Conversation
from peft_ext.models import load, load_tokenizer
from tests.tiny.folders import save_chat_model


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("chat") / "model")


def talk(monkeypatch, capsys, lines: str, *arguments: object) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    options = ["--max_new_tokens", "6", "--do_sample", "False"]
    assert main(["chat", *map(str, arguments), *options]) == 0
    return capsys.readouterr().out


def conversation(folder) -> Conversation:
    options = {"max_new_tokens": 6, "do_sample": False}
    return Conversation(load(str(folder)), load_tokenizer(str(folder)), options)


def test_what_is_said_is_remembered(chat_folder, monkeypatch, capsys):
    """The second answer follows on both turns; after /reset, on the last alone."""
    by_hand = conversation(chat_folder)
    model, tokenizer, messages, answers = by_hand.model, by_hand.tokenizer, [], []
    for line in ("One", "Two"):
        messages.append({"role": "user", "content": line})
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        written = model.generate(**tokens, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers.append(tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert ["".join(by_hand.say(line)) for line in ("One", "Two")] == answers
    assert by_hand.messages == messages
    out = talk(monkeypatch, capsys, "One\n\nTwo\n/reset\nOne\n/nothing\n/exit\nThree\n", chat_folder)
    assert out.startswith(f"{answers[0]}\n{answers[1]}\n(forgotten)\n{answers[0]}\nunknown command /nothing")
    assert out == talk(monkeypatch, capsys, "One\nTwo\n/reset\nOne\n/nothing\n", "--model", chat_folder)


def test_an_answer_can_be_stopped(chat_folder):
    chat = conversation(chat_folder)
    chat.options = {"min_new_tokens": 400, "max_new_tokens": 400, "do_sample": False}
    pieces = chat.say("Hi")
    first = next(piece for piece in pieces if piece)
    pieces.close()  # as Ctrl-C does
    assert chat.messages[-1]["role"] == "assistant" and chat.messages[-1]["content"].startswith(first)
    assert len(chat.messages[-1]["content"]) < 300
    chat.options = {"max_new_tokens": 2, "do_sample": False}
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    list(chat.say("Go on"))
    assert len(chat.messages) == 4


def test_ctrl_c_stops_the_answer_and_not_the_program(chat_folder, monkeypatch, capsys):
    def interrupted(self, text):
        yield "Hal"
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "say", interrupted)
    assert talk(monkeypatch, capsys, "One\nTwo\n", chat_folder) == "Hal (stopped)\nHal (stopped)\n"


def test_too_long_a_conversation_goes_on(chat_folder, monkeypatch, capsys):
    out = talk(monkeypatch, capsys, "x" * 600 + "\nHi\n", chat_folder)
    assert "has room for 512; /reset" in out and len(out.splitlines()) == 2


def test_without_a_chat_template(float_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert main(["chat", str(float_folder)]) == 2
    assert "has no chat template; pass --plain True" in capsys.readouterr().err
    assert talk(monkeypatch, capsys, "Hi\n", float_folder, "--plain", "True")


def test_a_system_message(chat_folder, monkeypatch, capsys):
    chat = Conversation(load(str(chat_folder)), load_tokenizer(str(chat_folder)), system="Be brief.")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    chat.messages.append({"role": "user", "content": "Hi"})
    chat.reset()
    assert len(chat.messages) == 1
    assert talk(monkeypatch, capsys, "Hi\n", chat_folder, "--system", "Be brief.")


def test_any_model_will_do(float_folder, run, tmp_path, monkeypatch, capsys):
    """Float, packed, adapter, run and GGUF, for generate, eval, chat and export."""
    folder, _ = run
    assert main(["export", str(folder), "--to", "gguf", "--output_dir", str(tmp_path / "gguf")]) == 0
    models = [float_folder, folder / "base", folder / "adapter", folder, tmp_path / "gguf" / "model.gguf"]
    common = ["--block_size", "32", "--blocks", "2", "--output", str(tmp_path / "e.json")]
    perplexities = []
    for model in models:
        assert main(["generate", str(model), "--prompt", "one", "--max_new_tokens", "2", "--device", "cpu"]) == 0
        assert main(["eval", "--model", str(model), *common]) == 0
        perplexities.append(json.loads((tmp_path / "e.json").read_text())["perplexity"])
        assert talk(monkeypatch, capsys, "one\n", model, "--plain", "True")
    assert perplexities[2] == perplexities[3] == pytest.approx(perplexities[4], rel=1e-2)
    assert len(set(perplexities)) >= 3
    for number, model in enumerate(models):
        out = tmp_path / f"float-{number}"
        assert main(["export", str(model), "--to", "dequantized", "--output_dir", str(out)]) == 0
        assert main(["eval", str(out), *common]) == 0
        found = json.loads((tmp_path / "e.json").read_text())["perplexity"]
        assert found == pytest.approx(perplexities[number], rel=1e-3)
    assert main(["generate", str(float_folder), "--prompt", "one", "--device", "cuda:77"]) == 2
    assert "device='cuda:77' can't be used" in capsys.readouterr().err
