"""rice.py against OpenAI CLIP's layout and the public RICE losses (golden numbers), and its own promises."""
import math

import pytest
import torch
from torch import nn
import torch.nn.functional as F
from conftest import golden

import rice
from rice import RICE, ViT, icl_loss, pfr_loss, pmd_loss, sample_negatives


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip_vit_tiny.pt", "clip_vit_tiny2.pt"])
def test_encoder_is_clip(name):
    g = golden(name)
    c = {k: int(v) for k, v in g["config"].items()}
    vit = ViT(c["width"], c["layers"], c["heads"], c["patch_size"], c["image_size"], c["output_dim"])
    vit.load_state_dict(g["state_dict"])
    assert {f"visual.{k}" for k in vit.state_dict()} == set(g["state_dict"])
    with torch.no_grad():
        embedding, tokens = vit(g["images_i8"].float() / 16)
    close(embedding, g["embedding"])
    close(tokens, g["tokens_before_ln_post"])
    close(vit.ln_post(tokens), g["tokens_after_ln_post"])


def test_contrastive_loss_is_the_public_one():
    g = golden("rice_losses.pt")["contrastive"]
    clip, image, scale = (g[n].clone().requires_grad_() for n in ("video", "image", "scale"))
    loss = icl_loss(clip, image, scale.square())                    # theirs multiplies each side by the scale
    loss.backward()
    close(loss, g["loss"])
    close(clip.grad, g["grad_video"])
    close(image.grad, g["grad_image"])
    close(scale.grad, g["grad_scale"])


def test_matching_loss_and_mining_are_the_public_ones():
    g = golden("rice_losses.pt")
    h = g["hard_negative"]
    close(pmd_loss(h["logits"]), h["loss"])
    m = g["mining"]
    similarity = F.normalize(m["image_embedding"], dim=1) @ F.normalize(m["video_embedding"], dim=1).T
    product = torch.arange(8)
    # Without noise and with a large scale, the draw is the hardest first, as the public code takes them.
    clips, real = sample_negatives(similarity * 1e3, product, product, 3, noise=torch.zeros(8, 8))
    assert torch.equal(clips, m["candidates"][:, 1:]) and real.all()


def test_pfr_is_the_public_one_but_for_padding():
    for name in ("pfr", "pfr_unit_init"):
        g = golden("rice_losses.pt")[name]
        head = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(2, 1, 1), torch.nn.ReLU())
        for layer, n in ((head[0], 1), (head[2], 2)):
            layer.weight.data, layer.bias.data = g[f"conv{n}_weight"].reshape(layer.weight.shape), g[f"conv{n}_bias"].reshape(layer.bias.shape)
        maps = g["attention"].clone().requires_grad_()
        clip = g["video_patch"].unflatten(1, (3, 25)) * g["video_temporal_mask"][:, :, None, None]      # theirs: zero where padded
        loss = pfr_loss(maps, head, clip.flatten(1, 2), g["image_patch"], torch.zeros(2, 75, dtype=torch.bool))
        loss.backward()
        close(loss, g["loss"])
        close(maps.grad, g["grad_attention"])


def test_negatives_are_drawn_without_replacement_and_by_similarity():
    image_product, clip_product = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 1, 0, 2])
    clips, real = sample_negatives(torch.zeros(4, 4), image_product, clip_product, 3)
    for i in range(4):
        drawn = clips[i][real[i]].tolist()
        assert len(set(drawn)) == len(drawn) == int((clip_product != image_product[i]).sum().clamp(max=3))
        assert all(clip_product[c] != image_product[i] for c in drawn)              # the same product is never a negative
    similarity = torch.tensor([[0.0, 0.0, math.log(6.0), math.log(3.0)]]).expand(4000, 4)
    first = sample_negatives(similarity, torch.zeros(4000), torch.tensor([0, 1, 2, 3]), 1, noise=rice.gumbel((4000, 4), 0))[0]
    share = torch.bincount(first[:, 0], minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([0, 0.1, 0.6, 0.3]), atol=0.03, rtol=0)
    even = sample_negatives(similarity, torch.zeros(4000), torch.tensor([0, 1, 2, 3]), 1, hard=False, noise=rice.gumbel((4000, 4), 0))[0]
    torch.testing.assert_close(torch.bincount(even[:, 0], minlength=4) / 4000, torch.tensor([0, 1, 1, 1]) / 3, atol=0.03, rtol=0)


def test_too_few_negatives():
    clips, real = sample_negatives(torch.zeros(1, 1), torch.tensor([0]), torch.tensor([0]), 3)
    assert clips.shape == real.shape == (1, 3) and not real.any()
    score = torch.randn(1, 4, requires_grad=True)
    loss = pmd_loss(score, real)
    loss.backward()
    assert loss == 0 and torch.isfinite(score.grad).all()


