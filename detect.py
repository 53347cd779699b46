"""The detectors of the supplement, section 2: SD (one frame: DAB-DETR, a DETR whose queries are anchor boxes), MD (a
clip: SD and a temporal transformer module, the TTM, which is TransVOD Lite's SeqHQM), their matching and their loss.

    image [B,3,H,W] -> backbone -> encoder -> memory [B,S,C] -> decoder: N anchor boxes ask the memory, layer by layer
                    -> logits [L,B,N,K], boxes [L,B,N,4]                                                         SD
    clip [B,T,3,H,W] -> frozen SD on each frame -> for k in (80, 50, 30): keep the k best queries of each frame,
                       let all T*k of them attend to each other, ask the own frame's memory, score again
                    -> logits [B,T,k,K], boxes [B,T,k,4] of each step; the best of the last is the answer             MD

Letters: B images or clips, T frames, N queries (anchors), k queries kept, K classes, L decoder layers, C channels,
H W pixels, h w feature map, S = h*w memory tokens, M boxes of a frame, G groups of channels, `heads` of attention, Q
tokens that ask and R that are asked, E their width. Boxes are (cx, cy, w, h) in 0..1 of the picture without padding.
Masks called `padding` and `absent` are True where nothing is; `valid`, `here`, `allowed` where something is.
"""
import itertools
import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, box_convert, roi_align, sigmoid_focal_loss

# ------------------------------------------------------------------ positions


def inverse_sigmoid(x, eps=1e-3):
    """Logit of x in 0..1; finite at the border, where within eps (DAB-DETR's) it hardly moves."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def sine(position, channels, temperature):
    """Angles [...] -> sine embedding [..., channels]: sin and cos in turn, wavelengths 2*pi .. 2*pi*temperature."""
    power = 2 * (torch.arange(channels, device=position.device) // 2) / channels
    angle = position[..., None] / temperature ** power                                           # [..., channels]
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2)         # [..., channels]


def sine_image(padding, channels):
    """Position of every memory token: padding [B,h,w] -> [B,h,w,C], y in the first half and x in the second.

    The image's temperature is 20 (DAB-DETR's choice: tokens are few and coarse, long wavelengths tell nothing apart);
    the anchors' is 10000, as in DETR: their centres and sizes are continuous, for the MLP behind to read. How the two
    meet in cross-attention stands at attend_near_the_anchor.
    """
    y, x = (~padding).cumsum(1, dtype=torch.float32), (~padding).cumsum(2, dtype=torch.float32)  # [B,h,w]
    y, x = y / (y[:, -1:] + 1e-6) * 2 * math.pi, x / (x[:, :, -1:] + 1e-6) * 2 * math.pi         # [B,h,w]
    return torch.cat([sine(y, channels // 2, 20), sine(x, channels // 2, 20)], -1)               # [B,h,w,C]


def sine_anchor(anchors, channels):
    """Anchor boxes [...,4] (cx, cy, w, h in 0..1) -> [..., 2C], in the order y, x, w, h."""
    # By slices: a list as index would be sent to the device in every layer, and waited for.
    swapped = torch.cat([anchors[..., :2].flip(-1), anchors[..., 2:]], -1)
    return sine(swapped * 2 * math.pi, channels // 2, 10000).flatten(-2)


# ------------------------------------------------------------------ transformer


class MLP(nn.Module):
    """Linear layers with ReLU between them (the name `layers.N` is the public checkpoint's)."""

    def __init__(self, inputs, hidden, outputs, layers):
        super().__init__()
        sizes = [inputs] + [hidden] * (layers - 1) + [outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))                                                                 # [...,hidden]
        return self.layers[-1](x)                                                                # [...,outputs]


