"""The shapes in the comments are true: every line that ends in one is watched while the models run on odd sizes.

A letter means one number within a call (H != W, B != T, N != k), so a wrong or swapped letter cannot agree with what is computed.
"""
import ast
import inspect
import re
import sys
import textwrap

import pytest
import torch
import detect
import eval as evaluation
import rice

SHAPE = re.compile(r"\[([^\[\]]*)\]")
SEEN = set()                                     # (function, line) whose shape was checked


FIXED = {"detect": {"C": 32, "K": 7}, "rice": {"W": 40, "D": 24, "P": 16}}       # the same in every call; the other letters are a call's own
OWN_CHANNELS = "GroupNorm", "Block."             # in a backbone C is the layer's


def shapes_said(function):
    """{statement's first line: (names it assigns, or "return"; shapes of its comment, the first time and "then"; its last line)}."""
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    said = {}
    for node in ast.walk(tree):
        comment = lines[node.end_lineno - 1].rpartition("# ")[2] if isinstance(node, (ast.Assign, ast.Return)) else ""
        shapes = SHAPE.findall(comment) if comment.strip().startswith("[") else []
        if not shapes:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        names = "return" if target is None else [x.id if isinstance(x, ast.Name) else None for x in getattr(target, "elts", [target])]
        shapes = [[shapes[0]], shapes[1:]] if "], then [" in comment else [shapes * (2 if "] twice" in comment else 1)]
        said[first + node.lineno - 1] = names, shapes, first + node.end_lineno - 1
    return said


def value_of(text, known):
    """A size such as T*(1+P), 2C or H/4 in numbers; None while a letter of it is not known."""
    text = re.sub(r"(\d)([A-Za-z])", r"\1*\2", text.strip()).replace("/", "//")
    if not set(re.findall(r"[A-Za-z]+", text)) <= known.keys():
        return None
    return eval(text, {"__builtins__": {}}, known)                                # letters and + * // of our own comments


def check(shape, said, known, where):
    """Hold a shape against a comment; a letter that is not `known` yet is what makes the comment true, if one number does."""
    sizes = said.split(",")
    if "..." in sizes:
        sizes, shape = sizes[sizes.index("...") + 1:], shape[len(shape) - len(sizes) + sizes.index("...") + 1:]
    assert len(sizes) == len(shape), f"{where}: [{said}] is {list(shape)}"
    for text, size in zip(sizes, shape):
        expected = value_of(text, known) if text.strip() not in (".", "") else size
        new = set(re.findall(r"[A-Za-z]+", text)) - known.keys()
        if expected is None and len(new) == 1:
            (letter,) = new
            fitting = [n for n in range(1, size + 1) if value_of(text, known | {letter: n}) == size]
            assert fitting, f"{where}: [{said}] is {list(shape)} with {known}"
            known |= {letter: fitting[0]} if len(fitting) == 1 else {}
            expected = size
        assert expected in (None, size), f"{where}: [{said}] is {list(shape)} with {known}"


def tensors(value):
    return [x for x in (value if isinstance(value, tuple) else [value]) if torch.is_tensor(x)]


def watched(functions):
    """A trace function that holds each named statement's result against its comment as soon as the statement is done."""
    told = {function.__code__: (function.__qualname__, shapes_said(function)) for function in functions}

    def trace(frame, event, _):
        if frame.f_code not in told:
            return None
        name, said = told[frame.f_code]
        known, before, bound = {} if name.startswith(OWN_CHANNELS) else dict(FIXED.get(frame.f_globals["__name__"], {})), [None], {}                # bound: line -> letters it was the first to use, in this turn of a loop

        def done(result=None):
            if before[0] in said:
                names, turns, line = said[before[0]]
                for letter in bound.get(line, ()):
                    del known[letter]
                earlier, shapes = set(known), turns[min(line in bound, len(turns) - 1)]
                values = tensors(result) if names == "return" else [frame.f_locals.get(n) for n in names]
                for value, text in zip([v[0] if isinstance(v, list) and v else v for v in values], shapes):       # a list of one a step
                    if torch.is_tensor(value):
                        check(value.shape, text, known, f"{name}, line {line}")
                        SEEN.add((name, line))
                bound[line] = known.keys() - earlier

        def step(frame, event, result):
            if event == "line" and frame.f_lineno != before[0]:
                done()
                before[0] = frame.f_lineno
            elif event == "return" and result is not None:
                done(result)
            return step
        return step
    return trace


