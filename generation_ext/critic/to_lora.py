# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""A critic with linear action values as a LoRA on the language model's output head, for engines that know nothing of us.

Such a critic adds `strength * w_a . h` to the logit of each token a, h being the last hidden state. With
`w_a = sum_i B[a, i] A[i]`, that is the output head with a LoRA of the rank of the action-value head's map.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from peft_ext.files import check_folder_writable, written_whole
from peft_ext.language_model import (
    ENCODER_DECODER,
    LanguageModel,
    base_name,
    device_of,
    embedding_weight,
    inference,
    other_adapters,
    start_token,
    token_embedding,
)
from peft_ext.model_card import SOURCE, Card, base_model, write_card
from peft_ext.tensor_files import write_tensors


if TYPE_CHECKING:
    from generation_ext.critic.value import Critic


FORMATS = ("peft", "gguf")
GGUF_FILE = "adapter.gguf"
_PROBED_TOKENS = 8
# How far from proportional a probe may be: bfloat16 rounds to 0.004.
_TOLERANCE = 0.02


class HeadLora(NamedTuple):
    """A change of an output head, float32.

    Attributes:
        name: The head's name in the language model.
        down: `[rank, hidden_size]`, PEFT's `lora_A`.
        up: `[vocabulary, rank]`, PEFT's `lora_B`.
    """

    name: str
    down: torch.Tensor
    up: torch.Tensor


def head_lora(critic: Critic, model: nn.Module, strength: float = 1.0) -> HeadLora:
    """The LoRA that steers as `CriticLogitsProcessor(model, critic, top_k=vocabulary, strength, mode="action-value")`.

    Args:
        critic: Has action values of `action_form="linear"`.
        model: Its language model.
        strength: The exponent of the odds ratio; negative: steers away.

    Raises:
        ValueError: If the critic isn't such a one, or the model does more to its logits than to scale them or to add
            constants.
    """
    _check_critic(critic)
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise ValueError(f"strength={strength!r} must be a finite number (negative: steers away).")
    critic.attach(model)
    language_model = LanguageModel(model)
    head = language_model.base.get_output_embeddings()
    name = next((name for name, module in language_model.base.named_modules() if module is head), None)
    if head is None or name is None:
        raise ValueError(f"model ({type(language_model.base).__name__}) has no output head that a LoRA can lie on.")
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            f"model: its output head {name!r} has an adapter already; merge it first (merge_and_unload())."
        )
    factor = _factor(language_model, head)
    embedding = embedding_weight(token_embedding(model)).detach().to("cpu", torch.float32)
    mapped = critic.action_map.weight.detach().to("cpu", torch.float32)
    down = mapped if critic.action_down is None else critic.action_down.weight.detach().to("cpu", torch.float32)
    up = embedding if critic.action_down is None else embedding @ mapped
    down = down / critic.root_mean_square.cpu()
    up = up * (strength * float(critic.embedding_scale) / math.sqrt(len(mapped)) / factor)
    # servers hold both in half precision: neither should have all of the scale
    balance = (up.norm(dim=0) / down.norm(dim=1).clamp(min=1e-20)).sqrt().clamp(min=1e-10)
    tokens = _outputs(head, len(up))
    up = nn.functional.pad(up, (0, 0, 0, max(0, tokens - len(up))))[:tokens]
    return HeadLora(name, (down * balance[:, None]).contiguous(), (up / balance).contiguous())


