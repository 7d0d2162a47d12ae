"""Runs of TRL's trainers, stock and ours, on pooled ranks."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from trainer_start import forget


def paragraphs(count):
    """Text that is on every machine: of a module's documentation."""
    text = " ".join(f"{argparse.__doc__} {json.__doc__} {textwrap.TextWrapper.__doc__}".split()).split(". ")
    return [text[at % len(text)] + "." for at in range(count)]


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"vocab_size": 320, "special_tokens": ["<pad>", "<end>"], "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(paragraphs(40), trainers.BpeTrainer(initial_alphabet=alphabet, **options))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def make_model(vocabulary, seed=5, family="llama"):
    torch.manual_seed(seed)
    if family == "gpt2":  # with dropout
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=4, n_head=4, n_positions=64, resid_pdrop=0.3, embd_pdrop=0.3
        )
        return transformers.GPT2LMHeadModel(config)
    if family == "mixtral":
        config = transformers.MixtralConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        )  # fmt: skip
        return transformers.MixtralForCausalLM(config)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def start(folder, steps, **options):
    """What is given to the configuration of any of TRL's trainers."""
    forget()
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 6, "per_device_eval_batch_size": 6,
        "learning_rate": 3e-3, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "save_strategy": "no", "bf16": False, "max_length": 24,
    } | options  # fmt: skip


def told(trainer):
    """Logs of a run without its times."""
    timed = ("runtime", "per_second", "train_loss", "total_flos")
    return [
        {name: value for name, value in row.items() if not any(each in name for each in timed)}
        for row in trainer.state.log_history
    ]


def trained(trainer, stock):
    trainer.train()
    trainer.evaluate()
    if not stock:
        trainer._engine.destroy()
    return told(trainer)


def saved(folder, model):
    """Where a model has been saved, which rank 0 alone does."""
    path = Path(folder, "given")
    model.save_pretrained(path)
    if dist.is_initialized():
        dist.barrier()
    return str(path)


def mean_over_tokens(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].float()
    return 0.5 * torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def largest_token(outputs, labels, num_items_in_batch=None):
    return outputs.logits.float().abs().amax()


def with_loss(kind, change):
    """A subclass as users write them; `change` of a loss that is known."""

    class Changed(kind):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (change(loss), outputs) if return_outputs else change(loss)

    return Changed


def half(loss):
    return loss / 2


def square(loss):
    return loss**2


def sft(folder, stock=False, steps=4, config=None, rows=None, family="llama", by_path=False, change=None, **options):
    """`by_path`: the model is a folder, from which TRL loads it. `change`: as for `with_loss`."""
    import datasets
    import trl

    config = dict(config or {})
    if template := config.pop("chat_template", None):
        config["chat_template_path"] = str(Path(folder, f"{os.environ.get('RANK', 0)}.jinja"))
        Path(folder).mkdir(exist_ok=True)
        Path(config["chat_template_path"]).write_text(template)
    arguments = trl.SFTConfig(**start(folder, steps, **config))
    if stock:
        kind = trl.SFTTrainer
    else:
        from dualpipe_engine.integrations.trl import DualPipeSFTTrainer as kind
    kind = with_loss(kind, change) if change else kind
    tokenizer = make_tokenizer()
    rows = rows or {"text": paragraphs(30)}
    model = make_model(len(tokenizer), family=family)
    trainer = kind(
        model=saved(folder, model) if by_path else model, args=arguments,
        train_dataset=datasets.Dataset.from_dict(rows),
        eval_dataset=datasets.Dataset.from_dict({name: values[:8] for name, values in rows.items()}),
        processing_class=tokenizer, **options,
    )  # fmt: skip
    return trained(trainer, stock)


REFERENCES = ("another", "reloaded", "without adapters", "given adapters")


