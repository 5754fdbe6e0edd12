"""A Lightning module and Trainer, with token labels in the lines marked `# +`.

    python examples/lightning_module.py images/train labels --model vit_small_patch16_224 --img-size 224 --steps 10000

`labels` is what `tokenlabel annotate images/train labels --teacher ...` wrote.
"""

import argparse
from typing import Any

import lightning
import torch

import tokenlabel as tl  # +


class Classifier(lightning.LightningModule):
    """A classifier whose tokens learn from labels of their own."""

    def __init__(self, name: str, *, num_classes: int, img_size: tuple[int, int], lr: float) -> None:
        super().__init__()
        self.model = tl.create_model(name, num_classes=num_classes, img_size=img_size)  # +
        self.lr = lr

    def training_step(self, batch: Any) -> torch.Tensor:
        """Return the loss of a batch."""
        outputs = self.model(tl.normalize_images(batch.images, mean=self.model.mean, std=self.model.std))  # +
        targets = tl.align(batch.score_maps, batch.views, outputs.grid)  # +
        loss = tl.token_label_loss(outputs, batch.class_targets(), targets, beta=0.5).total  # +
        self.log("loss", loss, batch_size=len(batch.images), prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)


class Losses(lightning.Callback):
    """Prints the mean loss of every ten steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add a step's loss."""
        self.losses.append(float(outputs["loss"]))
        if len(self.losses) == 10:
            print(f"step {batch_idx} loss {sum(self.losses) / 10:.4f}", flush=True)
            self.losses = []


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder with one folder a class")
    parser.add_argument("labels", help="label store")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128, help="images a step and process")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[Losses()],
        use_distributed_sampler=False,  # ours gives each process its own images
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    img_size = (args.img_size, args.img_size)
    images = tl.open_images(args.images)  # +
    transform = tl.TrainTransform(tl.AugmentConfig(), img_size)  # +
    dataset = tl.TokenLabelDataset(images, transform, seed=0, store=tl.LabelStore(args.labels))  # +
    count: dict[str, Any] = {"num_images": len(dataset), "num_steps": args.steps, "seed": 0}
    ranks: dict[str, Any] = {"rank": trainer.global_rank, "world_size": trainer.world_size}
    order = tl.BatchSampler(batch_size=args.batch_size * trainer.world_size, **count, **ranks)  # +
    loader = tl.make_loader(dataset, order, num_workers=args.workers)  # +
    model = Classifier(args.model, num_classes=dataset.num_classes, img_size=img_size, lr=args.lr)
    trainer.fit(model, loader)


if __name__ == "__main__":
    main()
