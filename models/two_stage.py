"""What LF-ViT and CF-ViT share: a half-resolution stage, then a stage that refines the patches that matter.

CF-ViT (Chen et al. 2023, arXiv 2203.03821) and LF-ViT (Hu et al. 2024, arXiv 2402.00033). Grid side g of the
first stage, 2g of the second; both stages use the same blocks, norm and head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from models.selection import refine, take
from models.vit import AdaptiveViT, Flag, Picture, StageOutput
from utils import SHARE, InputError


class TwoStageViT(AdaptiveViT):
    """Plain ViT, except:

    - two position embeddings, one per stage, over the g x g and the 2g x 2g grid;
    - stage 0 sees the image at half resolution and also returns its class attention: an exponential moving
      average over the blocks (CF-ViT, section 3.3, global class attention);
    - stage 1 sees the four children of the patches that `select` refines, the other coarse patches as stage 0
      embedded them, and for every refined patch what stage 0 made of it (CF-ViT, section 3.4, feature reuse).

    Args:
        stage_size: g; the full image is 2 * patch_size * g pixels wide.
        img_size: that very number, if anything; the stage size sets it.
        alpha: share of the candidate patches that are refined, in (0, 1].
        beta: decay of the moving average of the class attention.
        first_attention: first block (0-based) of that average; the early blocks attend to everything.
        select_from_epoch: before this epoch stage 1 trains on all 2g x 2g patches. Evaluation always selects.
        coarse_only_epochs: until this epoch stage 0 alone is trained, on the plain criterion.
    """

    num_exits = 2
    read = slice(1)  # tokens that the last norm of stage 1 is needed for
    flags = (
        Flag("--alpha", "share of the patches (LF-ViT: of the region's patches) that are refined"),
        Flag(
            "--select-from",
            "share of the epochs after which selection starts (LF-ViT: 0.77)",
            SHARE,
            argument="select_from_epoch",
            epochs=True,
            training=True,
        ),
        Flag(
            "--coarse-only",
            "share of the epochs that train the first stage alone",
            SHARE,
            argument="coarse_only_epochs",
            epochs=True,
            training=True,
        ),
    )

    def __init__(
        self,
        stage_size: int,
        alpha: float,
        beta: float = 0.99,
        first_attention: int | None = None,
        select_from_epoch: float = 0,
        coarse_only_epochs: float = 0,
        patch_size: int = 16,
        img_size: int | None = None,
        **vit,
    ):
        if not (isinstance(stage_size, int) and stage_size >= 1):
            raise InputError(f"stage size is {stage_size}: take a grid of at least one patch a side")
        if not 0 < alpha <= 1:
            raise InputError(f"alpha is {alpha}: take a share in (0, 1]")
        self.stage_size, side = stage_size, 2 * patch_size * stage_size
        if img_size not in (None, side):
            flags = [flag.spellings[-1] for flag in self.flags if flag.target.endswith("stage_size")]
            raise InputError(
                f"img_size is {img_size}, but {' or '.join(flags) or 'stage_size'} sets it:"
                f" {stage_size} makes {side} pixels, {2 * patch_size} for each"
            )
        super().__init__(img_size=side, patch_size=patch_size, **vit)  # calls make_pos_embed
        if self.num_prefix_tokens > 1:
            raise InputError("distilled goes with plain models: two stages have no distillation token")
        self.beta = beta
        # The first quarter of the blocks is left out: 3 of 12, as published (3 of 16 for LV-ViT).
        self.first_attention = min(3, len(self.blocks) // 4) if first_attention is None else first_attention
        self.select_from_epoch, self.coarse_only_epochs = select_from_epoch, coarse_only_epochs
        self.varying_graph = coarse_only_epochs > 0
        self.selecting, self.coarse_only = True, False
        hidden = self.blocks[0].mlp.fc1.out_features
        self.reuse_block = nn.Sequential(self.norm_layer(self.embed_dim), Mlp(self.embed_dim, hidden))

    def make_pos_embed(self) -> None:
        sizes = [self.stage_size**2 + 1, 4 * self.stage_size**2 + 1]
        self.pos_embed_list = nn.ParameterList(torch.zeros(1, n, self.embed_dim) for n in sizes)

    def set_epoch(self, epoch: float) -> None:
        super().set_epoch(epoch)
        self.selecting = epoch >= self.select_from_epoch
        self.coarse_only = epoch < self.coarse_only_epochs

    def select(self, cls_attn: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Split the coarse patches by their class attention [B,g*g].

        Returns:
            Patches to refine [B,k], patches that stay coarse [B,g*g-k], and what pictures may want to know.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[StageOutput]:
        if self.training and self.coarse_only:
            return [self.stage(0, images, {})]
        return super().forward(images)

    def stage(self, k: int, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        self.check_images(images)
        return self.coarse(images) if k == 0 else self.fine(images, prev)

    def check_images(self, images: Tensor) -> None:
        AdaptiveViT.check_images(self, images)  # of this very size, whatever a reducer's own class takes

    def begin(self, images: Tensor) -> dict[str, Tensor]:
        """Return what `embed_patches` and `classify` of both stages read of this batch; batch-first."""
        return {}

    def coarse(self, images: Tensor) -> StageOutput:
        """Run stage 0. Its info: `cls_attn` [B,P], `embedded` and `features` [B,P,C], P = g*g."""
        info, half = self.begin(images), self.stage_size * self.patch_size
        # align_corners is part of the published weights: they were trained on this very resize.
        small = F.interpolate(images, (half, half), mode="bilinear", align_corners=True)
        embedded = self.embed_patches(small, info) + self.pos_embed_list[0][:, 1:]
        embedded = self.with_class_token(embedded, 0)
        x, cls_attn = embedded, torch.zeros((), device=images.device)
        for i, block in enumerate(self.blocks):
            x, row = block.attend(x, need="cls" if i >= self.first_attention else None)
            x = block.feed(x)
            if row is not None:  # the average of rows is the row of the averaged maps
                cls_attn = self.beta * cls_attn + (1 - self.beta) * row.detach()
        x = self.norm(x)
        info |= {"cls_attn": cls_attn, "embedded": embedded[:, 1:], "features": x[:, 1:]}
        return self.classify(0, x, info)

    def fine(self, images: Tensor, prev: dict[str, Tensor]) -> StageOutput:
        """Run stage 1.

        Its info: `kept` [B,4k], refined patches of the 2g x 2g grid, and what `select` and `run` add.
        """
        if self.training and not self.selecting:
            every = torch.arange(self.stage_size**2, device=images.device).expand(images.shape[0], -1)
            refined, rest, extra = every, every[:, :0], {}
        else:
            refined, rest, extra = self.select(prev["cls_attn"])
        kept = refine(refined, self.stage_size)
        reused = self.reuse_block(take(prev["features"], refined)).repeat(1, 4, 1)  # one for four children
        x = self.embed_patches(images, prev, kept) + reused + take(self.pos_embed_list[1][:, 1:], kept)
        x = torch.cat([self.with_class_token(x, 1), take(prev["embedded"], rest)], dim=1)  # [B,1+4k+g*g-k,C]
        x, info = self.run(x)
        info |= {"kept": kept, "rest": rest, **extra}
        return self.classify(1, self.norm(x[:, self.read]), info, prev)

    def picture(self, info: dict[str, Tensor]) -> Picture:
        picture, kept = super().picture(info), info.get("kept")
        if kept is None:
            return picture._replace(heat=info["cls_attn"])
        # `run` tells of slots, which are patches of the fine grid, then coarse ones of four children each.
        coarse = refine(info["rest"], self.stage_size).unflatten(1, (4, -1)).transpose(1, 2)
        slots = torch.cat([kept[..., None].expand(-1, -1, 4), coarse], dim=1)  # [B,S,4]
        stay = [take(slots, at.clamp(min=0)).where(at[..., None] >= 0, -1) for at in picture.kept]
        groups = picture.groups
        if groups is not None:
            full = groups.new_zeros(groups.shape[0], 4 * self.stage_size**2)
            groups = full.scatter(1, slots.flatten(1), groups.repeat_interleave(4, dim=1))
        return picture._replace(refined=kept, kept=tuple(at.flatten(1) for at in stay), groups=groups)

    def classify(
        self, k: int, x: Tensor, info: dict[str, Tensor], prev: dict[str, Tensor] | None = None
    ) -> StageOutput:
        """Return the logits of stage `k` from its normalised tokens [B,N,C], in stage 1 those of `read`."""
        return StageOutput(self.head(x[:, 0]), info)

    def with_class_token(self, patches: Tensor, k: int) -> Tensor:
        token = self.cls_token + self.pos_embed_list[k][:, :1]
        return torch.cat([token.expand(patches.shape[0], -1, -1), patches], dim=1)

    def embed_patches(self, images: Tensor, info: dict[str, Tensor], index: Tensor | None = None) -> Tensor:
        """Embed all patches of images as [B,P,C], or patches `index` [B,n] of the full image as [B,n,C]."""
        if index is None:
            return self.patch_embed(images)
        side, p = 2 * self.stage_size, self.patch_size
        grid = images.unflatten(3, (side, p)).unflatten(2, (side, p))
        grid = grid.permute(0, 2, 4, 1, 3, 5)  # [B,2g,2g,3,p,p]
        rows = torch.arange(images.shape[0], device=images.device)[:, None]
        pixels = grid[rows, index // side, index % side].flatten(2)  # [B,n,3*p*p]
        proj = self.patch_embed.proj
        return F.linear(pixels, proj.weight.flatten(1), proj.bias)

    def loss(
        self, outputs: list[StageOutput], target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Stage 1 learns from the target and stage 0 from stage 1 (CF-ViT, section 3.5)."""
        if len(outputs) == 1:
            return {"coarse_ce": criterion(outputs[0].logits, target)}
        first, last = (out.logits.float().log_softmax(dim=-1) for out in outputs)
        distil = F.kl_div(first, last.detach(), log_target=True, reduction="batchmean")
        return {"fine_ce": criterion(outputs[1].logits, target), "coarse_kl": distil}