def attend(query, key, value, heads, padding=None):
    """Multi-head attention after projection: query [B,Q,E], key [B,S,E], value [B,S,C], padding [B,S] -> [B,Q,C]."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))  # [B,heads,.,.]
    allowed, width = None if padding is None else ~padding[:, None, None], value.shape[-1]           # [B,1,1,S]
    if width < key.shape[-1]:                                                    # fast kernels want them of one width
        value = F.pad(value, (0, key.shape[-1] - width))                                             # [B,heads,S,.]
    return F.scaled_dot_product_attention(query, key, value, allowed)[..., :width].transpose(1, 2).flatten(2)  # [B,Q,C]


def attend_by(layer, query, key, value, padding=None):
    """Attention with the weights of an nn.MultiheadAttention, whose own forward turns batches about and copies them:
    query [B,Q,C], key and value [B,S,C], padding [B,S] -> [B,Q,C]."""
    parts = zip((query, key, value), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3))
    query, key, value = (F.linear(*part) for part in parts)                                          # [B,.,C]
    return layer.out_proj(attend(query, key, value, layer.num_heads, padding))                       # [B,Q,C]


def linear_of_position(layer, position):
    """A linear layer of the memory's position [B,h,w,C] -> [B,S,C]. Half of it tells the row, half the column, and the
    layer takes each row and each column once instead of all tokens: a twentieth of a training step. Differs where
    padding is, right and below, which nobody attends to."""
    rows, columns = position[:, :, 0].chunk(2, -1)[0], position[:, 0].chunk(2, -1)[1]            # [B,h,C/2], [B,w,C/2]
    of_row, of_column = layer.weight.chunk(2, 1)                                                 # [C,C/2] twice
    rows, columns = F.linear(rows, of_row, layer.bias), F.linear(columns, of_column)             # [B,h,C], [B,w,C]
    return (rows[:, :, None] + columns[:, None]).flatten(1, 2)                                   # [B,S,C]


def beside(content, position, heads):
    """Content and position of each head side by side: [B,N,C], [B,N,C] -> [B,N,2C], so their products add, unmixed."""
    return torch.cat([x.unflatten(-1, (heads, -1)) for x in (content, position)], -1).flatten(-2)


class EncoderLayer(nn.Module):
    """Self-attention over the memory tokens, position in query and key only, and a feed-forward net; post-norm."""

    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.activation = nn.PReLU()

    def forward(self, x, position, padding):
        q = x + position                                                                         # [B,S,C]
        x = self.norm1(x + attend_by(self.self_attn, q, q, x, padding))                          # [B,S,C]
        return self.norm2(x + self.linear2(self.activation(self.linear1(x))))                    # [B,S,C]


class Encoder(nn.Module):
    """Layers of self-attention; in each the content scales its tokens' positions: how much place counts is learned."""

    def __init__(self, dim, heads, ffn, layers):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, ffn) for _ in range(layers))
        self.query_scale = MLP(dim, dim, dim, 2)

    def forward(self, x, position, padding):
        for layer in self.layers:
            x = layer(x, position * self.query_scale(x), padding)                                # [B,S,C]
        return x


class DecoderLayer(nn.Module):
    """Queries attend to each other, then to the memory by content beside position, then a feed-forward net; post-norm.

    In cross-attention only the first layer, where all queries have the same content, adds the anchor's position to it
    too, as DAB-DETR does; self-attention adds it in every layer.
    """

    def __init__(self, dim, heads, ffn, first):
        super().__init__()
        self.heads, self.first = heads, first
        self.sa_qcontent_proj, self.sa_qpos_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.sa_kcontent_proj, self.sa_kpos_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.sa_v_proj = nn.Linear(dim, dim)
        self.self_attn = nn.ModuleDict({"out_proj": nn.Linear(dim, dim)})
        self.ca_qcontent_proj, self.ca_qpos_sine_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if first:
            self.ca_qpos_proj = nn.Linear(dim, dim)
        self.ca_kcontent_proj, self.ca_kpos_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.ca_v_proj = nn.Linear(dim, dim)
        self.cross_attn = nn.ModuleDict({"out_proj": nn.Linear(dim, dim)})
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.activation = nn.PReLU()

    def forward(self, x, query_position, query_sine, memory, position, padding):
        q = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_position)                         # [B,N,C]
        k = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_position)                         # [B,N,C]
        x = self.norm1(x + self.self_attn["out_proj"](attend(q, k, self.sa_v_proj(x), self.heads)))  # [B,N,C]
        q, k = self.ca_qcontent_proj(x), self.ca_kcontent_proj(memory)                           # [B,N,C], [B,S,C]
        k_position = linear_of_position(self.ca_kpos_proj, position)                             # [B,S,C]
        if self.first:
            q, k = q + self.ca_qpos_proj(query_position), k + k_position                         # [B,N,C], [B,S,C]
        q = beside(q, self.ca_qpos_sine_proj(query_sine), self.heads)                            # [B,N,2C]
        k = beside(k, k_position, self.heads)                                                    # [B,S,2C]
        asked = attend(q, k, self.ca_v_proj(memory), self.heads, padding)                        # [B,N,C]
        x = self.norm2(x + self.cross_attn["out_proj"](asked))                                   # [B,N,C]
        return self.norm3(x + self.linear2(self.activation(self.linear1(x))))                    # [B,N,C]


