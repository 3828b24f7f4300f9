"""OwLore in a loop of your own: python examples/plain_pytorch.py MODEL DATA.jsonl OUT."""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from owlore import OwLore, outlier_scores
from owlore.data import Collator, read_jsonl, tokenize

name, data, out = sys.argv[1:4]
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).train()
rows = tokenize(read_jsonl(data), tokenizer, max_length=512).examples
loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=Collator.of(tokenizer))

scores = outlier_scores(model, [row["input_ids"] for row in rows[:64]])
optimizer = OwLore(
    model, lr=3e-4, blocks=5, rank=128, scores=scores, embeddings="freeze", head="freeze"
)
schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader))
for batch in loader:
    loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(f"step {optimizer.steps}: loss {loss.item():.3f}, blocks {optimizer.active_blocks}")

optimizer.detach()
model.save_pretrained(out)
tokenizer.save_pretrained(out)
