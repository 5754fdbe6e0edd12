"""Hugging Face's Trainer, with token labels in the lines marked `# +`.

    python examples/hf_trainer.py images/train labels --model vit_small_patch16_224 --img_size 224 \
        --output_dir runs/hf --max_steps 10000 --per_device_train_batch_size 128

`labels` is what `tokenlabel annotate images/train labels --teacher ...` wrote. All of Trainer's own options work, and
`torchrun` or `accelerate launch` before the script.
"""

import argparse
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

import tokenlabel as tl  # +


class TokenLabelTrainer(Trainer):
    """A Trainer that takes its batches and its loss from tokenlabel."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of all steps, this process's part of each."""
        args: Any = self.args
        dataset: Any = self.train_dataset
        count, size = {"num_images": len(dataset), "num_steps": args.max_steps}, args.train_batch_size
        ranks = {"rank": args.process_index, "world_size": args.world_size}
        order = tl.BatchSampler(**count, batch_size=size * args.world_size, seed=0, **ranks)  # +
        return DataLoader(dataset, batch_sampler=order, collate_fn=as_inputs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss of a batch."""
        batch, ours = inputs["batch"].to(self.args.device), self.accelerator.unwrap_model(model)
        outputs = model(tl.normalize_images(batch.images, mean=ours.mean, std=ours.std))  # +
        targets = tl.align(batch.score_maps, batch.views, outputs.grid)  # +
        loss = tl.token_label_loss(outputs, tl.class_targets(batch.class_ids), targets, beta=0.5).total  # +
        return (loss, outputs) if return_outputs else loss


def as_inputs(samples: list[Any]) -> dict[str, Any]:
    """Return a batch as Trainer wants it: by name."""
    return {"batch": tl.collate(samples)}  # +


def main() -> None:
    """Train."""
    kinds: Any = TrainingArguments
    parser = HfArgumentParser(
        kinds, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="folder with one folder a class")
    parser.add_argument("labels", help="label store")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--img_size", type=int, default=224)
    parser.set_defaults(remove_unused_columns=False, learning_rate=1e-3, weight_decay=0.05)
    args, ours = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    size_px = (ours.img_size, ours.img_size)
    images = tl.open_images(ours.images)  # +
    transform = tl.TrainTransform(tl.AugmentConfig(), size_px)  # +
    dataset = tl.TokenLabelDataset(images, transform, seed=0, store=tl.LabelStore(ours.labels))  # +
    model = tl.create_model(ours.model, num_classes=dataset.num_classes, size_px=size_px)  # +
    TokenLabelTrainer(model=model, args=args, train_dataset=dataset).train()


if __name__ == "__main__":
    main()
