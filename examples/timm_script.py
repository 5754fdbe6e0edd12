"""A training script in the style of timm's train.py, with token labels in the lines marked `# +`.

    python examples/timm_script.py images/train labels --model vit_small_patch16_224 --img-size 224 --epochs 300

`labels` is what `tokenlabel annotate images/train labels --teacher ...` wrote. What is not marked is timm's and
PyTorch's own: the optimizer, the schedule, the averaged weights, the loop.
"""

import argparse
import time

import torch
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.metrics import AverageMeter
from timm.utils.misc import ParseKwargs
from timm.utils.model_ema import ModelEmaV3

import tokenlabel as tl  # +


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder with one folder a class")
    parser.add_argument("labels", help="label store")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Train."""
    args = parse_args()
    img_size, batch_size = (args.img_size, args.img_size), args.batch_size
    images = tl.open_images(args.images)  # +
    transform = tl.TrainTransform(tl.AugmentConfig(), img_size)  # +
    dataset = tl.TokenLabelDataset(images, transform, seed=0, store=tl.LabelStore(args.labels))  # +
    num_steps = args.epochs * (len(dataset) // batch_size)
    order = tl.BatchSampler(num_images=len(dataset), batch_size=batch_size, seed=0, num_steps=num_steps)  # +
    loader = tl.make_loader(dataset, order, num_workers=args.workers)  # +

    torch.manual_seed(0)
    options = {"img_size": img_size, "num_classes": dataset.num_classes, **args.model_kwargs}
    model = tl.create_model(args.model, **options).to(args.device)  # +
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs)
    model_ema = ModelEmaV3(model, decay=0.999, use_warmup=True)

    losses, started = AverageMeter(), time.perf_counter()
    for step, batch in enumerate(loader):
        batch = batch.to(args.device)
        outputs = model(tl.normalize_images(batch.images, mean=model.mean, std=model.std))  # +
        targets = tl.align(batch.score_maps, batch.views, outputs.grid)  # +
        loss = tl.token_label_loss(outputs, batch.class_targets(), targets, beta=0.5).total  # +
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model_ema.update(model, step=step)
        losses.update(loss.item(), len(batch.images))
        if (step + 1) % order.steps_per_epoch == 0:
            epoch = step // order.steps_per_epoch
            scheduler.step(epoch + 1)
            rate = losses.count / (time.perf_counter() - started)
            print(f"epoch {epoch} loss {losses.avg:.4f} images/s {rate:.0f}", flush=True)
            losses, started = AverageMeter(), time.perf_counter()


if __name__ == "__main__":
    main()
