"""The detectors of the supplement, section 2.1: SD finds the product in one frame, MD in a clip.

    frame [B,3,H,W] -> backbone -> encoder -> memory [B,S,C]
        -> decoder: N queries, each with an anchor box that every layer moves
        -> logits [L,B,N,K], boxes [L,B,N,4]                                  SD (DAB-DETR)
    clip [B,T,3,H,W] -> frozen SD on each frame -> for k in (80, 50, 30): keep the k best queries of
        each frame, let all T*k attend to each other, then to the memory of their own frame
        -> logits [B,T,k,K], boxes [B,T,k,4] of each step                     MD (TransVOD Lite)
    The answer for a frame is the box with the highest class score (select_top1).

Letters, the same in all files: B frames or clips of a batch, T frames of a clip, H W pixels, h w
cells of a feature map, S tokens (here the h*w of the memory), C channels of a token, D other
channels, N queries, k queries that are kept, K classes, L decoder layers, M true boxes of a frame,
R tokens that others attend to.
Boxes are cxcywh in 0..1 of the frame without its padding, unless a name says xyxy. A
`padding_mask` is True where there is nothing, `valid` is True where there is something.
"""
import itertools
import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, box_convert, sigmoid_focal_loss

# ---- position embeddings


def inverse_sigmoid(x, eps=1e-3):
    """Logit of x in 0..1, kept finite at the border by DAB-DETR's eps."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def sinusoidal_embedding(angle, channels, temperature):
    """Angles [...] -> [...,channels]: sin and cos in turn, wavelengths up to 2 pi temperature."""
    power = 2 * (torch.arange(channels, device=angle.device) // 2) / channels
    angle = angle[..., None] / temperature ** power
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2)


def position_embedding_2d(padding_mask, channels):
    """Position of each memory token: padding_mask [B,h,w] -> [B,h,w,C], half for y, half for x.

    The temperature is 20 as in DAB-DETR: tokens are few and coarse. Anchors are continuous, so
    their embedding (below) has 10000.
    """
    valid = ~padding_mask
    y, x = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
    y = y / (y[:, -1:] + 1e-6) * 2 * math.pi
    x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    return torch.cat([sinusoidal_embedding(y, channels // 2, 20),
                      sinusoidal_embedding(x, channels // 2, 20)], -1)


def anchor_embedding(anchors, channels):
    """Anchor boxes [...,4] -> [...,2C], a part each for y, x, w and h."""
    # Slices, not an index list: a GPU would wait for the list in every layer.
    yxwh = torch.cat([anchors[..., :2].flip(-1), anchors[..., 2:]], -1)
    return sinusoidal_embedding(yxwh * 2 * math.pi, channels // 2, 10000).flatten(-2)


# ---- attention


class MLP(nn.Module):
    """Linear layers with ReLU between them; `layers.N` is the public checkpoint's name."""

    def __init__(self, inputs, hidden, outputs, layers):
        super().__init__()
        sizes = [inputs] + [hidden] * (layers - 1) + [outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))  # [...,hidden]
        return self.layers[-1](x)  # [...,outputs]


def split_heads(x, heads):
    """[B,N,C] -> [B,N,heads,C/heads]."""
    return x.unflatten(-1, (heads, -1))


def multihead_attention(query, key, value, heads, padding_mask=None):
    """Attention after projection: query [B,N,D], key [B,S,D], value [B,S,C], padding_mask [B,S] ->
    [B,N,C]. D is C, or 2C where each head has content and position."""
    query = split_heads(query, heads).transpose(1, 2)  # [B,heads,N,D/heads]
    key = split_heads(key, heads).transpose(1, 2)  # [B,heads,S,D/heads]
    value = split_heads(value, heads).transpose(1, 2)  # [B,heads,S,C/heads]
    allowed = None if padding_mask is None else ~padding_mask[:, None, None]  # [B,1,1,S]
    attended = F.scaled_dot_product_attention(query, key, value, allowed)
    return attended.transpose(1, 2).flatten(2)


def concat_per_head(content, position, heads):
    """Each head's content beside its position: [B,N,C], [B,N,C] -> [B,N,2C]. The product of two
    such vectors is content * content + position * position."""
    content, position = split_heads(content, heads), split_heads(position, heads)
    return torch.cat([content, position], -1).flatten(-2)


# ---- encoder, decoder


