"""Hugging Face's Trainer, with token labels in the lines marked `# +`.

    python examples/hf_trainer.py images/train labels --model vit_small_patch16_224 --img_size 224 \
        --output_dir runs/hf --max_steps 10000 --per_device_train_batch_size 128

`labels` is what `tokenlabel annotate images/train labels --teacher ...` wrote. All of Trainer's own options work, and
`torchrun` or `accelerate launch` before the script.
"""

import argparse
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

import tokenlabel as tl  # +


class Learner(nn.Module):
    """A network that returns its loss, as Trainer wants it; so the loss is part of what DDP wraps."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Return the loss of a batch."""
        network, batch = self.network, batch.to(next(self.parameters()).device)
        outputs = network(tl.normalize_images(batch.images, mean=network.mean, std=network.std))  # +
        targets = tl.align(batch.score_maps, batch.views, outputs.grid)  # +
        loss = tl.token_label_loss(outputs, batch.class_targets(), targets, beta=0.5).total  # +
        return {"loss": loss}


class TokenLabelTrainer(Trainer):
    """A Trainer whose batches know where in an image they come from."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of all steps, this process's part of each."""
        args: Any = self.args
        dataset: Any = self.train_dataset
        num_batches = args.max_steps * args.gradient_accumulation_steps
        count = {"num_images": len(dataset), "num_steps": num_batches, "seed": args.seed}
        ranks = {"rank": args.process_index, "world_size": args.world_size}
        order = tl.BatchSampler(batch_size=args.train_batch_size * args.world_size, **count, **ranks)  # +
        workers = args.dataloader_num_workers
        return DataLoader(dataset, batch_sampler=order, collate_fn=by_name, num_workers=workers)


def by_name(samples: list[Any]) -> dict[str, Any]:
    """Return a batch as an argument of `Learner.forward`."""
    return {"batch": tl.collate(samples)}  # +


def main() -> None:
    """Train."""
    kinds: Any = TrainingArguments
    formatter = argparse.RawDescriptionHelpFormatter
    parser = HfArgumentParser(kinds, description=__doc__, formatter_class=formatter)
    parser.add_argument("images", help="folder with one folder a class")
    parser.add_argument("labels", help="label store")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--img_size", type=int, default=224)
    parser.set_defaults(remove_unused_columns=False, learning_rate=1e-3, weight_decay=0.05)
    args, ours = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    img_size = (ours.img_size, ours.img_size)
    images = tl.open_images(ours.images)  # +
    transform = tl.TrainTransform(tl.AugmentConfig(), img_size)  # +
    dataset = tl.TokenLabelDataset(images, transform, seed=0, store=tl.LabelStore(ours.labels))  # +
    network = tl.create_model(ours.model, num_classes=dataset.num_classes, img_size=img_size)  # +
    TokenLabelTrainer(model=Learner(network), args=args, train_dataset=dataset).train()


if __name__ == "__main__":
    main()
