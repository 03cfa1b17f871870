# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The mixin on transformers' and TRL's trainers: which tokens, which scale, which teacher, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_ext import PeqaConfig
from peft_ext.distillation import DistillationMixin, DistillationTrainer
from peft_ext.distillation.output_head import output_head
from tests.tiny import families
from tests.tiny.models import tiny
from tests.tiny.moe import tiny_moe
from tests.tiny.tokenizers import VOCAB, tiny_tokenizer


class DistilledSFT(DistillationMixin, SFTTrainer):
    pass


def rows(count: int = 8, masked: bool = False) -> Dataset:
    """Texts of different lengths; with `masked`, the beginning of each is a prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCAB, (4 + 3 * (n % 4),), generator=generator).tolist() for n in range(count)]
    labels = [[-100] * (2 + n % 2) + row[2 + n % 2 :] if masked else row for n, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def student(bits: int = 2):
    config = PeqaConfig(bits=bits, group_size=16, init_method="minmax", task_type="CAUSAL_LM")
    return get_peft_model(tiny("llama"), config)


def options(folder, **more):
    common = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True}
    return {**common, "output_dir": str(folder), "use_cpu": True, "seed": 0, "logging_steps": 1, "bf16": False, **more}


def sft(folder, model=None, data=None, *, teacher_model=None, alone=False, arguments=None, **distillation):
    args = SFTConfig(**options(folder, **{"max_length": None, **(arguments or {})}))
    teacher = tiny("llama") if teacher_model is None and not alone else teacher_model
    return DistilledSFT(
        model=student() if model is None else model,
        args=args,
        train_dataset=rows() if data is None else data,
        processing_class=tiny_tokenizer(),
        teacher_model=teacher,
        **distillation,
    )


def obvious(model, teacher, batch, distill: float, temperature: float) -> torch.Tensor:
    """The mean over the supervised tokens of a batch."""
    batch = dict(batch)
    labels = batch.pop("labels")[:, 1:]
    kept = labels != -100
    logits, with_teacher = (each(**batch, use_cache=False).logits[:, :-1][kept] for each in (model, teacher))
    cross_entropy = F.cross_entropy(logits, labels[kept])
    value = F.kl_div(
        (logits / temperature).log_softmax(-1),
        (with_teacher / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - distill) * cross_entropy + distill * temperature**2 * value


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "arguments", [{}, {"packing": True, "max_length": 24}, {"padding_free": True, "packing": True, "max_length": 16}]
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_the_obvious_one(tmp_path, arguments, masked, cached):
    """Padded or packed, of whole texts or completions; with the teacher beside or on disk."""
    kept = {"teacher_logits": tmp_path / "kept", "top_k": VOCAB} if cached else {}
    trainer = sft(tmp_path, data=rows(masked=masked), arguments=arguments, distill=0.3, temperature=2.0, **kept)
    trainer.prepare_teacher()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    expected = obvious(trainer.model, tiny("llama"), batch, 0.3, 2.0)
    torch.testing.assert_close(loss, expected, rtol=1e-3 if cached else 1e-5, atol=1e-5)
    wanted = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for one, other in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted)):
        torch.testing.assert_close(one, other, rtol=1e-2 if cached else 1e-4, atol=1e-4 if cached else 1e-6)


def test_accumulated_batches_are_one_batch(tmp_path):
    """Texts have different lengths: every token counts the same, however the batch is divided."""
    ends = []
    for steps in (1, 4):
        arguments = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        arguments |= {"learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0}
        trainer = sft(tmp_path / str(steps), data=rows(masked=True), arguments=arguments)
        trainer.train()
        ends.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    one, other = (torch.cat([each.flatten() for each in end]) for end in ends)
    assert 0 < (one - other).norm() < 0.01 * one.norm()  # rows of other lengths round otherwise


@pytest.mark.parametrize("trainer_class", [SFTTrainer, Trainer])
def test_weight_zero_is_the_trainers_own_loss(tmp_path, trainer_class):
    class Mine(DistillationMixin, trainer_class):
        pass

    found = []
    for kind, more in ((trainer_class, {}), (Mine, {"distill": 0.0})):
        args = SFTConfig if trainer_class is SFTTrainer else TrainingArguments
        batch = {"per_device_train_batch_size": 1}
        trainer = kind(
            model=student(),
            args=args(**options(tmp_path, **batch)),
            train_dataset=rows(4),
            processing_class=tiny_tokenizer(),
            **more,
        )
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_student_moves_to_its_teacher(tmp_path):
    """By the divergence alone; and its parts are in the log."""
    arguments = {"max_steps": 40, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    trainer = sft(tmp_path, arguments=arguments, distill=1.0)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "divergence" in entry]
    assert len(history) == 40
    assert history[0]["loss"] == pytest.approx(history[0]["divergence"], rel=1e-3)
    assert history[-1]["divergence"] < 0.7 * history[0]["divergence"]
    assert all(entry["cross_entropy"] > 0 for entry in history)


def test_the_same_model_teaches_nothing(tmp_path):
    trainer = sft(tmp_path, get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM")), distill=1.0)
    trainer.train()
    assert trainer.state.log_history[0]["divergence"] == pytest.approx(0, abs=1e-6)


def test_an_adapter_teaches(tmp_path):
    tuned = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    trainer = sft(tmp_path, get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM")), teacher_model=tuned)
    trainer.train()
    assert trainer.state.log_history[0]["divergence"] > 1e-3
    assert not any(parameter.requires_grad for parameter in tuned.parameters())


def test_transformers_own_trainer_and_its_evaluation(tmp_path):
    """Blocks without a mask; the evaluation is of the cross-entropy, with or without a teacher."""
    blocks = torch.randint(3, VOCAB, (8, 12)).tolist()
    data = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
    losses = []
    for kind, more in ((Trainer, {}), (DistillationTrainer, {"teacher_model": tiny("llama")})):
        args = TrainingArguments(**options(tmp_path))
        trainer = kind(model=student(), args=args, train_dataset=data, eval_dataset=data, **more)
        losses.append(trainer.evaluate()["eval_loss"])
    trainer.train()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert trainer.state.log_history[0]["divergence"] > 0


def test_a_trained_head(tmp_path):
    """What is trained behind the backbone gets its gradient."""
    config = LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"], target_modules=["q_proj"])
    trainer = sft(tmp_path, get_peft_model(tiny("llama"), config))
    trainer.prepare_teacher()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    wanted = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    loss = trainer.compute_loss(trainer.model, dict(batch))
    expected = obvious(trainer.model, tiny("llama"), batch, 0.5, 1.0)
    for one, other in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "falcon_h1", "mamba", "gpt2", "llama4"])
def test_logits_of_pieces_are_the_models_own(name):
    """Scaled, capped, with or without a cache: by the model's own forward."""
    model = families.build(name)
    head = output_head(model)
    assert head is not None
    tokens = torch.tensor([[3, 5, 7, 9, 4, 6]])
    states = head.states_of(model, {"input_ids": tokens})[0]
    whole = model(input_ids=tokens, use_cache=False).logits[0]
    torch.testing.assert_close(torch.cat([head(states[:2]), head(states[2:])]), whole, rtol=1e-4, atol=1e-4)