class EncoderLayer(nn.Module):
    """Self-attention of the memory tokens and a feed-forward net, post-norm."""

    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear1 = nn.Linear(dim, ffn)
        self.linear2 = nn.Linear(ffn, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.activation = nn.PReLU()

    def forward(self, x, pos_embed, padding_mask):
        qk = x + pos_embed  # [B,S,C]
        attended, _ = self.self_attn(qk, qk, x, padding_mask, need_weights=False)  # [B,S,C]
        x = self.norm1(x + attended)  # [B,S,C]
        return self.norm2(x + self.linear2(self.activation(self.linear1(x))))  # [B,S,C]


class Encoder(nn.Module):
    """Layers of self-attention, in which the content scales the positions."""

    def __init__(self, dim, heads, ffn, layers):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, ffn) for _ in range(layers))
        self.query_scale = MLP(dim, dim, dim, 2)

    def forward(self, x, pos_embed, padding_mask):
        for layer in self.layers:
            x = layer(x, pos_embed * self.query_scale(x), padding_mask)  # [B,S,C]
        return x


class DecoderLayer(nn.Module):
    """Queries attend to each other, then to the memory, then pass a feed-forward net; post-norm.

    Self-attention adds the anchor's position to the content. Cross-attention concatenates content
    and position in each head. In the first layer all contents are zero: there cross-attention
    also adds the position to the content. The names are DAB-DETR's: sa self-attention, ca
    cross-attention, qcontent the query from the content, kpos the key from the position.
    """

    def __init__(self, dim, heads, ffn, is_first_layer):
        super().__init__()
        self.heads = heads
        self.is_first_layer = is_first_layer
        self.sa_qcontent_proj = nn.Linear(dim, dim)
        self.sa_qpos_proj = nn.Linear(dim, dim)
        self.sa_kcontent_proj = nn.Linear(dim, dim)
        self.sa_kpos_proj = nn.Linear(dim, dim)
        self.sa_v_proj = nn.Linear(dim, dim)
        self.self_attn = nn.ModuleDict({"out_proj": nn.Linear(dim, dim)})
        self.ca_qcontent_proj = nn.Linear(dim, dim)
        self.ca_qpos_sine_proj = nn.Linear(dim, dim)
        if is_first_layer:
            self.ca_qpos_proj = nn.Linear(dim, dim)
        self.ca_kcontent_proj = nn.Linear(dim, dim)
        self.ca_kpos_proj = nn.Linear(dim, dim)
        self.ca_v_proj = nn.Linear(dim, dim)
        self.cross_attn = nn.ModuleDict({"out_proj": nn.Linear(dim, dim)})
        self.linear1 = nn.Linear(dim, ffn)
        self.linear2 = nn.Linear(ffn, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.activation = nn.PReLU()

    def forward(self, x, query_pos, query_sine, memory, pos_embed, padding_mask):
        q = self.sa_qcontent_proj(x) + self.sa_qpos_proj(query_pos)  # [B,N,C]
        k = self.sa_kcontent_proj(x) + self.sa_kpos_proj(query_pos)  # [B,N,C]
        self_attn_out = multihead_attention(q, k, self.sa_v_proj(x), self.heads)  # [B,N,C]
        x = self.norm1(x + self.self_attn["out_proj"](self_attn_out))  # [B,N,C]
        q = self.ca_qcontent_proj(x)  # [B,N,C]
        k = self.ca_kcontent_proj(memory)  # [B,S,C]
        v = self.ca_v_proj(memory)  # [B,S,C]
        k_pos = self.ca_kpos_proj(pos_embed)  # [B,S,C]
        if self.is_first_layer:
            q = q + self.ca_qpos_proj(query_pos)  # [B,N,C]
            k = k + k_pos  # [B,S,C]
        q = concat_per_head(q, self.ca_qpos_sine_proj(query_sine), self.heads)  # [B,N,2C]
        k = concat_per_head(k, k_pos, self.heads)  # [B,S,2C]
        cross_attn_out = multihead_attention(q, k, v, self.heads, padding_mask)  # [B,N,C]
        x = self.norm2(x + self.cross_attn["out_proj"](cross_attn_out))  # [B,N,C]
        return self.norm3(x + self.linear2(self.activation(self.linear1(x))))  # [B,N,C]


class Decoder(nn.Module):
    """Layers that move N anchors. An anchor box is the position of its query."""

    def __init__(self, dim, heads, ffn, layers, box_head):
        super().__init__()
        self.dim = dim
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ffn, i == 0) for i in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, 2)
        self.ref_point_head = MLP(2 * dim, dim, dim, 2)
        self.ref_anchor_head = MLP(dim, dim, 2, 2)
        self.bbox_embed = box_head

    def query_positions(self, anchors, x, is_first_layer=False):
        """Anchors [B,N,4], contents x [B,N,C] -> query_pos, the position for self-attention, and
        query_sine, the modulated sine embedding for cross-attention, both [B,N,C].

        The x half is scaled by (a width predicted from the content / the anchor's width), the
        y half by the same of the heights: a wide anchor is less sharp along x.
        """
        embedding = anchor_embedding(anchors, self.dim)  # [B,N,2C]
        centre = embedding[..., :self.dim]  # [B,N,C]
        if not is_first_layer:     # its contents are zero and would scale all queries alike
            centre = centre * self.query_scale(x)  # [B,N,C]
        width, height = self.ref_anchor_head(x).sigmoid().unbind(-1)  # [B,N], [B,N]
        sine_y, sine_x = centre.chunk(2, -1)  # [B,N,C/2] twice
        sine_y = sine_y * (height / anchors[..., 3])[..., None]  # [B,N,C/2]
        sine_x = sine_x * (width / anchors[..., 2])[..., None]  # [B,N,C/2]
        return self.ref_point_head(embedding), torch.cat([sine_y, sine_x], -1)  # [B,N,C], [B,N,C]

    def forward(self, anchors, memory, pos_embed, padding_mask):
        x = anchors.new_zeros(*anchors.shape[:2], self.dim)  # [B,N,C]
        hidden_states, references = [], [anchors]
        for i, layer in enumerate(self.layers):
            query_pos, query_sine = self.query_positions(anchors, x, i == 0)  # [B,N,C], [B,N,C]
            x = layer(x, query_pos, query_sine, memory, pos_embed, padding_mask)  # [B,N,C]
            hidden_states.append(self.norm(x))
            if i + 1 < len(self.layers):
                # The next anchor is made from x without the norm, the reported box with it.
                moved = (self.bbox_embed(x) + inverse_sigmoid(anchors)).sigmoid()  # [B,N,4]
                # "Look forward once": the next layer's anchor is detached, the reference of its
                # reported box is not, so that box's loss trains the box head here as well.
                references.append(moved)
                anchors = moved.detach()  # [B,N,4]
        return torch.stack(hidden_states), torch.stack(references)  # [L,B,N,C], [L,B,N,4]


