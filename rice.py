"""RICE: does this clip show the product of this shop image? (supplement, sections 1, 3 and 4)

    clip [B,T,3,H,W] -> ViT -> an embedding a frame -> mean -> clip embedding [B,D] --+
    shop image [B,3,H,W] -> ViT -> image embedding [B,D] -----------------------------+-- ICL
    ASR and title -> text encoder -> added to the embeddings, and one more token each
    image tokens attend to the tokens of 1 right and n wrong clips -> match scores     -- PMD
    the attention to the right clip has to rebuild the image's patches from the clip's -- PFR

ICL is the instance contrastive loss, PMD the pairwise matching decoder, PFR patch feature
reconstruction. The cosine of the embeddings ranks the images of a shop; the PMD
re-ranks the first of them.

Letters, the same in all files: B pairs of a clip and its image on this process, A pairs of all
processes, T frames of a clip, H W pixels, C channels of a token, D channels of an embedding, P
patches of a picture, S tokens, R = T*(1+P)+1 tokens of a clip that others attend to, J tokens of
a text, n negatives. A `padding_mask` is True where there is nothing, `valid` where there is
something.
"""
import functools
import math
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

# ---- image encoder


class QuickGELU(nn.Module):
    """CLIP's approximate GELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)  # [...]


def self_attend(layer, x, padding_mask=None):
    """The forward of an nn.MultiheadAttention `layer` on one input: x [B,S,C], padding_mask [B,S]
    -> [B,S,C]. It calls SDPA itself, which saves the copies that nn.MultiheadAttention makes."""
    qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    query, key, value = (y.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for y in qkv)
    allowed = None if padding_mask is None else ~padding_mask[:, None, None]
    attended = F.scaled_dot_product_attention(query, key, value, allowed)
    return layer.out_proj(attended.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """CLIP's residual block, pre-norm, with OpenAI's parameter names."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, padding_mask=None):
        x = x + self_attend(self.attn, self.ln_1(x), padding_mask)  # [B,S,C]
        return x + self.mlp(self.ln_2(x))  # [B,S,C]


class Transformer(nn.Module):
    """Blocks with CLIP's initialisation: the more there are, the less each adds at the start."""

    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        out_std = (width * 2 * layers) ** -0.5
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=out_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=out_std)

    def forward(self, x, padding_mask=None):
        for block in self.resblocks:
            x = block(x, padding_mask)  # [B,S,C]
        return x


def conv_stem(width):
    """Convolutions in place of a patch projection, 16 pixels a patch: with them a small ViT learns
    far faster from scratch."""
    norm = functools.partial(nn.GroupNorm, 8)

    def downsample(inputs, outputs):
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), norm(outputs))
        return BasicBlock(inputs, outputs, 2, shortcut, norm_layer=norm)

    return nn.Sequential(nn.Conv2d(3, 32, 4, 4), norm(32), nn.ReLU(),
                         BasicBlock(32, 32, norm_layer=norm),
                         downsample(32, 64), downsample(64, width))


class ViT(nn.Module):
    """CLIP's image tower; its parameter names are OpenAI's under "visual.".

    images [B,3,H,W], H = W = size -> embedding [B,D] (not normalised), tokens [B,1+P,C] (output
    of the last block, before ln_post; the class token first). patch: pixels of a patch, 0 for
    conv_stem. ValueError when the sizes do not fit together. An encoder that replaces it has to
    give the same two outputs, and `grid`, the number of patches on a side; it takes this one's
    place in RICE.visual.
    """

    def __init__(self, width=768, layers=12, heads=12, patch=32, size=224, dim=512):
        super().__init__()
        stride = patch or 16
        if width % heads or width % 8 or size % stride:
            raise ValueError(f"width {width}, heads {heads}, size {size}, patch {patch}: expected "
                             "a width in multiples of 8 and the heads, a size in multiples of the "
                             "patch (of 16 when that is 0)")
        self.grid = size // stride
        scale = width ** -0.5
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False) if patch else conv_stem(width)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + self.grid ** 2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.proj = nn.Parameter(scale * torch.randn(width, dim))
        self.register_load_state_dict_pre_hook(_without_visual)

    def forward(self, images):
        x = self.conv1(images).flatten(2).mT  # [B,P,C]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)  # [B,1+P,C]
        tokens = self.transformer(self.ln_pre(x + self.positional_embedding))  # [B,1+P,C]
        return self.ln_post(tokens[:, 0]) @ self.proj, tokens  # [B,D], [B,1+P,C]


