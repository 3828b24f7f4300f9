"""OwLore with accelerate: accelerate launch examples/accelerate_loop.py MODEL DATA.jsonl OUT."""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from owlore import OwLore
from owlore.data import Collator, read_jsonl, tokenize

name, data, out = sys.argv[1:4]
accelerator = Accelerator(gradient_accumulation_steps=2)
dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).train()
rows = tokenize(read_jsonl(data), tokenizer, max_length=512).examples
loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=Collator.of(tokenizer))

# scores="scores.json", of `owlore outliers`, draws by outlier score instead of uniformly.
owlore = OwLore(
    model, lr=3e-4, blocks=5, rank=128, distribution="uniform", embeddings="freeze", head="freeze"
)
model, optimizer, loader = accelerator.prepare(model, owlore, loader)
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"step {owlore.steps}: loss {loss.item():.3f}")

if accelerator.is_main_process:
    owlore.detach()
    accelerator.unwrap_model(model).save_pretrained(out)
    tokenizer.save_pretrained(out)