def test_icl_leaves_out_pairs_of_the_same_product():
    clip, image = torch.randn(3, 8), torch.randn(3, 8)
    image[2] = image[0]
    loss = icl_loss(clip, image, torch.tensor(10.0), torch.tensor([4, 5, 4]))
    logits = 10 * F.normalize(clip, dim=1) @ F.normalize(image, dim=1).T
    allowed = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).log()
    by_hand = (F.cross_entropy(logits + allowed, torch.arange(3)) + F.cross_entropy(logits.T + allowed.T, torch.arange(3))) / 2
    torch.testing.assert_close(loss, by_hand)


def model(losses=("icl", "pmd", "pfr")):
    torch.manual_seed(0)
    return RICE({"width": 32, "layers": 1, "heads": 2, "patch": 0, "size": 48, "dim": 24}, 50, losses=losses)


def batch(B=4, T=3, pad=False):
    torch.manual_seed(1)
    out = {"frames": torch.randn(B, T, 3, 48, 48), "keep": torch.ones(B, T, 9, dtype=torch.bool), "image": torch.randn(B, 3, 48, 48),
           "valid": torch.ones(B, T, dtype=torch.bool), "product": torch.tensor([0, 1, 2, 1])[:B], "seed": 3,
           "asr": torch.tensor([[1, 5, 6, 0, 0]]).repeat(B, 1), "title": torch.tensor([[1, 7, 0, 0, 0]]).repeat(B, 1)}
    if pad:
        out["valid"][:, 1:] = False
    return out


def test_every_parameter_learns_and_shapes_hold():
    m, b = model(), batch()
    embedding, tokens = m.encode_images(b["image"], b["title"])
    assert embedding.shape == (4, 48) and tokens.shape == (4, 1 + 9 + 1, 32)
    embedding, tokens, padding = m.encode_clips(b["frames"], b["keep"], b["valid"], b["asr"])
    assert embedding.shape == (4, 48) and tokens.shape == (4, 3 * 10 + 1, 32) and padding.shape == (4, 31)
    loss, terms = m.loss(b)
    loss.backward()
    assert set(terms) == {"icl", "pmd", "pfr", "scale"}
    assert all(p.grad is not None for p in m.parameters())


def test_padded_frames_change_nothing():
    m = model().eval()
    torch.manual_seed(5)
    for p in m.parameters():
        p.data += 0.05 * torch.randn_like(p)
    long, short = batch(pad=True), batch()
    long["frames"][:, 1:] = 100 * torch.randn_like(long["frames"][:, 1:])
    short |= {"frames": long["frames"][:, :1], "valid": long["valid"][:, :1], "keep": long["keep"][:, :1]}
    a, b = m.loss(long), m.loss(short)
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], atol=1e-5, rtol=1e-5)


def test_text_starts_silent_and_the_masked_patches_are_not_seen():
    m, b = model(), batch()
    other = b | {"title": torch.tensor([[1, 9, 9, 9, 9]]).repeat(4, 1)}
    assert torch.equal(m.encode_images(b["image"], b["title"])[0], m.encode_images(b["image"], other["title"])[0])
    nn.init.normal_(m.text_proj.weight)                             # words count in one half of the embedding alone
    (read, seen), (read_other, seen_other) = (m.encode_images(b["image"], t)[0].chunk(2, -1) for t in (b["title"], other["title"]))
    assert torch.equal(seen, seen_other) and not torch.allclose(read, read_other)
    torch.testing.assert_close(torch.cat([read, seen], -1).norm(dim=-1), torch.ones(4))
    vit = ViT(32, 1, 2, 16, 48, 24).eval()
    keep = torch.zeros(1, 9, dtype=torch.bool)
    keep[0, 4] = True
    image = torch.randn(1, 3, 48, 48)
    changed = image.clone()
    changed[:, :, :16] = 7.0                                        # the first row of patches, masked
    torch.testing.assert_close(vit(image, keep)[0], vit(changed, keep)[0])


def test_rice_compiles_and_exports():
    m, b = model().eval(), batch()
    inputs = tuple(b[name] for name in ("image", "title", "frames", "keep", "valid", "asr"))
    expected = m(*inputs)
    for made in (torch.export.export(m, inputs).module(), torch.compile(m, fullgraph=True, backend="eager")):
        torch.testing.assert_close(made(*inputs), expected)


def test_extreme_scales_stay_finite():
    clip, image = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    loss = icl_loss(clip, image, torch.tensor(1e4)) + pmd_loss(torch.tensor([[1e4, -1e4, 0.0]]))
    loss.backward()
    assert loss.isfinite() and clip.grad.isfinite().all()