def _without_visual(model, state, prefix, *_):
    """A ViT alone also loads a state dict with the names of a whole CLIP, "visual.NAME"."""
    for key in [key for key in state if key.startswith(f"{prefix}visual.")]:
        state[prefix + key[len(f"{prefix}visual."):]] = state.pop(key)


def interpolate_pos_embed(pos_embed, grid):
    """Position embeddings of another picture size: [1+P,C] -> [1+grid*grid,C], bicubic. The
    class token's is kept."""
    old_grid = math.isqrt(len(pos_embed) - 1)
    square = pos_embed[1:].reshape(1, old_grid, old_grid, -1).permute(0, 3, 1, 2).float()
    square = F.interpolate(square, (grid, grid), mode="bicubic")
    return torch.cat([pos_embed[:1].float(), square[0].flatten(1).T])


# ---- text encoder


class TextEncoder(nn.Module):
    """A small transformer over sentencepiece tokens: ids [B,J] (1: start, 0: padding) -> [B,C],
    the output of the start token. An empty text is the start token alone."""

    def __init__(self, vocab, width, heads, length, layers=2):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(length, width))
        self.transformer = Transformer(width, layers, heads)
        self.ln_final = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]  # [B,J,C]
        return self.ln_final(self.transformer(x, ids == 0)[:, 0])  # [B,C]


# ---- all processes


class AllGather(torch.autograd.Function):
    """The rows of all processes in order of rank, with gradients: [B,...] -> [A,...].

    The rows of this process also appear in the losses of the others, so backward sums their
    gradient over all processes. Each loss is a mean over its own B rows, and DDP averages over
    processes: together the mean over all A rows.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def all_gather_with_grad(x):
    """[B,...] -> [A,...]; the rows themselves when there is one process."""
    return AllGather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def rank_offset(rows):
    """The number of this process's first row among the rows of all processes."""
    return dist.get_rank() * rows if dist.is_initialized() else 0


# ---- ICL


def icl_loss(clip, image, scale, product_id=None):
    """Instance contrastive loss: symmetric InfoNCE over the pairs of all processes.

    clip and image: embeddings [B,D] (normalised here), scale of the cosine, product_id [B] -> the
    mean of both directions. Pairs of the same product are no negatives; in the public code they
    are.
    """
    targets = torch.arange(len(clip), device=clip.device) + rank_offset(len(clip))  # [B]
    with torch.autocast(clip.device.type, enabled=False):      # bf16 is too coarse for cosines
        clip = F.normalize(clip.float(), dim=-1)  # [B,D]
        image = F.normalize(image.float(), dim=-1)  # [B,D]
        clip_logits = scale * clip @ all_gather_with_grad(image).T  # [B,A]
        image_logits = scale * image @ all_gather_with_grad(clip).T  # [B,A]
    if product_id is not None:
        false_negative = product_id[:, None] == all_gather_with_grad(product_id)[None]  # [B,A]
        false_negative = false_negative.scatter(1, targets[:, None], False)  # [B,A]
        clip_logits = clip_logits.masked_fill(false_negative, -math.inf)  # [B,A]
        image_logits = image_logits.masked_fill(false_negative, -math.inf)  # [B,A]
    return (F.cross_entropy(clip_logits, targets) + F.cross_entropy(image_logits, targets)) / 2


# ---- hard negatives


