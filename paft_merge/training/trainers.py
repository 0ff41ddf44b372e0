"""TRL's trainers with further objectives and the L1 term: `compute_loss` and `log` are overridden."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from paft_merge.errors import TrainError
from paft_merge.training.callbacks import L1, Watch
from paft_merge.training.factors import adapted, owner, whole
from paft_merge.training.losses import ift_loss, orpo_loss, residual_embeddings, weighted_nll
from paft_merge.training.schema import IftSpec, Objective, OrpoSpec

_ARGMAX_TOKENS = 1024
"""Tokens whose logits are computed at a time for the greedy prediction."""


class L1Mixin:
    """Adds the L1 penalty to the loss of a TRL trainer, and sparsity measurements to its logs.

    The penalty is added once per optimizer step, with the last micro-batch, and not in evaluation. It adds only its
    gradient and not its value, so train and eval loss remain comparable.
    """

    l1: L1 | None = None
    watch: Watch | None = None
    where: str = "adapter"
    penalty_gradient: dict[torch.Tensor, torch.Tensor] | None = None
    """The penalty's part of each factor's gradient in this step; only in logged steps."""

    @property
    def row_sets(self: Any) -> list[Any]:
        """The sets of rows that are trained on."""
        return [self.train_dataset]

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report every trainer to the Hub."""

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run TRL's step; in a logged step also measure the gradient norms of the penalty and of the task."""
        self.penalty_gradient = None
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self.penalty_gradient is not None:
            parts, self.penalty_gradient = self.penalty_gradient, None
            self.extra_logs["l1/grad_norm"].append(_norm(parts.values()))
            trained = [p for p in self.model.parameters() if p.grad is not None]
            self.extra_logs["l1/task_grad_norm"].append(_norm(p.grad - parts.get(p, 0.0) for p in trained))
        return loss

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the task's loss, with the penalty's gradient in the last micro-batch of a step; count its tokens."""
        if self.model.training and self.watch is not None:
            self.watch.tokens += int(self.accelerator.reduce(_tokens_in(inputs), "sum").item())
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not self.model.training:
            return result
        loss = result[0] if return_outputs else result
        self._check_finite("loss", loss)
        if self.l1 is not None and self.l1.spec.mode == "penalty" and self.accelerator.sync_gradients:
            loss = loss + self._penalty(model, num_items_in_batch)
        return (loss, result[1]) if return_outputs else loss

    def _penalty(self: Any, model: Any, num_items_in_batch: Any) -> torch.Tensor:
        """A zero whose gradient is that of strength * L1, in the scale of this micro-batch's loss."""
        strength = self.l1.at(self.state.global_step, self.state.max_steps)
        factors = adapted(self.accelerator.unwrap_model(model))
        penalty = self.l1.penalty(factors)
        self._check_finite("l1 penalty", penalty)
        self.extra_logs["l1/strength"].append(strength)
        self.extra_logs["l1/norm"].append(penalty.item())
        self.extra_logs["l1/loss"].append(strength * penalty.item())
        if self._is_logged():
            owners = [owner(side) for f in factors for side in (f.a_RI, f.b_OR)]
            gradients = torch.autograd.grad(penalty, owners, retain_graph=True)
            self.penalty_gradient = {p: strength * g for p, g in zip(owners, gradients, strict=True)}
        # transformers divides a loss by the number of micro-batches unless the trainer scales it already (SFTTrainer
        # does, DPOTrainer does not). The penalty belongs to the whole step, so that division is undone.
        undo = 1 if self._scaled_already(num_items_in_batch) else self.current_gradient_accumulation_steps
        term: torch.Tensor = undo * strength * (penalty - penalty.detach())
        return term

    def _is_logged(self: Any) -> bool:
        """Whether this step is logged and its gradients are readable: neither scaled (fp16) nor managed by ZeRO."""
        step, every = self.state.global_step + 1, max(1, int(self.state.logging_steps or 1))
        plain = self.accelerator.scaler is None and not self.is_deepspeed_enabled
        return plain and self.args.logging_strategy == "steps" and step % every == 0

    def _scaled_already(self: Any, num_items_in_batch: Any) -> bool:
        """The rule of `Trainer.training_step` for not dividing a loss."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def _check_finite(self: Any, what: str, value: torch.Tensor) -> None:
        if not bool(torch.isfinite(value.detach()).all()):
            step = self.state.global_step + 1
            raise TrainError.of(
                "NONFINITE",
                self.where,
                f"the {what} is {value.detach().float().mean().item()} in optimizer step {step}",
                "lower training.learning_rate, check the data near that step, or train in bf16/fp32 instead of fp16",
            )

    @property
    def extra_logs(self) -> defaultdict[str, list[float]]:
        """Values since the last log, by name; their mean is logged."""
        if "_extra_logs" not in self.__dict__:
            self.__dict__["_extra_logs"] = defaultdict(list)
        found: defaultdict[str, list[float]] = self.__dict__["_extra_logs"]
        return found

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, plus the L1 terms and the latest measures of sparsity on training lines."""
        if "loss" in logs:
            logs.update({key: sum(values) / len(values) for key, values in self.extra_logs.items()})
            logs.update(self.watch.latest if self.watch else {})
            self.extra_logs.clear()
        super().log(logs, start_time)  # type: ignore[misc]