def write_lora(
    critic: Critic,
    model: nn.Module,
    output_dir: Union[str, Path],
    strength: float = 1.0,
    to: str = "peft",
) -> Path:
    """Write it as an adapter; see [`Critic.to_lora`][generation_ext.critic.Critic.to_lora].

    Returns:
        The folder, or the GGUF file.
    """
    if to not in FORMATS:
        raise ValueError(f"to={to!r} is unknown; choose one of {FORMATS}.")
    folder = Path(output_dir).expanduser()
    check_folder_writable(folder, "output_dir")
    architecture = _architecture(model) if to == "gguf" else None
    lora = head_lora(critic, model, strength)
    if other_adapters(model, "none") is not None:
        warnings.warn(
            "model has adapters, and the critic reads its hidden states with them: serve what they are merged into, or have "
            "them active beside this one.",
            stacklevel=3,
        )
    if architecture is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / GGUF_FILE) as partial:
            _write_gguf(lora, architecture, partial)
        return folder / GGUF_FILE
    with written_whole(folder, keep=True) as partial:
        partial.mkdir()
        _write_peft(lora, critic, model, strength, partial)
    return folder


def _check_critic(critic: Critic) -> None:
    config = critic.config
    if not config.action_values or config.action_form != "linear":
        has = f"has action values of action_form={config.action_form!r}" if config.action_values else "has none"
        raise ValueError(
            "to_lora needs a critic whose action values are linear in the hidden state, and this one "
            f"{has}: train one with Critic.for_model(model, action_values=True, action_form='linear', action_rank=16)."
        )
    if config.layers or config.running_mean:
        reads = f"layers={config.layers}, " if config.layers else ""
        raise ValueError(
            f"to_lora: this critic reads {reads}running_mean={config.running_mean}, and an output head the last hidden "
            "state alone: train one with Critic.for_model(..., layer=-1, running_mean=False)."
        )
    if config.lora_layers:
        raise ValueError(
            f"to_lora: this critic has a LoRA of its own (lora_rank={config.lora_rank}) and reads hidden states that a "
            "server doesn't compute; train one with lora_rank=0."
        )


