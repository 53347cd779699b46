"""RICE: cross-view semantic alignment of clips and shop images (supplement, sections 1, 3 and 4).

    clip frames [B,T,3,S,S] -> ViT -> frame embeddings -> mean -> clip embedding [B,D] --+-- ICL: pull pairs together
    shop image  [B,3,S,S]   -> ViT -> image embedding [B,D] -----------------------------+   (one ViT for both views)
    image tokens ask the tokens of 1 right and n wrong clips (hard negatives) -> match scores   -- PMD: tell them apart
    where they looked in the right clip, must rebuild the image's patches from the clip's       -- PFR: align patches
    ASR and title -> text encoder -> one token more for the PMD, and added to a half of the ICL embedding [B,2D]

Letters: B pairs of this process, A pairs of all processes, T frames, S side in pixels, P patches of a picture, W token
width, D embedding, N tokens of a text (in a Block: of any row), Q tokens of an image (1+P and its text), R tokens of a
clip, C candidate clips of an image, G and g patches on a side, `heads` of attention. Masks called `padding` are True
where there is nothing; `keep` and `valid` are True where there is something.
"""
import math
import pickle
import zipfile
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

# ------------------------------------------------------------------ encoders


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)                                                      # [...], as x


def self_attention(layer, x, padding=None):
    """Self-attention with the weights of an nn.MultiheadAttention, whose own forward turns batches about and copies
    them: x [B,N,W], padding [B,N] -> [B,N,W]."""
    parts = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)                   # [B,N,W] three times
    query, key, value = (y.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for y in parts)  # [B,heads,N,.]
    allowed = None if padding is None else ~padding[:, None, None]                               # [B,1,1,N]
    return layer.out_proj(F.scaled_dot_product_attention(query, key, value, allowed).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """CLIP's residual block: self-attention and an MLP, each after its LayerNorm (OpenAI's parameter names)."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(),
                                             c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, padding=None):
        x = x + self_attention(self.attn, self.ln_1(x), padding)                                 # [B,N,W]
        return x + self.mlp(self.ln_2(x))                                                        # [B,N,W]


class Transformer(nn.Module):
    """Blocks with CLIP's initialisation: the more of them, the less each adds at the start."""

    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        into, out = width ** -0.5, width ** -0.5 * (2 * layers) ** -0.5
        for block in self.resblocks:
            for weight, std in ((block.attn.in_proj_weight, into), (block.attn.out_proj.weight, out),
                                (block.mlp.c_fc.weight, (2 * width) ** -0.5), (block.mlp.c_proj.weight, out)):
                nn.init.normal_(weight, std=std)

    def forward(self, x, padding=None):
        for block in self.resblocks:
            x = block(x, padding)                                                                # [B,N,W]
        return x


def stem(width, norm=lambda channels: nn.GroupNorm(8, channels)):
    """Convolution blocks in place of one patch projection: 16 pixels a token; for a ViT that starts from nothing."""
    def down(inputs, outputs):
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), norm(outputs))
        return BasicBlock(inputs, outputs, 2, shortcut, norm_layer=norm)
    return nn.Sequential(nn.Conv2d(3, 32, 4, 4), norm(32), nn.ReLU(), BasicBlock(32, 32, norm_layer=norm),
                         down(32, 64), down(64, width))


