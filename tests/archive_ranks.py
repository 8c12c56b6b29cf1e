"""Run in two processes: prints which images each gets from this project's loaders, over two epochs."""

import json
import sys

from PIL import Image

import datasets
import utils
from loading import loaders


def grey(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def main() -> None:
    context = utils.start("cpu")
    seen: dict[str, dict[str, list]] = {}
    for kind, source in json.loads(sys.argv[1]).items():
        seen[kind] = {"train": [], "val": []}
        for split, epochs in seen[kind].items():
            with utils.main_first(context):
                data = datasets.build_dataset(datasets.DataSource(**source), split, grey)
            if split == "train":
                share = dict(rank=context.rank, world_size=context.world_size)
                loader = loaders.train_loader(data, 3, num_workers=2, **share)
            else:
                shard = loaders.Shard(data, context.rank, context.world_size)
                loader = loaders.EvalLoader(shard, 3, num_workers=2)
            for epoch in range(2):
                if split == "train":
                    loader.sampler.set_epoch(epoch)
                epochs.append(utils.gather([images.tolist() for images, _ in loader]))
    if context.is_main:
        print(json.dumps(seen))
