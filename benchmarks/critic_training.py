# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The critics of critic_control.py: on roll-outs, one for each code or one for all, and on whole texts for weighted
decoding. Each is trained once and kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from benchmarks.core.run import Run
from benchmarks.critic_tasks import OTHER_TOPICS, Score, Task
from generation_ext.critic import Critic, CriticConfig, CriticTrainer
from generation_ext.critic.rollout_files import read_rollouts
from generation_ext.critic.rollouts import fill_hidden
from peft_ext.files import write_json


RIDGE = 1.0  # of the map to sentence embeddings, on standardised states
HELD_OUT = 256  # roll-outs that a critic is measured on, at most; a quarter of what it learns from
# Kinds of critics, by the titles of their rows.
SEPARATE, UNSEEN, WEIGHTED = "CriticControl", "CriticControl, unseen topics", "Weighted decoding"
AS_LORA = "CriticControl, its LoRA on the output head"
LORA_RANK = 16


class Critics:
    """A task's critics.

    Args:
        task: The task.
        model, tokenizer: The frozen language model's.
        run: Says how much they learn from; they are kept in its work folder.
    """

    def __init__(self, task: Task, model: Any, tokenizer: Any, run: Run) -> None:
        self.task, self.model, self.tokenizer, self.run = task, model, tokenizer, run

    def __call__(self, kind: str, code: Optional[str] = None) -> Critic:
        """SEPARATE (the one of a code; with an action-value head), AS_LORA (linear in the last state), UNSEEN or WEIGHTED."""
        folder = self._folder(kind, code)
        if not (folder / "config.json").is_file():
            torch.manual_seed(self.run.seed)
            if kind == WEIGHTED:
                critic = self._train_on_whole_texts()
            elif kind == UNSEEN and code is not None:
                critic = self._any_topic(code)
            else:
                critic = self._train(kind, code)
            critic.save_pretrained(folder)
        return Critic.from_pretrained(folder).attach(self.model)

    def knowledge(self, kind: str, code: Optional[str] = None) -> dict[str, float]:
        """Explained variance of a critic, overall and by position; empty for one without roll-outs."""
        path = self._knowledge(self._folder(kind, code))
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {name.removeprefix("eval_"): value for name, value in found.items() if "explained_variance" in name}

    def _folder(self, kind: str, code: Optional[str]) -> Path:
        name = kind.lower().replace(" ", "-").replace(",", "")
        if kind == WEIGHTED:
            return self.run.work / name
        ending = "" if code is None else "-" + code.lower().replace("/", "-")
        return self.run.work / f"{name}-{self._rollouts(kind)}{ending}"

    def _any_topic(self, code: str) -> Critic:
        """The critic of a topic that no roll-out was scored for, out of its name.

        One linear map from what the critic reads to the sentence embedding of the finished text is fitted on the topics'
        roll-outs, without their rewards. Its projection on the name's embedding is a linear head, as any critic has it; how
        steep it is, is learnt on other topics, whose reward is nearness to their names.
        """
        assert self.task.described is not None and self.task.universal_reward is not None
        read = read_rollouts(_training_folder(self._folder(SEPARATE, self.task.codes[0])) / "rollouts")
        first = self(SEPARATE, self.task.codes[0])
        critic = Critic.for_model(self.model, layer=first.config.layers or -1, running_mean=first.config.running_mean)
        fill_hidden(self.model, read, self.run.batch_size, critic)
        texts = [each.prompt + each.completion for each in read]
        states = torch.cat([each.hidden for each in read]).float()  # type: ignore[misc]
        critic.fit_standardisation(states)
        owners = torch.arange(len(read)).repeat_interleave(torch.tensor([each.states for each in read]))
        inputs = (states - critic.mean) / critic.std
        embeddings = torch.from_numpy(self.task.described(texts)).float()
        middle = embeddings.mean(0)
        system = inputs.T @ inputs / len(inputs) + RIDGE * torch.eye(inputs.shape[1])
        weights = torch.linalg.solve(system, inputs.T @ (embeddings - middle)[owners] / len(inputs))
        names = torch.from_numpy(self.task.described([self.task.describe(name) for name in OTHER_TOPICS])).float()
        common = names.mean(0)
        rewards = np.stack([self.task.universal_reward(texts, [name] * len(texts)) for name in OTHER_TOPICS], 1)
        scale, bias = _odds(inputs @ weights @ (names - common).T, torch.from_numpy(rewards).float()[owners])
        own = torch.from_numpy(self.task.described([self.task.describe(code)])).float()[0]
        with torch.no_grad():
            critic.head.weight.copy_((scale * weights @ (own - common))[None])
            critic.head.bias.fill_(bias)
        return critic.eval()

    def _reading(self) -> dict[str, Any]:
        """What a critic reads; the paper's last hidden state where an experiment doesn't say."""
        settings = self.run.settings
        return {"layer": settings.get("layer", -1), "running_mean": settings.get("running_mean", False)}

    def _rollouts(self, kind: str) -> int:
        return self.run.unseen_rollouts if kind == UNSEEN else self.run.rollouts

    @staticmethod
    def _knowledge(folder: Path) -> Path:
        """Where it is kept how much of the reward's variance a critic explains on new roll-outs."""
        return folder.with_name(folder.name + "-held-out.json")

    def _train(self, kind: str, code: Optional[str]) -> Critic:
        """On roll-outs; separate critics and those for LoRAs share theirs, since their prompts have no codes."""
        codes = OTHER_TOPICS if kind == UNSEEN else ()
        reward = self.task.universal_reward if kind == UNSEEN else self.task.reward
        if reward is None:
            raise ValueError(f"task {self.task.name!r} has no reward for {kind!r}.")
        reading = (
            {"layer": -1, "running_mean": False, "action_form": "linear", "action_rank": LORA_RANK}
            if kind == AS_LORA
            else self._reading()
        )
        critic = Critic.for_model(
            self.model, head=self.run.head, action_values=True, control_codes=list(codes), **reading
        )
        folder, count = self._folder(kind, code), self._rollouts(kind)
        rng = np.random.default_rng(self.run.seed)
        training: list[Any] = self._prompts(rng, codes, count)
        held_out = self._prompts(rng, codes, min(HELD_OUT, count // 4))
        first = self._folder(SEPARATE if kind == AS_LORA else kind, self.task.codes[0])
        if first != folder and kind != UNSEEN:
            self(SEPARATE, self.task.codes[0])
            training = self._rewarded(read_rollouts(_training_folder(first) / "rollouts"), reward, code)

        def reward_func(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions)]
            found = reward(texts, columns.get("control_code") or [code] * len(texts))
            return [float(value) for value in found]

        config = CriticConfig(
            output_dir=str(_training_folder(folder)),
            num_iterations=1,
            rollouts_per_iteration=count,
            eval_rollouts=len(held_out),
            epochs_per_iteration=self.run.epochs,
            rollout_batch_size=self.run.batch_size,
            max_new_tokens=self.task.new_tokens,
            seed=self.run.seed,
            disable_tqdm=True,
        )
        trainer = CriticTrainer(critic, config, self.model, reward_func, training, held_out, self.tokenizer)
        trainer.train(resume_from_checkpoint=any(Path(str(config.output_dir)).glob("checkpoint-*")) or None)
        write_json(self._knowledge(folder), trainer.evaluate())
        return critic.eval()

    def _prompts(self, rng: np.random.Generator, codes: Sequence[str], count: int) -> list[dict[str, str]]:
        prompts = [{"prompt": str(rng.choice(self.task.train_prompts))} for _ in range(count)]
        if codes:
            prompts = [{**row, "control_code": codes[index % len(codes)]} for index, row in enumerate(prompts)]
        return prompts

    @staticmethod
    def _rewarded(rollouts: list[Any], reward: Score, code: str) -> list[Any]:
        found = reward([each.prompt + each.completion for each in rollouts], [code] * len(rollouts))
        return [replace(each, reward=float(value)) for each, value in zip(rollouts, found)]

    @torch.no_grad()
    def _states_of_whole_texts(self, critic: Critic) -> tuple[torch.Tensor, torch.Tensor]:
        """What a critic reads of labelled texts, and whether each has its code's attribute."""
        rows = self.task.whole_texts[: self.run.whole_texts]
        states, labels = [], []
        template = "{code}: {prompt}"
        rows = sorted(rows, key=lambda row: len(row[0]))
        for start in range(0, len(rows), 64):
            part = rows[start : start + 64]
            texts = [text if code is None else template.format(code=code, prompt=text) for text, code, _ in part]
            batch = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128)
            states.append(critic.read(self.model, **batch)[:, -1])  # padded on the left
            labels.extend(float(label) for _, _, label in part)
        return torch.cat(states), torch.tensor(labels)

    def _train_on_whole_texts(self) -> Critic:
        """The same head, fitted on finished, labelled texts instead of on roll-outs."""
        codes = [code for code in self.task.codes if code is not None]
        # the last state alone, as in the paper's comparison
        critic = Critic.for_model(self.model, layer=-1, running_mean=False, head=self.run.head, control_codes=codes)
        states, labels = self._states_of_whole_texts(critic)
        critic.fit_standardisation(states)
        optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3, weight_decay=0.1)
        critic.train()
        for _ in range(self.run.whole_epochs):
            for rows in torch.randperm(len(states)).split(128):
                loss = nn.functional.binary_cross_entropy_with_logits(critic(states[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return critic.eval()


def _odds(scores: torch.Tensor, rewards: torch.Tensor) -> tuple[float, float]:
    """Scale and bias with which scores are the rewards' log-odds, by logistic regression."""
    found = torch.zeros(2, requires_grad=True)
    spread = float(scores.std())
    optimizer = torch.optim.LBFGS([found], max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(found[0] * scores / spread + found[1], rewards)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(found[0].detach()) / spread, float(found[1].detach())


def _training_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + "-training")
