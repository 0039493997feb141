# SPDX-License-Identifier: MIT
"""Turns an ONNX file of InsightFace, such as w600k_r50.onnx, into weights that can be trained:

python .github/from_onnx.py w600k_r50.onnx --images FOLDER --out backbone.pth

Exporters fold a batch norm that follows a convolution into it: without training, both are one
affine map. Here it becomes a batch norm again, with the mean and variance that the convolution has
over the faces below FOLDER, so that training begins with what the file computes. 500 to 2,000
aligned faces are enough; they should be like those to train on. Needs onnx. The result is compared
with the file by onnxruntime where that is installed, else by onnx.
"""

import argparse
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

try:
    import onnx
    from onnx.reference import ReferenceEvaluator
except ImportError:
    raise SystemExit("error: from_onnx.py needs onnx: pip install onnx") from None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import lrfr

EPS = 1e-5  # of IResNet's batch norms
SKIPPED = (
    "Identity",
    "Dropout",
    "Cast",
    "Unsqueeze",
)  # taken as if they changed no number; else `compare` notices

# ---- 1. From the graph to InsightFace's names ----------------------------------------------------


class Walk:
    """Follows the tensors through a graph, as long as it is an IResNet's.

    Names of tensors and nodes mean nothing, nor does their order. Each step takes x, the name of
    its input, and returns the name of its output. What is found is in `state`, by InsightFace's
    names. `folded` has the batch norms that the file lacks: {name: name of the layer before it}.
    """

    def __init__(self, path, graph):
        self.path = path
        self.nodes = list(graph.node)
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.state = {}
        self.folded = {}
        self.blocks = []  # how many in each layer
        self.readers = {}  # {name of a tensor: the nodes that read it}
        origin = {}  # {output of a skipped node: its input}
        for node in self.nodes:
            inputs = [origin.get(name, name) for name in node.input]
            node.input[:] = inputs
            if node.op_type == "Constant":
                self.stored[node.output[0]] = node.attribute[0].t
            elif node.op_type in SKIPPED:
                origin[node.output[0]] = inputs[0]
            else:
                for name in inputs:
                    self.readers.setdefault(name, []).append(node)

    def stop(self, node, expected):
        """Raises a UserError: the node, or the end, is not what was expected."""
        found = "the graph ends"
        if node:
            place = self.nodes.index(node) + 1
            found = f"node {place} of {len(self.nodes)} is {node.op_type} '{node.name}'"
        raise evaluate.UserError(
            f"{self.path}: not InsightFace's IResNet: {found}, where {expected} was expected "
            "(MobileFaceNet, as in buffalo_s, AdaFace's networks and ViTs cannot be converted)"
        )

    def next(self, x, *kinds):
        """The node of one of these kinds that reads x."""
        readers = self.readers.get(x, [])
        for node in readers:
            if node.op_type in kinds:
                return node
        self.stop(readers[0] if readers else None, " or ".join(kinds))

    def take(self, node, i):
        """Input i of a node: a stored tensor, as float32."""
        name = node.input[i] if i < len(node.input) else ""
        if name not in self.stored:
            self.stop(node, f"{node.op_type} with {i + 1} inputs, its weights stored in the file,")
        try:
            array = onnx.numpy_helper.to_array(self.stored[name])
            return torch.from_numpy(array.astype(np.float32))
        except Exception as error:  # of many kinds, for damaged files
            raise evaluate.UserError(f"{self.path}: {name} is damaged: {error}") from None

    def put(self, module, **tensors):
        for name, tensor in tensors.items():
            self.state[f"{module}.{name}"] = tensor

    def norm(self, x, name):
        node = self.next(x, "BatchNormalization")
        eps = EPS  # is ONNX's default, too
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                eps = attribute.f
        self.put(
            name,
            weight=self.take(node, 1),
            bias=self.take(node, 2),
            running_mean=self.take(node, 3),
            running_var=self.take(node, 4) + eps - EPS,
        )
        return node.output[0]

    def norm_after(self, x, layer, bias, name):
        """The batch norm after a layer: the file's, or a new one where it was folded.

        It takes over the layer's bias, since IResNet's layers have none there.
        """
        readers = self.readers.get(x, [])
        if len(readers) == 1 and readers[0].op_type == "BatchNormalization":
            x = self.norm(x, name)
            self.state[f"{name}.running_mean"] -= bias
            return x
        self.folded[name] = layer
        ones = torch.ones(len(bias))
        self.put(
            name,
            weight=ones,
            bias=bias,
            running_mean=0 * ones,
            running_var=ones - EPS,
        )
        return x

    def convolution(self, x, layer, norm):
        node = self.next(x, "Conv")
        weight = self.take(node, 1)
        bias = torch.zeros(len(weight))
        if len(node.input) > 2:
            bias = self.take(node, 2)
        self.put(layer, weight=weight)
        return self.norm_after(node.output[0], layer, bias, norm)

    def prelu(self, x, name):
        node = self.next(x, "PRelu")
        self.put(name, weight=self.take(node, 1).flatten())
        return node.output[0]

    def block(self, x):
        """A block. Its input is read by a batch norm, and by the shortcut: a Conv or the Add."""
        reader, other = self.readers[x]
        if reader.op_type == "BatchNormalization":
            reader = other
        kind = reader.op_type
        if kind == "Conv":
            self.blocks.append(0)
        elif kind != "Add" or not self.blocks:
            self.stop(reader, "the Conv or Add of a shortcut")
        name = f"layer{len(self.blocks)}.{self.blocks[-1]}"
        self.blocks[-1] += 1
        shortcut = x
        if kind == "Conv":
            shortcut = self.convolution(x, f"{name}.downsample.0", f"{name}.downsample.1")
        x = self.norm(x, f"{name}.bn1")
        x = self.convolution(x, f"{name}.conv1", f"{name}.bn2")
        x = self.prelu(x, f"{name}.prelu")
        x = self.convolution(x, f"{name}.conv2", f"{name}.bn3")
        add = self.next(x, "Add")
        if set(add.input) != {x, shortcut}:
            self.stop(add, "the Add of a shortcut")
        return add.output[0]

    def linear(self, x):
        node = self.next(x, "Gemm", "MatMul")
        weight = self.take(node, 1)
        if not any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
            weight = weight.T
        if node.op_type == "Gemm":
            bias = self.take(node, 2)
        else:
            x = node.output[0]
            node = self.next(x, "Add")
            bias = self.take(node, 1 if node.input[0] == x else 0)
        self.put("fc", weight=weight, bias=torch.zeros(len(weight)))
        return self.norm_after(node.output[0], "fc", bias, "features")

    def network(self, x):
        x = self.convolution(x, "conv1", "bn1")
        x = self.prelu(x, "prelu")
        while len(self.readers.get(x, [])) == 2:
            x = self.block(x)
        x = self.norm(x, "bn2")
        x = self.next(x, "Flatten", "Reshape").output[0]
        x = self.linear(x)
        if x in self.readers:
            self.stop(self.readers[x][0], "the end")