def sample_negatives(similarity, image_product, clip_product, count, hard=True, noise=None):
    """For each image, `count` clips of other products without replacement (supplement, 3).

    similarity [B,A]: scaled ICL similarity of image and clip; products [B] and [A] -> index of the
    clips [B,n], valid [B,n] (False: there were too few). The chance of a clip is proportional to
    exp(similarity) when `hard`, else equal. Adding Gumbel noise [B,A] to the log-probabilities
    and taking the highest n draws n clips without replacement (Gumbel top-k). RICE.candidates
    gives noise that is the same for any number of processes.
    """
    noise = gumbel_noise(similarity.shape).to(similarity.device) if noise is None else noise
    score = similarity.detach().float() + noise if hard else noise  # [B,A]
    score = score.masked_fill(image_product[:, None] == clip_product[None], -math.inf)
    # Fewer clips than `count`: columns of -inf, whose index is then that of some clip, not valid.
    score = F.pad(score, (0, max(0, count - score.shape[1])), value=-math.inf)
    best, clip_index = score.topk(count, dim=1)  # [B,n] twice
    return clip_index.clamp(max=similarity.shape[1] - 1), best > -math.inf


def gumbel_noise(shape, seed=None):
    """Gumbel noise; from a seed where every process has to draw the same."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return -torch.empty(shape).exponential_(generator=generator).log()


# ---- PMD


class MatchLayer(nn.Module):
    """Image tokens attend to each other (in PMD.forward), then to the tokens of a clip, then pass
    an MLP; pre-norm.

    Cross-attention starts "tied": query and key are twice the identity, the value is the identity
    and the output its negative, with a little noise. So at the start an image token attends most
    to the clip tokens like it, and they are subtracted from it: what is left is the difference.
    From a random start the PMD does not learn to compare in a short training.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.ln_3 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), QuickGELU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.self_attn.out_proj.weight)
        tied_start = (self.query, 2), (self.key, 2), (self.value, 1), (self.out, -1)
        for linear, gain in tied_start:
            linear.weight.data = gain * torch.eye(width) + 0.02 * torch.randn(width, width)
            nn.init.zeros_(linear.bias)

    def cross_attend(self, x, key, value, padding_mask):
        """Cross-attention and MLP: x [B,S,C], key and value [B,R,C], padding_mask [B,R] -> x,
        weights [B,heads,S,R]."""
        query, key, value = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                             for y in (self.query(self.ln_2(x)), key, value))
        logits = (query @ key.mT).float() / math.sqrt(query.shape[-1])
        logits = logits.masked_fill(padding_mask[:, None, None], -math.inf)
        weights = logits.softmax(-1).to(value.dtype)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_3(x)), weights


class PMD(nn.Module):
    """Pairwise matching decoder: does this clip show the product of this image?

    image_tokens [B,S,C], clip_tokens [A,R,C], padding_mask [A,R], candidates [B,1+n] (which clips
    each image is compared with, in training the true one first) -> score [B,1+n], and the
    attention weights of the last layer for column 0 [B,heads,S,R].
    """

    def __init__(self, width, heads, layers=2):
        super().__init__()
        self.ln_image = nn.LayerNorm(width)
        self.ln_clip = nn.LayerNorm(width)
        self.ln_out = nn.LayerNorm(width)
        self.layers = nn.ModuleList(MatchLayer(width, heads) for _ in range(layers))
        self.score = nn.Linear(width, 1)

    def forward(self, image_tokens, clip_tokens, padding_mask, candidates):
        x = self.ln_image(image_tokens)  # [B,S,C]
        clip_tokens = self.ln_clip(clip_tokens)  # [A,R,C]
        pairs_per_image = candidates.shape[1]
        clip_of_pair = candidates.flatten()  # [B*(1+n)]
        for i, layer in enumerate(self.layers):
            # Layer 0 sees the image alone, so once for each image; the next, once for each pair.
            x = x + self_attend(layer.self_attn, layer.ln_1(x))  # [.,S,C]
            if i == 0:
                x = x.repeat_interleave(pairs_per_image, 0)  # [B*(1+n),S,C]
            # A clip stands in many pairs, so its tokens are projected before they are gathered.
            key = layer.key(clip_tokens)[clip_of_pair]  # [B*(1+n),R,C]
            value = layer.value(clip_tokens)[clip_of_pair]  # [B*(1+n),R,C]
            x, weights = layer.cross_attend(x, key, value, padding_mask[clip_of_pair])
        score = self.score(self.ln_out(x.mean(1))).view(candidates.shape)  # [B,1+n]
        return score, weights.unflatten(0, candidates.shape)[:, 0]  # [B,1+n], [B,heads,S,R]


