"""SAM in the Hugging Face Trainer with gradient accumulation: add ``SAMTrainer`` as the first base class."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fastsam.integrations.hugging_face import SAMTrainer

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32}
CONFIG = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **SIZES)


class MyTrainer(SAMTrainer, Trainer):
    """A trainer with SAM. Replace ``Trainer`` by the class that you use, such as ``Seq2SeqTrainer``."""


def main() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    texts = [{"input_ids": text, "labels": text} for text in torch.randint(50, (64, 6))]
    arguments = TrainingArguments(
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        use_cpu=True,
        report_to="none",
    )
    MyTrainer(model=model, args=arguments, train_dataset=texts, sam={"rho": 0.05}).train()
    return model.state_dict()


if __name__ == "__main__":
    main()