class Decoder(nn.Module):
    """Layers that refine N anchors. Anchor boxes are the queries' positions, and each layer moves them."""

    def __init__(self, dim, heads, ffn, layers, box_head):
        super().__init__()
        self.dim = dim
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ffn, first=i == 0) for i in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, 2)
        self.ref_point_head = MLP(2 * dim, dim, dim, 2)
        self.ref_anchor_head = MLP(dim, dim, 2, 2)
        self.bbox_embed = box_head

    def positions(self, anchors, content, scaled=True):
        """Anchors [B,N,4] and content [B,N,C] -> query position [B,N,C] and modulated sine [B,N,C] for cross-attention.

        A wide anchor looks less sharply along x: the x half is scaled by (a width predicted from the content / the
        anchor's width), y likewise.
        """
        embedding = sine_anchor(anchors, self.dim)                                               # [B,N,2C]
        centre = embedding[..., :self.dim]                                                       # [B,N,C] y, x
        if scaled:                      # the first layer's content is zero: it would scale all positions alike
            centre = centre * self.query_scale(content)                                          # [B,N,C]
        width, height = self.ref_anchor_head(content).sigmoid().unbind(-1)                       # [B,N], [B,N]
        y, x = centre.chunk(2, -1)                                                               # [B,N,C/2] twice
        y, x = y * (height / anchors[..., 3])[..., None], x * (width / anchors[..., 2])[..., None]
        return self.ref_point_head(embedding), torch.cat([y, x], -1)                             # [B,N,C], [B,N,C]

    def forward(self, anchors, memory, position, padding):
        x, contents, references = torch.zeros(*anchors.shape[:2], self.dim, device=anchors.device), [], []  # [B,N,C]
        reference = anchors                                                                      # [B,N,4]
        for i, layer in enumerate(self.layers):
            # The anchor that a layer computes with is detached (the first is learned), the content x never is. What the
            # layer's reported box starts from is not detached, so the loss on this box still reaches what the layer
            # before gave to the box head (one for all layers). Reported boxes are made from normed contents, the next
            # anchor is not.
            references.append(reference)
            anchors = reference if i == 0 else reference.detach()                                # [B,N,4]
            x = layer(x, *self.positions(anchors, x, scaled=i > 0), memory, position, padding)   # [B,N,C]
            contents.append(self.norm(x))
            if i + 1 < len(self.layers):
                reference = (self.bbox_embed(x) + inverse_sigmoid(anchors)).sigmoid()            # [B,N,4]
        return torch.stack(contents), torch.stack(references)                                    # [L,B,N,C], [L,B,N,4]


# ------------------------------------------------------------------ backbones


class GroupNorm(nn.GroupNorm):
    """Group norm that leaves padding out of its statistics, and zero: x [B,C,h,w], here [B,1,h,w] -> [B,C,h,w].

    So a picture alone and the same picture padded in a batch give the same, and nothing looks across the batch.
    """

    def forward(self, x, here):
        x, share = x.float() * here, here.float().mean((1, 2, 3))[:, None, None]                 # [B,C,h,w], [B,1,1]
        mean, square = (y.mean((2, 3)).unflatten(1, (self.num_groups, -1)).mean(2, keepdim=True) / share
                        for y in (x, x.square()))                                                # [B,G,1] twice
        inverse = (square - mean.square()).clamp(min=0).add(self.eps).rsqrt()                    # [B,G,1]
        gain = self.weight.view(self.num_groups, -1) * inverse                                   # [B,G,C/G]
        offset = self.bias.view(self.num_groups, -1) - mean * gain                               # [B,G,C/G]
        gain, offset = (y.flatten(1)[..., None, None] for y in (gain, offset))                   # [B,C,1,1] twice
        return torch.addcmul(offset, x, gain).mul_(here)                                         # [B,C,h,w]


class Block(nn.Module):
    """Residual block of a backbone that starts from nothing; padding stays zero, so it changes nothing."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = GroupNorm(8, outputs), GroupNorm(8, outputs)
        same = (inputs, stride) == (outputs, 1)
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x, here):
        y = F.relu_(self.norm1(self.conv1(x), here))                                             # [B,C,h,w]
        return F.relu_(self.norm2(self.conv2(y), here) + self.skip(x))                           # [B,C,h,w]


class SmallBody(nn.Module):
    """Backbone "small" (presets tiny and small): stride 8, with stride 16 added from below. Channels 128."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 4, 4), GroupNorm(8, 32)
        self.block4, self.block8, self.block8b = Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1)
        self.block16, self.side = Block(64, 128, 2), nn.Conv2d(64, 128, 1)

    def forward(self, images, padding):
        here4, here8, here16 = (~padding[:, None, ::s, ::s] for s in (4, 8, 16))                 # [B,1,h,w] each
        x = images.contiguous(memory_format=torch.channels_last)                                 # [B,3,H,W]
        x = F.relu_(self.norm(self.stem(x), here4))                                              # [B,32,H/4,W/4]
        x = self.block8b(self.block8(self.block4(x, here4), here8), here8)                       # [B,64,H/8,W/8]
        below = self.block16(x, here16)                                                          # [B,128,H/16,W/16]
        below = F.interpolate(below, x.shape[-2:], mode="nearest")                               # [B,128,H/8,W/8]
        return (self.side(x) + below) * here8                                                    # [B,128,H/8,W/8]


class Backbone(nn.Module):
    """Pictures [B,3,H,W] and padding [B,H,W] -> feature map [B,channels,H/stride,W/stride], rounded up: "small" (H and
    W multiples of 8), or a torchvision ResNet's C5.

    The ResNet's batch norm is frozen, and so are its stem and first stage, as DETR has them: it needs public weights.
    """

    def __init__(self, name):
        super().__init__()
        self.small, self.stride = name == "small", 8 if name == "small" else 32
        if self.small:
            self.body, self.channels = SmallBody(), 128
            return
        self.body = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d)
        self.channels, self.body.fc = self.body.fc.in_features, nn.Identity()
        for part in (self.body.conv1, self.body.layer1):
            part.requires_grad_(False)

    def forward(self, images, padding):
        if self.small:
            return self.body(images, padding)                                                    # [B,channels,h,w]
        x = images.contiguous(memory_format=torch.channels_last)                                 # [B,3,H,W]
        x = F.max_pool2d(F.relu_(conv_norm(x, self.body.conv1, self.body.bn1)), 3, 2, 1)         # [B,64,H/4,W/4]
        for block in (*self.body.layer1, *self.body.layer2, *self.body.layer3, *self.body.layer4):
            x = residual(x, block)                                                               # [B,channels,h,w]
        return x


