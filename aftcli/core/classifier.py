"""The classifier f(x) = head(layer(stem(x))) with weights w0, w1, w2 (§4.2)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aftcli.core.classes import Classes, Preprocessing
from aftcli.core.head import Gradients, LinearHead, Score, linear_head
from aftcli.core.inputs import find_preprocessing, input_shape
from aftcli.core.outputs import BOTH, Meant, output_of, probabilities, with_both_classes
from aftcli.cutting.cut import flow_of
from aftcli.cutting.layers import default_layer, divided, moves_output
from aftcli.cutting.networks import copied, name_of, outside_inference_mode, unwrapped
from aftcli.cutting.outputs import (
    Logits,
    LogitsOfSeveral,
    at_path,
    check_logits,
    run,
    with_logits,
)
from aftcli.errors import AftError
from aftcli.files import tensors_hash
from aftcli.settings import AUTO, NONE, SOFTMAX


class Engine(Protocol):
    """Another way to run a classifier's passes without gradients (aftcli/engine/accelerate.py)."""

    name: str
    precision: str  # a key of aftcli.engine.accelerate.TOLERANCES

    def takes(self, x: Tensor) -> bool:
        """Tell if the engine can run inputs of this shape and dtype."""

    def activation(self, x: Tensor) -> Tensor:
        """Compute A of inputs x, as `Classifier.activation`."""

    def logits(self, x: Tensor) -> Tensor:
        """Compute logits of inputs x, as the classifier itself."""