# ---- backbones


class ResidualBlock(nn.Module):
    """Two convolutions with group norm and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))  # [B,channels,h,w]
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))  # [B,channels,h,w]


class SmallBody(nn.Module):
    """The backbone "small", for training from scratch: stride 8, 128 channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.GroupNorm(8, 32), nn.ReLU())
        self.stride8 = nn.Sequential(ResidualBlock(32, 32, 1), ResidualBlock(32, 64, 2),
                                     ResidualBlock(64, 64, 1))
        self.stride16 = ResidualBlock(64, 128, 2)
        self.lateral = nn.Conv2d(64, 128, 1)

    def forward(self, images):
        x = self.stride8(self.stem(images))  # [B,64,H/8,W/8]
        top_down = F.interpolate(self.stride16(x), x.shape[-2:])  # [B,128,H/8,W/8]
        return self.lateral(x) + top_down  # [B,128,H/8,W/8]


class Backbone(nn.Module):
    """Frames [B,3,H,W] -> feature map [B,channels,h,w]: "small" (stride 8), or a torchvision ResNet
    (stride 32), whose batch norm, stem and first stage are frozen as in DETR.

    Another backbone has to give `channels` and this forward. Padding counts as pixels of the mean
    colour, so that padded frames differ a little near their border.
    """

    def __init__(self, name):
        super().__init__()
        if name == "small":
            self.body, self.channels = SmallBody(), 128
            return
        self.body = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d)
        self.channels = self.body.fc.in_features
        self.body.fc = nn.Identity()                       # the classifier is not used
        self.body.conv1.requires_grad_(False)
        self.body.layer1.requires_grad_(False)

    def forward(self, images):
        x = images.contiguous(memory_format=torch.channels_last)  # [B,3,H,W]
        if isinstance(self.body, SmallBody):
            return self.body(x)  # [B,channels,h,w]
        x = F.relu(conv_norm(x, self.body.conv1, self.body.bn1))  # [B,64,H/2,W/2]
        x = F.max_pool2d(x, 3, 2, 1)  # [B,64,H/4,W/4]
        stages = self.body.layer1, self.body.layer2, self.body.layer3, self.body.layer4
        for block in itertools.chain(*stages):
            x = resnet_block_forward(x, block)
        return x  # [B,channels,h,w]