def conv_norm(x, conv, norm):
    """Convolution and frozen batch norm in one: the norm is a factor and an offset a channel, and a pass is saved."""
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()                                 # [channels]
    offset = norm.bias - norm.running_mean * factor                                              # [channels]
    weight = conv.weight * factor[:, None, None, None]                                           # [channels,.,.,.]
    return F.conv2d(x, weight, offset, conv.stride, conv.padding, conv.dilation, conv.groups)    # [B,channels,h,w]


def residual(x, block):
    """A torchvision BasicBlock or Bottleneck, its norms inside its convolutions: [B,c,h,w] -> [B,channels,h,w]."""
    last = 3 if hasattr(block, "conv3") else 2
    skip, y = conv_norm(x, *block.downsample) if block.downsample else x, x
    for n in range(1, last):
        y = F.relu_(conv_norm(y, getattr(block, f"conv{n}"), getattr(block, f"bn{n}")))
    return F.relu_(conv_norm(y, getattr(block, f"conv{last}"), getattr(block, f"bn{last}")).add_(skip))


# ------------------------------------------------------------------ SD


class SD(nn.Module):
    """Single-frame detector: DAB-DETR, with the public checkpoint's parameter names (supplement, section 2.1).

    images [B,3,H,W] (normalised, 0 where padded), padding [B,H,W] -> logits [L,B,N,K], boxes_cxcywh [L,B,N,4]; the last
    layer is the answer. There is no background class: the K scores are sigmoids of their own, all low where nothing is,
    and the focal loss copes with the many low ones.
    backbone: "resnet50" (or another ResNet of torchvision), or "small" (stride 8, starts from nothing).
    Two auxiliary losses for a detector from nothing, by their weights (0: no such loss, nor its head). dense: a token
    inside a box tells the box's category. looks: a query paints a thumbnail of its box, for MD compares what queries
    know; with more weight it tells products of one category apart, with too much boxes suffer.
    ValueError when the sizes do not go together.
    """

    def __init__(self, classes=34, queries=300, dim=256, heads=8, encoder_layers=6, decoder_layers=6, ffn=2048,
                 backbone="resnet50", dense=0.0, looks=0.0):
        super().__init__()
        if dim % (4 * heads):
            raise ValueError(f"dim {dim}, heads {heads}: expected a dim that is a multiple of 4 x heads")
        self.dense, self.looks = dense, looks
        box_head = MLP(dim, dim, 4, 3)
        self.transformer = nn.ModuleDict({"encoder": Encoder(dim, heads, ffn, encoder_layers),
                                          "decoder": Decoder(dim, heads, ffn, decoder_layers, box_head)})
        self.class_embed, self.bbox_embed = nn.Linear(dim, classes), box_head
        self.refpoint_embed = nn.Embedding(queries, 4)
        self.backbone = nn.ModuleList([Backbone(backbone)])
        self.input_proj = nn.Conv2d(self.backbone[0].channels, dim, 1)
        if dense:
            self.dense_embed = nn.Linear(dim, classes)
        if looks:
            self.looks_embed = nn.Linear(dim, 3 * 3 * 3)
        self.register_load_state_dict_pre_hook(_share_box_head)
        self._initialise(heads)

    def _initialise(self, heads):
        for parameter in self.transformer.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.constant_(self.class_embed.bias, -math.log(99))  # every score starts at 0.01 (focal loss's prior)
        for value in (self.bbox_embed.layers[-1].weight, self.bbox_embed.layers[-1].bias):
            nn.init.zeros_(value)                                # a layer starts by leaving its anchor where it is
        side = math.ceil(math.sqrt(len(self.refpoint_embed.weight)))
        place = (torch.arange(side) + 0.5) / side
        grid = torch.cartesian_prod(place, place)[:len(self.refpoint_embed.weight)]
        self.refpoint_embed.weight.data = inverse_sigmoid(torch.cat([grid, torch.full_like(grid, 0.3)], 1))
        attend_near_the_anchor(self.transformer["decoder"], heads)

    def features(self, images, padding):
        """-> contents [L,B,N,C], boxes [L,B,N,4], memory [B,S,C], position [B,h,w,C], padding [B,S]; S = h * w."""
        # A picture that is not there is all padding; it is computed as if it had none: a softmax over no key is NaN.
        padding = padding & ~padding.all(2).all(1)[:, None, None]                                # [B,H,W]
        feature = self.backbone[0](images, padding)                                              # [B,channels,h,w]
        padding = F.interpolate(padding[:, None].float(), feature.shape[-2:])[:, 0].bool()       # [B,h,w]
        position = sine_image(padding, self.input_proj.out_channels)                             # [B,h,w,C]
        tokens, padding = self.input_proj(feature).flatten(2).transpose(1, 2), padding.flatten(1)   # [B,S,C], [B,S]
        memory = self.transformer["encoder"](tokens, position.flatten(1, 2), padding)            # [B,S,C]
        anchors = self.refpoint_embed.weight.sigmoid().expand(len(images), -1, -1)               # [B,N,4]
        contents, references = self.transformer["decoder"](anchors, memory, position, padding)   # [L,B,N,C], [L,B,N,4]
        boxes = (self.bbox_embed(contents) + inverse_sigmoid(references)).sigmoid()              # [L,B,N,4]
        return contents, boxes, memory, position, padding

    def forward(self, images, padding):
        contents, boxes, *_ = self.features(images, padding)                                     # [L,B,N,C], [L,B,N,4]
        return self.class_embed(contents), boxes                                                 # [L,B,N,K], [L,B,N,4]

    def loss(self, batch):
        """A batch of collate_detection (frames as normalised floats) -> the loss and its terms for the log."""
        names = "frames", "padding", "labels", "boxes_cxcywh", "valid"
        frames, padding, labels, targets, valid = (batch[name].flatten(0, 1) for name in names)
        contents, boxes, memory, *_ = self.features(frames, padding)
        loss, terms = detection_loss(self.class_embed(contents), boxes, labels, targets, valid)
        if self.dense:
            terms["dense"] = self._dense_loss(memory, padding, labels, targets)
            loss = loss + self.dense * terms["dense"]
        if self.looks:
            terms["looks"] = self._looks_loss(contents[-1], boxes[-1], frames, padding, valid)
            loss = loss + self.looks * terms["looks"]
        return loss, {name: value.detach() for name, value in terms.items()}

    def _looks_loss(self, contents, boxes, frames, padding, valid):
        """Mean squared error of a query's 3 x 3 thumbnail of its box: contents [B,N,C], boxes [B,N,4], valid [B]."""
        corners = box_convert(boxes.detach().float(), "cxcywh", "xyxy")                          # [B,N,4]
        extent = corners * picture_size(padding)[:, None].repeat(1, 1, 2)                        # [B,N,4] pixels
        # A diverged run is reported by the loop, not here.
        pixels = roi_align(frames, list(extent.nan_to_num(0)), 3, sampling_ratio=2).flatten(1)   # [B*N,27]
        error = (self.looks_embed(contents).flatten(0, 1).float() - pixels).square().mean(1)     # [B*N]
        return (error.view(len(frames), -1).mean(1) * valid).sum() / share_of_all(valid.sum())

    def _dense_loss(self, memory, padding, labels, targets):
        """Cross-entropy of the category of each token in the middle 70 % of a box: memory [B,S,C] -> a number."""
        h, w = (math.ceil(n / self.backbone[0].stride) for n in padding.shape[1:])                # S = h * w
        extent = picture_size(padding)                                                            # [B,2]
        y, x = ((torch.arange(n, device=memory.device) + 0.5) / n * size for n, size in zip((h, w), padding.shape[1:]))
        place = torch.cartesian_prod(y, x).flip(-1) / extent[:, None]                             # [B,S,2] x, y in 0..1
        near = (place[:, :, None] - targets[:, None, :, :2]).abs() < 0.35 * targets[:, None, :, 2:]  # [B,S,M,2]
        inside = near.all(-1) & (labels >= 0)[:, None]                                            # [B,S,M]
        logits = self.dense_embed(memory).float().log_softmax(-1)                                 # [B,S,K]
        right = logits.gather(2, labels.clamp(min=0)[:, None].expand(-1, memory.shape[1], -1))    # [B,S,M]
        return -(right * inside).sum() / share_of_all(inside.sum())