class Before(Protocol):
    """The layer and head that a classifier had before its zero level, and the level's tensors."""

    layer: nn.Module
    head: nn.Module

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that moved the maps, by their names in a checkpoint."""


class Held(nn.Module):
    """A head as a function of A alone: what bypasses layer l is held fixed.

    Args:
        head: w2, a function of A and the rest.
        rest: tensors of shape (N, ...), or (1, ...) for any number of A.
    """

    def __init__(self, head: nn.Module, rest: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.inner: nn.Module = head.inner if isinstance(head, Held) else head
        self.rest = rest
        self.training = head.training

    def forward(self, activation: Tensor, *rest: Tensor) -> Tensor:
        """Compute logits, shape (N, C), of A, shape (N, K, h, w); `rest` replaces what is held."""
        # Not len(): a tracer (engine/export.py) would take it for a fixed number.
        count = activation.shape[0]
        held = (r.expand(count, *r.shape[1:]) if r.shape[0] == 1 else r for r in self.rest)
        return self.inner(activation, *(rest or held))  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """A network cut at layer l: logits = head(layer(stem(x))).

    Attributes:
        stem: w0, from the input to layer l.
        layer: w1, layer l; its output is the activation A.
        head: w2, from A to the logits.
        name: the model's name, as `--model` takes it.
        layer_name: the layer's name, as `--layer` takes it.
        preprocessing: the steps from an image to x.
        classes: the names of the classes.
        activation_shape: (K, h, w) of A at the preprocessing's input size.
        cam: the CAM method that it was fine-tuned for (§4.2); None without.
        checkpoint: the file its weights are from; "" for published or given ones.
        engine: what runs passes without gradients; None runs all as they are written.
        zero_level: what `layer` and `head` were before a zero level was given; None without.
        watch: is told of each pass how many images it has; None for nobody.
        gradients: those that the maps of one call share, see `sharing`; None to share none.
        bypassed: the head takes more than A: the layer returns (A, *rest), each of shape (N, ...),
            and logits = head(A, *rest); see `at`.
        output: how logits become probabilities: softmax, sigmoid, or none if they are
            probabilities already.
        output_key: the entry of the network's output that was asked for; "" for the usual one.
    """

    def __init__(
        self,
        stem: nn.Module,
        layer: nn.Module,
        head: nn.Module,
        *,
        name: str,
        layer_name: str,
        preprocessing: Preprocessing,
        classes: Classes,
        activation_shape: tuple[int, int, int],
        cam: str | None = None,
        bypassed: bool = False,
        output: str = SOFTMAX,
        output_key: str = "",
    ) -> None:
        super().__init__()
        self.stem, self.layer, self.head = stem, layer, head
        self.name, self.layer_name = name, layer_name
        self.preprocessing, self.classes = preprocessing, classes
        self.activation_shape = activation_shape
        self.cam, self.checkpoint, self.bypassed = cam, "", bypassed
        self.output = output
        self.output_key = output_key
        self.engine: Engine | None = None
        self.zero_level: Before | None = None
        self.watch: Callable[[int], None] | None = None
        self.gradients: Gradients | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, shape (N, C), of inputs x, shape (N, 3, H, W)."""
        if self.watch:
            self.watch(len(x))
        engine = self._engine_for(x)
        return engine.logits(x) if engine else self.head(*flow_of(self.layer(self.stem(x))))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Compute probabilities of classes, shape (N, C), from logits (§2.1)."""
        return probabilities(logits, self.output)

    @property
    def single(self) -> bool:
        """True where the network has one output, of which the head makes columns of two classes."""
        return hasattr(self.head, BOTH)

    def activation(self, x: Tensor) -> Tensor:
        """Compute activations A of layer l, shape (N, K, h, w), of x, shape (N, 3, H, W)."""
        return self.at(x)[1]

    def at(self, x: Tensor) -> tuple[Classifier, Tensor]:
        """Hold what bypasses layer l at its values for x, so that `head` is a function of A alone.

        Args:
            x: inputs, shape (N, 3, H, W).

        Returns:
            The classifier for these images (f itself if nothing bypasses the layer), and A.
        """
        engine = None if self.bypassed else self._engine_for(x)
        return (self, engine.activation(x)) if engine else self.after(self.stem(x))

    def after(self, z: Any) -> tuple[Classifier, Tensor]:  # noqa: ANN401 - a tensor or several
        """Hold what bypasses layer l, as `at` does, given the stem's output z."""
        activation, *rest = flow_of(self.layer(z))
        return self.holding(rest), activation

    def holding(self, rest: Sequence[Tensor]) -> Classifier:
        """Hold these values of what bypasses layer l, each (N, ...) or (1, ...); f if empty."""
        if not rest:
            return self
        held = copy.copy(self)
        held._modules = {**self._modules, "head": Held(self.head, tuple(rest))}
        return held

    def image(self, n: int) -> Classifier:
        """Return the classifier for the n-th of the images that it holds values of."""
        if not isinstance(self.head, Held):
            return self
        return self.holding([r[n : n + 1] for r in self.head.rest])

    def with_engine(self, engine: Engine | None) -> Classifier:
        """Return a classifier of the same modules whose inference passes run on an engine."""
        fast = copy.copy(self)
        fast.engine = engine
        return fast

    def sharing(self, activation: Tensor, class_index: Tensor) -> Classifier:
        """Return a classifier of the same modules that computes a score's gradient in A once.

        It is for maps that are made together by several methods; f itself keeps nothing.

        Args:
            activation: A, shape (N, K, h, w).
            class_index: c, shape (N,).
        """
        shared = copy.copy(self)
        shared.gradients = Gradients(self.head, activation, class_index, {})
        return shared

    def known_gradients(self, activation: Tensor, class_index: Tensor) -> dict[Score, Tensor]:
        """Return the gradients in A that are shared, by their scores; arguments as of `sharing`."""
        asked = (self.head, activation, class_index)
        shared = self.gradients
        same = shared and all(a is b for a, b in zip(asked, shared[:3], strict=True))
        return shared.known if shared and same else {}

    @property
    def precision(self) -> str:
        """Precision of inference passes; "no" means the weights' own dtype."""
        return self.engine.precision if self.engine else "no"

    def _engine_for(self, x: Tensor) -> Engine | None:
        usable = self.engine and not torch.is_grad_enabled() and self.engine.takes(x)
        return self.engine if usable else None

    @cached_property
    def linear_head(self) -> LinearHead | None:
        """The head split at its first linear layer, where it can be."""
        return None if self.bypassed else linear_head(self.head, self.activation_shape)

    def weights(self) -> dict[str, Tensor]:
        """All weights and statistics, under the names of the uncut model."""
        plain = self.zero_level or self
        parts = (self.stem, plain.layer, plain.head)
        found = {name: value for part in parts for name, value in part.state_dict().items()}
        return found | (self.zero_level.tensors() if self.zero_level else {})

    def weights_hash(self) -> str:
        """SHA-256 of all weights, under the names of the uncut model."""
        return tensors_hash(self.weights())

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device


def ahead(
    f: Classifier, run: Callable[[Tensor], Tensor], made: Iterable[Tensor]
) -> Iterator[Tensor]:
    """Map as `map` does; where ONNX Runtime runs, the next input is made meanwhile.

    Args:
        f: the classifier that `run` passes inputs through.
        run: in a thread of its own.
        made: inputs, made in the caller's.
    """
    if not f.engine or f.engine.name != "onnxruntime":
        yield from map(run, made)
        return
    with ThreadPoolExecutor(1) as runner:
        running: Future[Tensor] | None = None
        for x in made:
            following = runner.submit(run, x)
            if running:
                yield running.result()
            running = following
        if running:
            yield running.result()


