# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""`peft-ext chat`: talk with any model in the terminal; its answers appear as they are written."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from peft_ext.command_line import parse
from peft_ext.commands.run_folder import AnyModelArguments


COMMANDS = "/reset forgets the conversation, /exit ends; Ctrl-C stops an answer."


OWNS_STDOUT = True  # what it prints is the conversation


@dataclass
class ChatArguments(AnyModelArguments):
    """Arguments of `peft-ext chat`."""

    system: Optional[str] = field(default=None, metadata={"help": "A system message to begin with."})
    plain: bool = field(
        default=False,
        metadata={"help": "No chat template: the model goes on from what was said so far, as it stands."},
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens of an answer at most."})
    do_sample: bool = field(default=True, metadata={"help": "Sample; False takes the most likely token."})
    temperature: float = field(default=0.7, metadata={"help": "Temperature of sampling."})
    top_p: float = field(default=0.95, metadata={"help": "Probability mass to sample from."})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Penalty of tokens that stand in the conversation already."}
    )
    seed: Optional[int] = field(default=None, metadata={"help": "Seed of sampling."})


class Conversation:
    """What was said so far, and how the model goes on.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer; with a chat template unless `plain`.
        options: Of `generate`.
        system: A system message.
        plain: Turns follow each other as they stand.

    Raises:
        ValueError: If there is no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        options: Optional[dict[str, Any]] = None,
        system: Optional[str] = None,
        plain: bool = False,
    ) -> None:
        if not plain and tokenizer.chat_template is None:
            raise ValueError(
                "this model's tokenizer has no chat template; pass --plain True, and the model goes on from your text."
            )
        self.model, self.tokenizer, self.options = model, tokenizer, options or {}
        self.system, self.plain = system, plain
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def tokens(self) -> torch.Tensor:
        """What the model sees, int64 `[1, tokens]`."""
        if self.plain:
            text = "".join(message["content"] for message in self.messages)
            return self.tokenizer(text, return_tensors="pt")["input_ids"]
        return self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]

    def say(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. If the caller stops early, generation does too; what came stays in the history."""
        self.messages.append({"role": "user", "content": text})
        answer, stop, failed = "", threading.Event(), []
        try:
            tokens = self.tokens().to(self.model.device)
            self._check_length(tokens.shape[1])
        except Exception:
            self.messages.pop()
            raise
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def work() -> None:
            try:
                with torch.no_grad():
                    self.model.generate(
                        input_ids=tokens,
                        attention_mask=torch.ones_like(tokens),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([_Stopped(stop)]),
                        pad_token_id=self.tokenizer.pad_token_id,
                        **self.options,
                    )
            except BaseException as error:  # shown where the pieces are read
                failed.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            for piece in streamer:
                answer += piece
                yield piece
        finally:
            stop.set()
            thread.join()
            self.messages.append({"role": "assistant", "content": answer})
        if failed:
            raise failed[0]

    def _check_length(self, count: int) -> None:
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and count >= room:
            raise ValueError(
                f"the conversation has {count} tokens, and the model has room for {room}; /reset forgets it."
            )


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def main(argv: Sequence[str]) -> None:
    """Read lines until /exit or the end of the input, and answer each."""
    (args,) = parse(argv, ChatArguments, positional="model")
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={args.max_new_tokens} must be at least 1.")
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model, tokenizer = args.load()
    names = ["max_new_tokens", "do_sample", "repetition_penalty"]
    names += ["temperature", "top_p"] if args.do_sample else []
    options = {name: getattr(args, name) for name in names}
    conversation = Conversation(model, tokenizer, options, args.system, args.plain)
    if sys.stdin.isatty():
        print(COMMANDS)
        try:
            import readline  # noqa: F401 (input() then edits lines and remembers them)
        except ImportError:
            pass
    while True:
        line = _line()
        if line is None or line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            conversation.reset()
            print("(forgotten)")
        elif line.strip().startswith("/"):
            print(f"unknown command {line.strip().split()[0]}: {COMMANDS}")
        elif line.strip():
            _answer(conversation, line)


def _line() -> Optional[str]:
    """The next line, without its end; None at the end of the input. Ctrl-C at the prompt gives up the line alone."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(f"\n({COMMANDS})")
        return ""


def _answer(conversation: Conversation, line: str) -> None:
    pieces = conversation.say(line)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        print(" (stopped)")
    except ValueError as error:
        print(f"({error})")