class ViT(nn.Module):
    """CLIP's image tower, OpenAI layout; its parameter names are those under "visual." in OpenAI's files.

    images [B,3,S,S] -> embedding [B,D] (not normalised), tokens [B,1+P,W] (the last block's output, before ln_post; the
    class token first). keep [B,P]: patches that take part in attention (the `mask` view), all of them by default.
    patch: pixels of a patch; 0 takes the patches from a stem of convolutions (16 pixels each) instead. ValueError when
    the sizes do not go together.
    """

    def __init__(self, width=768, layers=12, heads=12, patch=32, size=224, dim=512):
        super().__init__()
        if width % heads or width % 8:
            raise ValueError(f"width {width}, heads {heads}: expected a width that is a multiple of 8 and of the heads")
        if size % (patch or 16):
            raise ValueError(f"size {size}, patch {patch}: expected a size that is a multiple of the patch, of 16 when "
                             "that is 0")
        self.grid = size // (patch or 16)
        scale = width ** -0.5
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False) if patch else stem(width)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + self.grid ** 2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.proj = nn.Parameter(scale * torch.randn(width, dim))
        self.register_load_state_dict_pre_hook(_without_visual)

    def forward(self, images, keep=None):
        x = self.conv1(images).flatten(2).transpose(1, 2)                                        # [B,P,W]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)                        # [B,1+P,W]
        x = self.ln_pre(x + self.positional_embedding)                                           # [B,1+P,W]
        padding = None if keep is None else F.pad(~keep, (1, 0), value=False)                    # [B,1+P]
        tokens = self.transformer(x, padding)                                                    # [B,1+P,W]
        return self.ln_post(tokens[:, 0]) @ self.proj, tokens                                    # [B,D], [B,1+P,W]


def _without_visual(model, state, prefix, *_):
    """The tower alone also takes its parameters under the names that they have in a whole CLIP."""
    for key in [key for key in state if key.startswith(f"{prefix}visual.")]:
        state[prefix + key[len(prefix) + 7:]] = state.pop(key)


class TextEncoder(nn.Module):
    """A small transformer over sentencepiece tokens: ids [B,N] (1 start, 0 padding) -> [B,W], the start token's vector.

    The start token is always there, so an empty text has a vector too: the one that says "nothing was said".
    """

    def __init__(self, vocab, width, heads, layers=2, length=24):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(length, width))
        self.transformer, self.ln_final = Transformer(width, layers, heads), nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]                 # [B,N,W]
        return self.ln_final(self.transformer(x, ids == 0)[:, 0])                                # [B,W]


# ------------------------------------------------------------------ all processes


class Gather(torch.autograd.Function):
    """Rows of every process, in order of rank, with gradients: [B,...] -> [A,...].

    Each process takes the mean loss of its own B rows, but its rows take part in the others' losses too. So the
    gradient of its rows is the sum of what all processes found for them (all_reduce, then its own slice). DDP then
    averages over processes, and the mean over B rows of each becomes the mean over all A rows: no other factor where
    all rows count (where some do not, mean_of_pairs divides by those that do, on all processes).
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)                 # it is autograd's, not ours
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    return Gather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def first_row(count):
    """The place of this process's first row among all processes' rows."""
    return dist.get_rank() * count if dist.is_initialized() else 0


# ------------------------------------------------------------------ ICL


def icl_loss(clip, image, scale, product=None):
    """Instance contrastive loss: symmetric InfoNCE over the pairs of all processes.

    clip, image [B,D] (normalised here), scale of the cosine, product [B] (-1: not read, left out) -> the mean of both
    directions. Clips of a batch may show the same product, told by the image's id: such a pair is no negative (in the
    public code it is one).
    """
    own = torch.arange(len(clip), device=clip.device) + first_row(len(clip))                     # [B]
    with torch.autocast(clip.device.type, enabled=False):                    # bf16 would blur the cosines
        clip, image = F.normalize(clip.float(), dim=-1), F.normalize(image.float(), dim=-1)      # [B,D], [B,D]
        logits = torch.stack([scale * clip @ gather(image).T, scale * image @ gather(clip).T])   # [2,B,A]
    if product is not None:
        others = gather(product)                                                                 # [A]
        same = (product[:, None] == others[None]) | (others < 0)                                 # [B,A]
        same &= torch.arange(len(others), device=own.device) != own[:, None]                     # [B,A]
        logits = logits.masked_fill(same, -math.inf)                                             # [2,B,A]
    loss = F.cross_entropy(logits.flatten(0, 1), own.repeat(2), reduction="none").view(2, -1)    # [2,B]
    return mean_of_pairs(loss.mean(0), product)


def mean_of_pairs(loss, product):
    """Mean of loss [B] over all processes' pairs that could be read (product >= 0).

    DDP will divide the sum of all processes by their number (A / B), so what each has is multiplied by it here.
    """
    if product is None:
        return loss.mean()
    there = gather(product) >= 0                                                                 # [A]
    return (loss * (product >= 0)).sum() * (len(there) / len(product)) / there.sum().clamp(min=1)


# ------------------------------------------------------------------ hard negatives


def sample_negatives(similarity, image_product, clip_product, count, hard=True, noise=None):
    """For each image, `count` clips of other products, drawn without replacement (supplement, section 3).

    similarity [B,A] scaled ICL similarity of image and clip, products [B] and [A] (-1: not read, never drawn) -> clips
    [B,count], real [B,count] (False: there were too few other products). A clip's chance is proportional to
    exp(similarity) when hard, else equal: adding Gumbel noise [B,A] and taking the highest draws exactly so.
    """
    if noise is None:
        noise = gumbel(similarity.shape, None).to(similarity.device)
    other = (image_product[:, None] != clip_product[None]) & (clip_product >= 0)                 # [B,A]
    score = ((similarity.detach().float() if hard else 0) + noise).masked_fill(~other, -math.inf)  # [B,A]
    score = F.pad(score, (0, max(0, count - score.shape[1])), value=-math.inf)
    best, clips = score.topk(count, dim=1)                                                       # [B,count]
    return clips.clamp(max=similarity.shape[1] - 1), best > -math.inf


def gumbel(shape, seed):
    """Gumbel noise, from a seed where the draw must be the same whatever the number of processes."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return -torch.empty(shape).exponential_(generator=generator).log()