def dpo(
    folder, stock=False, steps=4, config=None, reference=None, family="llama", by_path=False, change=None, **options
):
    """`reference`: one of `REFERENCES`; None: the model as it is given, ahead of training."""
    import datasets
    import peft
    import trl

    arguments = trl.DPOConfig(**start(folder, steps, precompute_ref_log_probs=reference is None) | (config or {}))
    if stock:
        kind = trl.DPOTrainer
    else:
        from dualpipe_engine.integrations.trl import DualPipeDPOTrainer as kind
    kind = with_loss(kind, change) if change else kind
    tokenizer = make_tokenizer()
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [f"Question {at}?" for at in range(20)],
            "chosen": [f" It is {at * at}, {'as ever' * (at % 3)}." for at in range(20)],
            "rejected": [f" No {'idea' * (at % 4)}" for at in range(20)],
        }
    )
    model = make_model(len(tokenizer), family=family)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    if by_path:
        model = saved(folder, model)
    elif reference == "reloaded":
        model = transformers.AutoModelForCausalLM.from_pretrained(saved(folder, model))
    elif reference == "another":
        options["ref_model"] = make_model(len(tokenizer), seed=6, family=family)
    elif reference == "without adapters":
        options["peft_config"] = lora
    elif reference == "given adapters":
        torch.manual_seed(7)
        model = peft.get_peft_model(model, lora)
    trainer = kind(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows.select(range(7)),
        processing_class=tokenizer, **options,
    )  # fmt: skip
    found = trained(trainer, stock)
    if not stock and trainer._reference_engine is not None:
        trainer._reference_engine.destroy()
    return found


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
TALKS = [
    [{"role": "user", "content": f"What is {at}?"}, {"role": "assistant", "content": f"It is {at * at}, as ever."}]
    for at in range(24)
]
PAIRS = {
    "prompt": [f"Question {at}? " for at in range(24)],
    "completion": [f"The answer is {at * at}, {'as ever' * (at % 3)}." for at in range(24)],
}


def correct(found):
    """Next tokens that are the likeliest, of those that count."""
    logits, labels = torch.as_tensor(found.predictions)[:, :-1], torch.as_tensor(found.label_ids)[:, 1:]
    return {"correct": float((logits.argmax(-1) == labels)[labels >= 0].float().mean())}


#: Runs that between them give each argument of the table in docs/trainer.md another value than its default.
SFT_CASES = {
    "conversations": {
        "rows": {"messages": TALKS},
        "config": {
            "chat_template": TEMPLATE, "assistant_only_loss": True, "eos_token": "<end>", "pad_token": "<pad>",
            "pad_to_multiple_of": 8, "shuffle_dataset": True, "dataset_num_proc": 2, "max_length": 20,
            "truncation_mode": "keep_end",
        },
    },
    "loaded and packed": {
        "rows": {"words": paragraphs(30)},
        "by_path": True,
        "config": {
            "model_init_kwargs": {"attn_implementation": "eager"}, "trust_remote_code": True,
            "dataset_text_field": "words", "packing": True, "packing_strategy": "wrapped", "eval_packing": False,
        },
    },
    "tokens": {
        "rows": {"input_ids": [[at % 7 + k for k in range(9)] for at in range(24)],
                 "labels": [[-100, *(at % 7 + k for k in range(8))] for at in range(24)]},
        "config": {"dataset_kwargs": {"skip_prepare_dataset": True}, "loss_type": "dft"},
        "compute_metrics": correct,
    },
    "experts": {
        "rows": PAIRS, "family": "mixtral", "config": {"router_aux_loss_coef": 0.0, "completion_only_loss": False},
    },
}  # fmt: skip
DPO_CASES = {
    "weighted": {
        "config": {
            "loss_type": ["sigmoid_norm", "discopop"], "loss_weights": [0.7, 0.3], "discopop_tau": 0.1, "ld_alpha": 0.5,
            "f_divergence_type": "js_divergence", "beta": 0.2, "use_weighting": True, "pad_to_multiple_of": 8,
            "precompute_ref_batch_size": 4, "pad_token": "<end>", "padding_free": True,
        },
    },
    "robust, with dropout in the model": {
        "reference": "another",
        "family": "gpt2",
        "config": {
            "loss_type": ["robust"], "label_smoothing": 0.1, "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.3, "dataset_num_proc": 2, "max_length": 12, "truncation_mode": "keep_end",
            "disable_dropout": True,
        },
    },
    "loaded": {
        "by_path": True,
        "reference": "reloaded",
        "config": {
            "model_init_kwargs": {"attn_implementation": "eager"}, "trust_remote_code": True,
            "router_aux_loss_coef": 0.0, "precompute_ref_log_probs": False,
        },
    },
}  # fmt: skip

FRESH = {
    "sft": (sft, {}),
    "sft, completions": (sft, {"rows": PAIRS}),
    "dpo, ahead": (dpo, {}),
    **{f"dpo, {reference}": (dpo, {"reference": reference}) for reference in REFERENCES},
}


def fresh(folder, stock):
    """Twenty steps of each of `FRESH` in processes in which nothing has run before; what is logged goes to a file."""
    rank = os.environ.get("RANK", "0")
    found = {}
    for name, (run, given) in FRESH.items():
        options = {} if stock else {"num_chunks": 3}
        found[name] = run(f"{folder}/{name}", stock=stock, steps=20, **given, **options)
    Path(folder, f"{'stock' if stock else 'ours'}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    fresh(sys.argv[1], sys.argv[2] == "stock")