def picture_size(padding):
    """Width and height of each picture without its padding: [B,H,W] -> [B,2], pixels."""
    real = (~padding).float()
    return torch.stack([real.amax(1).sum(1), real.amax(2).sum(1)], -1)


def _share_box_head(model, state, prefix, *_):
    """The decoder's box head is the model's own under a second name, which a checkpoint may leave out."""
    for key in [key for key in state if key.startswith(f"{prefix}bbox_embed.")]:
        state.setdefault(f"{prefix}transformer.decoder.{key[len(prefix):]}", state[key])


def attend_near_the_anchor(decoder, heads, gain=2.0):
    """Initialise cross-attention so that a query looks around its anchor from the first step.

    The positional projections of query and key become (gain times) a choice of sine pairs, such that each head holds
    pairs of equal wavelength on both sides: their product is then greatest where token and anchor coincide. Anchors and
    tokens have different temperatures, so pair p of an anchor meets pair p * log(10000) / log(20) of a token.
    """
    half, per_head = decoder.dim // 2, decoder.dim // heads // 4
    usable = [p for p in range(half // 2) if round(p * math.log(10000, 20)) < half // 2][:6]      # the shortest
    q, k = torch.zeros(2, decoder.dim, decoder.dim)
    places = itertools.product(range(heads), (0, half), range(per_head), (0, 1))      # the last: sin and cos of a pair
    for row, (head, axis, j, part) in enumerate(places):
        p = usable[(head + j) % len(usable)]
        q[row, axis + 2 * p + part] = k[row, axis + 2 * round(p * math.log(10000, 20)) + part] = gain
    for layer in decoder.layers:
        layer.ca_qpos_sine_proj.weight.data, layer.ca_kpos_proj.weight.data = q.clone(), k.clone()
    nn.init.zeros_(decoder.query_scale.layers[-1].weight)
    nn.init.ones_(decoder.query_scale.layers[-1].bias)


# ------------------------------------------------------------------ MD


class TemporalLayer(nn.Module):
    """Queries of all frames attend to each other: self-attention, cross-attention to the same set as it came in, FFN.

    tokens [B,Q,C], others [B,R,C], own_padding [B,Q], padding [B,R] -> [B,Q,C]. Parameter names are TransVOD Lite's
    (norm2 comes first).
    """

    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, tokens, others, own_padding=None, padding=None):
        x = self.norm2(tokens + attend_by(self.self_attn, tokens, tokens, tokens, own_padding))  # [B,Q,C]
        x = self.norm1(x + attend_by(self.cross_attn, x, others, others, padding))               # [B,Q,C]
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))                             # [B,Q,C]


