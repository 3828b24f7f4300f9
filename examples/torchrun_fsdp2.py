"""Sharded over GPUs: torchrun --nproc-per-node 2 torchrun_fsdp2.py MODEL DATA.jsonl OUT."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from owlore import OwLore
from owlore.data import Collator, read_jsonl, tokenize

name, data, out = sys.argv[1:4]
device = torch.accelerator.current_accelerator() or torch.device("cpu")
dist.init_process_group()
if device.type != "cpu":
    torch.accelerator.set_device_index(dist.get_rank() % torch.accelerator.device_count())
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).train()
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for block in model.model.layers:
    fully_shard(block, mp_policy=policy)
fully_shard(model, mp_policy=policy)
frozen = {"embeddings": "freeze", "head": "freeze"}
optimizer = OwLore(model, lr=3e-4, blocks=5, rank=128, scores="scores.json", **frozen)

rows = tokenize(read_jsonl(data), tokenizer, max_length=512).examples
loader = DataLoader(rows, 8, sampler=DistributedSampler(rows), collate_fn=Collator.of(tokenizer))
for batch in loader:
    model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
if weights := get_model_state_dict(model, options=options):
    model.save_pretrained(out, state_dict=weights)
    tokenizer.save_pretrained(out)
dist.destroy_process_group()
