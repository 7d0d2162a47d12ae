"""Trainers of PEFT models, stock and ours, on pooled ranks: adapters that are switched, kinds of adapters, files."""

from __future__ import annotations

import peft
import torch
import transformers
from trainer_hook_runs import told
from trainer_runs import Sentences, make_model, pad
from trainer_start import trainer_class

ATTENTION = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def stirred(model, config, **options):
    """A PEFT model whose adapters are no identity."""
    model = peft.get_peft_model(model, config, **options)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.02 * torch.randn(param.shape, generator=generator))
    return model


def tied():
    config = make_model().config
    config.tie_word_embeddings = True
    return transformers.LlamaForCausalLM(config)


def two_kinds():
    model = stirred(make_model(), peft.LoraConfig(r=2, **ATTENTION), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["k_proj"], init_weights=False))
    model.set_adapter(["default", "other"])
    return model


#: Adapters that change the blocks, or both ends.
HONOURED = {
    "lora": lambda: stirred(make_model(), peft.LoraConfig(r=2, **ATTENTION)),
    "dora": lambda: stirred(make_model(), peft.LoraConfig(r=2, use_dora=True, **ATTENTION)),
    "tokens of tied ends": lambda: stirred(tied(), peft.LoraConfig(r=2, trainable_token_indices=[1, 10], **ATTENTION)),
    "whole tied ends": lambda: stirred(
        tied(), peft.LoraConfig(r=2, modules_to_save=["embed_tokens", "lm_head"], **ATTENTION)
    ),
    "ia3": lambda: stirred(make_model(), peft.IA3Config(task_type="CAUSAL_LM")),
    "projections that all layers share": lambda: stirred(
        make_model(), peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ),
    "layers twice": lambda: stirred(
        make_model(), peft.LoraConfig(r=2, layer_replication=[[0, 2], [0, 4]], **ATTENTION)
    ),
    "two kinds": two_kinds,
}
LAYER = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
#: Adapters that do more, and a part of what is said of them.
REFUSED = {
    "adalora": (lambda: peft.AdaLoraConfig(total_step=9, **LAYER), "a forward of its own"),
    "poly": (lambda: peft.PolyConfig(r=2, n_tasks=2, **LAYER), "a forward of its own"),
    "alora": (lambda: peft.LoraConfig(alora_invocation_tokens=[3], **LAYER), "a token that the PEFT model looks for"),
    "tied adapters": (
        lambda: peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM"),
        "the head of that of the embedding",
    ),
    "prompt": (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "a prompt"),
    "vector bank": (lambda: peft.VBLoRAConfig(num_vectors=8, vector_length=8, topk=2, r=4, **LAYER), "one weight"),
    "one vector": (lambda: peft.UniLoraConfig(**LAYER), "one weight"),
}


def make(folder, stock, model, **options):
    kind = trainer_class(stock)
    transformers.set_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=3, logging_steps=1, per_device_train_batch_size=8, per_device_eval_batch_size=8,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        save_strategy="no", optim="adamw_torch",
    )  # fmt: skip
    if not stock:
        options = {"num_chunks": 4} | options
    return kind(
        model=model, args=arguments, train_dataset=Sentences(24), eval_dataset=Sentences(6, seed=2), data_collator=pad,
        **options,
    )  # fmt: skip


def switched(folder, stock=False):
    """Losses of evaluations and of training, the model without and with its adapters and with another one, and logits
    of a call of it in the end."""
    model = HONOURED["lora"]()
    model.add_adapter("other", peft.LoraConfig(r=2, init_lora_weights=False, **ATTENTION))
    trainer = make(folder, stock, model)

    def loss():
        return trainer.evaluate()["eval_loss"]

    with trainer.model.disable_adapter():
        found = {"before": loss()}
    trainer.train()
    found["losses"] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    found["with"] = loss()
    with trainer.model.disable_adapter():
        found["without"] = loss()
    trainer.model.set_adapter("other")
    found["other"] = loss()
    trainer.model.set_adapter("default")
    with torch.no_grad():
        found["called"] = float(trainer.model(**pad([Sentences(1)[0]])).loss)
    if not stock:
        trainer._engine.destroy()
    return found


def trained(folder, names, stock=False, **options):
    """Losses, norms and the saved adapter of each kind."""
    found = {}
    for name in names:
        trainer = make(folder, stock, HONOURED[name](), **options)
        trainer.train()
        trainer.save_model(f"{folder}/{name}")
        logs = [row for row in trainer.state.log_history if "loss" in row]
        found[name] = {"losses": [row["loss"] for row in logs], "norms": [row["grad_norm"] for row in logs]}
        if not stock:
            trainer._engine.destroy()
    return found


def in_part(folder, stock=False):
    """What saving the model says where some of it trains on other ranks, and the operations counted."""
    trainer = make(folder, stock, HONOURED["lora"](), **({} if stock else {"schedule": "dualpipev"}))
    trainer.train()
    found = {"flops": trainer.state.log_history[-1]["total_flos"]}
    if not stock:
        found["saved"] = told(lambda: trainer.model.save_pretrained(f"{folder}/part"))
        found["of the base"] = told(lambda: trainer.model.merge_and_unload().save_pretrained(f"{folder}/part"))
        trainer._engine.destroy()
    return found