def keep_best(logits, k, *tensors):
    """The k queries of each frame of highest class score: logits [...,N,K], tensors [...,N,C] -> [...,k,C] each."""
    best = logits.amax(-1).topk(min(k, logits.shape[-2]), dim=-1).indices                        # [...,k]
    return [x.gather(-2, best[..., None].expand(*best.shape, x.shape[-1])) for x in tensors]


class TTMStep(nn.Module):
    """One step of the TTM: all frames' queries attend to each other, then to their own frame's memory, then are scored.

    queries [B,T,k,C], boxes [B,T,k,4] (SD's), memory [B*T,S,C], position [B*T,h,w,C], padding [B*T,S], absent [B,T]:
    frames that are not there; positions_of: SD's frozen Decoder.positions -> queries [B,T,k,C], logits [B,T,k,K], boxes
    [B,T,k,4]
    """

    def __init__(self, classes, dim, heads, ffn):
        super().__init__()
        self.temporal = TemporalLayer(dim, heads, ffn)
        self.frame = DecoderLayer(dim, heads, ffn, first=False)
        self.class_embed, self.bbox_embed = nn.Linear(dim, classes), MLP(dim, dim, 4, 3)
        nn.init.constant_(self.class_embed.bias, -math.log(99))
        for value in (self.bbox_embed.layers[-1].weight, self.bbox_embed.layers[-1].bias):
            nn.init.zeros_(value)                                                # start from SD's boxes

    def forward(self, queries, boxes, positions_of, memory, position, padding, absent):
        k = queries.shape[2]
        x, absent = queries.flatten(1, 2), absent.repeat_interleave(k, 1)                        # [B,T*k,C], [B,T*k]
        x = self.temporal(x, x, absent, absent).reshape(-1, k, x.shape[-1])                      # [B*T,k,C]
        x = self.frame(x, *positions_of(boxes.flatten(0, 1), x), memory, position, padding)      # [B*T,k,C]
        x = x.reshape(queries.shape)                                                             # [B,T,k,C]
        refined = (self.bbox_embed(x) + inverse_sigmoid(boxes)).sigmoid()                        # [B,T,k,4]
        return x, self.class_embed(x), refined                                                   # [B,T,k,C], [B,T,k,K]


