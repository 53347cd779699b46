"""detect.py against golden numbers of DAB-DETR, TransVOD Lite and scipy, and its own promises."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, recipe

import detect
from detect import MD, SD, detection_loss, linear_sum_assignment, topk_queries


def close(ours, theirs, atol=1e-5, rtol=0.0):
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=atol, rtol=rtol)


def golden_targets(g):
    """Labels [B,M], -1 where there is no box, and boxes [B,M,4] of a golden batch."""
    pad = torch.nn.utils.rnn.pad_sequence
    labels = pad([*g["target_labels"], torch.tensor([-1])], True, -1)[:-1]
    return labels, pad([*g["target_boxes"], torch.zeros(1, 4)], True)[:-1]


def loss_like_golden(g, logits, boxes, labels, targets, atol, rtol):
    """The loss; its terms are those of the last layer, so each layer is made the last once."""
    for layers, suffix in ((1, "_0"), (2, "_1"), (3, "")):
        loss, terms = detection_loss(logits[:layers], boxes[:layers], labels, targets)
        for ours, theirs in (("class", "ce"), ("l1", "bbox"), ("giou", "giou")):
            close(terms[ours], g["losses"][f"loss_{theirs}{suffix}"], atol, rtol)
    return loss


def test_sd_its_loss_and_its_gradients_are_dab_detr():
    g = golden("dab_detr_tiny.pt")                    # every weight random, 3 decoder layers
    sd = SD(7, 20, 32, 4, encoder_layers=2, decoder_layers=3, ffn=64, backbone="resnet18").eval()
    body = {f"backbone.0.body.{k}": v for k, v in recipe(sd.backbone[0].body).items()}
    sd.load_state_dict(g["state_dict"] | body)
    images, decoder = g["images_i8"].float() / 32, sd.transformer["decoder"]
    close(sd.backbone[0](images), g["feature"], 1e-4)
    hidden_states, _, memory, pos_embed, padding_mask = sd.features(images, g["mask"])
    anchors = sd.refpoint_embed.weight.sigmoid().expand(2, -1, -1)
    close(pos_embed.mT, g["pos_embed"])
    assert torch.equal(padding_mask, g["feature_mask"].flatten(1))
    close(memory, g["memory"])
    close(decoder(anchors, memory, pos_embed, padding_mask)[1], g["reference_points"])
    close(hidden_states, g["hs"])
    logits, boxes = sd(images, g["mask"])
    close(logits, g["pred_logits"])
    close(boxes, g["pred_boxes"])
    loss = loss_like_golden(g, logits, boxes, *golden_targets(g), 0, 2e-5)
    loss.backward()
    close(loss, g["total_loss"], 0, 1e-5)
    norms = {n: p.grad.norm()[None] for n, p in sd.named_parameters() if p.grad is not None}
    torch.testing.assert_close(norms, g["grad_norm"], atol=1e-4, rtol=1e-3)
    anchor_head = decoder.ref_anchor_head.layers[-1]
    close(sd.refpoint_embed.weight.grad, g["grad_refpoint_embed"], 1e-4, 1e-3)
    close(anchor_head.weight.grad, g["grad_ref_anchor_head_last"], 1e-4, 1e-3)


def test_parts_are_dab_detr():
    g = golden("dab_detr_parts.pt")
    close(detect.position_embedding_2d(g["pos_mask"], 256).movedim(-1, 1), g["pos_embed_256_T20"])
    close(detect.anchor_embedding(g["query_ref"], 256), g["query_sine_256"])
    close(detect.inverse_sigmoid(g["inv_sigmoid_in"]), g["inv_sigmoid_out"])
    backbone = detect.Backbone("resnet50").eval()
    backbone.body.load_state_dict(recipe(backbone.body))
    close(backbone(g["r50_image_i8"].float() / 32), g["r50_feature"], 1e-4, 1e-4)
    assert sum(p.numel() for p in SD(classes=91).parameters()) == 43_671_517
    g = golden("dab_detr_loss.pt")["giou"]
    close(detect.generalized_iou(g["boxes1_xyxy"][:, None], g["boxes2_xyxy"][None]), g["giou"])


@pytest.mark.parametrize("case", ["main", "empty", "many"])
def test_loss_is_the_official_one(case):
    g = golden("dab_detr_loss.pt")[case]
    logits, boxes = g["logits"].clone().requires_grad_(), g["boxes"].clone().requires_grad_()
    loss = loss_like_golden(g, logits, boxes, *golden_targets(g), 1e-7, 1e-5)
    loss.backward()
    close(loss, g["total"], 0, 1e-5)
    close(logits.grad, g["grad_logits"], 1e-4)
    close(boxes.grad, g["grad_boxes"], 1e-4)


def test_assignment_is_optimal():
    g = golden("hungarian.npz")
    for i in range(40):
        cost = torch.from_numpy(g[f"cost_{i:02d}"])
        rows, cols = (x.tolist() for x in linear_sum_assignment(cost))
        assert rows == sorted(set(rows)) and len(rows) == len(set(cols)) == g["n_matched"][i]
        np.testing.assert_allclose(cost.double()[rows, cols].sum(), g["optimal_cost"][i], 1e-9)
    for n, m in itertools.product(range(1, 5), range(1, 6)):
        cost = np.random.default_rng(n * m).integers(-3, 4, (n, m))         # full of ties
        rows, cols = linear_sum_assignment(cost)
        wide = cost if n <= m else cost.T
        choices = itertools.permutations(range(max(n, m)), min(n, m))
        assert cost[rows, cols].sum() == min(wide[range(len(c)), c].sum() for c in choices)
    with pytest.raises(ValueError, match="finite"):
        linear_sum_assignment(np.array([[np.nan]]))


def test_ttm_is_transvod_lite():
    g = golden("seqhqm_tiny.pt")
    layer = detect.TemporalLayer(32, 4, 64).eval()
    layer.load_state_dict(g["layer"]["state_dict"])
    query = g["layer"]["query"]
    close(layer(query, query), g["layer"]["out_self"])
    close(layer(query, g["layer"]["ref_query"]), g["layer"]["out_cross"])
    s, c = g["select"], g["chain"]
    logits = F.linear(s["hs"], s["class_embed_weight"], s["class_embed_bias"])
    hs, reference = topk_queries(logits, int(s["topk"]), s["hs"], s["reference"])
    close(hs, s["hs_out"])
    close(reference, s["reference_out"])
    hs, reference = c["hs_in"], c["reference_in"]
    for i, k in enumerate(c["schedule"].tolist()):
        logits = F.linear(hs, **c["selector_heads"][i])
        hs, reference = topk_queries(logits, k, hs, reference)
        layer.load_state_dict(c["layers"][i])
        hs = layer(*[hs.reshape(1, -1, 32)] * 2).reshape(hs.shape)
        close(hs, c["hs_after"][i])
        close(reference, c["reference_after"][i])


def small(md=False):
    """A small model with random weights everywhere, so that no zero at the start hides anything."""
    torch.manual_seed(0)
    model = SD(5, 9, 32, 4, 1, 2, 64, "small")
    model = MD(model, (6, 4, 2)) if md else model
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def clips(B, T):
    """Frames, padding mask and valid frames of B clips, nothing masked."""
    return torch.randn(B, T, 3, 48, 64), torch.zeros(B, T, 48, 64) > 0, torch.ones(B, T) > 0


def test_masked_tokens_of_the_memory_change_nothing():
    md, (frames, padding_mask, valid) = small(md=True), clips(2, 3)
    padding_mask[..., 40:] = True
    *found, memory, pos_embed, mask = md.run_sd(frames, padding_mask)
    anchors = md.sd.refpoint_embed.weight.sigmoid().expand(6, -1, -1)

    def outputs(memory):
        yield md.sd.transformer["encoder"](memory, pos_embed, mask)[~mask]
        yield md.sd.transformer["decoder"](anchors, memory, pos_embed, mask)[0]
        yield md.run_ttm(*found, memory, pos_embed, mask, valid)[1][-1]
    for noisy, plain in zip(outputs(memory.masked_fill(mask[..., None], 9.0)), outputs(memory)):
        close(noisy, plain)


@pytest.mark.parametrize("grad", [True, False])        # PyTorch's attention has two ways
def test_a_clip_alone_and_among_longer_ones_is_the_same(grad):
    md, (frames, padding_mask, valid) = small(md=True).requires_grad_(grad), clips(2, 4)
    valid[1, 2:], padding_mask[1, 2:] = False, True
    def run(clips=slice(2), frame=slice(4)):
        return md(frames[clips, frame], padding_mask[clips, frame], valid[clips, frame])[2]
    with torch.set_grad_enabled(grad):
        box, first_frame = run(), run(frame=slice(1))
        close(run(slice(1)), box[:1])
        close(run(slice(1, 2), slice(2)), box[1:, :2])
        frames[1, 2:] = torch.randn(2, 3, 48, 64)
        close(run()[1, :2], box[1, :2])
        valid[:, 1:] = False
        close(run()[:, :1], first_frame)
        valid[:] = False
        assert run().isfinite().all()


def test_md_starts_from_the_boxes_of_sd():
    md, (frames, padding_mask, valid) = MD(small(), (50, 4)), clips(2, 3)
    _, logits, boxes, *_ = md.run_sd(frames, padding_mask)
    all_logits, all_boxes, box = md(frames, padding_mask, valid)
    for k, step_logits, step_boxes in zip((9, 4), all_logits, all_boxes):     # 9 are all there are
        (boxes,), logits = topk_queries(logits, k, boxes), step_logits
        close(step_boxes, boxes)
    close(box, detect.select_top1(logits, boxes)[0])


def batch(*labels):
    """A batch of one frame or more a clip: labels [B,T,M] as lists."""
    labels = torch.tensor(labels)
    batch = dict(zip(("frames", "padding_mask", "valid"), clips(*labels.shape[:2])))
    return batch | {"labels": labels, "boxes_cxcywh": torch.rand(*labels.shape, 4) * 0.3 + 0.2}


def test_frozen_sd_stays_still_and_the_rest_learns():
    md = small(md=True).train()
    before = {k: v.clone() for k, v in md.state_dict().items()}
    md.loss(batch([[1], [-1], [2]], [[-1], [-1], [-1]]))[0].backward()
    torch.optim.AdamW([p for p in md.parameters() if p.requires_grad], 1e-2).step()
    for name, value in md.state_dict().items():
        assert torch.equal(before[name], value) == name.startswith("sd."), name


def test_a_batch_without_boxes_and_with_several():
    sd, empty, several = small(), batch([[-1]], [[-1]]), batch([[0, 1, -1]], [[2, -1, -1]])
    loss, terms = sd.loss(empty)
    loss.backward()
    assert loss.isfinite() and terms["l1"] == terms["giou"] == 0
    assert all(p.grad is not None for p in sd.parameters())
    assert sd.loss(empty | {"valid": empty["valid"] & False})[0] == 0
    frames, padding_mask, _, labels, boxes = (x[:, 0] for x in several.values())
    query = detect.match(*sd(frames, padding_mask), labels, boxes)
    assert ((query >= 0) == (labels >= 0)).all() and (query[:, 0, 0] != query[:, 0, 1]).all()
    close(sd(frames, padding_mask | True)[1], sd(frames, padding_mask)[1])     # as if unpadded


def test_the_answer_is_the_box_with_the_highest_score():
    logits = torch.tensor([[[-1.0, 0.5], [2.0, -3.0], [0.0, 1.0]]])
    box, score, category = detect.select_top1(logits, torch.arange(12.0).reshape(1, 3, 4))
    assert box.tolist() == [[4, 5, 6, 7]] and category.tolist() == [0]
    close(score, torch.tensor([2.0]).sigmoid())


def test_extreme_logits_stay_finite():
    logits, boxes = torch.tensor([[[[1e4, -1e4]] * 3]], requires_grad=True), torch.rand(1, 3, 4)
    loss, _ = detection_loss(logits, boxes[None], torch.tensor([[0, 1, 0]]), boxes)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("md", [False, True])
def test_detectors_compile_and_export(md):
    model, (frames, padding_mask, valid) = small(md), clips(2, 3)
    inputs = (frames, padding_mask, valid) if md else (frames[0], padding_mask[0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for made in (torch.export.export(model, inputs).module(), compiled):
        torch.testing.assert_close(made(*inputs), model(*inputs))
