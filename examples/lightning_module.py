"""OwLore in Lightning: python examples/lightning_module.py MODEL DATA.jsonl OUT."""

import sys

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from owlore import OwLore
from owlore.data import Collator, read_jsonl, tokenize


class Module(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model.train()

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OwLore:
        # strategy.model: this module, in DDP where there are several GPUs.
        # scores="scores.json", of `owlore outliers`, draws by outlier score.
        options = {"distribution": "uniform", "embeddings": "freeze", "head": "freeze"}
        return OwLore(self.trainer.strategy.model, lr=3e-4, blocks=5, rank=128, **options)


name, data, out = sys.argv[1:4]
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
tokenizer = AutoTokenizer.from_pretrained(name)
module = Module(AutoModelForCausalLM.from_pretrained(name, dtype=dtype))
rows = tokenize(read_jsonl(data), tokenizer, max_length=512).examples
loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=Collator.of(tokenizer))
trainer = lightning.Trainer(max_epochs=1, default_root_dir=out, gradient_clip_val=1.0)
trainer.fit(module, loader)
if trainer.is_global_zero:
    module.model.save_pretrained(out)
