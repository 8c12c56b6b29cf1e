"""A method that the project does not know, in one file, as a user would add it: the far patches stay.

`import toy_method` registers `toy_deit_nano` and `toy_lf_deit_nano`; nothing else in the project names them.
"""

import torch
from torch import Tensor

from models import AdaptiveViT, Knob, Picture, StageOutput
from models.lf_vit import LFViT
from models.registry import register
from models.selection import take, top_patches
from models.vit import NANO, Flag

AFTER = 1  # the block after which patches are dropped


class Toy(AdaptiveViT):
    """Plain ViT, except:

    - after block 1 only those `far` patches stay whose keys lie farthest from the mean key of the image.

    Args:
        far: how many stay.
        far_from_epoch: before this epoch training drops nothing.
    """

    stage_names = ("thinned",)
    recipe = {"lr": 1e-3, "far_from": 0.25}
    knobs = {"far": Knob(int, 1, 196)}
    flags = (
        Flag("--far", "toy: patches that stay after block 1", int),
        Flag(
            "--far-from",
            "toy: share of the epochs after which patches are dropped",
            argument="far_from_epoch",
            epochs=True,
            training=True,
        ),
    )

    def __init__(self, far: int = 49, far_from_epoch: float = 0, **vit):
        if not isinstance(far, int) or far < 1:
            raise ValueError(f"far is {far}: take a whole number from 1 up")
        super().__init__(**vit)
        self.far, self.far_from_epoch, self.dropping = far, far_from_epoch, True

    def set_epoch(self, epoch: float) -> None:
        super().set_epoch(epoch)
        self.dropping = epoch >= self.far_from_epoch

    def run(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the blocks on tokens [B,N,C]; info: `far` [B,n], the patches that stay, farthest first."""
        info = {}
        for i, block in enumerate(self.blocks):
            if i != AFTER or (self.training and not self.dropping):
                x = block(x)
                continue
            x, keys = block.attend(x, need="keys")
            x, keys = block.feed(x), keys[:, 1:]
            distance = (keys - keys.mean(dim=1, keepdim=True)).norm(dim=-1)  # [B,P]
            info["far"] = top_patches(distance, min(self.far, distance.shape[1]))
            x = torch.cat([x[:, :1], take(x[:, 1:], info["far"])], dim=1)
        return x, info

    def picture(self, info: dict[str, Tensor]) -> Picture:
        return super().picture(info)._replace(kept=(info["far"],) if "far" in info else ())

    def statistics(self, outputs: list[StageOutput]) -> dict[str, Tensor]:
        """Return how many patches stay."""
        last = outputs[-1].info
        count = last["far"].shape[1] if "far" in last else (self.img_size // self.patch_size) ** 2
        return {"patches_left": torch.tensor(float(count), device=outputs[-1].logits.device)}


class Combined(LFViT, Toy):
    """LF-ViT whose focus stage drops tokens as the toy does."""

    flags = (*LFViT.flags, *Toy.flags)
    knobs = Toy.knobs
    recipe = LFViT.recipe | Toy.recipe

    def picture(self, info: dict[str, Tensor]) -> Picture:
        """Return LF-ViT's picture; tokens that stay and are no refined patch are -1."""
        if "far" not in info:
            return super().picture(info)
        slots, refined = info["far"], info["kept"]
        patches = refined.gather(1, slots.clamp(max=refined.shape[1] - 1))
        return super().picture(info)._replace(kept=(patches.masked_fill(slots >= refined.shape[1], -1),))


register("toy_deit_nano toy_nano", Toy, "The toy at the size of the embedded data set.", **NANO, img_size=56)
register("toy_lf_deit_nano", Combined, "The toy inside LF-ViT's focus stage.", **NANO)