def read_network(path):
    """-> the IResNet of an ONNX file, its batch norms that are folded, the name of its input."""
    try:
        graph = onnx.load(path).graph
        walk = Walk(path, graph)
    except OSError as error:
        raise evaluate.UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # of many kinds, for files that are damaged or of another format
        raise evaluate.UserError(f"{path}: not an ONNX file, or a damaged one: {error}") from None
    inputs = [entry.name for entry in graph.input if entry.name not in walk.stored]
    walk.network(inputs[0] if inputs else "")
    depth_of = {blocks: depth for depth, blocks in lrfr.DEPTHS.items()}
    depth = depth_of.get(tuple(walk.blocks))
    if depth is None:
        raise evaluate.UserError(
            f"{path}: an IResNet of {walk.blocks} blocks; known are {[*depth_of]}"
        )
    width, embed_dim = len(walk.state["conv1.weight"]), len(walk.state["fc.weight"])
    backbone = lrfr.IResNet(depth, width, embed_dim).eval()
    try:
        backbone.load_state_dict(walk.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise evaluate.UserError(f"{path}: not InsightFace's IResNet: {reason}") from None
    print(f"{path}: an IResNet of depth {depth}, width {width}, embeddings of {embed_dim} numbers")
    return backbone, walk.folded, inputs[0]


# ---- 2. Batch norms that train -------------------------------------------------------------------


class Moments:
    """A forward hook that adds up, for each channel, a layer's outputs and their squares."""

    def __init__(self):
        self.count = self.sum = self.squares = 0

    def __call__(self, layer, inputs, output):
        dims = [0, *range(2, output.dim())]  # all but the channels
        self.count += output[:, 0].numel()
        self.sum += output.sum(dims, dtype=torch.float64)
        self.squares += output.square().sum(dims, dtype=torch.float64)


def unfold(backbone, folded, paths):
    """Gives the folded batch norms the mean and variance that their layers have over these faces.

    So far each of them only adds its bias b. A batch norm with running mean m, running variance v,
    weight sqrt(v + eps) and bias m + b does the same, for any m and v.

    The length of a convolution's filters was folded, too. Nothing but training depends on it: the
    same learning rate turns a filter of half the length four times as fast. It becomes what it is
    in a new IResNet, for which train.py's rates are meant, and m and v follow.
    """
    moments = {}
    for name, layer in folded.items():
        moments[name] = Moments()
        backbone.get_submodule(layer).register_forward_hook(moments[name])
    title = "measuring the layers' outputs"
    sizes = [evaluate.SIZE]
    settings = evaluate.Settings(torch.device("cpu"), flip="none")
    evaluate.embed_sources({"the file": backbone}, title, paths, sizes, settings)
    for name, total in moments.items():
        mean = total.sum / total.count
        variance = total.squares / total.count - mean.square()
        variance = variance.clamp(min=0)  # rounding can make it negative
        scale = torch.ones_like(mean)
        weight = backbone.get_submodule(folded[name]).weight.data
        if weight.dim() == 4:
            lengths = weight.flatten(1).norm(dim=1).double()
            scale = 0.1 * math.sqrt(weight[0].numel()) / lengths.clamp(min=1e-6)
            weight *= scale[:, None, None, None]
        norm = backbone.get_submodule(name)
        norm.running_mean.copy_(scale * mean)
        norm.running_var.copy_(scale.square() * variance)
        norm.weight.data.copy_((scale.square() * variance + EPS).sqrt() / scale)
        norm.bias.data += mean


# ---- 3. Comparison with the file -----------------------------------------------------------------


def run_file(path, name, images):
    """Embeddings by the file itself, one image at a time: some files take no more."""
    if find_spec("onnxruntime"):
        from onnxruntime import InferenceSession

        session = InferenceSession(path, providers=["CPUExecutionProvider"])
    else:
        model = onnx.load(path)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "momentum":
                    # Else ReferenceEvaluator normalises by the image, too, in opset 9 to 13
                    # (onnx pull request 8442).
                    attribute.f = 1
        session = ReferenceEvaluator(model)
    embeddings = [session.run(None, {name: image[None].numpy()})[0] for image in images]
    return torch.from_numpy(np.concatenate(embeddings))


def compare(path, name, backbone, images):
    """UserError if an embedding differs from the file's own by more than 1e-3 of its length."""
    theirs = run_file(path, name, images)
    with torch.no_grad():
        ours = backbone(images)
    difference = ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max().item()
    print(f"embeddings of {len(images)} images differ from the file's own by {difference:.1e}")
    if not difference <= 1e-3:
        raise evaluate.UserError(
            f"{path}: its embeddings are not those of an IResNet; nothing is written"
        )


def choose_images(folder):
    """At most 2,000 images below a folder, evenly spaced."""
    paths = evaluate.images_below(folder)
    count = min(len(paths), 2000)
    if count < 2:
        raise evaluate.UserError(
            f"--images {folder}: {count} images; 2 or more are needed, 500 measure better"
        )
    if count < 500:
        print(f"only {count} images: 500 or more measure better", file=sys.stderr, flush=True)
    return [paths[i * len(paths) // count] for i in range(count)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split(":\n")[0])
    parser.add_argument("file", metavar="FILE.onnx")
    text = "aligned faces like those to train on, 500 to 2,000, in folders or not"
    parser.add_argument("--images", metavar="FOLDER", required=True, help=text)
    parser.add_argument("--out", metavar="FILE.pth", required=True, help="write the weights here")
    args = parser.parse_args(argv)
    evaluate.keep_memory()
    paths = choose_images(args.images)
    backbone, folded, name = read_network(args.file)
    unfold(backbone, folded, paths)
    print(f"{len(folded)} folded batch norms measured on {len(paths):,} images")
    images = lrfr.to_input(evaluate.read_images(paths[:8]), "cpu")
    compare(args.file, name, backbone, images)
    with evaluate.new_file(args.out) as file:
        torch.save(backbone.state_dict(), file)
    print(f"the weights: {args.out}")


if __name__ == "__main__":
    evaluate.run(main)