# ------------------------------------------------------------------ PMD


class MatchLayer(nn.Module):
    """Image tokens attend to each other, then to a clip's tokens, then an MLP; pre-norm.

    The image asks, for it shows the product alone: each of its tokens looks for its like in the cluttered clip.
    Cross-attention starts "tied" (but for a little noise): query and key are the same multiple of the identity, value
    the identity, output its negative. A token then attends to its look-alike and keeps what differs: mine minus yours.
    So the decoder starts as a comparison and need not find one; self-attention starts silent, to leave that as it is.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2, self.ln_3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), QuickGELU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.self_attn.out_proj.weight)
        for linear, gain in ((self.query, 2.0), (self.key, 2.0), (self.value, 1.0), (self.out, -1.0)):
            linear.weight.data = gain * torch.eye(width) + 0.02 * torch.randn(width, width)
            nn.init.zeros_(linear.bias)

    def think(self, x):
        """Self-attention over an image's tokens: [.,Q,W] -> [.,Q,W]; needs no clip."""
        return x + self_attention(self.self_attn, self.ln_1(x))

    def look(self, x, key, value, padding):
        """Cross-attention to one clip each: x [.,Q,W], key, value [.,R,W], padding [.,R] -> x, maps [.,heads,Q,R]."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(self.ln_2(x)), key, value))
        logits = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])                      # [.,heads,Q,R]
        maps = logits.masked_fill(padding[:, None, None], -math.inf).softmax(-1).to(v.dtype)     # [.,heads,Q,R]
        x = x + self.out((maps @ v).transpose(1, 2).flatten(2))                                  # [.,Q,W]
        return x + self.mlp(self.ln_3(x)), maps


class PMD(nn.Module):
    """Pairwise matching decoder: does this clip show this image's product?

    image_tokens [B,Q,W], clip_tokens [A,R,W], padding [A,R], pairs [B,C] (which clips each image is compared with)
    -> score [B,C], and the last layer's attention maps of column 0, the true pair: [B,heads,Q,R].
    """

    def __init__(self, width, heads, layers=2):
        super().__init__()
        self.ln_image, self.ln_clip, self.ln_out = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(MatchLayer(width, heads) for _ in range(layers))
        self.score = nn.Linear(width, 1)

    def forward(self, image_tokens, clip_tokens, padding, pairs):
        x, clip = self.ln_image(image_tokens), self.ln_clip(clip_tokens)                         # [B,Q,W], [A,R,W]
        chosen = pairs.flatten()                                                                 # [B*C]
        for i, layer in enumerate(self.layers):
            x = layer.think(x)                                                                # [B,Q,W], then [B*C,Q,W]
            if i == 0:
                x = x.repeat_interleave(pairs.shape[1], 0)                                       # [B*C,Q,W]
            # Projected once a clip and gathered a pair: a clip stands in many pairs.
            key, value = (of(clip).index_select(0, chosen) for of in (layer.key, layer.value))   # [B*C,R,W] twice
            x, maps = layer.look(x, key, value, padding[chosen])                                 # [B*C,Q,W]
        score = self.score(self.ln_out(x.mean(1)))                                               # [B*C,1]
        return score.view(pairs.shape), maps.unflatten(0, pairs.shape)[:, 0]                     # [B,C], [B,heads,Q,R]


def pmd_loss(score, real=None, product=None):
    """Cross-entropy of the true pair (column 0) against its negatives: score [B,1+n], real [B,n] (False: left out),
    product [B] (-1: the pair is left out)."""
    score = score.float()
    if real is not None:
        score = score.masked_fill(F.pad(~real, (1, 0), value=False), -math.inf)                  # [B,1+n]
    return mean_of_pairs(-score.log_softmax(1)[:, 0], product)


# ------------------------------------------------------------------ PFR


def pfr_weights(maps, head, padding):
    """Which clip patches each image patch is rebuilt from: maps [B,heads,P,T*P], padding [B,T*P] -> [B,P,T*P], sums 1.

    The public code does not mask this softmax, so its padded frames take weight; here they take none.
    """
    return head(maps).squeeze(1).float().masked_fill(padding[:, None], -math.inf).softmax(-1)    # [B,P,T*P]


def pfr_loss(maps, head, clip_patches, image_patches, padding, product=None):
    """Patch feature reconstruction: the maps of the true pair must rebuild the image's patches from the clip's.

    maps [B,heads,P,T*P] (attention, softmaxed once), head: heads -> 1 by 1x1 convolutions, clip_patches [B,T*P,W],
    image_patches [B,P,W], padding [B,T*P], product [B] (-1: left out) -> mean squared error. Both features are
    detached, or to make all of them alike would be cheapest; `head` learns and, through the maps, the PMD and the
    encoder where to look.
    """
    weight = pfr_weights(maps, head, padding)                                                    # [B,P,T*P]
    with torch.autocast(maps.device.type, enabled=False):
        rebuilt = weight @ clip_patches.detach().float()                                         # [B,P,W]
    error = (rebuilt - image_patches.detach().float()).square().mean((1, 2))                     # [B]
    return mean_of_pairs(error, product)


# ------------------------------------------------------------------ RICE


class RICE(nn.Module):
    """One image encoder for both views, with text, and the three losses.

    `loss` is what training asks for; evaluation asks encode_images and encode_clips for embeddings, whose product is
    the ranking, and `pmd` for scores. A fourth loss is one more term of `loss`, its layers made in
    __init__ where it is asked for (DDP wants each of them used), its mean taken by mean_of_pairs, and named in the
    combinations of eval.CHOICES; logs and curves show it.
    vit: arguments of ViT. vocab: size of the tokenizer. negatives: "hard" or "rand". losses: which of icl, pmd, pfr.
    masked: whether patches of a clip may be hidden (the `mask` view); attention without a mask is faster.
    """

    def __init__(self, vit, vocab, n_neg=3, negatives="hard", losses=("icl", "pmd", "pfr"), masked=True):
        super().__init__()
        width, heads, dim = vit["width"], vit["heads"], vit["dim"]
        self.n_neg, self.hard, self.losses, self.masked = n_neg, negatives == "hard", losses, masked
        self.visual = ViT(**vit)
        self.text = TextEncoder(vocab, width, heads)
        self.text_proj = nn.Linear(width, dim, bias=False)
        nn.init.zeros_(self.text_proj.weight)        # training starts from the images; text has to earn its place
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if "pmd" in losses:
            self.pmd = PMD(width, heads)
        if "pfr" in losses:
            half = max(1, heads // 2)
            self.pfr_head = nn.Sequential(nn.Conv2d(heads, half, 1), nn.ReLU(), nn.Conv2d(half, 1, 1))

    def scale(self):
        """What a cosine is multiplied by; learned, clamped to 100 as CLIP does."""
        return self.logit_scale.exp().clamp(max=100)

    def encode_images(self, image, title):
        """image [B,3,S,S], title [B,N] -> embedding [B,2D], tokens [B,1+P+1,W]: class, patches, text."""
        embedding, tokens = self.visual(image)                                                   # [B,D], [B,1+P,W]
        text = self.text(title)                                                                  # [B,W]
        return self.embedding(embedding, text), torch.cat([tokens, text[:, None]], 1)            # [B,2D], [B,1+P+1,W]

    def encode_clips(self, frames, keep, valid, asr):
        """frames [B,T,3,S,S], keep [B,T,P], valid [B,T], asr [B,N] -> embedding [B,2D], tokens [B,R,W], padding [B,R].

        R = T*(1+P) + 1: each frame's class token and patches, then the text. The embedding points along the mean of the
        valid frames' directions.
        """
        B, T = valid.shape
        shown = keep.flatten(0, 1) if self.masked else None                                      # [B*T,P]
        embedding, tokens = self.visual(frames.flatten(0, 1), shown)                             # [B*T,D], [B*T,1+P,W]
        seen = (F.normalize(embedding, dim=-1).view(B, T, -1) * valid[..., None]).sum(1)         # [B,D]
        text = self.text(asr)                                                                    # [B,W]
        tokens = torch.cat([tokens.reshape(B, -1, tokens.shape[-1]), text[:, None]], 1)          # [B,R,W]
        here = (F.pad(keep, (1, 0), value=True) & valid[..., None]).flatten(1)                   # [B,T*(1+P)]
        return self.embedding(seen, text), tokens, F.pad(~here, (0, 1), value=False)            # [B,2D], [B,R,W], [B,R]

    def embedding(self, seen, text):
        """What was seen [B,D] and read [B,W] -> [B,2D] of length 1: one half with the text, one without.

        The product of two is the mean of both cosines. By the first alone, words outweigh what the pictures show.
        """
        seen = F.normalize(seen, dim=-1)                                                         # [B,D]
        read = F.normalize(seen + self.text_proj(text), dim=-1)                                  # [B,D]
        return torch.cat([read, seen], -1) * math.sqrt(0.5)                                      # [B,2D]

    def forward(self, image, title, frames, keep, valid, asr):
        """Both views of B pairs, by encode_images and encode_clips; their embeddings' product is the ranking."""
        return self.encode_images(image, title), self.encode_clips(frames, keep, valid, asr)

    def loss(self, batch):
        """A batch of PairSet (pictures as normalised floats; "seed" of this step's draw) -> loss and its terms.

        ICL is asked for with and without the text: words would else spare the pictures the learning.
        """
        views = self(*(batch[name] for name in ("image", "title", "frames", "keep", "valid", "asr")))
        (image, image_tokens), (clip, clip_tokens, padding) = views           # [B,2D], [B,Q,W], [B,2D], [B,R,W], [B,R]
        halves = list(zip(clip.chunk(2, -1), image.chunk(2, -1)))                                # [B,D], [B,D] twice
        loss = sum(icl_loss(*half, self.scale(), batch["product"]) for half in halves) / 2
        terms = {"icl": loss.detach(), "scale": self.scale().detach()}
        if "pmd" in self.losses:
            # Hard is what is alike with the texts: the first half of the embeddings.
            pairs, real = self._candidates(*halves[0], batch["product"], batch["seed"])          # [B,1+n], [B,n]
            score, maps = self.pmd(image_tokens, gather(clip_tokens), gather(padding.float()) > 0, pairs)
            pmd = pmd_loss(score, real, batch["product"])
            loss, terms = loss + pmd, terms | {"pmd": pmd.detach()}
        if "pfr" in self.losses:
            pfr = self._reconstruct(maps, clip_tokens, image_tokens, padding, batch["valid"].shape[1], batch["product"])
            loss, terms = loss + 0.05 * pfr, terms | {"pfr": pfr.detach()}
        return loss, terms

    @torch.no_grad()
    def _candidates(self, clip, image, product, seed):
        """The image's own clip (column 0), then negatives from all processes' clips: [B,1+n]; which are real [B,n]."""
        with torch.autocast(image.device.type, enabled=False):
            clip, image = F.normalize(clip.float(), dim=-1), F.normalize(image.float(), dim=-1)  # [B,D], [B,D]
            similarity = self.scale() * image @ gather(clip).T                                   # [B,A]
        row, (B, A) = first_row(len(image)), similarity.shape
        noise = gumbel((A, A), seed)[row:row + B].to(image.device, non_blocking=True)  # all rows: alike in any layout
        negatives, real = sample_negatives(similarity, product, gather(product), self.n_neg, self.hard, noise)
        return torch.cat([torch.arange(row, row + B, device=image.device)[:, None], negatives], 1), real

    def patch_maps(self, maps, padding, T):
        """The PMD's maps of patches alone: class tokens and text are left out on both sides.

        maps [B,heads,Q,R], padding [B,R] -> [B,heads,P,T*P], [B,T*P].
        """
        heads, P, width = maps.shape[1], self.visual.grid ** 2, self.text_proj.in_features
        maps = maps[:, :, 1:1 + P, :-1].unflatten(-1, (T, 1 + P))[..., 1:].flatten(-2)           # [B,heads,P,T*P]
        padding = padding[:, :-1].unflatten(1, (T, 1 + P))[..., 1:].flatten(1)                   # [B,T*P]
        # Times sqrt(width of a head), as in the public code: weights of 1/R alone are too small to learn from.
        return maps * math.sqrt(width / heads), padding

    def _reconstruct(self, maps, clip_tokens, image_tokens, padding, T, product):
        padding = padding & (product >= 0)[:, None]               # of a pair that is left out: no softmax over nothing
        maps, padding = self.patch_maps(maps, padding, T)                                     # [B,heads,P,T*P], [B,T*P]
        P = maps.shape[2]
        clip_patches = clip_tokens[:, :-1].unflatten(1, (T, 1 + P))[:, :, 1:].flatten(1, 2)   # [B,T*P,W]
        return pfr_loss(maps, self.pfr_head, clip_patches, image_tokens[:, 1:1 + P], padding, product)