def _tokens_in(inputs: Any) -> torch.Tensor:
    """Number of tokens of a batch without padding: of preference pairs both sides, of online objectives also the prompts."""
    masks = [inputs[key] for key in ("attention_mask", "prompt_mask") if key in inputs]
    masks += [inputs["completion_mask"]] if "prompt_mask" in inputs else []
    counted = [mask.sum() for mask in masks] or [
        torch.tensor(inputs["input_ids"].numel(), device=inputs["input_ids"].device)
    ]
    return torch.stack(counted).sum()


def _norm(gradients: Iterable[torch.Tensor]) -> float:
    """Norm of all gradients together."""
    return math.sqrt(sum(float(whole(g.detach().float().square().sum())) for g in gradients))


class _ORPOTrainer(DPOTrainer):  # type: ignore[misc]
    """The odds-ratio objective on TRL's preference batches: one forward, no reference."""

    loss_is_scaled_for_ga = False
    orpo = OrpoSpec()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return NLL of the chosen plus beta times the odds-ratio term."""
        mask = inputs["attention_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        fused = model(
            input_ids=inputs["input_ids"], attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True
        )
        spec = self.orpo
        terms = orpo_loss(fused.log_probs, inputs["completion_mask"][:, 1:], mask[:, 1:], beta=spec.beta, nll=spec.nll)
        if self.model.training:
            wins = (terms.chosen > terms.rejected).float().mean()
            shown = {"nll": terms.nll, "odds_loss": terms.odds, "rewards/accuracies": wins}
            for key, value in shown.items():
                self.extra_logs[key].append(value.item())
        return terms.loss


class _IFTTrainer(SFTTrainer):  # type: ignore[misc]
    """Intuitive Fine-Tuning on TRL's batches: a greedy prediction without gradient, then the weighted loss."""

    loss_is_scaled_for_ga = False
    ift = IftSpec()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the mean over sequences of the weighted losses on residual embeddings."""
        ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs["attention_mask"]
        embed = self.accelerator.unwrap_model(model).get_input_embeddings()
        with torch.no_grad():
            predicted = ids.clone()
            predicted[:, 1:] = self._greedy(model, ids, mask)[:, :-1]
            response = (labels != -100) & (torch.arange(ids.shape[1], device=ids.device) > 0)
            mixed = residual_embeddings(embed(ids), embed(predicted), response, self.ift.lam).detach()
        if self.args.gradient_checkpointing:
            mixed.requires_grad_()  # or reentrant checkpointing cuts the graph
        fused = model(inputs_embeds=mixed, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True)
        if self.model.training:
            agreed = ((predicted == ids) & response).sum() / response.sum().clamp(min=1)
            self.extra_logs["greedy_agreement"].append(agreed.item())
        return ift_loss(
            -fused.log_probs.float(), fused.label_mask, gamma=self.ift.gamma, detach_weights=self.ift.detach_weights
        )

    def _greedy(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The most likely next token after every position, `[B, T + 1]`; dropout off."""
        was = model.training
        model.eval()
        try:
            if self.is_fsdp_enabled:  # only a forward of the root gathers the shards
                return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.argmax(-1)  # type: ignore[no-any-return]
            causal = self.accelerator.unwrap_model(model).get_base_model()
            hidden = causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            flat = hidden.flatten(0, 1).split(_ARGMAX_TOKENS)
            return torch.cat([causal.get_output_embeddings()(part).argmax(-1) for part in flat]).view_as(ids)
        finally:
            model.train(was)


class _WeightedCollator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """TRL's collator, plus the `weight` column."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        batch["weight"] = torch.tensor([example["weight"] for example in examples])
        return batch


class _RWRTrainer(SFTTrainer):  # type: ignore[misc]
    """Likelihood of sampled completions, weighted by their rewards."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the mean over sequences of weight times token-mean negative log-likelihood."""
        weight = inputs.pop("weight")
        fused = model(**inputs, use_cache=False, fused_lm_head=True)
        return weighted_nll(fused.log_probs, fused.label_mask, weight)


CONFIGS: dict[Objective, type[Any]] = {
    "sft": SFTConfig,
    "ift": SFTConfig,
    "best_of_n": SFTConfig,
    "rwr": SFTConfig,
    "dpo": DPOConfig,
    "orpo": DPOConfig,
    "on_policy": DPOConfig,
    "rloo": RLOOConfig,
    "grpo": GRPOConfig,
}
"""The TRL config whose fields `training:` takes, by objective."""


def with_l1(trainer: type[Any]) -> type[Any]:
    """Derive a trainer class with the L1 term."""
    return type(f"Paft{trainer.__name__.removeprefix('_')}", (L1Mixin, trainer), {})


TRAINERS: dict[Objective, type[Any]] = {
    "sft": with_l1(SFTTrainer),
    "ift": with_l1(_IFTTrainer),
    "best_of_n": with_l1(SFTTrainer),
    "rwr": with_l1(_RWRTrainer),
    "dpo": with_l1(DPOTrainer),
    "orpo": with_l1(_ORPOTrainer),
    "on_policy": with_l1(DPOTrainer),
    "rloo": with_l1(RLOOTrainer),
    "grpo": with_l1(GRPOTrainer),
}
"""The trainer class by objective."""

DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""Values of `loss_type` of TRL 1.16's DPO; a test compares the list with TRL's."""


def weighted_collator(tokenizer: Any) -> Any:
    """The collator of `rwr`."""
    return _WeightedCollator(pad_token_id=tokenizer.pad_token_id)