def methods(module):
    """Functions and methods of a module that end a line in a shape."""
    found = [f for _, f in inspect.getmembers(module, inspect.isfunction)]
    found += [f for _, c in inspect.getmembers(module, inspect.isclass) for _, f in inspect.getmembers(c, inspect.isfunction)]
    return [f for f in found if f.__code__.co_filename == module.__file__ and shapes_said(f)]


def clip_of_frames(B, T, H, W):
    padding = torch.zeros(B, T, H, W, dtype=torch.bool)
    padding[0, :, 40:] = padding[-1, :, :, 56:] = True
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[-1, -1] = False
    return {"frames": torch.randn(B, T, 3, H, W), "padding": padding, "valid": valid, "labels": torch.randint(-1, 7, (B, T, 3)),
            "boxes_cxcywh": torch.rand(B, T, 3, 4) / 2 + 0.2}


def run_detectors():
    for backbone, size in (("small", (48, 80)), ("resnet18", (64, 96))):
        extra = 1.0 * (backbone == "small")
        sd = detect.SD(7, queries=11, dim=32, heads=2, encoder_layers=2, decoder_layers=4, ffn=24, backbone=backbone, dense=extra, looks=extra)
        sd.loss(clip_of_frames(5, 1, *size))[0].backward()
        md = detect.MD(sd, (9, 6, 4))
        clips = clip_of_frames(2, 3, *size)
        md.loss(clips)[0].backward()
        md(*(clips[name] for name in ("frames", "padding", "valid")))
        sd(clips["frames"][0], clips["padding"][0])
    one = {name: value[:, :, :1] if name in ("labels", "boxes_cxcywh") else value for name, value in clip_of_frames(5, 1, 48, 80).items()}
    sd.loss(one)


def run_rice():
    B, T, S = 6, 3, 48
    model = rice.RICE({"width": 40, "layers": 2, "heads": 2, "patch": 12, "size": S, "dim": 24}, 50, n_neg=2)
    model.loss({"image": torch.randn(B, 3, S, S), "title": torch.randint(1, 50, (B, 7)), "frames": torch.randn(B, T, 3, S, S),
                "keep": torch.rand(B, T, 16) > 0.3, "valid": torch.tensor([[True] * T] * 4 + [[True, True, False]] * 2),
                "asr": torch.randint(1, 50, (B, 9)), "product": torch.tensor([0, 1, 2, 2, -1, 4]), "seed": 0})[0].backward()


def run_evaluation():
    torch.manual_seed(0)
    evaluation.nearest(torch.randn(5, 6), torch.randn(70, 6), 3, block=5, wide=32, group=4)
    evaluation.vote(torch.randn(2, 3, 5, 4), torch.tensor([[True] * 3, [True, True, False]]))


@pytest.mark.parametrize("module, run", [(detect, run_detectors), (rice, run_rice), (evaluation, run_evaluation)])
def test_every_shape_in_a_comment_is_true(module, run):
    functions = methods(module)
    torch.manual_seed(0)
    sys.settrace(watched(functions))
    try:
        run()
    finally:
        sys.settrace(None)
    forwards = [f for f in functions if f.__name__ == "forward"]
    missed = [f"{f.__qualname__}, line {line}" for f in forwards for *_, line in shapes_said(f).values() if (f.__qualname__, line) not in SEEN]
    assert not missed, missed


@pytest.mark.parametrize("module", [detect, rice])
def test_every_letter_is_told(module):
    for function in methods(module):
        owner = getattr(module, function.__qualname__.split(".")[0])
        told = set(re.findall(r"[A-Za-z]+", f"{module.__doc__} {owner.__doc__} {function.__doc__}")) | set(function.__code__.co_varnames)
        for names, turns, line in shapes_said(function).values():
            letters = set(re.findall(r"[A-Za-z]+", re.sub(r"(\d)([A-Za-z])", r"\1 \2", ",".join(text for turn in turns for text in turn))))
            letters = {letter for letter in letters if len(letter) < 3}                # words speak for themselves
            assert letters <= told, f"{function.__qualname__}, line {line}: {letters - told}"


def test_a_wrong_comment_is_found():
    with pytest.raises(AssertionError, match="f, line"):
        check((4, 5), "B,N", {"B": 4, "N": 6}, "f, line 1")
    known = {"T": 3}
    check((12, 5, 7), "T*k,C,2C-3", known | {"k": 4, "C": 5}, "f")
    with pytest.raises(AssertionError):
        check((2, 3), "B,T,C", {}, "f")
