"""OwLore in TRL's SFTTrainer: python examples/trl_sft.py MODEL DATA.jsonl OUT."""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from owlore.trainer import OwLoreFactory, log_to

name, data, out = sys.argv[1:4]
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
arguments = SFTConfig(
    out,
    num_train_epochs=1,
    per_device_train_batch_size=8,
    max_length=512,
    logging_steps=1,
    report_to="none",
    bf16=False,  # weights are bfloat16 already: no autocast over them
    gradient_checkpointing=False,
)
# scores="scores.json", of `owlore outliers`, draws by outlier score instead of uniformly.
options = {"lr": 3e-4, "blocks": 5, "rank": 128, "distribution": "uniform"}
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(name, dtype=dtype),
    arguments,
    train_dataset=load_dataset("json", data_files=data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(name),
    optimizer_cls_and_kwargs=(OwLoreFactory, {**options, "embeddings": "freeze", "head": "freeze"}),
)
log_to(trainer)
trainer.train()
trainer.save_model(out)