class MD(nn.Module):
    """Multi-frame detector: a frozen SD and the TTM, TransVOD Lite's SeqHQM (supplement, section 2.1).

    frames [B,T,3,H,W], padding [B,T,H,W], valid [B,T] (False: no such frame) -> logits and boxes_cxcywh, lists of
    [B,T,k,K] and [B,T,k,4] per step, and the one box of each frame [B,T,4]. k is capped at SD's number of queries.
    A clip of one frame attends to that frame alone (the T = 1 control).
    """

    def __init__(self, sd, steps=(80, 50, 30)):
        super().__init__()
        self.sd, self.steps = sd.requires_grad_(False).eval(), tuple(steps)
        layer = sd.transformer["decoder"].layers[0]
        shape = sd.class_embed.out_features, sd.class_embed.in_features, layer.heads, layer.linear1.out_features
        self.ttm = nn.ModuleList(TTMStep(*shape) for _ in self.steps)

    def train(self, mode=True):
        super().train(mode)
        self.sd.eval()          # nothing in it depends on the mode: no dropout, no batch statistics; this keeps it so
        return self

    def single(self, frames, padding):
        """SD alone -> contents [B,T,N,C], logits [B,T,N,K], boxes [B,T,N,4]; scene: memory, position, padding."""
        with torch.no_grad():
            contents, boxes, *scene = self.sd.features(frames.flatten(0, 1), padding.flatten(0, 1))
            logits = self.sd.class_embed(contents[-1])                                           # [B*T,N,K]
        return *(x.unflatten(0, frames.shape[:2]) for x in (contents[-1], logits, boxes[-1])), scene

    def temporal(self, queries, logits, boxes, scene, valid):
        """The TTM on what `single` gave: -> logits [B,T,k,K] and boxes [B,T,k,4] of each step, as two lists."""
        all_logits, all_boxes = [], []
        absent = ~valid & valid.any(1, keepdim=True)       # [B,T]; where no frame is there, all take part
        for k, step in zip(self.steps, self.ttm):
            # Selected by the scores of the step before (at first SD's), but the box that each query refines is always
            # the one SD gave it (TransVOD Lite's rule): the boxes of a step correct SD's, never another step's.
            queries, boxes = keep_best(logits, k, queries, boxes)                                # [B,T,k,C], [B,T,k,4]
            queries, logits, refined = step(queries, boxes, self.sd.transformer["decoder"].positions, *scene, absent)
            all_logits.append(logits)
            all_boxes.append(refined)
        return all_logits, all_boxes

    def forward(self, frames, padding, valid):
        # Evaluation calls the two parts itself (eval.answers_of): SD then runs once for SD, MD and the controls.
        *found, scene = self.single(frames, padding)
        logits, boxes = self.temporal(*found, scene, valid)                                      # [B,T,k,.] a step
        return logits, boxes, pick(logits[-1], boxes[-1])[0]                                     # [B,T,4]

    def loss(self, batch):
        """A batch of collate_detection (frames as normalised floats) -> the loss of all steps, the last one's terms."""
        *found, scene = self.single(batch["frames"], batch["padding"])
        logits, boxes = self.temporal(*found, scene, batch["valid"])
        labels, targets, valid = (batch[name].flatten(0, 1) for name in ("labels", "boxes_cxcywh", "valid"))
        losses = [detection_loss(l.flatten(0, 1)[None], b.flatten(0, 1)[None], labels, targets, valid)
                  for l, b in zip(logits, boxes)]
        return sum(loss for loss, _ in losses), losses[-1][1]


def pick(logits, boxes):
    """The intended product of each frame: the box of the highest class score (supplement, section 2.1).

    logits [...,N,K], boxes [...,N,4] -> box [...,4], score [...] in 0..1, category [...].
    """
    score, best = logits.flatten(-2).sigmoid().max(-1)                                           # [...], [...]
    query, category = best // logits.shape[-1], best % logits.shape[-1]
    return boxes.gather(-2, query[..., None, None].expand(*query.shape, 1, 4)).squeeze(-2), score, category


# ------------------------------------------------------------------ matching


def assign(cost):
    """Minimum-cost assignment: cost [N,M] -> rows [min(N,M)], cols [min(N,M)], rows ascending; total cost is least.

    Shortest augmenting paths: rows are added one at a time; a Dijkstra search over columns, with costs made
    non-negative by the potentials u and v, finds the cheapest way to make room for the new row. O(min^2 * max).
    cost: a tensor (any device) or an array, finite; ValueError when it is not.
    """
    table = np.asarray(cost.detach().cpu() if torch.is_tensor(cost) else cost, np.float64)
    if not np.isfinite(table).all():
        raise ValueError("assign: the cost matrix is not finite")
    turned = table.shape[0] > table.shape[1]
    table = table.T if turned else table
    n, m = table.shape
    u, v, row_of = np.zeros(n), np.zeros(m), np.full(m, -1)
    for new in range(n):
        distance, before, open_ = np.full(m, np.inf), np.full(m, -1), np.ones(m, bool)
        row, col, reached = new, -1, 0.0
        while True:
            through = reached + table[row] - u[row] - v
            better = open_ & (through < distance)
            distance[better], before[better] = through[better], col
            col = int(np.where(open_, distance, np.inf).argmin())
            reached, open_[col] = distance[col], False
            if row_of[col] < 0:
                break
            row = row_of[col]
        closed = ~open_
        closed[col] = False
        u[new] += reached
        u[row_of[closed]] += reached - distance[closed]
        v[closed] -= reached - distance[closed]
        while before[col] >= 0:
            row_of[col], col = row_of[before[col]], before[col]
        row_of[col] = new
    cols = np.flatnonzero(row_of >= 0)
    rows, cols = (cols, row_of[cols]) if turned else (row_of[cols], cols)
    order = rows.argsort()
    rows, cols = rows[order], cols[order]
    return (torch.as_tensor(rows), torch.as_tensor(cols)) if torch.is_tensor(cost) else (rows, cols)