def conv_norm(x, conv, norm):
    """A convolution and its frozen batch norm as one convolution, which is a third faster."""
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight * factor[:, None, None, None]
    bias = norm.bias - norm.running_mean * factor
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def resnet_block_forward(x, block):
    """The forward of a torchvision BasicBlock or Bottleneck by conv_norm."""
    shortcut = conv_norm(x, *block.downsample) if block.downsample else x
    x = F.relu(conv_norm(x, block.conv1, block.bn1))
    x = conv_norm(x, block.conv2, block.bn2)
    if hasattr(block, "conv3"):
        x = conv_norm(F.relu(x), block.conv3, block.bn3)
    return F.relu(x + shortcut)


# ---- SD


class SD(nn.Module):
    """Single-frame detector: DAB-DETR with the public parameter names (supplement, 2.1).

    images [B,3,H,W] (normalised, 0 where padded), padding_mask [B,H,W] -> logits [L,B,N,K],
    boxes_cxcywh [L,B,N,4]; the last layer is the answer. The K scores are independent sigmoids,
    all low where there is nothing. ValueError when `dim` is no multiple of 4 * heads.
    """

    def __init__(self, classes=34, queries=300, dim=256, heads=8, encoder_layers=6,
                 decoder_layers=6, ffn=2048, backbone="resnet50"):
        super().__init__()
        if dim % (4 * heads):
            raise ValueError(f"dim {dim}: expected a multiple of 4 x heads, {4 * heads}")
        box_head = MLP(dim, dim, 4, 3)
        self.transformer = nn.ModuleDict({
            "encoder": Encoder(dim, heads, ffn, encoder_layers),
            "decoder": Decoder(dim, heads, ffn, decoder_layers, box_head)})
        self.class_embed = nn.Linear(dim, classes)
        self.bbox_embed = box_head
        self.refpoint_embed = nn.Embedding(queries, 4)
        self.backbone = nn.ModuleList([Backbone(backbone)])
        self.input_proj = nn.Conv2d(self.backbone[0].channels, dim, 1)
        self.register_load_state_dict_pre_hook(_share_box_head)
        self._initialise(heads)

    def _initialise(self, heads):
        for parameter in self.transformer.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        _initialise_heads(self.class_embed, self.bbox_embed)
        queries = self.refpoint_embed.num_embeddings
        side = math.ceil(math.sqrt(queries))
        centre = (torch.arange(side) + 0.5) / side
        grid = torch.cartesian_prod(centre, centre)[:queries]
        anchors = torch.cat([grid, torch.full_like(grid, 0.3)], 1)
        self.refpoint_embed.weight.data = inverse_sigmoid(anchors)
        attend_near_the_anchor(self.transformer["decoder"], heads)

    def features(self, images, padding_mask):
        """-> hidden_states [L,B,N,C], boxes [L,B,N,4], memory and pos_embed [B,S,C], padding_mask
        [B,S]."""
        feature_map = self.backbone[0](images)  # [B,channels,h,w]
        # A missing frame is all padding. Its tokens count as valid: a softmax over no key is NaN.
        missing = padding_mask.flatten(1).all(1)[:, None, None]  # [B,1,1]
        pixel_mask = (padding_mask & ~missing).float()  # [B,H,W]
        size = feature_map.shape[-2:]
        cell_mask = F.interpolate(pixel_mask[:, None], size)[:, 0].bool()  # [B,h,w]
        pos_embed = position_embedding_2d(cell_mask, self.input_proj.out_channels)  # [B,h,w,C]
        pos_embed = pos_embed.flatten(1, 2)  # [B,S,C]
        token_mask = cell_mask.flatten(1)  # [B,S]
        tokens = self.input_proj(feature_map).flatten(2).mT  # [B,S,C]
        memory = self.transformer["encoder"](tokens, pos_embed, token_mask)  # [B,S,C]
        anchors = self.refpoint_embed.weight.sigmoid().expand(len(images), -1, -1)  # [B,N,4]
        hidden_states, references = self.transformer["decoder"](
            anchors, memory, pos_embed, token_mask)  # [L,B,N,C], [L,B,N,4]
        boxes = (self.bbox_embed(hidden_states) + inverse_sigmoid(references)).sigmoid()
        return hidden_states, boxes, memory, pos_embed, token_mask

    def forward(self, images, padding_mask):
        hidden_states, boxes, *_ = self.features(images, padding_mask)  # [L,B,N,C], [L,B,N,4]
        return self.class_embed(hidden_states), boxes  # [L,B,N,K], [L,B,N,4]

    def loss(self, batch):
        """A batch of data.collate_detection, frames normalised -> loss, {term: value}."""
        frames, padding_mask, labels, targets, valid = (
            batch[name].flatten(0, 1)          # clips of one frame: [B,1,...] -> [B,...]
            for name in ("frames", "padding_mask", "labels", "boxes_cxcywh", "valid"))
        logits, boxes = self(frames, padding_mask)
        return detection_loss(logits, boxes, labels, targets, valid)