def _factor(model: LanguageModel, head: nn.Module) -> float:
    """By what the logits move where the head's output, as a function of the backbone's hidden states, moves by 1.

    Families scale what goes into the head (T5) or comes out of it (Cohere, Granite), and some bend it (Gemma 2): found by
    running the model once as it is, and once with random numbers added to the head's output.
    """
    seen: dict[str, torch.Tensor] = {}

    def remember(name: str, at: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            value = args[0] if at == 0 else output[0] if isinstance(output, tuple) else output
            seen[name] = (value if isinstance(value, torch.Tensor) else value[0]).detach().float()

        return hook

    def add(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        seen["added"] = 30 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        return output + seen["added"]

    tokens = torch.arange(3, 3 + _PROBED_TOKENS, device=device_of(model.base))[None] % model.config.vocab_size
    inputs = {"input_ids": tokens}
    if model.kind == ENCODER_DECODER:
        start = torch.full_like(tokens[:, :1], start_token(model.base))
        inputs["decoder_input_ids"] = torch.cat([start, tokens[:, 1:]], dim=1)
    handles = [
        model.backbone.register_forward_hook(remember("hidden", 1)),
        head.register_forward_hook(remember("read", 0)),
    ]
    try:
        with inference(model.base), torch.no_grad():
            before = model.base(**inputs, use_cache=False).logits.float()
            handles.append(head.register_forward_hook(add))
            after = model.base(**inputs, use_cache=False).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    name = type(model.base).__name__
    if "added" not in seen or seen["read"].shape[-1] != seen["hidden"].shape[-1]:
        raise ValueError(f"model ({name}) doesn't put its last hidden states through its output head as they are.")
    rows = seen["read"].shape[1]
    into = _ratio(seen["hidden"][:, -rows:], seen["read"])
    out = _ratio(seen["added"], (after - before)[..., : seen["added"].shape[-1]])
    if into is None or out is None:
        raise ValueError(
            f"model ({name}) bends its {'hidden states before' if into is None else 'logits after'} the output head (such "
            "as final_logit_softcapping), so no LoRA on it adds to the logits what the critic adds; use "
            "CriticLogitsProcessor."
        )
    return into * out


def _ratio(one: torch.Tensor, other: torch.Tensor) -> Optional[float]:
    """What `one` is to be multiplied with to be `other`; None if there is no such number."""
    ratio = float((one.double() * other.double()).sum() / one.double().square().sum())
    rest = float((other.double() - ratio * one.double()).norm() / other.double().norm().clamp(min=1e-30))
    if not math.isfinite(ratio) or not ratio or rest > _TOLERANCE:
        return None
    return 1.0 if abs(ratio - 1.0) < 1e-3 else ratio


def _outputs(head: nn.Module, tokens: int) -> int:
    outputs = getattr(head, "out_features", None)
    return outputs if isinstance(outputs, int) else tokens


def _write_peft(lora: HeadLora, critic: Critic, model: nn.Module, strength: float, folder: Path) -> None:
    rank = len(lora.down)
    kind = LanguageModel(model).kind
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[lora.name],
        task_type="SEQ_2_SEQ_LM" if kind == ENCODER_DECODER else "CAUSAL_LM",
        base_model_name_or_path=base_name(model),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    start = f"base_model.model.{lora.name}"
    tensors = {f"{start}.lora_A.weight": lora.down, f"{start}.lora_B.weight": lora.up}
    write_tensors(folder / SAFETENSORS_WEIGHTS_NAME, tensors)
    write_card(_card(critic, model, lora, strength), folder)


def _card(critic: Critic, model: nn.Module, lora: HeadLora, strength: float) -> Card:
    base = base_model(model)
    snippet = f"""
import peft_ext
from peft import PeftModel

model = PeftModel.from_pretrained(peft_ext.load("{base.name}", kind="auto"), "{SOURCE}")
tokenizer = peft_ext.load_tokenizer("{base.name}")
output = model.generate(**tokenizer("The weather was", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(output[0]))
"""
    return Card(
        title=f"A critic of {base.title} as a LoRA",
        text=f"An ordinary PEFT LoRA on the output head of {base}, made from a critic (`Critic.to_lora`): it steers what the "
        "model writes, without the critic.",
        base=base,
        relation="adapter",
        library="peft",
        tags=("critic-control", "controlled-text-generation", "lora"),
        pipeline_tag="text-generation",
        facts={
            "strength": strength,
            "rank": len(lora.down),
            "on": f"`{lora.name}`",
            "control codes": ", ".join(f"`{code}`" for code in critic.config.control_codes) or "none",
        },
        snippet=None if base.name is None else snippet,
        notes=(
            "Don't merge it into a model whose embeddings are tied to its output head: the embeddings would change with it.",
        ),
    )


def _architecture(model: nn.Module) -> str:
    """llama.cpp's name of the model's architecture.

    Raises:
        ValueError: If it is none that we know, or its file has no output head for a LoRA to lie on.
        ImportError: If the `gguf` package is missing.
    """
    from peft_ext.checkpoint.gguf import ARCHITECTURES

    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("to='gguf' needs: pip install 'peft-ext[cli]' (or gguf)") from error
    base = LanguageModel(model).base
    name = type(base).__name__
    if name not in ARCHITECTURES:
        raise ValueError(f"to='gguf': the architecture {name} is unknown; known are {tuple(ARCHITECTURES)}.")
    head = base.get_output_embeddings()
    if getattr(head, "weight", None) is embedding_weight(token_embedding(model)):
        raise ValueError(
            "to='gguf': the output head is tied to the embeddings, and llama.cpp has no LoRA for such a head (it would look "
            "for output.weight, which the model's file lacks). Untie a copy and export that: "
            "head = model.get_output_embeddings(); head.weight = torch.nn.Parameter(head.weight.detach().clone()); "
            "model.config.tie_word_embeddings = False."
        )
    return ARCHITECTURES[name]


def _write_gguf(lora: HeadLora, architecture: str, path: Path) -> None:
    """As llama.cpp's `convert_lora_to_gguf.py` writes them."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(len(lora.down)))
    output = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.OUTPUT]
    writer.add_tensor(f"{output}.weight.lora_a", lora.down.numpy())
    writer.add_tensor(f"{output}.weight.lora_b", lora.up.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