# ------------------------------------------------------------------ public weights


def fit_positions(positions, grid):
    """Position embeddings of another picture size: [1+G*G,W] -> [1+g*g,W], bicubic in 2-d, the class token's kept."""
    old = math.isqrt(len(positions) - 1)
    square = positions[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2).float()                  # [1,W,G,G]
    square = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)            # [1,W,g,g]
    return torch.cat([positions[:1].float(), square[0].flatten(1).T])                            # [1+g*g,W]


class _Tensors(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive as data: its classes become empty records, none of its code is run."""

    class Record:
        pass

    def __init__(self, archive):
        self.archive, self.root = archive, archive.namelist()[0].split("/")[0]
        super().__init__(archive.open(f"{self.root}/data.pkl"))

    def persistent_load(self, what):
        _, dtype, key, _, _ = what
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}/data/{key}")), dtype=dtype)

    def find_class(self, module, name):
        dtypes = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
                  "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
                  "BoolStorage": torch.bool}
        if module == "torch" and name in dtypes:
            return dtypes[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":
            return lambda value, *_: value
        if module.startswith("__torch__"):
            return self.Record
        raise pickle.UnpicklingError(f"{module}.{name} is not what an archive of weights holds")


def read_torchscript(path):
    """State dict of a TorchScript archive such as OpenAI's CLIP files; BadZipFile, KeyError or IndexError if none."""
    def walk(record, prefix):
        for name, value in vars(record).items():
            if torch.is_tensor(value):
                yield prefix + name, value
            elif isinstance(value, _Tensors.Record):
                yield from walk(value, f"{prefix}{name}.")
    with zipfile.ZipFile(path) as archive:
        archive.getinfo(f"{archive.namelist()[0].split('/')[0]}/constants.pkl")         # only TorchScript has this part
        return dict(walk(_Tensors(archive).load(), ""))