def _initialise_heads(class_head, box_head):
    """Scores start near 0.01, the prior of the focal loss; a box starts at its anchor."""
    nn.init.constant_(class_head.bias, -math.log(99))
    nn.init.zeros_(box_head.layers[-1].weight)
    nn.init.zeros_(box_head.layers[-1].bias)


def _share_box_head(model, state, prefix, *_):
    """The decoder's box head is the model's own; a checkpoint may hold it under one name."""
    for key in [key for key in state if key.startswith(f"{prefix}bbox_embed.")]:
        state.setdefault(f"{prefix}transformer.decoder.{key[len(prefix):]}", state[key])


def attend_near_the_anchor(decoder, heads, gain=2.0):
    """Initialise cross-attention so that a query looks around its anchor from the first step. This
    is ours: DAB-DETR learns it, in a long training.

    The position projections of query and key choose some pairs (sine, cosine) of nearly the same
    wavelength, so that their product is greatest about where token and anchor coincide. The
    content scales the positions by 1 at first.
    """
    half = decoder.dim // 2                # channels for y, and for x
    pairs_per_head = decoder.dim // heads // 4
    # Pair p of an anchor and pair q of a token have the same wavelength where
    # 10000^(2p / half) = 20^(2q / half), so q = p * log(10000) / log(20).
    token_pair = [round(p * math.log(10000) / math.log(20)) for p in range(half // 2)]
    usable = [p for p in range(half // 2) if token_pair[p] < half // 2]
    usable = usable[:6]                   # the shortest waves; the longer ones tell places less
    query = torch.zeros(decoder.dim, decoder.dim)
    key = torch.zeros(decoder.dim, decoder.dim)
    row = 0                               # output channel: head by head, its pairs for y, then x
    for head in range(heads):
        for axis_start in (0, half):                      # the first channel for y, for x
            for j in range(pairs_per_head):
                p = usable[(head + j) % len(usable)]      # heads differ in their wavelengths
                for sin_or_cos in (0, 1):
                    query[row, axis_start + 2 * p + sin_or_cos] = gain
                    key[row, axis_start + 2 * token_pair[p] + sin_or_cos] = gain
                    row += 1
    for layer in decoder.layers:
        layer.ca_qpos_sine_proj.weight.data = query.clone()
        layer.ca_kpos_proj.weight.data = key.clone()
    nn.init.zeros_(decoder.query_scale.layers[-1].weight)
    nn.init.ones_(decoder.query_scale.layers[-1].bias)


# ---- TTM and MD


class TemporalLayer(nn.Module):
    """Tokens attend to each other, then to `others`, then pass a feed-forward net.

    tokens [B,N,C], others [B,R,C], masks [B,N] and [B,R] -> [B,N,C]. In the TTM the others are the
    same tokens as they came in. The parameter names are TransVOD Lite's: norm2 belongs to the
    self-attention, norm1 to the cross-attention.
    """

    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear1 = nn.Linear(dim, ffn)
        self.linear2 = nn.Linear(ffn, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, tokens, others, padding_mask=None, others_mask=None):
        y, _ = self.self_attn(tokens, tokens, tokens, padding_mask, need_weights=False)  # [B,N,C]
        x = self.norm2(tokens + y)  # [B,N,C]
        y, _ = self.cross_attn(x, others, others, others_mask, need_weights=False)  # [B,N,C]
        x = self.norm1(x + y)  # [B,N,C]
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))  # [B,N,C]


def topk_queries(logits, k, *tensors):
    """The k queries of each frame with the highest class scores, or all if there are fewer:
    logits [...,N,K], tensors [...,N,D] -> tensors [...,k,D]."""
    top = logits.amax(-1).topk(min(k, logits.shape[-2]), dim=-1).indices
    return [x.gather(-2, top[..., None].expand(*top.shape, x.shape[-1])) for x in tensors]


class TTMStep(nn.Module):
    """One step of the temporal transformer module (TTM), TransVOD Lite's SeqHQM: the queries of all
    frames attend to each other, then to the memory of their own frame.

    queries [B,T,k,C], boxes [B,T,k,4] of SD, query_positions (the method of SD's decoder), memory
    and pos_embed [B*T,S,C], padding_mask [B*T,S], frame_padding_mask [B,T] (True: no frame)
    -> queries [B,T,k,C], logits [B,T,k,K], boxes [B,T,k,4].
    """

    def __init__(self, classes, dim, heads, ffn):
        super().__init__()
        self.temporal = TemporalLayer(dim, heads, ffn)
        self.frame = DecoderLayer(dim, heads, ffn, is_first_layer=False)
        self.class_embed = nn.Linear(dim, classes)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        _initialise_heads(self.class_embed, self.bbox_embed)

    def forward(self, queries, boxes, query_positions, memory, pos_embed, padding_mask,
                frame_padding_mask):
        k = queries.shape[2]
        token_mask = frame_padding_mask.repeat_interleave(k, 1)  # [B,T*k]
        x = queries.flatten(1, 2)  # [B,T*k,C]
        x = self.temporal(x, x, token_mask, token_mask)  # [B,T*k,C]
        x = x.reshape(-1, *queries.shape[2:])  # [B*T,k,C]
        query_pos, query_sine = query_positions(boxes.flatten(0, 1), x)  # [B*T,k,C] twice
        x = self.frame(x, query_pos, query_sine, memory, pos_embed, padding_mask)  # [B*T,k,C]
        x = x.reshape(queries.shape)  # [B,T,k,C]
        refined = (self.bbox_embed(x) + inverse_sigmoid(boxes)).sigmoid()  # [B,T,k,4]
        return x, self.class_embed(x), refined  # [B,T,k,C], [B,T,k,K]


class MD(nn.Module):
    """Multi-frame detector: a frozen SD and the TTM (supplement, 2.1).

    frames [B,T,3,H,W], padding_mask [B,T,H,W], valid [B,T] (False: no such frame) -> logits and
    boxes_cxcywh of each step (lists of [B,T,k,K] and [B,T,k,4]), and one box a frame [B,T,4].
    steps: the k of each step; a k above SD's number of queries keeps them all. A clip of one frame
    attends to that frame alone.
    """

    def __init__(self, sd, steps=(80, 50, 30)):
        super().__init__()
        self.sd = sd.requires_grad_(False)
        self.steps = tuple(steps)
        classes, dim = sd.class_embed.weight.shape
        layer = sd.transformer["decoder"].layers[0]
        self.ttm = nn.ModuleList(
            TTMStep(classes, dim, layer.heads, layer.linear1.out_features) for _ in steps)

    def train(self, mode=True):
        """SD stays in evaluation mode."""
        super().train(mode)
        self.sd.eval()
        return self

    def run_sd(self, frames, padding_mask):
        """SD on each frame -> queries [B,T,N,C], logits [B,T,N,K], boxes [B,T,N,4], and memory and
        pos_embed [B*T,S,C], padding_mask [B*T,S]."""
        with torch.no_grad():
            hidden_states, boxes, memory, pos_embed, token_mask = self.sd.features(
                frames.flatten(0, 1), padding_mask.flatten(0, 1))
            logits = self.sd.class_embed(hidden_states[-1])  # [B*T,N,K]
        queries, logits, boxes = (x.unflatten(0, frames.shape[:2])
                                  for x in (hidden_states[-1], logits, boxes[-1]))
        return queries, logits, boxes, memory, pos_embed, token_mask

    def run_ttm(self, queries, logits, boxes, memory, pos_embed, padding_mask, valid):
        """The TTM on what run_sd gave -> logits [B,T,k,K] and boxes [B,T,k,4] of each step."""
        all_logits, all_boxes = [], []
        # A clip without any frame counts as if all were there: a softmax over no key is NaN.
        frame_padding_mask = ~valid & valid.any(1, keepdim=True)
        for k, step in zip(self.steps, self.ttm):
            # The scores of the step before choose the queries (at first SD's). The box that a
            # query refines is always SD's, as in TransVOD Lite.
            queries, boxes = topk_queries(logits, k, queries, boxes)
            queries, logits, refined = step(
                queries, boxes, self.sd.transformer["decoder"].query_positions,
                memory, pos_embed, padding_mask, frame_padding_mask)
            all_logits.append(logits)
            all_boxes.append(refined)
        return all_logits, all_boxes

    def forward(self, frames, padding_mask, valid):
        logits, boxes = self.run_ttm(*self.run_sd(frames, padding_mask), valid)
        box, _, _ = select_top1(logits[-1], boxes[-1])  # [B,T,4]
        return logits, boxes, box  # [B,T,k,K], [B,T,k,4], [B,T,4]

    def loss(self, batch):
        """A batch of data.collate_detection, frames normalised -> the loss of all steps, and
        the terms of the last one."""
        sd_output = self.run_sd(batch["frames"], batch["padding_mask"])
        all_logits, all_boxes = self.run_ttm(*sd_output, batch["valid"])
        labels, targets, valid = (batch[name].flatten(0, 1)
                                  for name in ("labels", "boxes_cxcywh", "valid"))
        total = 0.0
        for logits, boxes in zip(all_logits, all_boxes):
            logits, boxes = logits.flatten(0, 1)[None], boxes.flatten(0, 1)[None]  # as one layer
            loss, terms = detection_loss(logits, boxes, labels, targets, valid)
            total = total + loss
        return total, terms


def select_top1(logits, boxes):
    """The intended product of each frame: the box with the highest class score (2.1).

    logits [...,N,K], boxes [...,N,4] -> box [...,4], score [...] in 0..1, class [...].
    """
    score, flat_index = logits.flatten(-2).sigmoid().max(-1)
    query, category = flat_index // logits.shape[-1], flat_index % logits.shape[-1]
    index = query[..., None, None].expand(*query.shape, 1, 4)
    return boxes.gather(-2, index).squeeze(-2), score, category


# ---- matching


def linear_sum_assignment(cost):
    """The assignment of least total cost, as SciPy's function of this name: cost [N,M] -> rows and
    cols [min(N,M)], rows ascending.

    Rows are added one at a time. A Dijkstra search over the columns, with costs that the
    potentials u and v keep from being negative, finds the cheapest way to make room for the new
    row (shortest augmenting paths). Written here because the paper's detector is trained by it;
    match avoids it where a frame has one box. ValueError if a cost is not finite.
    """
    table = np.asarray(cost.detach().cpu() if torch.is_tensor(cost) else cost, np.float64)
    if not np.isfinite(table).all():
        raise ValueError("linear_sum_assignment: the cost matrix is not finite")
    transposed = table.shape[0] > table.shape[1]
    table = table.T if transposed else table
    n_rows, n_cols = table.shape
    u = np.zeros(n_rows)
    v = np.zeros(n_cols)
    row_of = np.full(n_cols, -1)
    for new_row in range(n_rows):
        distance = np.full(n_cols, np.inf)
        predecessor = np.full(n_cols, -1)      # the column before it on the path
        unvisited = np.ones(n_cols, bool)
        row, col, reached = new_row, -1, 0.0
        while row >= 0:
            through_row = reached + table[row] - u[row] - v
            better = unvisited & (through_row < distance)
            distance[better], predecessor[better] = through_row[better], col
            col = int(np.where(unvisited, distance, np.inf).argmin())
            reached = distance[col]
            unvisited[col] = False
            row = row_of[col]                  # -1: a free column ends the search
        visited = ~unvisited
        visited[col] = False
        u[new_row] += reached
        u[row_of[visited]] += reached - distance[visited]
        v[visited] -= reached - distance[visited]
        while predecessor[col] >= 0:           # every row on the path moves to the next column
            row_of[col] = row_of[predecessor[col]]
            col = predecessor[col]
        row_of[col] = new_row
    cols = np.flatnonzero(row_of >= 0)
    rows, cols = (cols, row_of[cols]) if transposed else (row_of[cols], cols)
    order = rows.argsort()
    rows, cols = rows[order], cols[order]
    if torch.is_tensor(cost):
        return torch.as_tensor(rows), torch.as_tensor(cols)
    return rows, cols


def generalized_iou(boxes1_xyxy, boxes2_xyxy):
    """Generalised IoU of broadcast boxes [...,4] -> [...], with DAB-DETR's 1e-6."""
    low1, high1 = boxes1_xyxy[..., :2], boxes1_xyxy[..., 2:]
    low2, high2 = boxes2_xyxy[..., :2], boxes2_xyxy[..., 2:]
    overlap = (torch.minimum(high1, high2) - torch.maximum(low1, low2)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high1, high2) - torch.minimum(low1, low2)).prod(-1)
    union = (high1 - low1).prod(-1) + (high2 - low2).prod(-1) - overlap
    return overlap / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def matching_cost(logits, boxes, labels, targets):
    """Cost of query n for target m: 2 class + 5 L1 - 2 GIoU, DAB-DETR's weights. (In the loss the
    class weighs 1.) Class cost: focal(target = 1) - focal(target = 0).

    logits [L,B,N,K], boxes [L,B,N,4], labels [B,M], targets [B,M,4] -> [L,B,N,M]
    """
    target_class = labels.clamp(min=0)[..., None, :]
    target_class = target_class.expand(*logits.shape[:-1], labels.shape[-1])
    p = logits.gather(-1, target_class).sigmoid()
    focal_1 = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    focal_0 = 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    l1 = torch.cdist(boxes, targets, p=1)
    boxes_xyxy = box_convert(boxes, "cxcywh", "xyxy")[..., :, None, :]
    targets_xyxy = box_convert(targets, "cxcywh", "xyxy")[..., None, :, :]
    giou = generalized_iou(boxes_xyxy, targets_xyxy)
    return 2 * (focal_1 - focal_0) + 5 * l1 - 2 * giou


@torch.no_grad()
def match(logits, boxes, labels, targets):
    """The query of each target in every layer -> [L,B,M], -1 for padding and for targets that find
    no query. With at most one target in each frame of the batch, the usual case, this is an argmin
    on the device."""
    # A NaN cost does no harm here: train.py stops at a loss that is not finite.
    cost = matching_cost(logits, boxes, labels, targets).nan_to_num(1e6)
    if labels.shape[-1] == 1:
        return cost.argmin(-2).where(labels >= 0, -1)
    cost, is_box = cost.cpu(), (labels >= 0).cpu()
    query = torch.full((len(logits), *labels.shape), -1)
    for layer, b in itertools.product(range(len(logits)), range(len(labels))):
        columns = is_box[b].nonzero()[:, 0]
        rows, cols = linear_sum_assignment(cost[layer, b][:, columns])
        query[layer, b, columns[cols]] = rows
    return query.to(logits.device)


# ---- loss


def loss_divisor(count):
    """What the sum of a loss over the boxes of this process is divided by: the boxes of all
    processes (at least 1) / the number of processes. DDP averages the gradients over processes,
    so together the loss is the sum over all boxes / the number of all boxes."""
    total = count.detach().float().clone()
    if not dist.is_initialized():
        return total.clamp(min=1)
    dist.all_reduce(total)
    return total.clamp(min=1) / dist.get_world_size()


def detection_loss(logits, boxes, labels, targets, valid=None):
    """1 focal + 5 L1 + 2 (1 - GIoU), summed over the layers, divided by the number of boxes
    (DAB-DETR).

    logits [L,B,N,K], boxes [L,B,N,4], labels [B,M] (-1: no box), targets [B,M,4], valid [B]
    (False: no frame) -> loss, {"class", "l1", "giou"} of the last layer. A frame without a box
    teaches every query to score low.
    """
    logits, boxes = logits.float(), boxes.float()
    query = match(logits, boxes, labels, targets)                        # [L,B,M]
    matched, query = query >= 0, query.clamp(min=0)                      # [L,B,M] twice
    # Where (query, class) lies among the N*K scores of a frame; an unmatched target adds 0.
    flat_index = query * logits.shape[-1] + labels.clamp(min=0)          # [L,B,M]
    target_onehot = torch.zeros_like(logits).flatten(2)                  # [L,B,N*K]
    target_onehot = target_onehot.scatter_add(2, flat_index, matched.float()).view_as(logits)
    focal = sigmoid_focal_loss(logits, target_onehot, alpha=0.25, gamma=2)  # [L,B,N,K]
    if valid is not None:
        focal = focal * valid[:, None, None]                             # [L,B,N,K]
    predicted = boxes.gather(2, query[..., None].expand(-1, -1, -1, 4))  # [L,B,M,4]
    l1 = (predicted - targets).abs().sum(-1)                             # [L,B,M]
    giou_loss = 1 - generalized_iou(box_convert(predicted, "cxcywh", "xyxy"),
                                    box_convert(targets, "cxcywh", "xyxy"))
    num_boxes = loss_divisor((labels >= 0).sum())
    per_layer = {"class": focal.sum((1, 2, 3)) / num_boxes,
                 "l1": (l1 * matched).sum((1, 2)) / num_boxes,
                 "giou": (giou_loss * matched).sum((1, 2)) / num_boxes}
    loss = (per_layer["class"] + 5 * per_layer["l1"] + 2 * per_layer["giou"]).sum()
    return loss, {name: value[-1].detach() for name, value in per_layer.items()}