def pmd_loss(score, valid=None):
    """Cross-entropy of the true pair, column 0, against its negatives: score [B,1+n], valid
    [B,n] (False: there is no such negative)."""
    score = score.float()
    if valid is not None:
        score = score.masked_fill(F.pad(~valid, (1, 0), value=False), -math.inf)
    return -score.log_softmax(1)[:, 0].mean()


# ---- PFR


def pfr_loss(attention_weights, head, clip_patches, image_patches, padding_mask):
    """Patch feature reconstruction: mean squared error of the image's patches, rebuilt from the
    clip's. `head` merges the attention maps of the true pair's heads into one, and a softmax over
    the clip's patches makes weights of it. RICE.patch_reconstruction_loss chooses the tokens.

    attention_weights [B,heads,P,T*P], head: heads -> 1 channels by 1x1 convolutions, clip_patches
    [B,T*P,C], image_patches [B,P,C], padding_mask [B,T*P]. Both features are detached; otherwise
    they could collapse to a constant. The public code does not mask this softmax.
    """
    logits = head(attention_weights).squeeze(1).float()  # [B,P,T*P]
    weights = logits.masked_fill(padding_mask[:, None], -math.inf).softmax(-1)
    with torch.autocast(logits.device.type, enabled=False):
        rebuilt = weights @ clip_patches.detach().float()  # [B,P,C]
    return F.mse_loss(rebuilt, image_patches.detach().float())


# ---- RICE


