"""The shapes in the models' comments (of what a line assigns or returns) and docstrings (of
arguments, before "->") are held against running models. A letter is one number within a call."""
import ast
import inspect
import re
import sys
import unittest.mock

import pytest
import torch

import detect
import rice

SHAPE, COMMENT = r"\[([^\[\]]*)\]", re.compile(r"  # (\[.*)")
# Letters that are the same number in all calls below; a call tells the others by itself.
FIXED = {detect: {"C": 32, "K": 7, "T": 2, "H": 48, "W": 80},
         rice: {"C": 40, "D": 24, "P": 16, "T": 7, "n": 4}}


def functions(module):
    """The functions and methods of a module -> [(function, its docstring or its class's)]."""
    owners = [module, *(c for _, c in inspect.getmembers(module, inspect.isclass))]
    found = [(inspect.unwrap(f), f.__doc__ or owner.__doc__ or "")
             for owner in owners for _, f in inspect.getmembers(owner, inspect.isfunction)]
    return [(f, doc) for f, doc in found if f.__code__.co_filename == module.__file__]


def argument_shapes(code, doc):
    """[(argument, shape)] of a docstring: "x [B,N,C]" and "x and y [B,N,C]"."""
    told = re.findall(rf"(?:(\w+) and )?(\w+) {SHAPE}", doc.partition("->")[0])
    arguments = code.co_varnames[:code.co_argcount]
    return [(name, shape) for *names, shape in told for name in names if name in arguments]


def comment_shapes(module):
    """{first line of a statement: (its last line, the names that it assigns, shapes)}."""
    source, found = inspect.getsource(module), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.Return)):
            comment = "".join(COMMENT.findall(source.splitlines()[node.end_lineno - 1]))
            shapes = re.findall(SHAPE, comment) * (2 if comment.endswith(" twice") else 1)
            names = re.findall(r"[\w*]+", "".join(map(ast.unparse, getattr(node, "targets", ""))))
            found |= {node.lineno: (node.end_lineno, names, shapes)} if shapes else {}
    return found


def check(said, shape, known, where):
    """Hold a shape against what is said of it. A letter that is not known is solved for."""
    sizes, shape = said.split(","), list(shape)
    if sizes[0] == "...":
        sizes[:1] = ["."] * (len(shape) - len(sizes) + 1)
    where = f"{where}: [{said}] is {shape} with {known}"
    assert len(sizes) == len(shape), where
    for size, number in zip(sizes, shape):
        formula = re.sub(r"(\d)([A-Za-z])", r"\1*\2", size).replace("/", "//")
        for letter in set(re.findall("[A-Za-z]+", size)) - known.keys():
            fits = (n for n in range(number + 1) if eval(formula, known | {letter: n}) == number)
            known[letter] = next(fits, 0)
        assert size == "." or eval(formula, dict(known)) == number, where


def watch(module, seen):
    """A trace function that checks arguments and statements; it adds checked lines to `seen`."""
    statements = comment_shapes(module)
    told = {f.__code__: argument_shapes(f.__code__, doc) for f, doc in functions(module)}

    def trace(frame, event, _):
        if frame.f_code not in told:
            return None
        known, last = dict(FIXED[module]), None
        def hold(values, shapes, line):
            values = [v[0] if isinstance(v, list) else v for v in values]     # a list of steps
            if len(values) >= len(shapes) and all(map(torch.is_tensor, values[:len(shapes)])):
                for value, said in zip(values, shapes):
                    check(said, value.shape, known, f"{frame.f_code.co_name}, line {line}")
                seen.add(line)
        def step(frame, event, result):
            nonlocal last
            if last in statements and (event == "return" or frame.f_lineno != last):
                line, names, shapes = statements[last]
                result = result if isinstance(result, tuple) else (result,)
                hold([frame.f_locals.get(n) for n in names] if names else result, shapes, line)
            last = frame.f_lineno
            return step
        for name, said in told[frame.f_code]:
            hold([frame.f_locals[name]], [said], 0)
        return step
    return trace


def run_detectors():
    batch = {"frames": torch.randn(8, 2, 3, 48, 80), "padding_mask": torch.zeros(8, 2, 48, 80) > 0,
             "valid": torch.ones(8, 2) > 0, "labels": torch.randint(-1, 7, (8, 2, 6)),
             "boxes_cxcywh": torch.rand(8, 2, 6, 4)}
    for backbone in ("small", "resnet18"):
        sd = detect.SD(7, 11, 32, 2, 2, 3, 24, backbone)
        sd.loss(batch)
        md = detect.MD(sd, (9, 6, 4))
        md.loss(batch)
        md(*(batch[name] for name in ("frames", "padding_mask", "valid")))


def run_rice():
    vit = {"width": 40, "layers": 2, "heads": 2, "patch": 12, "size": 48, "dim": 24}
    batch = {"image": torch.randn(6, 3, 48, 48), "title": torch.randint(1, 50, (6, 7)),
             "frames": torch.randn(6, 7, 3, 48, 48), "asr": torch.randint(1, 50, (6, 9)),
             "valid": torch.ones(6, 7) > 0, "product_id": torch.arange(6), "seed": 0}
    # As if there were two processes, so that A is not B.
    with unittest.mock.patch.object(rice, "all_gather_with_grad", lambda x: torch.cat([x, x])):
        rice.RICE(vit, 50, n_neg=4).loss(batch)


@pytest.mark.parametrize("module, run", [(detect, run_detectors), (rice, run_rice)])
def test_every_shape_is_true(module, run):
    seen, source = set(), enumerate(inspect.getsource(module).splitlines(), 1)
    sys.settrace(watch(module, seen))
    try:
        run()
    finally:
        sys.settrace(None)
    missed = {line for line, text in source if COMMENT.search(text)} - seen
    assert seen and not missed, missed


@pytest.mark.parametrize("module", [detect, rice])
def test_every_letter_is_told(module):
    _, _, letters = module.__doc__.partition("Letters, the same in all files:")
    for function, doc in functions(module):
        text = " ".join([doc, *COMMENT.findall(inspect.getsource(function))])
        used = re.findall(r"(?i)(?<![a-z])[a-z](?![a-z])", " ".join(re.findall(SHAPE, text)))
        assert set(used) <= set(re.findall(r"\b[A-Za-z]\b", letters)), function.__qualname__


def test_a_wrong_shape_is_found():
    check("B,2C-3,T*k", (4, 7, 12), {"B": 4, "T": 3}, "f")
    for said, shape in (("B,N", (4, 5)), ("B,B", (4, 6)), ("B", (4, 4)), ("B,2k", (4, 7))):
        with pytest.raises(AssertionError, match="f, line 1"):
            check(said, shape, {"B": 4, "N": 6}, "f, line 1")