def giou(boxes1_xyxy, boxes2_xyxy):
    """Generalised IoU of broadcast boxes [...,4] -> [...], with DAB-DETR's 1e-6 that keeps empty boxes finite."""
    (low1, high1), (low2, high2) = ((b[..., :2], b[..., 2:]) for b in (boxes1_xyxy, boxes2_xyxy))
    inner = (torch.minimum(high1, high2) - torch.maximum(low1, low2)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high1, high2) - torch.minimum(low1, low2)).prod(-1)
    area1, area2 = (high1 - low1).prod(-1), (high2 - low2).prod(-1)
    union = area1 + area2 - inner
    return inner / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def matching_cost(logits, boxes, labels, targets):
    """Cost of giving target m to query n: 2 class + 5 L1 + 2 GIoU (DAB-DETR's weights; in the loss the class weighs 1).

    The class part is by how much the focal loss of that class rises when its target turns from 0 to 1.

    logits [...,N,K], boxes [...,N,4], labels [...,M], targets [...,M,4] -> [...,N,M]
    """
    wanted = labels.clamp(min=0)[..., None, :].expand(*logits.shape[:-1], labels.shape[-1])                 # [...,N,M]
    p = logits.gather(-1, wanted).sigmoid()                                                                 # [...,N,M]
    category = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log()              # [...,N,M]
    distance = torch.cdist(boxes, targets, p=1)                                                             # [...,N,M]
    overlap = giou(*(box_convert(b, "cxcywh", "xyxy") for b in (boxes[..., :, None, :], targets[..., None, :, :])))
    return 2 * category + 5 * distance - 2 * overlap                                                        # [...,N,M]


@torch.no_grad()
def match(logits, boxes, labels, targets):
    """Which query stands for which target, in every layer: [L,B,M], -1 where a target is padding or finds no query.

    Where no frame of the batch has two boxes, the usual case, this is an argmin and never leaves the device.
    """
    cost = matching_cost(logits, boxes, labels, targets)                                         # [L,B,N,M]
    if labels.shape[-1] == 1:
        return cost.argmin(-2).where(labels >= 0, -1)                                            # [L,B,1]
    real, found = (labels >= 0).cpu(), cost.argmin(-2).where(labels >= 0, -1).cpu()              # [B,M], [L,B,M]
    table = cost.nan_to_num(1e6).cpu()                                # a diverged run is reported by the loop, not here
    for layer, b in torch.cartesian_prod(torch.arange(len(logits)), real.sum(1).gt(1).nonzero()[:, 0]).tolist():
        columns = real[b].nonzero()[:, 0]
        # Where no two targets have the same best query, each can have its own, and nothing is cheaper.
        if len(found[layer, b, columns].unique()) < len(columns):
            found[layer, b] = -1
            rows, cols = assign(table[layer, b][:, columns])
            found[layer, b, columns[cols]] = rows
    return found.to(logits.device)


# ------------------------------------------------------------------ loss


def share_of_all(count):
    """The divisor of a loss summed on this process: the count over all processes, at least 1, over their number.

    DDP averages the gradients of all processes. Each divides its sum by (total / their number), so the average is sum /
    total: the step that one process would take on the whole batch.
    """
    total, world = count.detach().float().clone(), 1
    if dist.is_initialized():
        dist.all_reduce(total)
        world = dist.get_world_size()
    return total.clamp(min=1) / world


def detection_loss(logits, boxes, labels, targets, valid=None):
    """Focal 1, L1 5, GIoU 2 over every layer, divided by the number of boxes over all processes (DAB-DETR).

    logits [L,B,N,K], boxes [L,B,N,4], labels [B,M] (-1: no box), targets [B,M,4] cxcywh, valid [B] (False: the frame is
    not there) -> loss, {"class", "l1", "giou"} [L] each. A frame without a box teaches every query to score low.
    """
    logits, boxes = logits.float(), boxes.float()
    query = match(logits, boxes, labels, targets)                                                # [L,B,M]
    real, query = query >= 0, query.clamp(min=0)                                                 # [L,B,M] twice
    place = query * logits.shape[-1] + labels.clamp(min=0)                                       # [L,B,M] in N*K
    wanted = torch.zeros_like(logits).flatten(2).scatter_add(2, place, real.float()).view_as(logits)  # [L,B,N,K]
    focal = sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2)                              # [L,B,N,K]
    focal = focal if valid is None else focal * valid[:, None, None]
    divisor = share_of_all((labels >= 0).sum())
    predicted = boxes.gather(2, query[..., None].expand(-1, -1, -1, 4))                          # [L,B,M,4]
    l1 = (predicted - targets).abs().sum(-1)                                                     # [L,B,M]
    apart = 1 - giou(*(box_convert(b, "cxcywh", "xyxy") for b in (predicted, targets)))          # [L,B,M]
    terms = {"class": focal.sum((1, 2, 3)), "l1": (l1 * real).sum((1, 2)), "giou": (apart * real).sum((1, 2))}
    terms = {name: value / divisor for name, value in terms.items()}
    loss = (terms["class"] + 5 * terms["l1"] + 2 * terms["giou"]).sum()
    return loss, {name: value.detach() for name, value in terms.items()}