class RICE(nn.Module):
    """The image encoder of both views, the text encoder, and the three losses.

    vit: arguments of ViT. vocab and text_length: of the tokenizer. negatives: "hard" or "rand".
    losses: icl, and perhaps pmd, and with it pfr; PFR weighs pfr_weight, the others 1.
    """

    def __init__(self, vit, vocab, text_length=24, n_neg=3, negatives="hard",
                 losses=("icl", "pmd", "pfr"), pfr_weight=0.05):
        super().__init__()
        width, heads = vit["width"], vit["heads"]
        self.n_neg = n_neg
        self.hard = negatives == "hard"
        self.losses = losses
        self.pfr_weight = pfr_weight
        self.visual = ViT(**vit)
        self.text = TextEncoder(vocab, width, heads, text_length)
        self.text_proj = nn.Linear(width, vit["dim"], bias=False)
        nn.init.zeros_(self.text_proj.weight)        # ICL starts from the images alone
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if "pmd" in losses:
            self.pmd = PMD(width, heads)
        if "pfr" in losses:
            half = max(1, heads // 2)
            self.pfr_head = nn.Sequential(
                nn.Conv2d(heads, half, 1), nn.ReLU(), nn.Conv2d(half, 1, 1))

    def scale(self):
        """The factor on a cosine, learned, at most 100 as in CLIP."""
        return self.logit_scale.exp().clamp(max=100)

    def encode_images(self, image, title):
        """image [B,3,H,W], title [B,J] -> embedding [B,D], tokens [B,1+P+1,C]: class, patches,
        text; and the embedding without the text [B,D]. Embeddings have length 1."""
        visual, tokens = self.visual(image)  # [B,D], [B,1+P,C]
        visual = F.normalize(visual, dim=-1)  # [B,D]
        text = self.text(title)  # [B,C]
        embedding = F.normalize(visual + self.text_proj(text), dim=-1)  # [B,D]
        return embedding, torch.cat([tokens, text[:, None]], 1), visual

    def encode_clips(self, frames, valid, asr):
        """frames [B,T,3,H,W], valid [B,T], asr [B,J] -> embedding [B,D], tokens [B,R,C] (class and
        patches of each frame, then the text), the embedding without the text [B,D], and
        padding_mask [B,R]. The embedding is the mean of the directions of the frames."""
        B, T = valid.shape
        visual, tokens = self.visual(frames.flatten(0, 1))  # [B*T,D], [B*T,1+P,C]
        visual = F.normalize(visual, dim=-1).view(B, T, -1) * valid[..., None]  # [B,T,D]
        visual = F.normalize(visual.sum(1), dim=-1)  # [B,D]
        text = self.text(asr)  # [B,C]
        embedding = F.normalize(visual + self.text_proj(text), dim=-1)  # [B,D]
        padding_mask = (~valid).repeat_interleave(tokens.shape[1], 1)  # [B,T*(1+P)]
        tokens = torch.cat([tokens.reshape(B, -1, tokens.shape[-1]), text[:, None]], 1)  # [B,R,C]
        return embedding, tokens, visual, F.pad(padding_mask, (0, 1), value=False)

    def loss(self, batch):
        """A batch of data.ClipDataset, pictures normalised, with the "seed" of the step -> loss,
        {term: value}.

        A fourth loss is one more term here: a mean over this process's B pairs. Its layers go into
        __init__, its name into the choices of train.Config.losses, its weight into a field of
        train.Config that eval.build_model passes on.
        """
        image, image_tokens, image_visual = self.encode_images(batch["image"], batch["title"])
        clip, clip_tokens, clip_visual, padding_mask = self.encode_clips(
            batch["frames"], batch["valid"], batch["asr"])
        # With the text and without it: otherwise text would replace visual learning.
        loss = (icl_loss(clip, image, self.scale(), batch["product_id"]) +
                icl_loss(clip_visual, image_visual, self.scale(), batch["product_id"])) / 2
        terms = {"icl": loss.detach(), "scale": self.scale().detach()}
        if "pmd" in self.losses:
            candidates, valid = self.candidates(clip, image, batch["product_id"], batch["seed"])
            score, weights = self.pmd(image_tokens, all_gather_with_grad(clip_tokens),
                                      all_gather_with_grad(padding_mask.float()) > 0, candidates)
            pmd = pmd_loss(score, valid)
            loss = loss + pmd
            terms["pmd"] = pmd.detach()
        if "pfr" in self.losses:
            pfr = self.patch_reconstruction_loss(weights, clip_tokens, image_tokens, padding_mask)
            loss = loss + self.pfr_weight * pfr
            terms["pfr"] = pfr.detach()
        return loss, terms

    @torch.no_grad()
    def candidates(self, clip, image, product_id, seed):
        """The clip of each image (column 0), then negatives among the clips of all processes:
        clip and image [B,D], product_id [B] -> candidates [B,1+n], valid negatives [B,n]."""
        with torch.autocast(image.device.type, enabled=False):
            clips = all_gather_with_grad(clip.float())  # [A,D]
            similarity = self.scale() * image.float() @ clips.T  # [B,A]
        B, A = similarity.shape
        first = rank_offset(B)
        # The noise of all rows, so that the draw does not depend on the number of processes.
        noise = gumbel_noise((A, A), seed)[first:first + B].to(image.device, non_blocking=True)
        clip_product = all_gather_with_grad(product_id)  # [A]
        negatives, valid = sample_negatives(
            similarity, product_id, clip_product, self.n_neg, self.hard, noise)  # [B,n] twice
        own_clip = torch.arange(first, first + B, device=image.device)[:, None]  # [B,1]
        return torch.cat([own_clip, negatives], 1), valid

    def patch_reconstruction_loss(self, weights, clip_tokens, image_tokens, padding_mask):
        """PFR on the patches alone; class tokens and texts are left out on both sides.
        weights [B,heads,1+P+1,R], clip_tokens [B,R,C], image_tokens [B,1+P+1,C]."""
        P = self.visual.grid ** 2
        heads, width = weights.shape[1], clip_tokens.shape[-1]

        def patches_of(tokens, dim):
            """Of a clip's tokens [...,R,...] drop the text, the last one, and each class token."""
            frames = tokens.narrow(dim, 0, tokens.shape[dim] - 1).unflatten(dim, (-1, 1 + P))
            return frames.narrow(dim + 1, 1, P).flatten(dim, dim + 1)

        weights = patches_of(weights[:, :, 1:1 + P], 3)  # [B,heads,P,T*P]
        padding_mask = patches_of(padding_mask, 1)  # [B,T*P]
        clip_patches = patches_of(clip_tokens, 1)  # [B,T*P,C]
        # Attention over R tokens is about 1/R. The public code multiplies it by sqrt(channels of a
        # head) before the head sees it.
        return pfr_loss(weights * math.sqrt(width / heads), self.pfr_head, clip_patches,
                        image_tokens[:, 1:1 + P], padding_mask)