def test_a_mixtures_balancing_loss_comes_on_top(tmp_path):
    losses = []
    for weight in (0.0, 0.5):
        model = get_peft_model(tiny_moe("mixtral"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        arguments = {"router_aux_loss_coef": weight}
        trainer = sft(tmp_path, model, teacher_model=tiny_moe("mixtral"), arguments=arguments)
        trainer.train()
        losses.append(trainer.state.log_history[0])
    assert losses[0]["cross_entropy"] == pytest.approx(losses[1]["cross_entropy"], rel=1e-4)
    assert losses[1]["loss"] > losses[0]["loss"] + 0.5


def test_a_model_whose_logits_cannot_be_cut(tmp_path, monkeypatch):
    """All logits of a batch at once, and the same loss."""
    losses = []
    for cut in (True, False):
        if not cut:
            monkeypatch.setattr("peft_ext.distillation.trainer.output_head", lambda model: None)
        trainer = sft(tmp_path / str(cut))
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    """With the teacher's logits on disk: the end is that of an unbroken run, and the teacher isn't asked again."""
    arguments = {"max_steps": 6, "save_steps": 3, "learning_rate": 1e-2}
    kept = {"teacher_logits": tmp_path / "kept", "top_k": 8}
    whole = sft(tmp_path / "whole", arguments=arguments, **kept)
    whole.train()
    state = json.loads((tmp_path / "whole" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    again = sft(tmp_path / "again", arguments=arguments, **kept)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for one, other in zip(whole.model.parameters(), again.model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="distill=0.5 needs teacher_model, or teacher_logits"):
        DistillationTrainer(model=student(), args=TrainingArguments(**options(tmp_path)), train_dataset=rows())
    with pytest.raises(ValueError, match="distill=2 must be from 0 to 1"):
        sft(tmp_path, distill=2)
    with pytest.raises(ValueError, match="loss_type='dft' is another loss"):
        sft(tmp_path, arguments={"loss_type": "dft"})
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 is another loss"):
        sft(tmp_path, arguments={"label_smoothing_factor": 0.1})
    with pytest.raises(TypeError, match="teacher_model is a BertForSequenceClassification; it must be"):
        sft(tmp_path, teacher_model=tiny("bert")).train()
    wider = copy.deepcopy(tiny("llama"))
    wider.resize_token_embeddings(VOCAB + 8)
    with pytest.raises(ValueError, match="teacher_model has a vocabulary of 108 tokens, the student of 100"):
        sft(tmp_path, teacher_model=wider).train()