@outside_inference_mode
def cut_classifier(
    model: nn.Module,
    layer: str | nn.Module | None = None,
    *,
    name: str | None = None,
    preprocessing: Preprocessing | None = None,
    classes: Classes | None = None,
    output_key: str | None = None,
    own: bool = False,
    output: str = AUTO,
    note: Callable[[str], None] = warnings.warn,
) -> Classifier:
    """Cut a user's image classifier, and check that its output stays the same.

    Args:
        model: a network that takes images (N, C, H, W), or videos (N, C, D, H, W) if `layer` is
            given. It returns logits (N, C'), or a structure that holds them; of any other output
            only a target can be explained. One output, (N, 1) or (N,), makes it a binary
            classifier, which gets a column for each class. The model is copied, not changed, and
            taken out of DataParallel and torch.compile.
        layer: the module to cut at, or its name; default the last layer with cells that the logits
            depend on, see `cutting.layers.default_layer`.
        name: the model's name in results; default its class's name.
        preprocessing: the steps from an image to x; default what the model records, otherwise
            ImageNet's usual, at a size that the model takes.
        classes: the names of the classes; for a binary classifier both, or the positive one;
            default numbers.
        output_key: the entry of what the model returns that has the logits (`find_output`);
            default `logits`, otherwise the first tensor of shape (N, C').
        own: cut the model itself, without a copy; in-place activations become out-of-place.
        output: how outputs become probabilities: softmax, sigmoid (one output, or classes that do
            not exclude each other), none (they are probabilities already). auto takes none if
            it finds probabilities, sigmoid for one output, otherwise softmax.
        note: is told what was guessed, and what makes the network slower.

    Returns:
        A classifier in eval mode. Its logits equal the model's bit for bit; up to rounding where
        the network runs as it is.

    Raises:
        AftError: the layer is unknown or can't be cut, the parts do not equal the model, the
            model can't be copied, or its outputs do not fit `output`.
    """
    model = unwrapped(model)
    if own and any(tensor.is_inference() for tensor in model.state_dict().values()):
        raise AftError(
            f"{type(model).__name__} was made in torch.inference_mode(), where nothing has a "
            "gradient; make it outside, or leave own out for a copy"
        )
    layer = layer if layer is None or isinstance(layer, str) else name_of(layer, model)
    model = (model if own else copied(model)).eval().requires_grad_(False)
    preprocessing = find_preprocessing(model, preprocessing, note)
    tried = run(model, input_shape(model, preprocessing))
    x, of_logits = tried.x, with_logits(model, tried, output_key, note)
    check_logits(of_logits, tried, note)
    named, layer = layer, layer or default_layer(of_logits, x, note)
    parts, (activation, *rest), logits = divided(model, layer, x, tried.out, note)
    if isinstance(of_logits, Logits):
        taken = LogitsOfSeveral if rest else Logits
        parts = parts._replace(head=taken(parts.head, of_logits.path))
        logits = at_path(logits, of_logits.path)
    with torch.no_grad():
        # Other outputs have no classes; they are explained by a target (aftcli/models/targets.py).
        others = not isinstance(logits, Tensor) or (logits.dim() != 2 and logits.numel() != 1)
        meant = Meant(NONE)
        if not others:
            meant = output_of(lambda x: parts.head(*parts.flow(x)), x, logits, output)
    if named and rest and not others and not moves_output(parts.head, activation, rest):
        note(
            f"layer {layer} does not move the output (as where only the class token is read), so "
            "its maps are 0 everywhere; leave the layer out, or name an earlier one"
        )
    name = name or type(model).__name__
    if meant.guess:
        note(f"{name}: {meant.guess}")
    if meant.single:
        parts = parts._replace(head=with_both_classes(parts.head, meant.output == NONE))
        classes = Classes.of_one(*classes.names) if classes and len(classes) == 1 else classes
    count = 2 if meant.single else 0 if others else logits.shape[1]
    classes = classes or Classes.numbered(count)
    if len(classes) != count:
        raise AftError(
            f"{len(classes)} class names for a model with {count} classes; give one name a line, "
            "in the order of the model's outputs"
        )
    _, *shape = activation.shape
    return Classifier(
        *parts,
        name=name,
        layer_name=layer,
        preprocessing=preprocessing,
        classes=classes,
        activation_shape=tuple(shape),  # type: ignore[arg-type] # of videos (K, d, h, w)
        bypassed=bool(rest),
        output=meant.output,
        output_key=output_key or "",
    ).eval()
