"""rice.py against golden numbers of CLIP and the public RICE losses, and its own promises."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from torch import nn

from rice import RICE, ViT, gumbel_noise, icl_loss, pfr_loss, pmd_loss, sample_negatives


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip_vit_tiny.pt", "clip_vit_tiny2.pt"])
def test_encoder_is_clip(name):
    g = golden(name)
    sizes = "width", "layers", "heads", "patch_size", "image_size", "output_dim"
    vit = ViT(*(int(g["config"][size]) for size in sizes))
    vit.load_state_dict(g["state_dict"])
    assert {f"visual.{k}" for k in vit.state_dict()} == set(g["state_dict"])
    embedding, tokens = vit(g["images_i8"].float() / 16)
    close(embedding, g["embedding"])
    close(tokens, g["tokens_before_ln_post"])
    close(vit.ln_post(tokens), g["tokens_after_ln_post"])


def test_contrastive_loss_is_the_public_one():
    g = golden("rice_losses.pt")["contrastive"]
    clip, image, scale = (g[n].clone().requires_grad_() for n in ("video", "image", "scale"))
    loss = icl_loss(clip, image, scale.square())         # theirs multiplies each side by the scale
    loss.backward()
    close(loss, g["loss"])
    close(clip.grad, g["grad_video"])
    close(image.grad, g["grad_image"])
    close(scale.grad, g["grad_scale"])


def test_matching_loss_and_mining_are_the_public_ones():
    g, m = (golden("rice_losses.pt")[name] for name in ("hard_negative", "mining"))
    close(pmd_loss(g["logits"]), g["loss"])
    image, clip = (F.normalize(m[f"{view}_embedding"], dim=1) for view in ("image", "video"))
    product, noise = torch.arange(8), torch.zeros(8, 8)     # without noise the hardest come first
    clips, valid = sample_negatives(image @ clip.T * 1e3, product, product, 3, noise=noise)
    assert torch.equal(clips, m["candidates"][:, 1:]) and valid.all()


@pytest.mark.parametrize("name", ["pfr", "pfr_unit_init"])
def test_pfr_is_the_public_one_but_for_padding(name):
    g = golden("rice_losses.pt")[name]
    head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1), nn.ReLU())
    state = [g[f"conv{n}_{part}"] for n in (1, 2) for part in ("weight", "bias")]
    head.load_state_dict(dict(zip(head.state_dict(), state)))
    weights = g["attention"].clone().requires_grad_()
    # Theirs takes padded frames for zeros.
    clip = g["video_patch"] * g["video_temporal_mask"].repeat_interleave(25, 1)[..., None]
    loss = pfr_loss(weights, head, clip.requires_grad_(), g["image_patch"], torch.zeros(2, 75) > 0)
    loss.backward()
    close(loss, g["loss"])
    close(weights.grad, g["grad_attention"])
    assert clip.grad is None


def test_negatives_are_drawn_without_replacement_and_by_similarity():
    product = torch.tensor([0, 1, 0, 2])
    clips, valid = sample_negatives(torch.zeros(4, 4), product, product, 3)
    for i in range(4):
        drawn, others = clips[i][valid[i]], (product != product[i]).sum()
        assert len(drawn.unique()) == len(drawn) == min(3, others)
        assert (product[drawn] != product[i]).all()
    similarity = torch.tensor([[0.0, 0.0, math.log(6.0), math.log(3.0)]]).expand(4000, 4)
    other, product, noise = torch.zeros(4000), torch.arange(4), gumbel_noise((4000, 4), 0)
    for hard, chance in ((True, [0, 0.1, 0.6, 0.3]), (False, [0, 1 / 3, 1 / 3, 1 / 3])):
        clips, _ = sample_negatives(similarity, other, product, 1, hard, noise)
        share = torch.bincount(clips[:, 0], minlength=4) / 4000
        torch.testing.assert_close(share, torch.tensor(chance), atol=0.03, rtol=0)


def test_too_few_negatives():
    score, product = torch.randn(1, 4, requires_grad=True), torch.tensor([0])
    clips, valid = sample_negatives(torch.zeros(1, 1), product, product, 3)
    assert clips.shape == valid.shape == (1, 3) and not valid.any()
    loss = pmd_loss(score, valid)
    loss.backward()
    assert loss == 0 and score.grad.isfinite().all()


def test_icl_leaves_out_pairs_of_the_same_product():
    (clip, image), own = F.normalize(torch.randn(2, 3, 8), dim=-1), torch.arange(3)
    loss = icl_loss(clip, image, torch.tensor(10.0), torch.tensor([4, 5, 4]))
    logits = 10 * clip @ image.T + torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).log()
    close(loss, (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)


def model():
    torch.manual_seed(0)
    return RICE({"width": 32, "layers": 1, "heads": 2, "patch": 0, "size": 48, "dim": 24}, 50)


def batch():
    """4 clips of 3 frames and their images; two are of the same product."""
    return {"frames": torch.randn(4, 3, 3, 48, 48), "image": torch.randn(4, 3, 48, 48),
            "valid": torch.ones(4, 3) > 0, "product_id": torch.tensor([0, 1, 2, 1]), "seed": 3,
            "asr": torch.tensor([[1, 5, 6, 0]] * 4), "title": torch.tensor([[1, 7, 0, 0]] * 4)}


def test_every_parameter_learns():
    m = model()
    loss, terms = m.loss(batch())
    loss.backward()
    close(loss, terms["icl"] + terms["pmd"] + 0.05 * terms["pfr"])
    assert all(p.grad is not None for p in m.parameters())


def test_frames_that_are_missing_change_nothing():
    m, b = model(), batch()
    for p in m.parameters():
        p.data += 0.05 * torch.randn_like(p)
    b["valid"][:, 1:] = False
    one = b | {"frames": b["frames"][:, :1], "valid": b["valid"][:, :1]}
    torch.testing.assert_close(m.loss(b), m.loss(one), atol=1e-5, rtol=1e-5)


def test_text_starts_silent_and_is_in_one_embedding_alone():
    m, image = model(), batch()["image"][[0, 0]]
    titles = torch.tensor([[1, 7, 0, 0], [1, 9, 9, 9]])
    close(*m.encode_images(image, titles)[::2])
    close(m.text(titles[:1, :2]), m.text(titles[:1]))               # padding is not read
    nn.init.normal_(m.text_proj.weight)
    embedding, _, visual = m.encode_images(image, titles)
    assert torch.equal(*visual) and not torch.allclose(*embedding)
    close(torch.stack([embedding, visual]).norm(dim=-1), torch.ones(2, 2))


def test_pfr_leaves_out_class_tokens_and_texts():
    weights, clip, image = torch.rand(2, 2, 11, 31), torch.rand(2, 31, 32), torch.rand(2, 11, 32)
    m, padding_mask = model(), torch.zeros(2, 31) > 0
    loss = m.patch_reconstruction_loss(weights, clip, image, padding_mask)
    for x in (weights[:, :, ::10], weights[..., ::10], clip[:, ::10], image[:, ::10]):
        x.fill_(9.0)
    assert loss == m.patch_reconstruction_loss(weights, clip, image, padding_mask)


def test_extreme_scales_stay_finite():
    views, score = torch.randn(2, 4, 8, requires_grad=True), torch.tensor([[1e4, -1e4, 0.0]])
    loss = icl_loss(*views, torch.tensor(1e4)) + pmd_loss(score)
    loss.backward()
    assert loss.isfinite() and views.grad.isfinite().all()
