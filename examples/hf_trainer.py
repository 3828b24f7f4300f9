"""OwLore in Hugging Face's Trainer: python examples/hf_trainer.py MODEL DATA.jsonl OUT."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from owlore import outlier_scores
from owlore.data import Collator, read_jsonl, tokenize
from owlore.trainer import OwLoreFactory, log_to

name, data, out = sys.argv[1:4]
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
rows = tokenize(read_jsonl(data), tokenizer, max_length=512).examples
scores = outlier_scores(model, [row["input_ids"] for row in rows[:64]])

# The Trainer does not hand its learning rate on: lr stands among OwLore's options.
options = {"lr": 3e-4, "blocks": 5, "rank": 128, "scores": scores}
trainer = Trainer(
    model,
    TrainingArguments(
        out, num_train_epochs=1, per_device_train_batch_size=8, logging_steps=1, report_to="none"
    ),
    train_dataset=rows,
    data_collator=Collator.of(tokenizer),
    processing_class=tokenizer,
    optimizer_cls_and_kwargs=(OwLoreFactory, {**options, "embeddings": "freeze", "head": "freeze"}),
)
log_to(trainer)  # active blocks and captured gradient energy
trainer.train()
trainer.save_model(out)
